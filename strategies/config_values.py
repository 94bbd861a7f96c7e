"""The values of a model's config.json, read by name and checked: each of them may be anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clusters.safe.reading import printable
from strategies.families import FAMILIES, Family

_MOST = 2**27  # of any side of a weight: a size beyond it is a mistake in config.json


class UnknownArchitecture(ValueError):
    """A `model_type` whose layers are not described here; the text names those that are."""


class ConfigValues:
    """The values of a config.json; what it leaves out is what the family's configuration class fills in."""

    def __init__(self, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"it holds a {type(values).__name__}, not an object with named fields")
        self._values, self._silent = values, {}
        text = values.get("text_config")
        if text and not isinstance(text, Mapping):
            raise ValueError(f"its text_config is {shown(text)}, not an object with named fields")
        model_type = values.get("model_type")
        if isinstance(model_type, str) and model_type in FAMILIES:
            self._silent = FAMILIES[model_type].silent

    def get(self, name: str) -> Any:
        value = self._values.get(name)
        return self._silent.get(name) if value is None and name not in self._values else value

    def family(self) -> tuple[str, Family]:
        """The model_type and what its layers consist of.  Raises UnknownArchitecture, ValueError."""
        model_type = self.get("model_type")
        if not isinstance(model_type, str):
            raise UnknownArchitecture(f"its model_type is {shown(model_type)}; known: {', '.join(FAMILIES)}")
        if model_type not in FAMILIES:
            raise UnknownArchitecture(f"model_type {shown(model_type)} is not known; known: {', '.join(FAMILIES)}")
        family = FAMILIES[model_type]
        for name, described in family.only.items():
            if (value := self.get(name)) is not None and value != described:
                raise ValueError(
                    f"its {name} is {shown(value)}; models of type {model_type} are known with {described}"
                )
        return model_type, family

    def variant(self, family: Family) -> tuple[tuple[str, Any], ...]:
        """What these values change in the family's layers: names of `Family`'s fields with their values here."""
        changed = {}
        for where in family.where:
            if self.flag(where["key"], False) is where["is"]:
                changed |= {name: value for name, value in where.items() if name not in ("key", "is")}
        return tuple(changed.items())

    def whole(self, *names: str, default: int | None = None, least: int = 0, most: int = _MOST) -> int:
        """The first of these fields that is stated, a whole number within bounds."""
        stated = [name for name in names if self._values.get(name) is not None]
        name = next((name for name in (*stated, *names) if self.get(name) is not None), None)
        if name is None:
            if default is None:
                raise KeyError(f"the model's config.json has none of {', '.join(names)}")
            return default
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"its {name} is {shown(value)}, not a whole number")
        if not least <= value <= most:
            raise ValueError(f"its sizes are not those of a model: {name} is {shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool) and value not in (0, 1):
            raise ValueError(f"its {name} is {shown(value)}, neither true nor false")
        return bool(value)

    def has_dropout(self, *names: str) -> bool:
        """Whether one of these probabilities is not zero."""
        return any(self.get(name) for name in names)

    def layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """A list of layers' numbers."""
        value = self.get(name) or []
        if not isinstance(value, list) or not all(type(one) is int and 0 <= one < num_layers for one in value):
            raise ValueError(f"its {name} is {shown(value)}, not a list of layers from 0 to {num_layers - 1}")
        return tuple(sorted(set(value)))

    def biases(self, family: Family) -> tuple[bool, bool, bool]:
        """Whether queries, keys and values, the attention's output, and the MLP have biases."""
        stated = (family.qkv_bias, family.output_bias, family.mlp_bias)
        qkv, output, mlp = (self.flag(one, False) if isinstance(one, str) else one for one in stated)
        return qkv, output, mlp


def longest_sequence(values: Mapping[str, Any]) -> int | None:
    """The positions that a config.json states; None where it states none.  Raises ValueError."""
    return ConfigValues(values).whole("max_position_embeddings", "n_positions", default=0, most=2**40) or None


def stored_quantised(values: Mapping[str, Any]) -> str | None:
    """How a model's files are quantised, by its config.json, in words; None where they are not."""
    config = ConfigValues(values)
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        return f"quantization_config: {shown(stated)}"
    known = {"load_in_4bit": "4 bits", "load_in_8bit": "8 bits"}
    method = stated.get("quant_method") or stated.get("quantization") or "a method without a name"
    bits = stated.get("bits") or stated.get("w_bit")
    words = [f"{bits} bits" if type(bits) is int else None]
    words += [text for key, text in known.items() if stated.get(key) is True]
    return ", ".join([shown(method).strip("'"), *[word for word in words if word]])


def shown(value: Any) -> str:
    """A value as an error shows it: short, on one line."""
    text = repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")
