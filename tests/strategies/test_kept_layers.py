"""Planned again, a pipeline moves as few layers as a step about as short allows."""

import itertools
import random
import time

from strategies.cost.kept_layers import ABOUT_AS_FAST, best_kept, num_moved
from strategies.cost.pipeline import Boundary, Line, Pass, Search, Way, orders_of, simulate

M = 8  # micro-batches a step


def search_of(layer_s, most=None, num_layers=12, rate=1e9):
    """Devices of such seconds a layer, on which so many layers fit."""
    most = most or [num_layers] * len(layer_s)

    def ways(device, _role):
        forward, backward = Line(0.0, layer_s[device] / 3), Line(0.0, 2 * layer_s[device] / 3)
        return [Way(forward, backward, most[device], device)] if most[device] else []

    return Search(num_layers, M, ways, lambda *_: Boundary(100.0, rate), (0, 1))


def orders(held):
    return orders_of(range(len(held)), range(2, 7))


def every_cut(search, layer_s, most):
    """(devices, layers, seconds of a step) of every order, cut and number of micro-batches ahead that fits."""
    for order in orders(layer_s):
        for inner in itertools.combinations(range(1, search.num_layers), len(order) - 1):
            layers = [end - first for first, end in itertools.pairwise((0, *inner, search.num_layers))]
            if any(count > most[device] for device, count in zip(order, layers, strict=True)):
                continue
            passes = [Pass(layer_s[d] * n / 3, 2 * layer_s[d] * n / 3) for d, n in zip(order, layers, strict=True)]
            links = [search.links(0, 1)] * (len(order) - 1)
            for ahead in search.aheads:
                yield order, layers, simulate(passes, links, M, ahead).step_s


def test_no_arrangement_about_as_fast_moves_fewer_layers():
    chance, moved_less, tried = random.Random(5), 0, 0
    for _ in range(40):
        count = chance.randint(2, 4)
        layer_s = [chance.choice([0.5, 1.0, 1.1, 2.0]) for _ in range(count)]
        most = [chance.randint(2, 9) for _ in range(count)]
        edges = [0, *sorted(chance.sample(range(1, 9), count - 1)), 9]
        held = [[(first, end)] for first, end in itertools.pairwise(edges)]
        held[chance.randrange(count)] = []
        chance.shuffle(held)
        search = search_of(layer_s, most, 9, rate=chance.choice([100.0, 1e9]))
        best = search.best(orders(held))
        if best is None:
            continue
        tried += 1

        found = best_kept(search, orders(held), held)

        limit_s = ABOUT_AS_FAST * best.step_s
        moved = num_moved(found.devices, found.partition.layers, held)
        fewest = min(
            num_moved(devices, layers, held)
            for devices, layers, step_s in every_cut(search, layer_s, most)
            if step_s < limit_s
        )
        assert moved == fewest
        assert found.step_s < limit_s
        assert sum(found.partition.layers) == 9
        assert found.simulate(M).step_s == found.step_s
        moved_less += moved < num_moved(best.devices, best.partition.layers, held)
    assert tried > 20
    assert moved_less > 5, "the best alone would have done"


def test_what_a_lost_stage_held_goes_where_the_rest_may_stay():
    """Three equal devices of four layers each, and one comes in place of the second."""
    held = [[(0, 4)], [(8, 12)], []]

    found = best_kept(search_of([1.0] * 3), orders(held), held)

    assert (found.devices, found.partition.layers) == ((0, 2, 1), (4, 4, 4))


def test_a_node_that_stood_by_takes_over_what_it_has_read():
    """Of two equal ones in place of a lost stage."""
    held = [[(0, 4)], [(8, 12)], [], [(4, 8)]]

    found = best_kept(search_of([1.0] * 4), orders_of(range(4), (3,)), held)

    assert num_moved(found.devices, found.partition.layers, held) == 0
    assert found.devices == (0, 3, 1)


def test_layers_move_where_that_saves_more_than_a_twentieth():
    held = [[(0, 10)], [(10, 12)]]

    found = best_kept(search_of([1.0, 1.0]), orders(held), held)

    assert found.step_s < ABOUT_AS_FAST * search_of([1.0, 1.0]).best(orders(held)).step_s
    assert num_moved(found.devices, found.partition.layers, held) >= 3


def test_nothing_changes_where_nothing_is_held_and_no_limit_is_passed():
    search = search_of([1.0, 1.2, 0.7])
    best = search.best(orders([[]] * 3))

    assert best_kept(search, orders([[]] * 3), [[]] * 3) == best
    held = [[(0, 11)], [(11, 12)], []]
    assert best_kept(search, orders(held), held, 1.001 * best.step_s).step_s < 1.001 * best.step_s
    assert best_kept(search, orders(held), held, best.step_s) is None


def test_eighty_layers_over_six_devices_are_arranged_in_seconds():
    chance = random.Random(1)
    layer_s = [chance.uniform(0.8, 1.2) for _ in range(6)]
    held = [[(16 * n, 16 * n + 16)] for n in range(5)] + [[]]
    search, began = search_of(layer_s, num_layers=80), time.process_time()

    best_kept(search, orders(held), held)

    assert time.process_time() - began < 10
