"""`schema` finds every key of the job file, however deep it lies."""

import json

import pytest

from orchestrator.errors import JobError
from orchestrator.job.schema import all_fields, json_schema, one_field
from orchestrator.job.spec import JobSpec


def keys_of(schema, prefix=""):
    """Keys below a JSON schema, dotted, `*` where any name may stand: an own way to what `all_fields` must list."""
    if "$ref" in schema:
        schema = DOCUMENT["$defs"][schema["$ref"].rpartition("/")[2]]
    for kind in ("anyOf", "oneOf"):
        for option in schema.get(kind, ()):
            yield from keys_of(option, prefix)
    for key, inner in schema.get("properties", {}).items():
        yield f"{prefix}{key}"
        yield from keys_of(inner, f"{prefix}{key}.")
    if isinstance(schema.get("items"), dict):
        yield from keys_of(schema["items"], prefix)
    if isinstance(schema.get("additionalProperties"), dict):
        yield from keys_of(schema["additionalProperties"], f"{prefix}*.")


DOCUMENT = json.loads(json_schema())
SECTIONS = {name for name in JobSpec.model_fields if any(key.startswith(f"{name}.") for key in keys_of(DOCUMENT))}
KEYS = set(keys_of(DOCUMENT)) - SECTIONS


def test_the_schema_lists_every_key_of_every_section_and_no_other():
    found = all_fields()

    assert len(KEYS) > 150 and len(SECTIONS) == 15
    assert set(found) == KEYS
    assert all(field["description"] and field["type"] for field in found.values())


@pytest.mark.parametrize(
    ("name", "key", "type_", "default"),
    [
        ("lora_r", "method.lora_r", "integer >= 1", 16),
        ("format", "data.format", "auto | messages | prompt_completion", "auto"),  # not that of one source
        ("bank.distance", "bank.distance", "js_parts | js | js_answers", "js_answers"),
        ("trials", "search.budget.trials", "integer >= 1 <= 100000", 16),
        ("cost.nodes.*.years", "cost.nodes.*.years", "number > 0 <= 100", 3.0),
        ("data.eval.split", "data.eval.split", "string | number > 0 < 1", "train"),  # of a data set, or held out
    ],
)
def test_a_key_comes_with_its_type_and_default(name, key, type_, default):
    found = one_field(name)

    assert (found["key"], found["default"]) == (key, default)
    assert found["type"].startswith(type_)


def test_a_name_that_is_no_key_brings_the_nearest():
    with pytest.raises(JobError, match=r"there is no key 'bank.distanze'; nearest: bank.distance"):
        one_field("bank.distanze")
