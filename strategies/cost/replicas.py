"""Several pipelines beside each other that share the micro-batches of a step.  Pure arithmetic.

Each holds all layers, cut as its own devices want.  Micro-batches go where a step then ends first, which is by speed.
After its last backward pass a device adds up its gradients with those that hold some of the same layers: one stage at
least of each other pipeline.

Devices are divided in every way; `pipeline.Search` finds each part's order and cut.

Legend: D devices, R pipelines, M micro-batches of a step.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from strategies.cost.network import Network
from strategies.cost.pipeline import MOST_DEVICES, Arrangement, Search

Groups = tuple[tuple[int, ...], ...]  # the devices of each pipeline


@dataclass(frozen=True)
class Replicas:
    """Pipelines beside each other, or one."""

    pipelines: tuple[Arrangement, ...]
    num_micro_batches: tuple[int, ...]  # of each
    sum_s: float = 0.0  # what a step waits for gradients
    network: Network | None = None  # the slowest link among those that add up gradients; None = there is one pipeline

    @property
    def step_s(self) -> float:
        """Without the update."""
        return max(one.step_s for one in self.pipelines) + self.sum_s

    @property
    def shares(self) -> list[float]:
        """Of a step's samples, of each pipeline."""
        return [count / sum(self.num_micro_batches) for count in self.num_micro_batches]


def divisions_of(devices: Sequence[int], num_pipelines: int, num_stages: Sequence[int]) -> Iterator[Groups]:
    """Every way to make so many pipelines of some of the devices, of six at most, each of one of these numbers.

    A pipeline may be one device that holds all layers, but not each of them: those would be workers without stages.
    """

    def divide(left: Sequence[int], count: int) -> Iterator[Groups]:
        if not count:
            yield ()
            return
        for at, first in enumerate(left):  # the lowest of the next pipeline's devices
            after = left[at + 1 :]
            for others in itertools.chain.from_iterable(itertools.combinations(after, n - 1) for n in num_stages):
                for further in divide([one for one in after if one not in others], count - 1):
                    yield ((first, *others), *further)

    return (groups for groups in divide(devices[:MOST_DEVICES], num_pipelines) if max(map(len, groups)) > 1)


class ReplicaSearch:
    """Looks for the best pipelines beside each other; `search` is that of one with all micro-batches of a step."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self._seconds: dict[tuple[int, ...], float] = {}  # of a micro-batch, at least
        # The best order by devices and micro-batches, or the limit below which there is none.
        self._orders: dict[tuple[tuple[int, ...], int], Arrangement | float] = {}

    def best(self, divisions: Iterable[Groups], limit_s: float = math.inf) -> Replicas | None:
        """The fastest step of all these divisions that takes less than the limit; a further device has to save
        something, as in one pipeline.
        """
        distinct: dict[Hashable, Groups] = {}
        for groups in divisions:
            distinct.setdefault(self._likeness(groups), groups)
        ranked = sorted((sum(map(len, groups)), self._bound_s(groups), groups) for groups in distinct.values())
        found: Replicas | None = None
        for _, same in itertools.groupby(ranked, key=lambda one: one[0]):
            if found:  # of fewer devices
                limit_s = self.search.worth_a_device * found.step_s
            for _, bound_s, groups in same:
                if bound_s >= limit_s:
                    break
                if better := self.best_of(groups, limit_s):
                    found, limit_s = better, better.step_s
        return found

    def best_of(self, groups: Groups, limit_s: float = math.inf) -> Replicas | None:
        """The fastest step of these pipelines that takes less than the limit.

        Exact before gradients: a pipeline's step gets longer with its micro-batches, so where none of the slowest can
        go to another that then takes less, no division of them is better.
        """
        counts = self._by_speed(groups)
        if counts is None or self._bound_s(groups) >= limit_s:
            return None
        runs = [self._best_order(one, count, limit_s) for one, count in zip(groups, counts, strict=True)]
        while True:
            seconds = [run.step_s if run else math.inf for run in runs]
            slowest = max(range(len(runs)), key=seconds.__getitem__)
            enough_s, offers = min(limit_s, seconds[slowest]), list[tuple[float, int, Arrangement]]()
            for number, group in enumerate(groups):
                if number != slowest and (run := self._best_order(group, counts[number] + 1, enough_s)):
                    offers.append((run.step_s, number, run))
            if not offers or counts[slowest] == 1:
                break
            _, other, runs[other] = min(offers, key=lambda offer: offer[:2])
            counts[other], counts[slowest] = counts[other] + 1, counts[slowest] - 1
            runs[slowest] = self._best_order(groups[slowest], counts[slowest], limit_s)
        known = [run for run in runs if run]
        found = self.summed(known, counts) if len(known) == len(groups) else None
        return found if found and found.step_s < limit_s else None

    def summed(self, pipelines: Sequence[Arrangement], counts: Sequence[int]) -> Replicas | None:
        """Pipelines with the sums of their gradients, those with the most micro-batches first; None without a link."""
        sum_s, slowest = 0.0, Network(len(pipelines), math.inf, 0.0)
        for run, other in itertools.permutations(pipelines, 2):
            for (first, end), device, num_bytes, one in _stages(run):
                others = [peer for (begin, stop), peer, *_ in _stages(other) if begin < end and first < stop]
                links = [self.search.links(device, peer) for peer in others]
                if None in links:
                    return None
                rate = min(link.bytes_per_s for link in links if link)
                trip_s = max(2 * link.latency_s for link in links if link)
                network = Network(len(pipelines), rate, trip_s)
                sum_s = max(sum_s, network.unhidden_s(num_bytes, one, network.bucket_bytes(num_bytes)))
                slowest = Network(len(pipelines), min(slowest.bytes_per_s, rate), max(slowest.round_trip_s, trip_s))
        ranked = sorted(zip(counts, pipelines, strict=True), key=lambda pair: -pair[0])
        return Replicas(tuple(run for _, run in ranked), tuple(count for count, _ in ranked), sum_s, slowest)

    def _best_order(self, devices: tuple[int, ...], count: int, limit_s: float) -> Arrangement | None:
        """The fastest order of these devices with so many micro-batches; None where it takes no less than the limit."""
        known = self._orders.get((devices, count), 0.0)
        if isinstance(known, float) and known < limit_s and count * self._micro_batch_s(devices) < limit_s:
            search = replace(self.search, num_micro_batches=count)
            known = search.best(itertools.permutations(devices), limit_s) or limit_s
            self._orders[devices, count] = known
        return known if isinstance(known, Arrangement) and known.step_s < limit_s else None

    def _by_speed(self, groups: Groups) -> list[int] | None:
        """Micro-batches of each pipeline, one at least, as fast as their slowest stages; None where these are too few.

        Each next one goes where it would be done first.
        """
        seconds = [self._micro_batch_s(group) for group in groups]
        counts = [1] * len(groups)
        for _ in range(self.search.num_micro_batches - len(groups)):
            counts[min(range(len(groups)), key=lambda number: (counts[number] + 1) * seconds[number])] += 1
        return counts if self.search.num_micro_batches >= len(groups) else None

    def _bound_s(self, groups: Groups) -> float:
        """No step of these pipelines is shorter: their speeds together, each that of its slowest stage."""
        seconds = [self._micro_batch_s(group) for group in groups]
        return math.inf if math.inf in seconds else self.search.num_micro_batches / sum(1 / one for one in seconds)

    def _micro_batch_s(self, devices: tuple[int, ...]) -> float:
        """What the slowest stage of these devices takes at least; infinite where the layers do not fit."""
        if devices not in self._seconds:
            bound_s = self.search.bound_s(frozenset(devices))
            self._seconds[devices] = bound_s / self.search.num_micro_batches
        return self._seconds[devices]

    def _likeness(self, groups: Groups) -> Hashable:
        """Divisions equal in this may stand for each other."""
        alike = self.search.alike
        of_each = (frozenset(Counter(alike[one] if alike else one for one in group).items()) for group in groups)
        return frozenset(Counter(of_each).items())


def _stages(run: Arrangement) -> Iterator[tuple[tuple[int, int], int, float, float]]:
    """Of each stage of a pipeline its layers, its device, bytes of gradients and seconds of a micro-batch."""
    edges = itertools.pairwise([0, *itertools.accumulate(run.partition.layers)])
    seconds = (one.total_s for one in run.partition.passes)
    return zip(edges, run.devices, run.partition.gradient_bytes, seconds, strict=True)
