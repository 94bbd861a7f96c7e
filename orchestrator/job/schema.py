"""The job file explained from its own definition: every key with its type, default and sentence."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic_core import PydanticUndefined

from clusters.safe.cache import cache_folder
from clusters.safe.writing import write_whole
from orchestrator.errors import JobError
from orchestrator.job.sections.methods import DEFAULT_METHOD, METHOD_SECTIONS
from orchestrator.job.sections.section import MOST, Section
from orchestrator.job.spec import SECTIONS, TYPED_SECTIONS, JobSpec
from orchestrator.language.catalogue import tr

_ABOUT = {
    "method": "How the model changes.",
    "objective": "What training makes better; `objective: NAME` is short for `objective: {type: NAME}`.",
}
RECIPES = Path(__file__).parents[1] / "recipes"


def all_fields() -> dict[str, dict[str, Any]]:
    """Every key of the job file, dotted, with its description, default and JSON-schema type.

    `*` stands for a name that the user chooses: `cost.nodes.*.per_hour`.
    """
    fields: dict[str, dict[str, Any]] = {}
    for key, field in _fields(JobSpec):
        known = fields.setdefault(key, field)
        if known["description"] != field["description"] and not key.startswith("method."):  # methods share options
            fields[key] = known | {part: _either(known[part], field[part]) for part in ("type", "description")}
    for name, kinds in TYPED_SECTIONS.items():
        fields[f"{name}.type"]["type"] = " | ".join(kinds)
    return fields


def _either(first: str, second: str) -> str:
    return first if second in first.split(" | ") else f"{first} | {second}"


def one_field(name: str) -> dict[str, Any]:
    """One key by its dotted name or by its last part.  Raises JobError with the nearest names."""
    fields = all_fields()
    matching = [key for key in fields if key == name or key.endswith(f".{name}")]
    if not matching:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
        raise JobError(f"schema: there is no key {name!r}; nearest: {', '.join(near) or 'none'}")
    key = min(matching, key=lambda key: (key != name, key.count(".")))
    return {"key": key, **fields[key]}


def json_schema() -> str:
    """The JSON schema of the job file, for editors."""
    return json.dumps(JobSpec.model_json_schema(), indent=1)


def editor_line() -> str:
    """The comment by which editors with a YAML language server check and complete a job file; writes its schema."""
    try:
        file = cache_folder("job-schema.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json_schema())
    except (OSError, RuntimeError):  # a cache that cannot be written, or no home
        return "# `orchestrator schema --json` prints the keys for editors."
    return f"# yaml-language-server: $schema={file}"


def reference() -> str:
    """The page `orchestrator/guides/job-file.md`: a section a heading, each key with its type, default and sentence."""
    lines = [
        "# The job file, key by key",
        "",
        "```console",
        "$ orchestrator schema --markdown",
        "```",
        "",
        "writes this page; `orchestrator schema --field lora_r` explains one key. `*` is a name of your choice.",
        "",
    ]
    section = ""
    for key, field in all_fields().items():
        first, _, rest = key.partition(".")
        if first != section and rest:
            section = first
            about = SECTIONS[first].__doc__ if first in SECTIONS else _ABOUT[first]
            lines += ["", f"## {first}", "", (about or "").partition("\n")[0], ""]
        lines += _entry(key, field)
    return "\n".join(lines) + "\n"


def _entry(key: str, field: dict[str, Any]) -> list[str]:
    default = "required" if field["required"] else f"default `{json.dumps(field['default'], ensure_ascii=False)}`"
    first, _, name = key.partition(".")
    kinds = TYPED_SECTIONS.get(first, {})
    having = [kind for kind, section in kinds.items() if name in section.model_fields]
    only = f" With {', '.join(having)}." if 0 < len(having) < len(kinds) else ""
    text = f"- **`{key}`** ({field['type']}; {default}): {field['description']}.{only}"
    return textwrap.wrap(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


_FEW = (  # keys of the short starter: what most people change first
    *("model.model_name_or_path", "data.train", "data.eval", "data.max_length", "method.type", "method.lora_r"),
    *("train.num_train_epochs", "train.learning_rate", "goal.prefer", "checkpoint.output_dir"),
)


STARTER = {  # comments of a starter
    "every": "A fine-tuning job.  Every key with its default; delete what you do not need.",
    "few": "A fine-tuning job.  `init --full` writes every key.",
    "auto": "What is `auto` or not here is decided by the plan, and printed with its reason.",
    "next": "Then",
}


def title_of(section: type[Section]) -> str:
    """What a section is about, in one line."""
    return (section.__doc__ or "").strip().partition("\n")[0]


def starter(model: str, train: Any, held_out: Any = None, full: bool = False, more: Mapping[str, Any] = {}) -> str:
    """A commented job file: the few keys that most people change first, or with `full` every key with its default.

    `more` are further keys that are stated.  The comments are in the language of this process.
    """
    given = {"model.model_name_or_path": model, "data.train": train, "data.eval": held_out or {"split": 0.1}, **more}
    lines = [
        editor_line(),
        f"# {tr(STARTER['every' if full else 'few'])}",
        f"# {tr(STARTER['auto'])}",
        *(["version: 1"] if full else []),
        "name: my-job",
        "",
    ]
    for section_name in [name for name in JobSpec.model_fields if name == "method" or name in SECTIONS]:
        section = METHOD_SECTIONS[DEFAULT_METHOD] if section_name == "method" else SECTIONS[section_name]
        keys = [key for key in section.model_fields if full or f"{section_name}.{key}" in {*_FEW, *given}]
        if keys:
            lines += [*_starter_section(section_name, section, keys, given, full), *([""] if full else [])]
    if not full:
        lines += ["", f"# {tr(STARTER['next'])}: orchestrator validate FILE, inspect FILE, plan FILE, submit FILE"]
    return "\n".join(lines) + "\n"


def _starter_section(
    name: str, section: type[Section], keys: list[str], given: dict[str, Any], full: bool
) -> Iterator[str]:
    """The lines of a section, with a sentence a key; the short starter has the first part of each."""
    schema = section.model_json_schema()
    title = tr(title_of(section))
    yield f"{name}:  # {title[0].lower()}{title[1:]}" if title and full else f"{name}:"
    for key in keys:
        field = _field(section, key, schema)
        value = given.get(f"{name}.{key}", field["default"])
        setting = f"  {key}: {json.dumps(value, ensure_ascii=False)}"
        about = tr(field["description"])
        about = about if full else re.sub(r"(; |。).*| ?\(.*?\)|（.*?）", "", about)
        yield f"{setting:<{44 if full else 28}}  # {about}"


def recipes() -> dict[str, tuple[Path, str]]:
    """The recipes: name -> (file, its first comment line)."""
    found = {}
    for file in sorted(RECIPES.glob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        found[file.stem] = (file, first.lstrip("# ").strip())
    return found


def _fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys of a section and of the sections in it; the job's own sections are no keys."""
    schema = section.model_json_schema()
    for key, info in section.model_fields.items():
        inner = list(_sections_in(info.annotation))
        if prefix or not inner:
            yield prefix + key, _field(section, key, schema)
        for below, part in inner:
            yield from _fields(part, f"{prefix}{key}.{below}")


def _sections_in(kind: Any, below: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Sections that a value of this type may be or hold, after `*.` where the user chooses a name on the way."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield below, kind
    for part in get_args(kind):
        yield from _sections_in(part, f"{below}*." if get_origin(kind) is dict else below)


def _field(section: type[Section], key: str, schema: dict[str, Any]) -> dict[str, Any]:
    """One key of a section whose JSON schema is `schema`; a key without a sentence has its section's."""
    info = section.model_fields[key]
    default = None if info.default is PydanticUndefined else info.default
    if isinstance(default, Section):
        default = default.model_dump()
    return {
        "description": info.description or (section.__doc__ or "").partition("\n")[0],
        "default": default,
        "required": info.is_required(),
        "type": _type(schema["properties"][key], schema.get("$defs", {})),
    }


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema as a short phrase: `auto | integer >= 1`."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return "{" + ", ".join(definitions[name]["properties"]) + "}"
    if "anyOf" in schema or "oneOf" in schema:
        return " | ".join(_type(option, definitions) for option in schema.get("anyOf") or schema["oneOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[word]}" for word, sign in limits.items() if schema.get(word, MOST) != MOST]
    name = schema.get("type", "any")
    if name == "array":
        name = f"list of {_type(schema['items'], definitions)}" if "items" in schema else "list"
    return " ".join([name, *bounds])
