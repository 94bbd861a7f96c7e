"""The smallest changes that would make a job fit, each found by planning again with the change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clusters.capability import ClusterCapability
from orchestrator.planning.candidates import Slot, Switches, enumerate_candidates
from strategies import METHODS
from strategies.contract import Method, Workload
from strategies.techniques.libraries import EXTRAS, lacks

_SHORTEST = 128


def remedies(
    workload: Workload, slots: Sequence[Slot], cluster: ClusterCapability, methods: Sequence[Method], switches: Switches
) -> list[str]:
    """Changes that help, smallest first; at most four."""
    found: list[str] = []

    def fits(work: Workload, places: Sequence[Slot], ways: Sequence[Method], choices: Switches) -> bool:
        return bool(enumerate_candidates(work, places, cluster, ways, choices).fitting)

    switched = {
        "train.gradient_checkpointing: auto": replace(switches, checkpointings=(False, True)),
        "train.per_device_train_batch_size: auto": replace(switches, rows=None, accumulation=None),
        "train.loss_type: auto": replace(switches, losses=("nll", "chunked_nll")),
        "model.dtype: auto": replace(switches, dtypes=("bfloat16", "float16", "float32")),
    }
    found += [
        words for words, choices in switched.items() if choices != switches and fits(workload, slots, methods, choices)
    ]
    freed = replace(
        switches,
        checkpointings=(False, True),
        rows=None,
        accumulation=None,
        losses=("nll", "chunked_nll"),
        dtypes=("bfloat16", "float16", "float32"),
        optims=("adamw_torch_fused", "adamw_bnb_8bit"),
    )
    missing = [lacks(slot.device, library) for slot in slots for library in EXTRAS]
    if any(missing):
        equipped = [replace(slot, device=replace(slot.device, libraries={})) for slot in slots]
        if fits(workload, equipped, methods, switches):
            found += dict.fromkeys(text.rpartition(": ")[2] for text in missing if text)
    named, full_rank = {method.name for method in methods}, all(method.full_rank for method in methods)
    # Who asked for full rank wants that first.
    for name, method in sorted(METHODS.items(), key=lambda item: full_rank and not item[1].full_rank):
        if name not in named and fits(workload, slots, [method()], freed):
            found.append(f"method: {{type: {name}}}")
    length = switches.max_length // 2
    while length >= _SHORTEST:
        shorter = replace(workload, longest_sample=min(workload.longest_sample, length))
        if fits(shorter, slots, methods, replace(freed, max_length=length)):
            found.append(f"data.max_length: {length} instead of {switches.max_length}")
            break
        length //= 2
    if not found:
        for slot in {(s.node.name, s.device.name): s for s in slots}.values():
            twice = replace(slot, node=replace(slot.node, name=f"{slot.node.name}-2"))
            more = replace(freed, zero_stages=(0, 1, 2, 3), offloads=("none", "optimizer", "parameters"))
            if fits(workload, [*slots, twice], methods, more):
                found.append(f"one more {slot.device.name}, sharded")
                break
            offloaded = replace(freed, offloads=("none", "activations", "optimizer", "parameters"))
            if fits(workload, slots, methods, offloaded):
                found.append("offload to host memory (strategy.offload: auto)")
                break
    return found[:4]
