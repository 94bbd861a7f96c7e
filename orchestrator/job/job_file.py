"""job.yaml -> JobSpec: every mistake at once, each with its line, key, value and the nearest known key.

Nothing is started and nothing is rewritten: other tools' key names and flat files are sorted into sections with a
notice, before validation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from clusters.safe.reading import BadInput, checked_path, load_yaml, name_mistake, printable, read_json
from orchestrator.errors import JobError, Mistake, bad_input_as_job_error
from orchestrator.job import secrets
from orchestrator.job.aliases import named_sections, nearest_name, other_tools, plain_values
from orchestrator.job.document import Document, KeyPath, apply_overrides, load_document, shown
from orchestrator.job.paths import read_text_file
from orchestrator.job.sections.training import REFUSED_VALUES
from orchestrator.job.spec import SECTIONS, TYPED_SECTIONS, JobSpec

_MOST_MISTAKES = 50  # that are listed
_LONGEST_NAME = 60  # of a key for which a near one is looked for
_CLEAR_NAME = 6  # letters of a key of another section that one here may be misspelt of: short words are alike by chance
_SECTION_NAMES = (*SECTIONS, "method")


@dataclass
class Job:
    """A validated job with where it came from."""

    spec: JobSpec
    folder: Path  # relative data and model paths start here
    text: str  # the job as it will be written into the run folder
    notices: list[str] = field(default_factory=list)

    def path(self, value: str) -> Path:
        """A path of the job file, relative to the file's folder.  Raises JobError for text that names no path."""
        with bad_input_as_job_error():
            return checked_path(value, self.folder)


def read_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read and validate a job file; `overrides` are `section.key=value` strings.

    Raises JobError with every mistake found.
    """
    try:
        text = read_text_file(path, "the job file")
    except JobError as error:
        hint = "`orchestrator init FILE` writes a job file (YAML), `orchestrator recipes` lists examples"
        raise JobError(f"{error}. {hint}") from None
    return parse_job(text, _origin_folder(path.parent) or path.parent.resolve(), printable(str(path)), overrides)


def _origin_folder(folder: Path) -> Path | None:
    """The folder that relative paths in a run's or a search's own job file start at; None for any other folder."""
    try:
        origin = read_json(folder / "origin.json")
    except BadInput:
        return None
    is_origin = isinstance(origin, dict) and list(origin) == ["folder"] and isinstance(origin["folder"], str)
    return Path(origin["folder"]) if is_origin else None


def parse_job(text: str, folder: Path, label: str = "job", overrides: Sequence[str] = ()) -> Job:
    """Validate the text of a job file; see `read_job`."""
    return job_of(load_document(text, label), folder, label, text, overrides)


def job_of(document: Document, folder: Path, label: str, text: str | None = None, overrides: Sequence[str] = ()) -> Job:
    """The job that a document states; `text` is how it was written.  Raises JobError with every mistake found."""
    mistakes: list[str] = []
    named_sections(document.values)
    apply_overrides(document, overrides, mistakes)
    named_sections(document.values)
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
    if spec:
        mistakes += [one for one in (name_mistake(spec.name), secrets.uri_mistake(spec.tracking.mlflow_uri)) if one]
        mistakes += spec.find_conflicts()
    if spec is None or mistakes:
        raise JobError([mistake.with_text(f"{label}: {mistake}") for mistake in map(Mistake.of, mistakes)])
    if text is None or overrides or notices:
        text = yaml.safe_dump(document.values, sort_keys=False, allow_unicode=True)
    return Job(spec, folder, text, notices + secrets.notices(document.values))


def located(error: JobError, text: str) -> JobError:
    """The same mistakes with the lines of the job file `text` that their keys stand in, and the values there."""
    document = load_document(text, "the job file")
    found = []
    for one in error.mistakes:
        path = tuple((one.key or "").split("."))
        if one.line is None and path in document.lines:
            one = Mistake(one, document.line(path), one.key, _short_value(_value_at(path, document.values)), one.fix)
        found.append(one)
    return JobError(found)


def spec_with(spec: JobSpec, values: Mapping[str, Any]) -> JobSpec:
    """The same wishes with some keys (`section.key`) at other values.  Raises JobError for what cannot be.

    Another `method.type` keeps what the job states of the options that both methods have.
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
        if section in TYPED_SECTIONS:
            kind = TYPED_SECTIONS[section].get(str(new.get("type", old.type)), kind)
            stated = {key: value for key, value in stated.items() if key in kind.model_fields}
        try:
            changed[section] = kind.model_validate({**stated, **new})
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            key = str(wrong["loc"][0])
            raise JobError(f"{section}.{key} is {shown(new.get(key))}; it should {_wanted(wrong)}") from None
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
    """The value of a dotted key; None for an option that the job's method does not have."""
    section, _, name = key.partition(".")
    return getattr(getattr(spec, section), name, None)


def text_with(job: Job, values: Mapping[str, Any]) -> str:
    """The job file with some keys at other values, its paths made absolute so that it may lie anywhere.

    `spec_with` as text.  Comments are lost.
    """
    document = load_yaml(job.text, "the job")
    path_values(document, lambda value: str(job.path(value)) if _is_here(job, value) else value)
    named_sections(document)
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        document.setdefault(section, {})[key] = value
    for name, kinds in TYPED_SECTIONS.items():
        if (kind := kinds.get(str(values.get(f"{name}.type", "")))) is not None:
            document[name] = {key: value for key, value in document[name].items() if key in kind.model_fields}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _is_here(job: Job, value: str) -> bool:
    """Whether a path is there, or is a pattern of files below a folder that is."""
    start = re.split(r"[*?\[]", value, maxsplit=1)[0]
    if start == value or "://" in value:
        return job.path(value).exists()
    return job.path(start.rpartition("/")[0] or ".").is_dir()


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


def _sort_into_sections(document: Document, mistakes: list[str]) -> list[str]:
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
    same = other_tools().same
    name = same.get(name, name)
    homes = [section for section in _SECTION_NAMES if name in _known_keys(section)]
    if len(homes) != 1 or (len(path) == 2 and path[-1] not in same):
        return None
    return homes[0], name


def _known_keys(section: str) -> set[str]:
    if section in TYPED_SECTIONS:
        return {key for fields in TYPED_SECTIONS[section].values() for key in fields.model_fields}
    return set(SECTIONS[section].model_fields) if section in SECTIONS else set()


def _explain(error: ValidationError, document: Document) -> list[str]:
    """One sentence a wrong key, however many branches of a union Pydantic tried for it."""
    by_path: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False, include_context=True):
        missing = detail["type"] == "missing"
        path = _path_in_file(detail["loc"][:-1] if missing else detail["loc"], document.values)
        by_path.setdefault((*path, detail["loc"][-1]) if missing else path, []).append(detail)
    above = {path[:length] for path in by_path for length in range(len(path))}
    by_path = {p: d for p, d in by_path.items() if p not in above or d[0]["type"] == "missing"}
    found = [_sentence(*each, document) for each in itertools.islice(by_path.items(), _MOST_MISTAKES)]
    return found + ([f"and {len(by_path) - len(found)} more mistakes"] if len(by_path) > len(found) else [])


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


def _sentence(path: KeyPath, details: list[Any], document: Document) -> Mistake:
    dotted = ".".join(str(step) for step in path) or "the job"
    start = f"{document.where(path)}: {dotted}"
    kinds = {detail["type"] for detail in details}
    value = None if kinds == {"missing"} else shown(_value_at(path, document.values))
    if kinds == {"missing"}:
        told = f"{start} is missing; add it"
    elif "extra_forbidden" in kinds:
        told = f"{start}: there is no such key{_nearest(path)}"
    elif "union_tag_invalid" in kinds:
        told = f"{start}: {value}: type must be one of {', '.join(TYPED_SECTIONS[str(path[0])])}"
    elif reason := _refused_value(dotted, _value_at(path, document.values)):
        told = f"{start} is {value}: {reason}"
    else:
        told = f"{start} is {value}; it should {' or '.join(dict.fromkeys(map(_wanted, details)))}"
    fix = (
        told.rpartition("there is no such key")[2].lstrip(":; ") or "remove it"
        if "extra_forbidden" in kinds
        else (told.partition("; ")[2] or told.rpartition(": ")[2])
    )
    stands = None if kinds == {"missing"} else _value_at(path, document.values)
    return Mistake(told, document.line(path), dotted, _short_value(stands), fix)


def _refused_value(dotted: str, value: Any) -> str | None:
    """Why a value that other tools know is none here."""
    return REFUSED_VALUES.get(dotted, {}).get(value) if isinstance(value, str) else None


def _short_value(value: Any) -> Any:
    """A value as a program reads it, what is long or nested as the text of its beginning."""
    is_short = value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 60)
    return value if is_short else shown(value)


def _wanted(detail: Any) -> str:
    """Pydantic's message as the end of a sentence that began with `it should`."""
    message = detail["msg"].split(", unable to parse")[0]
    for start in ("Input should ", "String should ", "List should ", "Value error, should "):
        message = message.removeprefix(start)
    return message


def _nearest(path: KeyPath) -> str:
    """The end of a sentence about an unknown key: what it is elsewhere, or the known key that it may be misspelt of."""
    name = str(path[-1])
    if told := _other_tools_key(name):
        return told
    if len(name) > _LONGEST_NAME:
        return ""
    if len(path) == 2 and path[0] in TYPED_SECTIONS and name in _known_keys(str(path[0])):
        owners = [kind for kind, section in TYPED_SECTIONS[str(path[0])].items() if name in section.model_fields]
        return f" with this {path[0]}.type; remove it, or use a type that has it: {', '.join(owners)}"
    if len(path) > 1 and name in JobSpec.model_fields:
        return f"; {name}: stands at the beginning of a line"
    siblings = sorted(_keys_beside(path))
    everywhere = {f"{section}.{key}": key for section in _SECTION_NAMES for key in sorted(_known_keys(section))}
    if homes := [dotted for dotted, key in everywhere.items() if key == name]:
        return f"; did you mean {homes[0]}?"
    if close := nearest_name(name, siblings):
        return f"; did you mean {'.'.join([*(str(step) for step in path[:-1]), close])}?"
    known = other_tools()
    elsewhere = [*everywhere.values(), *known.same, *known.not_yet, *known.not_needed]
    near = nearest_name(name, [one for one in elsewhere if len(one) >= _CLEAR_NAME])
    if near and (others := [dotted for dotted, key in everywhere.items() if key == known.same.get(near, near)]):
        return f"; did you mean {others[0]}?"
    if near and (told := _other_tools_key(near)):
        return f"; {near}{told}"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _other_tools_key(name: str) -> str:
    """What a key of other tools is here, where it is none; empty for any other name."""
    known = other_tools()
    if name in known.not_yet:
        return f" yet: {known.not_yet[name]}"
    return f": {known.not_needed[name]}" if name in known.not_needed else ""


def _keys_beside(path: KeyPath) -> list[str]:
    """The keys that may stand where this one does."""
    first = str(path[0])
    if len(path) == 1:
        return list(JobSpec.model_fields)
    section = SECTIONS.get(first)
    inner = section.model_fields.get(str(path[1])) if section and len(path) > 2 else None
    sections = [kind for kind in get_args(inner.annotation) if hasattr(kind, "model_fields")] if inner else []
    return sorted({key for one in sections for key in one.model_fields} or _known_keys(first))


def _value_at(path: KeyPath, values: Any) -> Any:
    for step in path:
        values = values[step]
    return values
