"""The text of an imported job: its settings by section, each with a comment that says where it came from."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.job.importers.draft import JobDraft, Setting
from orchestrator.job.schema import editor_line
from orchestrator.job.spec import SECTIONS, TYPED_SECTIONS, JobSpec

_COLUMN = 44


def job_text(draft: JobDraft, file: str) -> str:
    """The job file, in the order of the sections."""
    lines = [
        editor_line(),
        f"# Made of {file} ({draft.tool}) by `orchestrator import`; what stands behind a value is where it is from.",
    ]
    for section in JobSpec.model_fields:
        inside = {key: draft.settings[key] for key in _keys(section, draft) if key in draft.settings}
        if section in draft.settings:
            lines.append(_line(section, draft.settings[section]))
        elif inside:
            lines.append(f"{section}:")
            lines += [_line(f"  {key.partition('.')[2]}", setting) for key, setting in inside.items()]
    return "\n".join(lines) + "\n"


def _keys(section: str, draft: JobDraft) -> list[str]:
    stated = draft.settings.get(f"{section}.type")
    kind = TYPED_SECTIONS[section][stated.value] if section in TYPED_SECTIONS and stated else SECTIONS.get(section)
    return [f"{section}.{key}" for key in kind.model_fields] if kind else []


def _line(name: str, setting: Setting) -> str:
    return f"{f'{name}: {_flow(setting.value)}':<{_COLUMN}}  # {setting.origin}"


def _flow(value: Any) -> str:
    """A value on one line: JSON is YAML; a small number as YAML 1.1 reads it."""
    if isinstance(value, float):
        mantissa, power, exponent = repr(value).partition("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if power else repr(value)
    return json.dumps(value, ensure_ascii=False)
