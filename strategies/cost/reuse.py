"""What need not be computed again: common beginnings, frozen lower layers, a reference.  Pure arithmetic.

`Workload.tree_ratio` says for some numbers of rows how many tokens they have for each that their tree holds, as counted
on the data (orchestrator/data/prefixes.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

from clusters.capability import DeviceCapability
from strategies.cost.memory import Footprint
from strategies.cost.work import Work
from strategies.workload import Techniques, Workload

WORTH = 1.1  # tokens for each that is computed: less is not taken by itself
_MOST_EPOCHS = 100  # that are counted one by one: later ones are as the last
WORTH_KEEPING = 1.03  # times shorter steps: for less nothing is kept by itself


def ratio_of_step(workload: Workload) -> float:
    """Tokens of a device's part of a step for each token of its tree."""
    return _ratio(workload, workload.share * workload.tokens_per_step / workload.mean_length)


def workload_of_trees(workload: Workload, techniques: Techniques) -> Workload:
    """The same workload with the tokens that are computed, where common beginnings are computed once.

    The fullest step spares as many tokens as the usual one.  A token behind a common beginning looks at all of it: the
    length that is attended to shrinks less than the tokens.
    """
    if not techniques.share_prefixes:
        return workload
    left = computed_part(workload, techniques)
    spared = workload.tokens_per_step * (1 - left)
    fullest = workload.fullest_step_tokens
    return replace(
        workload,
        num_tokens=max(1, round(left * workload.num_tokens)),
        mean_square_length=left * (2 - left) * workload.attended_length * workload.mean_length,
        fullest_step_tokens=None if fullest is None else max(workload.longest_sample, round(fullest - spared)),
    )


def with_kept_layers(
    workload: Workload, techniques: Techniques, footprint: Footprint, work: Work
) -> tuple[Footprint, Work]:
    """A method's costs where what frozen lower layers make of a sample is kept: a hidden state a token.

    Each sample passes them the first time that its worker sees it.
    """
    if not techniques.cache_frozen_activations or not work.first_layer:
        return footprint, work
    of_token = workload.shape.hidden_size * footprint.stream_bytes
    kept = workload.num_tokens * of_token * _met(workload, workload.num_samples_seen / workload.num_samples)
    place = {"disk_bytes": kept} if techniques.cache_frozen_activations == "disk" else {"kept_bytes": kept}
    moved = of_token / computed_part(workload, techniques)
    return replace(footprint, **place), replace(
        work, lower_passes=_first_passes(workload, techniques), kept_bytes_per_token=moved
    )


def _first_passes(workload: Workload, techniques: Techniques) -> float:
    """Of all passes of a worker's samples, those in rows that hold a sample that it has not seen before.

    Who does a sample is drawn anew in each epoch: after e epochs a worker of share s has seen 1 - (1 - s)^e of them,
    and a row of r samples is known with that to the power of r.
    """
    epochs = workload.num_samples_seen / workload.num_samples
    rows = min(workload.share * workload.tokens_per_step, techniques.micro_batch_tokens) / workload.mean_length
    later = range(1, math.ceil(min(epochs, _MOST_EPOCHS)))
    known = sum(min(1.0, epochs - epoch) * _met(workload, epoch) ** max(1.0, rows) for epoch in later)
    known += max(0.0, epochs - _MOST_EPOCHS) * _met(workload, _MOST_EPOCHS) ** max(1.0, rows)
    return 1 - known / max(1.0, epochs)


def _met(workload: Workload, epochs: float) -> float:
    """Of all samples, those that a worker has seen after so many epochs."""
    return 1.0 if workload.share >= 1 else 1 - (1 - workload.share) ** epochs


def keeps_by_itself(device: DeviceCapability) -> bool:
    """Whether what frozen layers make of a sample may be kept unasked: on a GPU it was not measured."""
    return device.kind == "cpu"


def stores_reference(workload: Workload, starts_as_base: bool) -> bool:
    """Whether log-probabilities under the reference are computed before the first step, a forward pass of each sample.

    Else with the adapter off in each step: as many passes where no sample is seen twice, and none is kept.
    """
    return workload.needs_reference and (not starts_as_base or workload.num_samples_seen > workload.num_samples)


def computed_part(workload: Workload, techniques: Techniques) -> float:
    """Of all tokens, by the rows that share a micro-batch: as many as it holds when they are computed once."""
    if not techniques.share_prefixes:
        return 1.0
    whole = workload.share * workload.tokens_per_step / workload.mean_length
    rows = min(whole, techniques.micro_batch_tokens / workload.mean_length)
    return 1 / _ratio(workload, min(whole, rows * _ratio(workload, rows)))


def _ratio(workload: Workload, rows: float) -> float:
    """Between the numbers of rows that were counted on a straight line over their logarithm; 1 where nothing was."""
    known = sorted(workload.tree_ratio.items())
    if not known:
        return 1.0
    below = [one for one in known if one[0] <= rows][-1:] or known[:1]
    above = [one for one in known if one[0] >= rows][:1] or known[-1:]
    (fewer, low), (more, high) = below[0], above[0]
    if fewer >= more:
        return low
    return low + (high - low) * math.log(max(1.0, rows) / fewer) / math.log(more / fewer)
