"""The API server's verdict on KubeRay objects without one: the schemas of kube_fields.py, read as a server reads them.

Structural defaulting, unknown fields refused (fieldValidation=Strict), int-or-string, int32, duplicate keys of list
maps, CEL rules on create, duplicate YAML keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from tests.kube_fields import SCHEMAS

_INT32 = 2**31


class StrictLoader(yaml.SafeLoader):
    """A key that stands twice is an error, as it is for kubectl."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(text, StrictLoader) if document]


@cache
def _validator(key: tuple[str, str]) -> Any:
    import jsonschema

    top = _as_json_schema(SCHEMAS[key])
    top["properties"] = {**top["properties"], "metadata": {"type": "object"}}
    return jsonschema.Draft7Validator(top)


def verdict(document: dict[str, Any]) -> list[str]:
    """What the server would refuse; empty for what it takes, and for kinds that are not KubeRay's."""
    key = (str(document.get("apiVersion")), str(document.get("kind")))
    if key not in SCHEMAS:
        return []
    schema, document = SCHEMAS[key], copy.deepcopy(document)
    _fill(schema, document)
    errors = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in _validator(key).iter_errors(document)
    ]
    return errors or [*_twice(schema, document), *_broken_rules(schema, document)]


def _as_json_schema(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if key not in ("default",)}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    keeps_unknown = made.pop("x-kubernetes-preserve-unknown-fields", False)
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    if made.pop("format", None) == "int32":
        made.setdefault("minimum", -_INT32)
        made.setdefault("maximum", _INT32 - 1)
    if "properties" in made:
        made["properties"] = {key: _as_json_schema(value) for key, value in made["properties"].items()}
        if not keeps_unknown:
            made.setdefault("additionalProperties", False)
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = _as_json_schema(made["additionalProperties"])
    if "items" in made:
        made["items"] = _as_json_schema(made["items"])
    return made


def _fill(schema: dict[str, Any], value: Any) -> None:
    """Defaults, which the server sets before it looks."""
    if isinstance(value, dict):
        for key, inner in (schema.get("properties") or {}).items():
            if key not in value and "default" in inner:
                value[key] = copy.deepcopy(inner["default"])
            if key in value:
                _fill(inner, value[key])
        if isinstance(others := schema.get("additionalProperties"), dict):
            for one in value.values():
                _fill(others, one)
    elif isinstance(value, list) and "items" in schema:
        for one in value:
            _fill(schema["items"], one)


def _walk(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[tuple[dict[str, Any], Any, str]]:
    yield schema, value, path
    if isinstance(value, dict):
        for key, inner in (schema.get("properties") or {}).items():
            if key in value:
                yield from _walk(inner, value[key], f"{path}.{key}")
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from _walk(schema.get("items", {}), one, f"{path}[{place}]")


def _twice(schema: dict[str, Any], document: Any) -> Iterator[str]:
    for inner, value, path in _walk(schema, document):
        if isinstance(value, list) and inner.get("x-kubernetes-list-type") == "map":
            keys = [tuple(str(one.get(key)) for key in inner["x-kubernetes-list-map-keys"]) for one in value]
            yield from (f"{path}: {key} stands twice" for key in set(keys) if keys.count(key) > 1)


def _broken_rules(schema: dict[str, Any], document: Any) -> Iterator[str]:
    import cel

    for inner, value, path in _walk(schema, document):
        for rule in inner.get("x-kubernetes-validations", []):
            if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
                yield f"{path}: {rule.get('message', rule['rule'])}"
