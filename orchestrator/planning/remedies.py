"""The smallest changes that would make a job fit, each found by planning again with the change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from orchestrator.planning.candidates import Switches
from orchestrator.planning.enumeration import Enumeration
from strategies import METHODS
from strategies.techniques.libraries import EXTRAS, lacks

_SHORTEST = 128  # max_length in tokens
_MOST = 4
_OPEN: dict[str, Any] = {  # the switches as a job leaves them open
    name: getattr(Switches, name) for name in ("checkpointings", "rows", "accumulation", "losses", "dtypes", "optims")
}


def find_remedies(enumeration: Enumeration) -> list[str]:
    """Changes that help, smallest first; at most four."""
    small = itertools.chain(
        _opened_switches(enumeration),
        _installed_libraries(enumeration),
        _other_methods(enumeration),
        _shorter_samples(enumeration),
    )
    return list(itertools.islice(small, _MOST)) or list(_more_memory(enumeration))


def _fits(enumeration: Enumeration, **changes: Any) -> bool:
    return bool(replace(enumeration, **changes).run().fitting)


def _opened_switches(enumeration: Enumeration) -> Iterator[str]:
    keys = {
        "train.gradient_checkpointing": ("checkpointings",),
        "train.per_device_train_batch_size": ("rows", "accumulation"),
        "train.loss_type": ("losses",),
        "model.dtype": ("dtypes",),
    }
    for key, names in keys.items():
        switches = replace(enumeration.switches, **{name: _OPEN[name] for name in names})
        if switches != enumeration.switches and _fits(enumeration, switches=switches):
            yield f"{key}: auto"


def _installed_libraries(enumeration: Enumeration) -> Iterator[str]:
    missing = [lacks(slot.device, library) for slot in enumeration.slots for library in EXTRAS]
    equipped = [replace(slot, device=replace(slot.device, libraries={})) for slot in enumeration.slots]
    if any(missing) and _fits(enumeration, slots=equipped):
        yield from dict.fromkeys(text.rpartition(": ")[2] for text in missing if text)


def _other_methods(enumeration: Enumeration) -> Iterator[str]:
    stated = {method.name for method in enumeration.methods}
    full_rank = all(method.full_rank for method in enumeration.methods)  # then others of full rank come first
    opened = replace(enumeration.switches, **_OPEN)
    for name, method in sorted(METHODS.items(), key=lambda item: full_rank and not item[1].full_rank):
        if name not in stated and _fits(enumeration, methods=[method()], switches=opened):
            yield f"method: {{type: {name}}}"


def _shorter_samples(enumeration: Enumeration) -> Iterator[str]:
    work, switches = enumeration.workload, enumeration.switches
    length = switches.max_length // 2
    while length >= _SHORTEST:
        shorter = replace(work, longest_sample=min(work.longest_sample, length))
        if _fits(enumeration, workload=shorter, switches=replace(switches, **_OPEN, max_length=length)):
            yield f"data.max_length: {length} instead of {switches.max_length}"
            return
        length //= 2


def _more_memory(enumeration: Enumeration) -> Iterator[str]:
    """One more device like one that is there, or the host's memory."""
    opened = replace(enumeration.switches, **_OPEN)
    sharded = replace(opened, zero_stages=Switches.zero_stages, offloads=("none", "optimizer", "parameters"))
    offloaded = replace(opened, offloads=Switches.offloads)
    for slot in {slot.label: slot for slot in enumeration.slots}.values():
        twin = replace(slot, node=replace(slot.node, name=f"{slot.node.name}-2"))
        if _fits(enumeration, slots=[*enumeration.slots, twin], switches=sharded):
            yield f"one more {slot.device.name}, sharded"
            return
        if _fits(enumeration, switches=offloaded):
            yield "offload to host memory (strategy.offload: auto)"
            return
