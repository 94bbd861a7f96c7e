"""The job file explained from its own definition: every key with its type, default and sentence."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from orchestrator.errors import JobError
from orchestrator.job.spec import DEFAULT_METHOD, METHOD_SECTIONS, MOST, SECTIONS, JobSpec, Section

RECIPES = Path(__file__).parents[1] / "recipes"

_ORDER = (
    "model",
    "data",
    "method",
    "train",
    "goal",
    "strategy",
    "cluster",
    "checkpoint",
    "eval",
    "cost",
    "tracking",
    "kubernetes",
    "search",
)


def all_fields() -> dict[str, dict[str, Any]]:
    """Every key of the job file, dotted, with its description, default and JSON-schema type."""
    fields: dict[str, dict[str, Any]] = {}
    for name in ("version", "name"):
        fields[name] = _field(JobSpec, name)
    for section_name in _ORDER:
        variants = METHOD_SECTIONS if section_name == "method" else {"": SECTIONS[section_name]}
        for section in variants.values():
            for key in section.model_fields:
                fields.setdefault(f"{section_name}.{key}", _field(section, key))
    fields["method.type"]["type"] = " | ".join(METHOD_SECTIONS)
    return fields


def one_field(name: str) -> dict[str, Any]:
    """One key by its dotted name or by its last part.  Raises JobError with the nearest names."""
    fields = all_fields()
    matching = [key for key in fields if key == name or key.endswith(f".{name}")]
    if not matching:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
        raise JobError(f"schema: there is no key {name!r}; nearest: {', '.join(near) or 'none'}")
    return {"key": matching[0], **fields[matching[0]]}


def json_schema() -> str:
    """The JSON schema of the job file, for editors."""
    return json.dumps(JobSpec.model_json_schema(), indent=1)


def starter(model: str, train: str) -> str:
    """A job file with every key at its default and its sentence beside it."""
    lines = [
        "# A fine-tuning job.  Every key with its default; delete what you do not need, `auto` is decided for you",
        "# and printed with its reason.",
        "version: 1",
        "name: my-job",
        "",
    ]
    given = {"model.model_name_or_path": model, "data.train": train, "data.eval": {"split": 0.1}}
    for section_name in _ORDER:
        section = METHOD_SECTIONS[DEFAULT_METHOD] if section_name == "method" else SECTIONS[section_name]
        title = (section.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{section_name}:  # {title[0].lower()}{title[1:]}" if title else f"{section_name}:")
        for key in section.model_fields:
            field = _field(section, key)
            value = given.get(f"{section_name}.{key}", field["default"])
            setting = f"  {key}: {json.dumps(value, ensure_ascii=False)}"
            lines.append(f"{setting:<44}  # {field['description']}")
        lines.append("")
    return "\n".join(lines)


def recipes() -> dict[str, tuple[Path, str]]:
    """The recipes: name -> (file, its first comment line)."""
    found = {}
    for file in sorted(RECIPES.glob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        found[file.stem] = (file, first.lstrip("# ").strip())
    return found


def _field(section: type[Section], key: str) -> dict[str, Any]:
    info = section.model_fields[key]
    default = None if info.default is PydanticUndefined else info.default
    if isinstance(default, Section):
        default = default.model_dump()
    properties = section.model_json_schema()["properties"]
    return {
        "description": info.description or "",
        "default": default,
        "required": info.is_required(),
        "type": _type(properties[key], section.model_json_schema().get("$defs", {})),
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
