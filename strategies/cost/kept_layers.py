"""Of pipelines that are about equally fast, the one for which the fewest layers move.  Pure arithmetic.

Planned again, a pipeline reads each stage's tensors anew.  What a node has read before is in its page cache, so a layer
that stays costs next to nothing and one that moves costs its bytes over a disk or a network.

The cuts of an order of devices are tried by the layers that they keep, the most first, and among equals by their
slowest stage; the first whose simulated step is about as short as the best one is taken.

Legend: P stages, L layers, M micro-batches.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from strategies.cost.pipeline import Arrangement, Boundary, Partition, Role, Search, Way, simulate
from strategies.cost.replicas import Groups, Replicas, ReplicaSearch
from strategies.pipeline.schedule import num_in_flight

ABOUT_AS_FAST = 1.05  # times the best step
_MOST_ORDERS = 400  # that are looked at: all of five devices
_TRIES = 16  # cuts of an order that are simulated
_VISITS = 4  # ways to come to one border of stages that are followed

Ranges = Sequence[tuple[int, int]]  # of layers, [first, end)


def best_kept(
    search: Search, orders: Iterator[tuple[int, ...]], held: Sequence[Ranges], limit_s: float = math.inf
) -> Arrangement | None:
    """As `search.best`; where devices hold layers, of about equally fast arrangements the one that moves the fewest.

    `held` has the layers near each device.
    """
    if not any(held):
        return search.best(orders, limit_s)
    known = list(orders)
    best = search.best(iter(known), limit_s)
    if best is None:
        return None
    return _KeptSearch(search, held, min(limit_s, ABOUT_AS_FAST * best.step_s)).better(known, best)


def best_kept_replicas(
    search: ReplicaSearch, divisions: Iterable[Groups], held: Sequence[Ranges], limit_s: float = math.inf
) -> Replicas | None:
    """As `search.best`; where devices hold layers, of divisions about as fast one whose pipelines hold the most layers,
    and of each pipeline the cut that moves the fewest.
    """
    if not any(held):
        return search.best(divisions, limit_s)

    def num_held(groups: Groups) -> int:
        layers = range(search.search.num_layers)
        return sum(any(_holds(held[one], layer) for one in group) for group in groups for layer in layers)

    known = sorted(divisions, key=num_held, reverse=True)
    best = search.best(known, limit_s)
    if best is None:
        return None
    about_s, groups = min(limit_s, ABOUT_AS_FAST * best.step_s), tuple(run.devices for run in best.pipelines)
    few, count = sum(map(len, groups)), num_held(groups)
    others = (one for one in known if num_held(one) > count and sum(map(len, one)) <= few)
    best = next(
        (found for one in itertools.islice(others, _MOST_ORDERS) if (found := search.best_of(one, about_s))), best
    )
    runs = list[Arrangement]()
    for run, number in zip(best.pipelines, best.num_micro_batches, strict=True):
        one = replace(search.search, num_micro_batches=number)
        runs.append(best_kept(one, itertools.permutations(run.devices), held, about_s) or run)
    kept = search.summed(runs, best.num_micro_batches)
    return kept if kept and kept.step_s < limit_s else best


def num_moved(devices: Sequence[int], layers: Sequence[int], held: Sequence[Ranges]) -> int:
    """Layers whose device does not hold them yet."""
    moved, first = 0, 0
    for device, count in zip(devices, layers, strict=True):
        moved += sum(not _holds(held[device], layer) for layer in range(first, first + count))
        first += count
    return moved


def _holds(ranges: Ranges, layer: int) -> bool:
    return any(first <= layer < end for first, end in ranges)


class _KeptSearch:
    """Searches the arrangements within a limit for the one that keeps the most layers."""

    def __init__(self, search: Search, held: Sequence[Ranges], limit_s: float) -> None:
        self._search, self._held, self._limit_s = search, held, limit_s
        layers = range(search.num_layers)
        # [device][n]: how many of the first n layers it holds
        self._counts = [[0, *_cumulate(_holds(ranges, layer) for layer in layers)] for ranges in held]

    def better(self, orders: Iterable[tuple[int, ...]], best: Arrangement) -> Arrangement:
        """The arrangement that keeps the most layers; `best` where none keeps more than it."""
        layers = self._search.num_layers
        most = {order: self._most_kept(order, [layers] * len(order))[0][0] for order in orders}
        found, kept = best, layers - num_moved(best.devices, best.partition.layers, self._held)
        for order in sorted(most, key=lambda order: (-most[order], len(order)))[:_MOST_ORDERS]:
            if most[order] <= kept:
                break
            for other in self._arrangements(order, kept + 1):
                count = layers - num_moved(order, other.partition.layers, self._held)
                if count > kept:
                    found, kept = other, count
        return found

    def _most_kept(self, order: Sequence[int], most: Sequence[int]) -> list[list[float]]:
        """[stage][border]: the most layers that this stage and those after it keep, of the layers from the border on.

        `most` limits each stage's layers.

        O(P L): the best next border of a stage is the first of a sliding window.
        """
        layers = self._search.num_layers
        rest = [[-math.inf] * layers + [0.0]]
        for device, limit in zip(reversed(order), reversed(most), strict=True):
            counts, after, own = self._counts[device], rest[0], [-math.inf] * (layers + 1)
            window: deque[int] = deque()  # ends of this stage, the best first
            for first in range(layers - 1, -1, -1):
                value = after[first + 1] + counts[first + 1]
                while window and after[window[-1]] + counts[window[-1]] <= value:
                    window.pop()
                window.append(first + 1)
                while window and window[0] - first > limit:
                    window.popleft()
                if window:
                    own[first] = after[window[0]] + counts[window[0]] - counts[first]
            rest.insert(0, own)
        return rest

    def _arrangements(self, order: tuple[int, ...], least: int) -> Iterator[Arrangement]:
        """At most one for each number of micro-batches ahead: the first cut within the limit that keeps so many."""
        search, count = self._search, len(order)
        links = [search.links(one, other) for one, other in itertools.pairwise(order)]
        boundaries = [one for one in links if one is not None]
        link_s = max((one.message_s for one in boundaries), default=0.0)
        if len(boundaries) < len(links) or search.num_micro_batches * link_s > self._limit_s:
            return
        for ahead in search.aheads:
            flights = [num_in_flight(place, count, search.num_micro_batches, ahead) for place in range(count)]
            roles = [Role(place == 0, place == count - 1, flight) for place, flight in enumerate(flights)]
            ways = [search.ways(device, role) for device, role in zip(order, roles, strict=True)]
            if found := self._first_fast(order, ways, boundaries, (ahead, least)):
                yield found

    def _first_fast(
        self,
        order: tuple[int, ...],
        ways: Sequence[Sequence[Way]],
        boundaries: Sequence[Boundary],
        ahead_and_least: tuple[int, int],
    ) -> Arrangement | None:
        search, (ahead, least) = self._search, ahead_and_least
        cap_s = self._limit_s / search.num_micro_batches
        offers = [_list_offers(own, search.num_layers, cap_s) for own in ways]
        seconds = [[one for one, _ in own] for own in offers]
        link_s = max((one.message_s for one in boundaries), default=0.0)
        for layers in itertools.islice(self._cuts(order, seconds, least), _TRIES):
            if _least_s([own[count - 1] for own, count in zip(seconds, layers, strict=True)], search) >= self._limit_s:
                continue
            chosen = tuple(own[count - 1][1] for own, count in zip(offers, layers, strict=True))
            slowest_s = max(own[count - 1] for own, count in zip(seconds, layers, strict=True))
            cut = Partition(layers, chosen, max(slowest_s, link_s))
            step_s = simulate(cut.passes, boundaries, search.num_micro_batches, ahead).step_s
            if step_s < self._limit_s:
                return Arrangement(order, ahead, cut, tuple(boundaries), step_s)
        return None

    def _cuts(self, order: Sequence[int], seconds: Sequence[Sequence[float]], least: int) -> Iterator[tuple[int, ...]]:
        """Layers of each stage, of cuts that keep at least `least`: the most kept first, then by the slowest stage.

        `seconds` lists those of each stage by its number of layers, from one to the most that it may have.
        """
        layers = self._search.num_layers
        rest = self._most_kept(order, [len(own) for own in seconds])
        visits: dict[tuple[int, int], int] = {}
        heap: list[tuple[float, float, tuple[int, ...]]] = [(-rest[0][0], 0.0, ())] if rest[0][0] >= least else []
        while heap:
            bound, slowest_s, done = heapq.heappop(heap)
            first, stage = sum(done), len(done)
            if stage == len(order):
                yield done
                continue
            visits[stage, first] = visits.get((stage, first), 0) + 1
            if visits[stage, first] > _VISITS:
                continue
            counts = self._counts[order[stage]]
            kept = -bound - rest[stage][first]
            for number, own_s in enumerate(seconds[stage][: layers - first], 1):
                value = kept + counts[first + number] - counts[first] + rest[stage + 1][first + number]
                if value >= least:
                    heapq.heappush(heap, (-value, max(slowest_s, own_s), (*done, number)))


def _list_offers(ways: Sequence[Way], num_layers: int, cap_s: float) -> list[tuple[float, Way]]:
    """Seconds and the fastest way of a stage of one layer, of two and so on, while one fits within `cap_s`."""
    found: list[tuple[float, Way]] = []
    for layers in range(1, num_layers + 1):
        fitting = [(way.total_s(layers), number) for number, way in enumerate(ways) if way.most_layers >= layers]
        if not fitting or min(fitting)[0] > cap_s:
            break
        seconds, number = min(fitting)
        found.append((seconds, ways[number]))
    return found


def _least_s(seconds: Sequence[float], search: Search) -> float:
    """A lower bound of a step: a stage computes all micro-batches after the first arrives."""
    before = itertools.accumulate(seconds, initial=0.0)
    return max(first + search.num_micro_batches * own for first, own in zip(before, seconds, strict=False))


def _cumulate(values: Iterable[bool]) -> Iterator[int]:
    total = 0
    for value in values:
        total += value
        yield total
