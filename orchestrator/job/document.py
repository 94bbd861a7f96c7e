"""The YAML of a job file as plain values, each with its line; `--set` laid over them.

Sizes, nesting and aliases are limited before a value is built, so that no file takes longer than a person waits.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from clusters.safe.masking import masked, masked_values
from clusters.safe.reading import BadInput, compose_yaml, load_yaml, printable, yaml_value
from orchestrator.errors import JobError, bad_input_as_job_error

KeyPath = tuple[str | int, ...]
_MOST_VALUES = 50_000  # of a job file; validation of more takes longer than a user waits
_MOST_STEPS = 10  # of a dotted key


@dataclass
class Document:
    """Plain values with the source line of each key path."""

    values: dict[str, Any]
    lines: dict[KeyPath, int | str]

    def where(self, path: KeyPath) -> str:
        """The line of a key as a sentence begins with it, or the option that set it."""
        line = self._place(path)
        return f"line {line}" if isinstance(line, int) else line

    def line(self, path: KeyPath) -> int | None:
        """The line of a key; None for one that an option set."""
        line = self._place(path)
        return line if isinstance(line, int) else None

    def _place(self, path: KeyPath) -> int | str:
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def load_document(text: str, label: str) -> Document:
    """The document of a job file's text.  Raises JobError for what is no mapping or no YAML that can be read."""
    lines: dict[KeyPath, int | str] = {}
    with bad_input_as_job_error():
        node = compose_yaml(text, label, _MOST_VALUES)
        values = _construct(node, (), lines, label) if node is not None else None
    if not isinstance(values, dict):
        seen = "is empty" if values is None else f"holds {shown(values)}"
        raise JobError(
            f"{label}: {seen}; a job file is a mapping with `model:` and `data:`. `orchestrator init` writes one"
        )
    return Document(values, lines)


def _construct(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int | str], label: str) -> Any:
    """Build plain values from YAML nodes, noting the line of each key and refusing duplicate keys."""
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, i), lines, label) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return yaml_value(node, label)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise BadInput(f"{label}: line {line}: is not YAML: a key that is not a plain text")
        key = str(key_node.value)
        if key in mapping:
            raise BadInput(f"{label}: line {line}: is not YAML: the key {printable(key)!r} occurs twice in one mapping")
        lines[(*path, key)] = line
        mapping[key] = _construct(value_node, (*path, key), lines, label)
    return mapping


def apply_overrides(document: Document, overrides: Sequence[str], mistakes: list[str]) -> None:
    """Lay `section.key=value` texts over a document, values read as YAML; adds what is wrong to `mistakes`."""
    for override in overrides:
        dotted, equals, value = override.partition("=")
        path, label = tuple(dotted.strip().split(".")), f"--set {printable(masked(override)[:80])}"
        if not equals or not all(path) or len(path) > _MOST_STEPS:
            mistakes.append(f"{label}: write it as section.key=value, e.g. --set train.learning_rate=1e-4")
            continue
        try:
            value.encode("utf-8")
            parsed = load_yaml(value)
        except UnicodeEncodeError:
            mistakes.append(f"{label}: is not UTF-8 text")
            continue
        except BadInput:
            parsed = value  # a text with signs that YAML reads otherwise
        target: Any = document.values
        for step, key in enumerate(path[:-1]):
            inner = target.setdefault(key, {})
            if inner is None:
                inner = target[key] = {}
            if not isinstance(inner, dict):
                mistakes.append(f"{label}: {'.'.join(path[: step + 1])} is {shown(inner)}, not a section")
                break
            target = inner
        else:
            target[path[-1]] = parsed
            document.lines[path] = label


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: Any) -> str:
    """A value as a mistake names it: one line of at most 60 characters, its passwords masked before it is cut."""
    text = printable(_SHORT.repr(masked_values(value)))
    return text if len(text) <= 60 else text[:57] + "..."
