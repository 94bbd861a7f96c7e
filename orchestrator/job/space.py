"""What a search may try: job-file keys with their values.  A point is one value for each key.  Pure."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clusters.capability import DeviceCapability
from orchestrator.errors import JobError
from orchestrator.job.job_file import spec_with, value_of
from orchestrator.job.sections.search import Choices, LogUniform, RandInt, Uniform
from orchestrator.job.spec import JobSpec
from strategies import METHODS

Point = dict[str, Any]  # job-file key -> value
Range = Uniform | LogUniform | RandInt

_ROWS = (1, 2, 4, 8, 16, 32)
_MOST_POINTS = 20000
# Keys that change what is compared: every trial sees the same samples in the same steps.
_FIXED = ("train.seed", "train.global_batch_size", "train.num_train_epochs", "train.max_steps")
_FIXED_SECTIONS = ("search", "cluster", "checkpoint", "tracking", "cost", "goal", "objective", "eval")
# What trials follow of these sections: the model and its samples are prepared once, and each has one device.
_FOLLOWED = {
    "model": ("dtype", "attn_implementation"),
    "data": ("max_length", "packing", "packing_strategy", "share_prefixes"),
    "strategy": ("mode", "pipeline", "offload", "deepspeed", "nvme_path", "memory_safety"),
}


@dataclass(frozen=True)
class Space:
    """Choices are listed, so every one can be predicted; of ranges the plan knows nothing."""

    choices: dict[str, tuple[Any, ...]]
    ranges: dict[str, Range] = field(default_factory=dict)

    def __len__(self) -> int:
        """Combinations of the choices."""
        return math.prod(map(len, self.choices.values()))

    def points(self) -> Iterator[Point]:
        """Every combination of the choices, each once however a method spells it."""
        seen = set()
        for values in itertools.product(*self.choices.values()):
            point = canonical(dict(zip(self.choices, values, strict=True)))
            if (key := key_of(point)) not in seen:
                seen.add(key)
                yield point


def space_of(spec: JobSpec, devices: Sequence[DeviceCapability], global_batch_size: int) -> Space:
    """The job's own space, or what it leaves open.  Raises JobError for keys and values that cannot be."""
    if not spec.search.space:
        return Space(_open_choices(spec, devices, global_batch_size))
    return stated_space(spec)


def stated_space(spec: JobSpec) -> Space:
    """What search.space says.  Raises JobError for keys and values that cannot be, and for too many combinations."""
    mistakes = []
    for key, values in spec.search.space.items():
        try:
            _check(spec, key, values)
        except JobError as error:
            mistakes += [f"search.space.{mistake}" for mistake in error.mistakes]
    if mistakes:
        raise JobError(mistakes)
    listed = {key: values for key, values in spec.search.space.items() if isinstance(values, list)}
    ranges: dict[str, Range] = {
        key: values for key, values in spec.search.space.items() if not isinstance(values, list)
    }
    space = Space({key: _distinct(values) for key, values in listed.items()}, ranges)
    if len(space) > _MOST_POINTS:
        raise JobError(f"search.space has {len(space)} combinations, more than {_MOST_POINTS}; list fewer values")
    return space


def _distinct(values: list[Any]) -> tuple[Any, ...]:
    """Each value once; 1, 1.0 and true are three values, and lists are values too."""
    return tuple({json.dumps(value, sort_keys=True, default=str): value for value in reversed(values)}.values())[::-1]


def check_key(key: str) -> None:
    """Raises JobError for a key that cannot differ between trials."""
    section, dot, name = key.partition(".")
    if not dot:
        raise JobError(f"{key}: write it with its section, e.g. train.learning_rate")
    if key in _FIXED or section in _FIXED_SECTIONS or name not in _FOLLOWED.get(section, (name,)):
        raise JobError(f"{key}: it must be the same in every trial, or trials could not be compared")


def _check(spec: JobSpec, key: str, values: Choices) -> None:
    check_key(key)
    section = key.partition(".")[0]
    if isinstance(values, list):
        tried = values
    else:
        low, high = next(iter(values.model_dump().values()))
        if section == "data":  # samples are prepared before the first trial
            raise JobError(f"{key}: list its values, each is prepared before the first trial")
        if not low < high:
            raise JobError(f"{key}: its range is empty, {low} is not below {high}")
        tried = [low, high]
    for value in tried:
        if section == "method" and key != "method.type":
            _check_option(spec, key, value)
        else:
            spec_with(spec, {key: value})


def _check_option(spec: JobSpec, key: str, value: Any) -> None:
    """An option must suit one of the methods that may be chosen."""
    errors = []
    for name in _methods(spec):
        try:
            spec_with(spec, {"method.type": name, key: value})
        except JobError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def _methods(spec: JobSpec) -> list[str]:
    listed = spec.search.space.get("method.type")
    if isinstance(listed, list):
        return [name for name in listed if isinstance(name, str) and name in METHODS]
    return [method.name for method in spec.methods()]


def _open_choices(
    spec: JobSpec, devices: Sequence[DeviceCapability], global_batch_size: int
) -> dict[str, tuple[Any, ...]]:
    """Every optimization that the job leaves open, with the values that could make a difference on the devices."""
    on_gpu = any(device.kind != "cpu" for device in devices)
    dtypes = ("float32", "bfloat16", "float16") if on_gpu else ("float32", "bfloat16")
    kernels = ("document", "flash_attention_2", "sdpa", "eager") if on_gpu else ("document", "sdpa", "eager")
    choices: dict[str, tuple[Any, ...]] = {}
    methods = [method.name for method in spec.methods()]
    if spec.method.type not in METHODS:
        choices["method.type"] = tuple(methods)
    for name in methods:
        for option in _options(METHODS[name]):
            values = option.metadata.get("tried")
            if values and option.name not in spec.method.model_fields_set:
                choices[f"method.{option.name}"] = values
    tried: dict[str, tuple[Any, ...]] = {
        "model.dtype": dtypes,
        "model.attn_implementation": kernels,
        "data.packing": (True, False),
        "train.gradient_checkpointing": (False, True),
        "train.per_device_train_batch_size": tuple(rows for rows in _ROWS if rows <= global_batch_size),
        "train.loss_type": ("nll", "chunked_nll"),
        "train.optim": ("adamw_torch_fused", "adamw_bnb_8bit"),
        "strategy.offload": ("none", "activations") if on_gpu else ("none",),
    }
    choices |= {key: values for key, values in tried.items() if value_of(spec, key) == "auto" and len(values) > 1}
    if not choices:
        raise JobError("search: the job leaves nothing open; set some keys to auto, or list values in search.space")
    return choices


def canonical(point: Mapping[str, Any]) -> Point:
    """The point without options that its method does not have."""
    named = point.get("method.type")
    method = METHODS.get(named) if isinstance(named, str) else None
    if method is None:
        return dict(point)
    known = {f"method.{option.name}" for option in _options(method)} | {"method.type"}
    return {key: value for key, value in point.items() if not key.startswith("method.") or key in known}


def key_of(point: Mapping[str, Any]) -> str:
    """A name for a point: equal points have one."""
    return json.dumps(canonical(point), sort_keys=True, default=str)


_SHORT = {"train.per_device_train_batch_size": "micro-batch", "train.gradient_checkpointing": "checkpointing"}


def phrase(point: Mapping[str, Any], fixed: Mapping[str, Any] | None = None) -> str:
    """A point for a person: `lora_r 8, bfloat16, packing`; without what equals `fixed`."""
    parts = []
    for key, value in point.items():
        if fixed is not None and fixed.get(key) == value:
            continue
        name = _SHORT.get(key, key.rpartition(".")[2])
        if isinstance(value, bool):
            parts.append(name if value else f"no {name}")
        elif isinstance(value, str):
            parts.append(value)
        else:
            parts.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _options(method: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a method's dataclass."""
    return dataclasses.fields(method)
