"""Which slots could train together: groups worth a full estimate, found by arithmetic alone.  Pure.

A slot's pace is the seconds of a step by its share of the samples, and equal slots have one.  From paces and links the
time of any group follows in closed form, so that many groups are compared for the price of a few estimates.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from clusters.capability import ClusterCapability
from orchestrator.planning.candidates import Slot, limit_per_node, network_between, slowest_link, waiting_s
from strategies.contract import StrategyPlan
from strategies.cost.network import Network

_MOST_SUBSETS = 64  # of so many all are compared; of more those of the fastest slots with good links
_KEPT = 2  # subsets of one size that are worth a full estimate: the best may not fit together
_CLOSE, _MOST_CLOSE = 1.02, 4  # times the best of a size: subsets that are worth one as well, and how many in all
_SPARE = 2  # groups of a size that are placed where the best does not fit, among many slots
_MESSAGE_BYTES = 25 * 2**20  # of the sums that rank links: a bucket of gradients
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)  # of links' seconds: worse links are avoided
_ISLANDS = 3  # of slots that are linked well enough, for each limit
_RING = 16  # workers whose round trips a link's rank counts
_APART = 1e-3  # of a share: nearer ones say nothing of what a sample takes
_HALVINGS = 16  # of the time in which all finish
_REFINED = 8  # sizes between two others that are compared
_SEEDS = 3  # slots around which the best linked others are gathered
_NEAR_LINK = 0.5  # of the best link's rate: as good


@dataclass(frozen=True)
class Pace:
    """Seconds of a step on one slot: those of any share, and those of all samples together."""

    plan: StrategyPlan
    fixed_s: float
    whole_s: float

    @classmethod
    def of(cls, plan: StrategyPlan, share: float) -> Pace:
        """By a plan for one share of the samples."""
        time = plan.time
        fixed_s = time.update_s + (time.transfer_s if plan.techniques.offload == "optimizer" else 0.0)
        return cls(plan, fixed_s, max(time.step_s - fixed_s, 1e-12) / share)

    @classmethod
    def through(cls, plan: StrategyPlan, share: float, other: StrategyPlan, other_share: float) -> Pace:
        """By plans for two shares: what a micro-batch takes however few samples it has is no part of any sample."""
        pace, step_s = cls.of(plan, share), plan.time.step_s
        if abs(share - other_share) < _APART * share:
            return pace
        whole_s = (step_s - other.time.step_s) / (share - other_share)
        fixed_s = step_s - whole_s * share
        return cls(plan, fixed_s, whole_s) if whole_s > 0 and fixed_s >= pace.fixed_s else pace

    def step_s(self, share: float) -> float:
        return self.fixed_s + share * self.whole_s


def balance(paces: Sequence[Pace], counts: Sequence[int]) -> tuple[float, list[float]]:
    """When all finish a step together, and the share of one slot of each kind: n (t - fixed) / whole add up to 1.

    One that updates its weights for longer than that gets a share by its speed all the same: it takes part.
    """
    speed = sum(count / pace.whole_s for pace, count in zip(paces, counts, strict=True))
    late = sum(count * pace.fixed_s / pace.whole_s for pace, count in zip(paces, counts, strict=True))
    finish_s = (1 + late) / speed
    shares = [(finish_s - pace.fixed_s) / pace.whole_s for pace in paces]
    if min(shares) <= 0:
        shares = [1 / pace.whole_s / speed for pace in paces]
        finish_s = max(pace.step_s(share) for pace, share in zip(paces, shares, strict=True))
    return finish_s, shares


@dataclass
class Curve:
    """Seconds of a step on one slot by its share of the samples: straight lines between the shares that were estimated.

    More samples make more micro-batches, or larger ones, or need other settings: no single pace holds for all shares.
    """

    points: list[tuple[float, float]]  # share and seconds, by share; the first is what a share of nothing would take

    def add(self, share: float, seconds: float) -> None:
        bisect.insort(self.points, (share, seconds))

    def share_within(self, seconds: float) -> float:
        """The largest share that takes no more seconds."""
        points = self.points
        last = next((i for i in reversed(range(len(points))) if points[i][1] <= seconds), None)
        if last is None:
            return 0.0
        is_beyond = last == len(points) - 1
        (share, since), (more, until) = (points[0], points[-1]) if is_beyond else points[last : last + 2]
        return share + (more - share) * (seconds - since) / max(until - since, 1e-12)


def share_out(curves: Sequence[Curve], counts: Sequence[int], least: float) -> tuple[float, list[float]]:
    """When all finish a step together, and the share of one slot of each kind, of which none is below the least."""

    def shares_within(seconds: float) -> list[float]:
        return [max(least, curve.share_within(seconds)) for curve in curves]

    def whole(shares: Sequence[float]) -> float:
        return sum(count * share for count, share in zip(counts, shares, strict=True))

    if sum(counts) * least >= 1:
        return 0.0, [1 / sum(counts)] * len(curves)
    early, late = 0.0, max(curve.points[-1][1] for curve in curves)
    while whole(shares_within(late)) < 1:
        early, late = late, 2 * late
    for _ in range(_HALVINGS):
        middle = (early + late) / 2
        early, late = (early, middle) if whole(shares_within(middle)) >= 1 else (middle, late)
    shares = shares_within(late)
    return late, [share / whole(shares) for share in shares]


@dataclass
class Chain:
    """Slots in an order, and the slowest link among the first so many of them."""

    slots: list[Slot] = field(default_factory=list)
    links: list[tuple[float, float]] = field(default_factory=list)  # bytes a second, round trip


class Links:
    """The links between the nodes of some slots, and which slots are linked well enough to be grouped."""

    def __init__(self, cluster: ClusterCapability, slots: Sequence[Slot]) -> None:
        self.cluster = cluster
        self._names = list(dict.fromkeys(slot.node.name for slot in slots))
        self._places = {name: place for place, name in enumerate(self._names)}
        self._networks: dict[tuple[str, ...], tuple[Network | None, bool]] = {}
        self._chains: dict[tuple[tuple[int, ...], float], list[Chain]] = {}
        self._rates: list[list[float]] = []
        self._trips: list[list[float]] = []
        self.are_alike = cluster.has_like_links or len(self._names) < 2
        self.limits = [math.inf] if self.are_alike else self._rank()

    def _rank(self) -> list[float]:
        """Note each link; the limits of a link's seconds that groups are formed by."""
        count = len(self._names)
        self._rates = [[math.inf] * count for _ in range(count)]
        self._trips = [[0.0] * count for _ in range(count)]
        for i, j in itertools.combinations(range(count), 2):
            rate, trip, _ = slowest_link((self._names[i], self._names[j]), self.cluster)
            self._rates[i][j] = self._rates[j][i] = rate
            self._trips[i][j] = self._trips[j][i] = trip
        found = sorted(self._link_s(i, j) for i, j in itertools.combinations(range(count), 2))
        return sorted({found[int(part * (len(found) - 1))] for part in _QUANTILES})

    def _link_s(self, i: int, j: int) -> float:
        """What a bucket of a ring takes over a link: what links are compared by."""
        return _MESSAGE_BYTES / self._rates[i][j] + min(len(self._names), _RING) * self._trips[i][j]

    def network(self, slots: Sequence[Slot]) -> tuple[Network | None, bool]:
        """As `network_between`; looked up where the same nodes were asked for before."""
        key = tuple(slot.node.name for slot in slots)
        if key not in self._networks:
            self._networks[key] = network_between(slots, self.cluster)
        return self._networks[key]

    def chains(self, order: Sequence[Slot], limit: float) -> list[Chain]:
        """The slots linked well enough to the fastest, then to the fastest of the rest: islands with slow links between
        them, of which the one with the fastest slot need not be the best.
        """
        key = tuple(map(id, order)), limit
        if key not in self._chains:
            found, rest = list[Chain](), list(order)
            while rest and len(found) < _ISLANDS:
                found.append(self.chain(rest, limit))
                taken = set(map(id, found[-1].slots))
                rest = [slot for slot in rest if id(slot) not in taken]
            self._chains[key] = found
        return self._chains[key]

    def chain(self, order: Sequence[Slot], limit: float) -> Chain:
        """The slots in their order without those that have a link worse than `limit` to one before them."""
        chain = Chain()
        if self.are_alike:
            link = slowest_link(self._names, self.cluster)[:2] if len(self._names) > 1 else (math.inf, 0.0)
            return Chain(list(order), [link] * len(order))
        members: dict[int, None] = {}
        rate, trip = math.inf, 0.0
        for slot in order:
            place = self._places[slot.node.name]
            if place not in members:
                if limit < self.limits[-1] and any(self._link_s(place, other) > limit for other in members):
                    continue
                rate = min(rate, min(map(self._rates[place].__getitem__, members), default=math.inf))
                trip = max(trip, max(map(self._trips[place].__getitem__, members), default=0.0))
                members[place] = None
            chain.slots.append(slot)
            chain.links.append((rate, trip))
        return chain


@dataclass
class Groups:
    """Groups of slots by what a step of theirs would take."""

    links: Links
    pace: Callable[[Slot, int], Pace | None]  # of a slot in a group of that size; None where it does not fit there
    batch_size: int  # samples of a step: each slot of a group has one, unless the job states more slots
    equal_parts: bool = False  # whatever the paces
    stated: int | None = None  # a number of slots that the job states

    @property
    def most(self) -> int:
        """Slots of a group."""
        return max(self.batch_size, self.stated or 0)

    def best(self, slots: Sequence[Slot]) -> list[list[list[Slot]]]:
        """The best groups of each number of slots that is looked at, the best of all first.

        Each stands before those to place where it turns out not to fit: a score knows no division of the state.
        """
        few = 2 ** len(slots) <= _MOST_SUBSETS
        scored = self._subsets(slots) if few else itertools.chain(self._prefixes(slots), self._inside_nodes(slots))
        by_size: dict[int, list[tuple[float, int, list[Slot]]]] = {}
        for number, (seconds, group) in enumerate(scored):
            if math.isfinite(seconds):
                by_size.setdefault(len(group), []).append((seconds, number, group))
        kept = list[list[tuple[float, int, list[Slot]]]]()
        for found in map(sorted, by_size.values()):
            kept += [[one] for one in _closest(found)] if few else [found[: 1 + _SPARE]]
        return [[group for _, _, group in entry] for entry in sorted(kept)]

    def _score(self, slots: Sequence[Slot], network: Network | None) -> float:
        """Seconds of a step of these slots together; infinite where one of them does not fit."""
        counts: dict[int, int] = {}
        paces: dict[int, Pace] = {}
        for slot in slots:
            pace = self.pace(slot, len(slots))
            if pace is None:
                return math.inf
            counts[id(pace)] = counts.get(id(pace), 0) + 1
            paces[id(pace)] = pace
        known = list(paces.values())
        if self.equal_parts:
            seconds = max(pace.step_s(1 / len(slots)) for pace in known)
        else:
            seconds, _ = balance(known, list(counts.values()))
            least = min(1 / self.batch_size, 1 / len(slots))  # a share below a sample is none
            seconds = max(seconds, *(pace.step_s(least) for pace in known))
        return seconds + (waiting_s(network, [pace.plan for pace in known]) if network else 0.0)

    def _subsets(self, slots: Sequence[Slot]) -> Iterator[tuple[float, list[Slot]]]:
        seen = set[Any]()
        for count in range(2, min(self.most, len(slots)) + 1):
            for chosen in itertools.combinations(slots, count):
                alike = self._kind_of(chosen)
                if alike not in seen and len(limit_per_node(chosen)) == count:
                    seen.add(alike)
                    yield self._score(chosen, self.links.network(chosen)[0]), list(chosen)

    def _kind_of(self, slots: Sequence[Slot]) -> Any:
        """Equal for groups of equal slots, of equal nodes too where all links are alike: one of them stands for all."""
        by_node: dict[str, list[int]] = {}
        for slot in slots:
            by_node.setdefault(slot.node.name, []).append(id(self.pace(slot, len(slots))))
        names = {name: "" if self.links.are_alike else name for name in by_node}
        return tuple(sorted((names[name], tuple(sorted(ids))) for name, ids in by_node.items()))

    def _prefixes(self, slots: Sequence[Slot]) -> Iterator[tuple[float, list[Slot]]]:
        """The fastest two, three, four, six ... of those that are linked well enough, and sizes around the best."""
        sizes = self._sizes(len(slots))
        best: dict[int, float] = {}
        for size in sizes:
            for seconds, group in self._of_size(slots, size):
                best[size] = min(best.get(size, math.inf), seconds)
                yield seconds, group
        if not best or self.equal_parts:
            return
        middle = sizes.index(min(best, key=best.__getitem__))
        low, high = sizes[max(0, middle - 1)], sizes[min(len(sizes) - 1, middle + 1)]
        for size in range(low + 1, high, max(1, (high - low) // _REFINED)):
            if size not in best:
                yield from self._of_size(slots, size)

    def _of_size(self, slots: Sequence[Slot], size: int) -> Iterator[tuple[float, list[Slot]]]:
        order, seen = self._order(slots, size), set[tuple[int, ...]]()
        for chain in itertools.chain.from_iterable(self.links.chains(order, limit) for limit in self.links.limits):
            group = chain.slots[:size]
            if len(group) < size or (ids := tuple(map(id, group))) in seen:
                continue
            seen.add(ids)
            yield self._score(group, self._network(group, chain.links[size - 1])), group

    def _inside_nodes(self, slots: Sequence[Slot]) -> Iterator[tuple[float, list[Slot]]]:
        """The slots of one node, nodes of one kind once: no network is as fast as the links inside a machine."""
        by_node: dict[str, list[Slot]] = {}
        for slot in slots:
            by_node.setdefault(slot.node.name, []).append(slot)
        seen = set[tuple[int, ...]]()
        for here in by_node.values():
            for size in self._sizes(len(here)) if len(here) > 1 else ():
                group = self._order(here, size)[:size]
                alike = tuple(id(self.pace(slot, size)) for slot in group)
                if len(group) == size and alike not in seen:
                    seen.add(alike)
                    yield self._score(group, self.links.network(group)[0]), group

    def _network(self, group: Sequence[Slot], link: tuple[float, float]) -> Network | None:
        if all(slot.node.name == group[0].node.name for slot in group):
            return self.links.network(group)[0]
        return Network(len(group), *link)

    def _order(self, slots: Sequence[Slot], size: int) -> list[Slot]:
        """The slots that fit in groups of a size, the fastest first."""
        timed = [(pace.step_s(1 / size), slot) for slot in slots if (pace := self.pace(slot, size))]
        return limit_per_node([slot for _, slot in sorted(timed, key=lambda item: item[0])])

    def _sizes(self, num_slots: int) -> list[int]:
        most = min(self.most, num_slots)
        doubled = itertools.takewhile(lambda size: size < most, (2**power for power in itertools.count(1)))
        # Each size of equal parts is a division of its own, with all settings to be estimated.
        between = doubled if self.equal_parts else (size for each in doubled for size in (each, each * 3 // 2))
        sizes = {*between, most, self.stated or most}
        return sorted(size for size in sizes if 2 <= size <= most)


def _closest(scored: Sequence[tuple[float, int, list[Slot]]]) -> list[tuple[float, int, list[Slot]]]:
    """Of subsets of one size, best first, those worth a full estimate: a score is right to some percent."""
    enough_s = _CLOSE * scored[0][0]
    return [one for place, one in enumerate(scored[:_MOST_CLOSE]) if place < _KEPT or one[0] <= enough_s]


def linked_groups(num_slots: int, most: int, rate: Callable[[int, int], float]) -> list[list[int]]:
    """All places where there are so many at most; of more, those with good links to one of the first, first ones first.

    Slots stand in order of their speed; `rate` is of the link between two places.
    """
    places = range(num_slots)
    if num_slots <= most:
        return [list(places)]
    found: dict[frozenset[int], list[int]] = {}
    for seed in places[:_SEEDS]:
        rates = {other: rate(seed, other) for other in places if other != seed}
        near = _NEAR_LINK * max(rates.values())
        others = sorted(rates, key=lambda other: (rates[other] < near, other))
        group = [seed, *others[: most - 1]]
        found.setdefault(frozenset(group), group)
    return list(found.values())
