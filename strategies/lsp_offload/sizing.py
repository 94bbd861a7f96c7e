"""How large a subspace may be before its way over the bus and through the CPU no longer hides behind the computation.

The lanes work at the same time, so a layer's image is free as long as each lane needs less for it than the backward
pass for one layer; COST_MODEL C5: T = T_fwd + max(T_bwd, T_down, T_update, T_up) + one layer's (down + update + up).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_STEP = 64
_HEADROOM = 0.8  # of a layer's backward pass: rates fall where lanes and computation share a memory
# Of a step's computation: what the last layer's image may take behind it, where nothing is left to hide it.  Starting
# and waiting for lanes takes 2 % more, so a step stays below 1.08 of one without offload.
_TAIL = 0.05


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second."""

    down_bytes_per_s: float
    up_bytes_per_s: float
    adam_elements_per_s: float  # of the host's optimizer
    element_bytes: int = 4  # of an image on the bus


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer on the device."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Sized:
    """A size with the lane that bounds it."""

    size: int
    bound: str  # down | update | up | sides | tail
    text: str


def seconds_by_lane(num_elements: float, rates: Rates) -> dict[str, float]:
    """What an image (or a whole gradient) of so many elements costs in each rates."""
    size_bytes = num_elements * rates.element_bytes
    return {
        "down": size_bytes / rates.down_bytes_per_s,
        "update": num_elements / rates.adam_elements_per_s,
        "up": size_bytes / rates.up_bytes_per_s,
    }


def largest_that_hides(
    shapes: Sequence[tuple[int, int]], times: LayerTimes, rates: Rates, num_layers: int, most: int | None = None
) -> Sized:
    """The largest d for layers of these weights whose slowest lane still fits into a layer's backward pass, and whose
    last image takes little beside the whole step.

    At most `most`, or half of the smallest side, the paper's advice; at least 64.
    """
    most = most or max(_STEP, min(min(shape) for shape in shapes) // 2 // _STEP * _STEP)
    costs = seconds_by_lane(len(shapes), rates)  # of d = 1
    slowest = max(costs, key=lambda name: costs[name])
    tail_s = _TAIL * num_layers * (times.forward_s + times.backward_s)
    hidden, behind = _HEADROOM * times.backward_s / costs[slowest], tail_s / sum(costs.values())
    fitting = math.floor(math.sqrt(min(hidden, behind)) / _STEP) * _STEP
    size = min(most, max(_STEP, fitting))
    if size == most:
        return Sized(
            size, "sides", f"{size}: half of the weights' side, and every transfer hides behind the computation"
        )
    if behind < hidden:
        return Sized(size, "tail", f"{size}: larger, and the last layer's image would take long behind the step")
    word = {"down": "the way to the host", "update": "the CPU's update", "up": "the way back"}[slowest]
    return Sized(size, slowest, f"{size}: larger, and {word} would not hide behind the backward pass")


def step_s(num_layers: int, times: LayerTimes, lanes: dict[str, float], overlapped: bool, clips: bool = False) -> float:
    """Seconds of a step: the layer-wise schedule, or everything after the backward pass, one layer after the other.

    With clipping no update begins before the backward pass ends: updates and the way back run beside the next forward
    pass instead.
    """
    compute_s = num_layers * (times.forward_s + times.backward_s)
    if not overlapped:
        return compute_s + num_layers * sum(lanes.values())
    if clips:
        backward_s = num_layers * max(times.backward_s, lanes["down"])
        forward_s = num_layers * max(times.forward_s, lanes["update"], lanes["up"])
        return backward_s + forward_s + sum(lanes.values())
    slowest_s = num_layers * max(times.backward_s, *lanes.values())
    return num_layers * times.forward_s + slowest_s + sum(lanes.values())
