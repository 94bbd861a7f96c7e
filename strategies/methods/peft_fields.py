"""PEFT's configuration classes, read from its source: names of their fields without importing PEFT or torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path

_OURS = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")


@cache
def known_fields() -> Mapping[str, tuple[str, ...]] | None:
    """The fields of each `peft_type`; None where PEFT is not installed."""
    spec = importlib.util.find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return None
    tuners = Path(next(iter(spec.submodule_search_locations))) / "tuners"
    classes: dict[str, ast.ClassDef] = {}
    for file in (*sorted(tuners.glob("*.py")), *sorted(tuners.glob("*/config.py"))):
        if file.name == "config.py" or "Config(" in file.read_text(encoding="utf-8"):
            body = ast.parse(file.read_text(encoding="utf-8")).body
            classes |= {one.name: one for one in body if isinstance(one, ast.ClassDef)}
    kinds = {name: kind for name, one in classes.items() if (kind := _peft_type_of(one)) is not None}
    return {kind: _fields_of(classes[name], classes) for name, kind in kinds.items()}


def _fields_of(one: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> tuple[str, ...]:
    """A dataclass's own fields and those of its bases."""
    bases = [classes[base.id] for base in one.bases if isinstance(base, ast.Name) and base.id in classes]
    inherited = [name for base in bases for name in _fields_of(base, classes)]
    own = [part.target.id for part in one.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    return tuple(dict.fromkeys([*inherited, *own]))


def _peft_type_of(one: ast.ClassDef) -> str | None:
    """X of `self.peft_type = PeftType.X`."""
    for node in ast.walk(one):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            target = node.targets[0]
            if isinstance(target, ast.Attribute) and target.attr == "peft_type":
                return node.value.attr
    return None


def mistakes(kind: str, options: Mapping[str, object]) -> list[str]:
    """What is wrong with the options of a configuration of this type, a sentence each; none where PEFT is absent."""
    known = known_fields()
    if known is None or kind not in known:
        return []
    found = []
    for name in options:
        if name in _OURS:
            found.append(f"method.config.{name}: it follows from the job; remove it")
        elif name not in known[kind]:
            near = get_close_matches(name, known[kind], 1)
            way = f"did you mean {near[0]}?" if near else f"known: {', '.join(known[kind])}"
            found.append(f"method.config.{name}: PEFT's {kind} has no such option; {way}")
    return found
