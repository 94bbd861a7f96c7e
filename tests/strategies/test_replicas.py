"""Pipelines beside each other: which devices make one, how many micro-batches each gets, what the sums take."""

import itertools
import random
from dataclasses import replace

import pytest

from strategies.cost.kept_layers import best_kept_replicas, num_moved
from strategies.cost.network import Network
from strategies.cost.pipeline import Boundary, Line, Role, Search, Way
from strategies.cost.replicas import ReplicaSearch, divisions_of

BELL = [1, 1, 2, 5, 15, 52, 203, 877]


def search_of(layer_s, most, num_layers=5, num_micro_batches=6, rates=None, gradient_bytes=0.0, **changes):
    """Devices of such seconds a layer, on which so many layers fit with one micro-batch in flight.

    A message takes 0.1 s at rate 1; `rates` has those of pairs, None where there is no link.
    """

    def ways(device: int, role: Role):
        fits = max(0, most[device] - (role.num_in_flight - 1))
        seconds, fixed = layer_s[device], 0.5 * role.is_last
        forward, backward = Line(fixed / 3, seconds / 3), Line(2 * fixed / 3, 2 * seconds / 3)
        return [Way(forward, backward, fits, "way", Line(0.0, gradient_bytes))] if fits else []

    def links(one: int, other: int):
        rate = (rates or {}).get((min(one, other), max(one, other)), 1.0)
        return None if rate is None else Boundary(0.1, rate, 1e-3)

    return Search(num_layers, num_micro_batches, ways, links, worth_a_device=1.0, **changes)


def partitions(devices):
    """All set partitions, one after the other: each device into a part that is there, or into one of its own."""
    found = [[]]
    for device in devices:
        found = [
            [*parts[:at], [*parts[at], device], *parts[at + 1 :]] if at < len(parts) else [*parts, [device]]
            for parts in found
            for at in range(len(parts) + 1)
        ]
    return found


def normal(groups):
    return frozenset(map(frozenset, groups))


@pytest.mark.parametrize("count", range(2, 7))
def test_devices_are_divided_in_every_way_once(count):
    expected = {
        normal(parts)
        for size in range(2, count + 1)
        for chosen in itertools.combinations(range(count), size)
        for parts in partitions(chosen)
        if max(map(len, parts)) > 1
    }

    found = [
        normal(groups)
        for number in range(1, count)
        for groups in divisions_of(range(count), number, range(1, count + 1))
    ]

    # Of each subset its partitions are one more device's; without those in which each device is alone, and nobody.
    assert len(found) == len(set(found)) == BELL[count + 1] - 2**count
    assert set(found) == expected


def test_stated_stages_are_those_of_each_pipeline():
    found = list(divisions_of(range(5), 2, (2,)))

    assert len(found) == 15  # 5 x (4 choose 2) / 2
    assert {len(one) for groups in found for one in groups} == {2}


def brute_force(search, counts):
    """The shortest step of all set partitions, orders, cuts and divisions of the micro-batches; before sums."""
    devices, known = range(len(search.alike) or DEVICES), {}

    def step_s(group, count):
        if (group, count) not in known:
            own = replace(search, num_micro_batches=count)
            every = [own.best_of(order) for order in itertools.permutations(group)]
            known[group, count] = min((one.step_s for one in every if one), default=None)
        return known[group, count]

    found = []
    for number in counts:
        for size in range(number + 1, len(devices) + 1):
            for chosen in itertools.combinations(devices, size):
                for parts in partitions(chosen):
                    if len(parts) == number:
                        found += divided(search.num_micro_batches, list(map(tuple, parts)), step_s)
    return min(found, default=None)


def divided(total, groups, step_s):
    for borders in itertools.combinations(range(1, total), len(groups) - 1):
        counts = [after - before for before, after in itertools.pairwise((0, *borders, total))]
        seconds = [step_s(group, count) for group, count in zip(groups, counts, strict=True)]
        if None not in seconds:
            yield max(seconds)


DEVICES = 4


@pytest.mark.parametrize("number", [2, 3])
def test_pipelines_are_the_best_of_all_set_partitions_orders_cuts_and_shares(number):
    chance, fitting = random.Random(number), 0
    for _ in range(60):
        layer_s = [chance.uniform(0.1, 2.0) for _ in range(DEVICES)]
        most = [chance.randint(1, 7) for _ in range(DEVICES)]
        pairs = itertools.combinations(range(DEVICES), 2)
        rates = {pair: chance.choice([0.05, 1.0, 20.0]) for pair in pairs}
        search = search_of(layer_s, most, num_micro_batches=chance.randint(1, 7), rates=rates)
        every = list(divisions_of(range(DEVICES), number, range(1, DEVICES + 1)))

        found, best = ReplicaSearch(search).best(every), brute_force(search, (number,))

        assert (found is None) == (best is None)
        if found is None:
            continue
        fitting += 1
        assert found.step_s == pytest.approx(best)
        assert sum(found.num_micro_batches) == search.num_micro_batches
        assert sum(found.shares) == pytest.approx(1.0)
        assert list(found.num_micro_batches) == sorted(found.num_micro_batches, reverse=True)
        devices = [device for run in found.pipelines for device in run.devices]
        assert len(devices) == len(set(devices))
        for run, count in zip(found.pipelines, found.num_micro_batches, strict=True):
            assert sum(run.partition.layers) == search.num_layers
            assert run.simulate(count).step_s == run.step_s
    assert 15 < fitting < 60, "neither all fit nor none"


def test_a_limit_hides_only_what_is_longer():
    chance = random.Random(5)
    for _ in range(20):
        layer_s = [chance.uniform(0.1, 2.0) for _ in range(DEVICES)]
        search = search_of(layer_s, [chance.randint(2, 7) for _ in range(DEVICES)])
        every = list(divisions_of(range(DEVICES), 2, range(1, 5)))
        best = ReplicaSearch(search).best(every)

        if best:
            assert ReplicaSearch(search).best(every, best.step_s) is None
            assert ReplicaSearch(search).best(every, 1.001 * best.step_s).step_s == best.step_s


def test_micro_batches_go_by_speed():
    """Two pairs, one three times as fast: of sixteen micro-batches it takes twelve."""
    search = search_of(
        [1.0, 1.0, 3.0, 3.0], [4] * 4, num_layers=4, num_micro_batches=16, rates=dict.fromkeys(PAIRS, 1e6)
    )

    found = ReplicaSearch(search).best_of(((0, 1), (2, 3)))

    assert [set(run.devices) for run in found.pipelines] == [{0, 1}, {2, 3}]
    assert found.num_micro_batches == (12, 4)
    assert found.shares == [0.75, 0.25]


PAIRS = list(itertools.combinations(range(4), 2))


def test_a_layers_gradients_cross_the_slowest_link_between_its_holders():
    """Cut in the middle: 0 and 2 hold the lower layers, 1 and 3 the upper ones; 30 bytes a layer."""
    rates = {**dict.fromkeys(PAIRS, 1e6), (1, 3): 0.5}
    search = search_of([1.0] * 4, [3] * 4, 4, 4, rates, gradient_bytes=30.0, aheads=(0,))
    runs = [search.best_of(order) for order in ((0, 1), (2, 3))]

    found = ReplicaSearch(search).summed(runs, [2, 2])

    # A ring of two sends 2 x 60 / 2 bytes at 0.5 a second after a round trip of 2 ms; one bucket hides nothing.
    assert found.sum_s == pytest.approx(120.002)
    assert found.network == Network(2, 0.5, 2e-3)
    assert found.step_s == max(one.step_s for one in runs) + found.sum_s


def test_unequal_cuts_have_holders_by_their_layers():
    """Without a link between 1 and 2 they may not hold the same layers: the upper of 0 - 1, the lower of 2 - 3."""
    rates = {**dict.fromkeys(PAIRS, 1e6), (1, 2): None}
    search = search_of([1.0] * 4, [4, 4, 2, 4], 4, 4, rates, gradient_bytes=30.0, aheads=(0,))
    even, uneven = search.best_of((0, 1)), search.best_of((2, 3))
    other = replace(uneven, partition=replace(uneven.partition, layers=(3, 1)))
    assert (even.partition.layers, uneven.partition.layers) == ((2, 2), (1, 3))

    assert ReplicaSearch(search).summed([even, uneven], [2, 2]) is not None
    assert ReplicaSearch(search).summed([even, other], [2, 2]) is None


def test_nothing_is_summed_where_nothing_trains():
    search = search_of([1.0] * 4, [3] * 4, 4, 4)

    found = ReplicaSearch(search).best_of(((0, 1), (2, 3)))

    assert found.sum_s == 0.0


def test_gradients_decide_between_divisions():
    """Fast links 0 - 1 and 2 - 3: hidden states are small there or gradients are, by what a step sends more of."""
    rates = {**dict.fromkeys(PAIRS, 0.05), (0, 1): 1e3, (2, 3): 1e3}
    divisions = list(divisions_of(range(4), 2, (2,)))
    few, many = (
        ReplicaSearch(search_of([0.1] * 4, [4] * 4, 4, 4, rates, gradient_bytes=each)).best(divisions)
        for each in (1e-3, 10.0)
    )

    assert {frozenset(run.devices) for run in few.pipelines} == {frozenset({0, 1}), frozenset({2, 3})}
    assert {frozenset(run.devices) for run in many.pipelines} != {frozenset({0, 1}), frozenset({2, 3})}


def test_fewer_micro_batches_than_pipelines_make_none():
    assert (
        ReplicaSearch(search_of([1.0] * 4, [5] * 4, num_micro_batches=1)).best(divisions_of(range(4), 2, (2,))) is None
    )


def test_devices_that_are_alike_are_divided_once():
    search = search_of([1.0] * 6, [9] * 6, alike=["a"] * 6)
    asked = set()
    counted = replace(search, ways=lambda d, r: asked.add(d) or search.ways(d, r))

    found = ReplicaSearch(counted).best(divisions_of(range(6), 2, (3,)))

    assert len(found.pipelines) == 2
    assert asked == set(range(6))
    assert len(counted.cuts) <= 2 * 3 * 6, "of each pipeline one order, three depths, few numbers of micro-batches"


def test_planned_again_each_pipeline_has_its_devices_and_layers():
    """Alike devices in pairs 0 - 2 and 1 - 3, cut beside the middle."""
    search = search_of([1.0] * 4, [40] * 4, 40, 40, dict.fromkeys(PAIRS, 1e6), alike=["a"] * 4)
    held = [[(0, 19)], [(0, 20)], [(19, 40)], [(20, 40)]]

    found = best_kept_replicas(ReplicaSearch(search), divisions_of(range(4), 2, (2,)), held)

    assert {run.devices: run.partition.layers for run in found.pipelines} == {(0, 2): (19, 21), (1, 3): (20, 20)}
    assert sum(num_moved(run.devices, run.partition.layers, held) for run in found.pipelines) == 0
    assert found.step_s < 1.06 * ReplicaSearch(search).best(divisions_of(range(4), 2, (2,))).step_s
