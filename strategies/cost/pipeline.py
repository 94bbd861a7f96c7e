"""Seconds of a step over unequal stages, and the best way to cut layers over devices.  Pure arithmetic.

A stage does forward and backward passes in the order of `pipeline/schedule.py`, each as soon as its input is there.
A message leaves when it is computed; those of one boundary and direction follow each other, the two directions work
together, and nobody waits for a message that he sends.  Receives are posted `ahead + 2` deep, which is more than can be
on their way, so their number holds nothing up.

The cut minimises the slowest stage or link: what a step of many micro-batches costs each.  Of several orders of devices
the simulated step decides.

Legend: P stages, M micro-batches, L layers, D devices.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from strategies.pipeline.schedule import num_in_flight, operations

MOST_DEVICES = 6  # of which all orders are looked at
LEAST_BYTES_PER_S = 5e6 / 8  # of a link: below it hidden states of a small model take seconds each
AHEADS = (0, 1, 2)
WORTH_A_DEVICE = 0.95  # of a step without it: what one more device has to bring


@dataclass(frozen=True)
class Pass:
    """Seconds of one micro-batch on a stage."""

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Boundary:
    """What lies between two stages."""

    message_bytes: float  # of one micro-batch: a hidden state, or its gradient
    bytes_per_s: float  # of each direction
    latency_s: float = 0.0  # of one direction: half a round trip

    @property
    def message_s(self) -> float:
        """What a message occupies the link."""
        return self.message_bytes / self.bytes_per_s


@dataclass(frozen=True)
class PassEvent:
    """A pass of one micro-batch on a stage, in seconds from the step's begin."""

    stage: int
    is_forward: bool
    micro_batch: int
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """One step, simulated."""

    passes: tuple[Pass, ...]
    begins: tuple[tuple[float, ...], ...]  # of each stage's operations, in their order
    num_micro_batches: int
    ahead: int

    @cached_property
    def step_s(self) -> float:
        """From the first forward pass to the end of the last backward pass of any stage."""
        return max(begins[-1] + one.backward_s for begins, one in zip(self.begins, self.passes, strict=True))

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Of each stage, what it computes."""
        return tuple(self.num_micro_batches * one.total_s for one in self.passes)

    @property
    def waiting_s(self) -> tuple[float, ...]:
        """Of each stage, the rest of the step."""
        return tuple(self.step_s - busy for busy in self.busy_s)

    @property
    def events(self) -> Iterator[PassEvent]:
        """Every pass, stage by stage, in order of time: what a timeline is drawn from."""
        for stage, (begins, one) in enumerate(zip(self.begins, self.passes, strict=True)):
            order = operations(stage, len(self.passes), self.num_micro_batches, self.ahead)
            for operation, begin in zip(order, begins, strict=True):
                seconds = one.forward_s if operation.is_forward else one.backward_s
                yield PassEvent(stage, operation.is_forward, operation.micro_batch, begin, begin + seconds)


def simulate(
    passes: Sequence[Pass], boundaries: Sequence[Boundary], num_micro_batches: int, ahead: int = 0
) -> Simulation:
    """A step of P stages with P - 1 boundaries between them.  O(P M)."""
    count = len(passes)
    orders = [_order(stage, count, num_micro_batches, ahead) for stage in range(count)]
    seconds = [(one.backward_s, one.forward_s) for one in passes]
    links = [(one.message_s, one.latency_s) for one in boundaries]
    # When a micro-batch's input is there: [stage] -> hidden states and gradients in the order of their arrival.
    hidden: list[list[float]] = [[0.0] * num_micro_batches] + [[] for _ in range(count - 1)]
    gradients: list[list[float]] = [[] for _ in range(count)]
    up, down = [0.0] * count, [0.0] * count  # when the links have sent what they were given
    free = [0.0] * count
    begins: list[list[float]] = [[] for _ in range(count)]
    waiting = True
    while waiting:
        waiting = False
        for stage in range(count):
            order, done, now = orders[stage], begins[stage], free[stage]
            while len(done) < len(order):
                is_forward, number = order[len(done)]
                arrived = hidden[stage] if is_forward else gradients[stage]
                if number >= len(arrived):
                    waiting = True
                    break
                begin = max(now, arrived[number])
                done.append(begin)
                now = begin + seconds[stage][is_forward]
                if not is_forward and stage:
                    message_s, latency_s = links[stage - 1]
                    down[stage - 1] = max(down[stage - 1], now) + message_s
                    gradients[stage - 1].append(down[stage - 1] + latency_s)
                elif is_forward and stage < count - 1:
                    message_s, latency_s = links[stage]
                    up[stage] = max(up[stage], now) + message_s
                    hidden[stage + 1].append(up[stage] + latency_s)
                elif is_forward:
                    gradients[stage].append(now)
            free[stage] = now
    return Simulation(tuple(passes), tuple(map(tuple, begins)), num_micro_batches, ahead)


@dataclass(frozen=True)
class PlannedPasses:
    """What the step of a pipeline was simulated from, by stage: its passes of a micro-batch, and its links."""

    passes: tuple[Pass, ...]
    boundaries: tuple[Boundary, ...]
    num_micro_batches: int
    ahead: int

    @cached_property
    def simulation(self) -> Simulation:
        return simulate(self.passes, self.boundaries, self.num_micro_batches, self.ahead)

    @property
    def bytes_sent(self) -> list[float]:
        """Of each stage in a step: hidden states to the next, gradients to the one before."""
        messages = [one.message_bytes * self.num_micro_batches for one in self.boundaries]
        return [up + down for up, down in zip([*messages, 0.0], [0.0, *messages], strict=True)]


@lru_cache(256)
def _order(stage: int, count: int, num_micro_batches: int, ahead: int) -> tuple[tuple[bool, int], ...]:
    return tuple((one.is_forward, one.micro_batch) for one in operations(stage, count, num_micro_batches, ahead))


@dataclass(frozen=True)
class Role:
    """What a stage has beside its layers, and how many micro-batches' activations it keeps."""

    is_first: bool
    is_last: bool
    num_in_flight: int


@dataclass(frozen=True)
class Line:
    """A quantity of so many layers: affine."""

    fixed: float
    a_layer: float

    def at(self, layers: int) -> float:
        return self.fixed + self.a_layer * layers

    def most_layers(self, limit: float) -> int:
        """The most layers with which it stays within a limit; none below the first."""
        if self.a_layer <= 0:
            return 0 if self.fixed > limit else 2**31
        return max(0, math.floor((limit - self.fixed) / self.a_layer * (1 + 1e-12) + 1e-9))


@dataclass(frozen=True)
class Way:
    """One way to compute a stage on a device: seconds of a micro-batch, and the most layers that fit."""

    forward_s: Line
    backward_s: Line
    most_layers: int
    name: Any = None  # whatever tells ways apart
    gradient_bytes: Line = Line(0.0, 0.0)  # of what trains in it: pipelines beside each other add them up

    def total_s(self, layers: int) -> float:
        return self.forward_s.at(layers) + self.backward_s.at(layers)


# The ways of a device in a role.
Ways = Callable[[int, Role], Sequence[Way]]
# The boundary between two devices; None where there is no link that carries hidden states.
Links = Callable[[int, int], Boundary | None]


@dataclass(frozen=True)
class Partition:
    """Layers of each stage, the way each is computed, and what a micro-batch waits for."""

    layers: tuple[int, ...]
    ways: tuple[Way, ...]
    slowest_s: float  # stage or link, a micro-batch

    @property
    def passes(self) -> list[Pass]:
        return [
            Pass(way.forward_s.at(count), way.backward_s.at(count))
            for way, count in zip(self.ways, self.layers, strict=True)
        ]

    @property
    def gradient_bytes(self) -> list[float]:
        """Of each stage."""
        return [way.gradient_bytes.at(count) for way, count in zip(self.ways, self.layers, strict=True)]


def partition(stages: Sequence[Sequence[Way]], num_layers: int, slowest_link_s: float = 0.0) -> Partition | None:
    """The best cut of the layers over stages in this order, each with its ways; None where they do not fit.

    Exact: the seconds of a stage never fall with its layers, so each further layer goes where the stage is then the
    fastest.  O(L log P) comparisons.
    """
    if len(stages) > num_layers or not all(stages):
        return None
    offers = [_Offers(ways) for ways in stages]
    chosen = [one.fastest(1) for one in offers]
    layers = [1] * len(stages)
    heap = [(*one.fastest(2), stage) for stage, one in enumerate(offers)]
    heapq.heapify(heap)
    for _ in range(num_layers - len(stages)):
        seconds, way, stage = heap[0]
        layers[stage] += 1
        chosen[stage] = seconds, way
        heapq.heapreplace(heap, (*offers[stage].fastest(layers[stage] + 1), stage))
    slowest = max(seconds for seconds, _ in chosen)
    if not math.isfinite(slowest):
        return None
    ways = tuple(ways[way] for ways, (_, way) in zip(stages, chosen, strict=True))
    return Partition(tuple(layers), ways, max(slowest, slowest_link_s))


class _Offers:
    """The ways of one stage, as numbers."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._lines = [(way.most_layers, way.total_s(0), way.total_s(1) - way.total_s(0)) for way in ways]

    def fastest(self, layers: int) -> tuple[float, int]:
        """Seconds of so many layers and the number of the way; infinite where they do not fit."""
        best, chosen = math.inf, 0
        for number, (most, fixed, a_layer) in enumerate(self._lines):
            if most >= layers and (seconds := fixed + a_layer * layers) < best:
                best, chosen = seconds, number
        return best, chosen


@dataclass(frozen=True)
class Arrangement:
    """Devices in order, with what each computes and the step that follows."""

    devices: tuple[int, ...]
    ahead: int
    partition: Partition
    boundaries: tuple[Boundary, ...]
    step_s: float  # without the update

    def simulate(self, num_micro_batches: int) -> Simulation:
        return simulate(self.partition.passes, self.boundaries, num_micro_batches, self.ahead)


@dataclass(frozen=True)
class Search:
    """The devices there are, and what is stated of the pipeline."""

    num_layers: int
    num_micro_batches: int
    ways: Ways
    links: Links
    aheads: Sequence[int] = AHEADS
    alike: Sequence[Hashable] = ()  # of each device: those equal in this may stand for each other
    worth_a_device: float = WORTH_A_DEVICE
    # Cuts that were made; shared by searches that differ in their number of micro-batches.
    cuts: dict[Any, Partition | None] = field(default_factory=dict, compare=False, repr=False)

    def best(self, orders: Iterator[tuple[int, ...]], limit_s: float = math.inf) -> Arrangement | None:
        """The fastest step of all these orders of devices that takes less than the limit.

        A further device has to save something: it may fail, and draws power.
        """
        found: Arrangement | None = None
        distinct: dict[tuple[Hashable, ...], tuple[int, ...]] = {}
        for order in orders:
            distinct.setdefault(tuple(self.alike[one] for one in order) if self.alike else order, order)
        bounds = {members: self.bound_s(members) for members in {frozenset(order) for order in distinct.values()}}
        ranked = sorted(distinct.values(), key=lambda order: (len(order), bounds[frozenset(order)]))
        for count, same in itertools.groupby(ranked, key=len):
            if found and len(found.devices) < count:
                limit_s = self.worth_a_device * found.step_s
            for order in same:
                if bounds[frozenset(order)] >= limit_s:
                    break
                if better := self.best_of(order, limit_s):
                    found, limit_s = better, better.step_s
        return found

    def best_of(self, order: tuple[int, ...], limit_s: float = math.inf) -> Arrangement | None:
        """The fastest step of the devices in this order that takes less than the limit."""
        known = [self.links(one, other) for one, other in itertools.pairwise(order)]
        boundaries = [one for one in known if one is not None]
        if len(boundaries) < len(known):
            return None
        found: Arrangement | None = None
        link_s = max((one.message_s for one in boundaries), default=0.0)
        for ahead in sorted(self.aheads):
            cut = self._cut(order, ahead, link_s)
            if cut is None or self.num_micro_batches * cut.slowest_s >= limit_s:
                break  # more micro-batches in flight leave less room
            if self._least_s(cut, boundaries) >= limit_s:
                continue
            step_s = simulate(cut.passes, boundaries, self.num_micro_batches, ahead).step_s
            if step_s < limit_s * (1 - 1e-9):  # of equals the fewest micro-batches in flight
                found, limit_s = Arrangement(order, ahead, cut, tuple(boundaries), step_s), step_s
        return found

    def _cut(self, order: tuple[int, ...], ahead: int, link_s: float) -> Partition | None:
        roles = tuple(self._role(place, len(order), ahead) for place in range(len(order)))
        if (order, roles) not in self.cuts:
            stages = [self.ways(device, role) for device, role in zip(order, roles, strict=True)]
            self.cuts[order, roles] = partition(stages, self.num_layers, link_s)
        return self.cuts[order, roles]

    def _role(self, place: int, count: int, ahead: int) -> Role:
        flight = num_in_flight(place, count, self.num_micro_batches, ahead)
        return Role(place == 0, place == count - 1, flight)

    def bound_s(self, devices: frozenset[int]) -> float:
        """No step of these devices is shorter, whatever their order: all as stages in the middle, and then one last."""
        middle = {device: self.ways(device, Role(False, False, 1)) for device in devices}
        last = {device: self.ways(device, Role(len(devices) == 1, True, 1)) for device in devices}
        found = (
            partition([last[one] if one == end else middle[one] for one in devices], self.num_layers) for end in devices
        )
        slowest_s = min((cut.slowest_s for cut in found if cut), default=math.inf)
        return self.num_micro_batches * slowest_s

    def _least_s(self, cut: Partition, boundaries: Sequence[Boundary]) -> float:
        """No step is shorter: a stage computes all micro-batches, after the first has come and until the last is back;
        a link carries all of them.
        """
        least, before = 0.0, 0.0
        for number, one in enumerate(cut.passes):
            least = max(least, before + self.num_micro_batches * one.total_s)
            before += one.total_s
            if number < len(boundaries):
                link = boundaries[number]
                least = max(least, before + self.num_micro_batches * link.message_s)
                before += 2 * (link.message_s + link.latency_s)
        return least


def orders_of(devices: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every order of so many of the devices, of six at most."""
    few = devices[:MOST_DEVICES]
    return itertools.chain.from_iterable(itertools.permutations(few, count) for count in counts if count <= len(few))
