"""job.yaml -> JobSpec: every mistake at once, each with its line, key, value and the nearest known key.

Nothing is started and nothing is rewritten: other tools' key names and flat files are sorted into sections with a
notice, before validation.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.aliases import ALIASES, NOT_NEEDED, NOT_YET, plain_values
from orchestrator.errors import JobError
from orchestrator.job import secrets
from orchestrator.spec import METHOD_SECTIONS, SECTIONS, JobSpec

KeyPath = tuple[str | int, ...]
_ALIKE = 0.75  # of two keys, so that one may be the other misspelt


@dataclass
class Job:
    """A validated job with where it came from."""

    spec: JobSpec
    folder: Path  # relative data and model paths start here
    text: str  # the job as it will be written into the run folder
    notices: list[str] = field(default_factory=list)

    def path(self, value: str) -> Path:
        """A path of the job file, relative to the file's folder."""
        return (self.folder / Path(value).expanduser()).resolve()


@dataclass
class _Document:
    """Plain values with the source line of each key path."""

    values: dict[str, Any]
    lines: dict[KeyPath, int | str]

    def where(self, path: KeyPath) -> str:
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path, 1)
        return f"line {line}" if isinstance(line, int) else line


def read_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read and validate a job file; `overrides` are `section.key=value` strings.

    Raises JobError with every mistake found.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(
            f"{path}: no such file. `orchestrator init {path}` writes a starter, `recipes` lists examples"
        ) from None
    except IsADirectoryError:
        raise JobError(f"{path}: is a folder; give a job file (YAML)") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: is not UTF-8 text; give a job file (YAML)") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror or error}") from None
    return parse_job(text, path.parent.resolve(), str(path), overrides)


def read_run_job(run_path: Path, name: str = "job.yaml") -> Job:
    """The job of a run folder, its relative paths starting where they did when it was submitted."""
    origin = run_path / "origin.json"
    folder = Path(json.loads(origin.read_text())["folder"]) if origin.exists() else run_path
    try:
        text = (run_path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"{run_path} is not a run folder: it has no {name}") from None
    return parse_job(text, folder, str(run_path / name))


def parse_job(text: str, folder: Path, label: str = "job", overrides: Sequence[str] = ()) -> Job:
    """Validate the text of a job file; see `read_job`."""
    document = _load(text, label)
    mistakes: list[str] = []
    _apply_overrides(document, overrides, mistakes)
    notices = _sort_into_sections(document, mistakes)
    notices += plain_values(document.values, document.where)
    try:
        spec = JobSpec.model_validate(document.values)
    except ValidationError as error:
        mistakes += _explain(error, document)
        spec = None
    except RecursionError:
        mistakes.append("is nested too deeply")
        spec = None
    if spec and (mistake := secrets.uri_mistake(spec.tracking.mlflow_uri)):
        mistakes.append(mistake)
    if spec is None or mistakes:
        raise JobError([f"{label}: {mistake}" for mistake in mistakes])
    rewritten = bool(overrides or notices)
    return Job(
        spec,
        folder,
        yaml.safe_dump(document.values, sort_keys=False, allow_unicode=True) if rewritten else text,
        notices + secrets.notices(document.values),
    )


def spec_with(spec: JobSpec, values: Mapping[str, Any]) -> JobSpec:
    """The same wishes with some keys (`section.key`) at other values.  Raises JobError for what cannot be.

    Another `method.type` keeps what the job states of the knobs that both methods have.
    """
    by_section: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        if key not in _known_keys(section):
            raise JobError(f"{dotted}: there is no such key{_nearest((section, key))}")
        by_section.setdefault(section, {})[key] = value
    changed = {}
    for section, new in by_section.items():
        old = getattr(spec, section)
        kind = type(old)
        stated = {key: getattr(old, key) for key in old.model_fields_set}
        if section == "method":
            kind = METHOD_SECTIONS.get(new.get("type", old.type), kind)
            stated = {key: value for key, value in stated.items() if key in kind.model_fields}
        try:
            changed[section] = kind.model_validate({**stated, **new})
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            key = str(wrong["loc"][0])
            raise JobError(f"{section}.{key} is {_shown(new.get(key))}; it should {_wanted(wrong)}") from None
    return spec.model_copy(update=changed)


def changed_keys(old: JobSpec, new: JobSpec) -> list[str]:
    """What two jobs differ in, as `section.key is NEW, was OLD`."""
    before, after = flat(old.model_dump()), flat(new.model_dump())
    return [
        f"{key} is {after.get(key)}, was {before.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `section.key`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def value_of(spec: JobSpec, key: str) -> Any:
    """The value of a dotted key; None for a knob that the job's method does not have."""
    section, _, name = key.partition(".")
    return getattr(getattr(spec, section), name, None)


def text_with(job: Job, values: Mapping[str, Any]) -> str:
    """The job file with some keys at other values, its paths made absolute so that it may lie anywhere.

    `spec_with` as text.  Comments are lost.
    """
    document = yaml.safe_load(job.text)
    path_values(document, lambda value: str(job.path(value)) if job.path(value).exists() else value)
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        document.setdefault(section, {})[key] = value
    kind = METHOD_SECTIONS.get(values.get("method.type", ""))
    if kind is not None:
        document["method"] = {key: value for key, value in document["method"].items() if key in kind.model_fields}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def path_values(document: dict[str, Any], change: Callable[[str], str] = lambda value: value) -> list[str]:
    """The values of a job's document that may be paths (model, data, template), each put through `change` in place."""
    found: list[str] = []

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(part) for part in value]
        if isinstance(value, dict):
            return {**value, "path": one(value["path"])} if "path" in value else value
        if not isinstance(value, str):
            return value
        found.append(value)
        return change(value)

    data, model = document["data"], document["model"]
    for key in ("train", "eval", "chat_template"):
        if data.get(key) not in (None, "tokenizer"):
            data[key] = one(data[key])
    model["model_name_or_path"] = one(model["model_name_or_path"])
    return found


def _load(text: str, label: str) -> _Document:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[KeyPath, int | str] = {}
        values = _construct(node, (), lines, ()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise JobError(f"{label}: line {line}: is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise JobError(f"{label}: is not YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError, TypeError) as error:
        raise JobError(f"{label}: holds a value that cannot be read: {error}") from None
    except RecursionError:
        raise JobError(f"{label}: is nested too deeply") from None
    if not isinstance(values, dict):
        seen = "is empty" if values is None else f"holds {_shown(values)}"
        raise JobError(
            f"{label}: {seen}; a job file is a mapping with `model:` and `data:`. `orchestrator init` writes one"
        )
    return _Document(values, lines)


def _construct(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int | str], above: tuple[int, ...]) -> Any:
    """Build plain values from YAML nodes, noting the line of each key and refusing duplicate keys."""
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="an anchor that contains itself", problem_mark=node.start_mark)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, i), lines, above) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not a plain word", problem_mark=key_node.start_mark)
            key = str(key_node.value)
            if key in mapping:
                problem = f"the key {key!r} stands twice in one mapping"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            lines[(*path, key)] = key_node.start_mark.line + 1
            mapping[key] = _construct(value_node, (*path, key), lines, above)
        return mapping
    return yaml.SafeLoader("").construct_object(node)


def _apply_overrides(document: _Document, overrides: Sequence[str], mistakes: list[str]) -> None:
    for override in overrides:
        dotted, equals, value = override.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            mistakes.append(f"--set {override}: write it as section.key=value, e.g. --set train.learning_rate=1e-4")
            continue
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            parsed = value
        target: Any = document.values
        for step, key in enumerate(path[:-1]):
            inner = target.setdefault(key, {})
            if inner is None:
                inner = target[key] = {}
            if not isinstance(inner, dict):
                mistakes.append(f"--set {override}: {'.'.join(path[: step + 1])} is {_shown(inner)}, not a section")
                break
            target = inner
        else:
            target[path[-1]] = parsed
            document.lines[path] = f"--set {override}"


def _sort_into_sections(document: _Document, mistakes: list[str]) -> list[str]:
    """Move flat keys into their sections and other tools' names onto ours; returns a notice for each."""
    notices = []
    for path in list(_keys(document.values)):
        name = path[-1]
        target = _home_of(path)
        if target is None or target == path:
            continue
        section_name, key = target
        section = document.values.setdefault(section_name, {})
        if not isinstance(section, dict):
            continue  # the section itself is wrong; validation says so
        source = document.values if len(path) == 1 else document.values[path[0]]
        where = document.where(path)
        if key in section:
            mistakes.append(f"{where}: {'.'.join(path)} and {section_name}.{key} are the same setting; keep one")
            source.pop(name)
            continue
        section[key] = source.pop(name)
        document.lines[target] = document.lines.get(path, where)
        notices.append(f"{where}: {'.'.join(path)} is read as {section_name}.{key}")
    return notices


def _keys(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (name,)
        if name in JobSpec.model_fields and isinstance(value, dict):
            yield from ((name, key) for key in value)


def _home_of(path: tuple[str, ...]) -> tuple[str, str] | None:
    """Where a flat or foreign key belongs; None when it is unknown or already at home."""
    name = path[-1]
    if len(path) == 1 and name in JobSpec.model_fields:
        return None
    if len(path) == 2 and name in _known_keys(path[0]):
        return None
    name = ALIASES.get(name, name)
    homes = [section for section in _section_names() if name in _known_keys(section)]
    if len(homes) != 1 or (len(path) == 2 and path[-1] not in ALIASES):
        return None
    return homes[0], name


def _section_names() -> list[str]:
    return [*SECTIONS, "method"]


def _known_keys(section: str) -> set[str]:
    if section == "method":
        return {key for fields in METHOD_SECTIONS.values() for key in fields.model_fields}
    return set(SECTIONS[section].model_fields) if section in SECTIONS else set()


def _explain(error: ValidationError, document: _Document) -> list[str]:
    """One sentence a wrong key, however many branches of a union Pydantic tried for it."""
    by_path: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False, include_context=True):
        missing = detail["type"] == "missing"
        path = _path_in_file(detail["loc"][:-1] if missing else detail["loc"], document.values)
        by_path.setdefault((*path, detail["loc"][-1]) if missing else path, []).append(detail)
    by_path = {
        p: d
        for p, d in by_path.items()
        if not any(q[: len(p)] == p and q != p for q in by_path) or d[0]["type"] == "missing"
    }
    return [_sentence(path, details, document) for path, details in by_path.items()]


def _path_in_file(location: Sequence[Any], values: Any) -> KeyPath:
    """Pydantic's location without the names of union branches: the part that exists in the file."""
    path: list[str | int] = []
    for step in location:
        if (isinstance(values, dict) and step in values) or (
            isinstance(values, list) and isinstance(step, int) and step < len(values)
        ):
            values = values[step]
        else:
            continue
        path.append(step)
    return tuple(path)


def _sentence(path: KeyPath, details: list[Any], document: _Document) -> str:
    dotted = ".".join(str(step) for step in path) or "the job"
    start = f"{document.where(path)}: {dotted}"
    kinds = {detail["type"] for detail in details}
    if kinds == {"missing"}:
        return f"{start} is missing; add it"
    if "extra_forbidden" in kinds:
        return f"{start}: there is no such key{_nearest(path)}"
    value = _shown(_value_at(path, document.values))
    if "union_tag_invalid" in kinds:
        return f"{start}: {value}: type must be one of {', '.join(METHOD_SECTIONS)}"
    wanted = [_wanted(detail) for detail in details]
    return f"{start} is {value}; it should {' or '.join(dict.fromkeys(wanted))}"


def _wanted(detail: Any) -> str:
    """Pydantic's message as the end of a sentence that began with `it should`."""
    message = detail["msg"].split(", unable to parse")[0]
    for start in ("Input should ", "String should ", "List should ", "Value error, should "):
        message = message.removeprefix(start)
    return message


def _nearest(path: KeyPath) -> str:
    name = str(path[-1])
    if name in NOT_YET:
        return f" yet: {NOT_YET[name]}"
    if name in NOT_NEEDED:
        return f": {NOT_NEEDED[name]}"
    siblings = sorted(_known_keys(str(path[0]))) if len(path) > 1 else list(JobSpec.model_fields)
    everywhere = {f"{section}.{key}": key for section in _section_names() for key in sorted(_known_keys(section))}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=_ALIKE)
    if close:
        return f"; did you mean {'.'.join([*(str(step) for step in path[:-1]), close[0]])}?"
    elsewhere = [
        dotted
        for dotted, key in everywhere.items()
        if key in difflib.get_close_matches(name, everywhere.values(), n=1, cutoff=_ALIKE)
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _value_at(path: KeyPath, values: Any) -> Any:
    for step in path:
        values = values[step]
    return values


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
