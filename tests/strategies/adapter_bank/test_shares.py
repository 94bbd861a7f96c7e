"""Shares that are tuned on labelled rows, and shares that are learned from a bank."""

import numpy
import pytest
import torch
from torch import nn

from strategies.adapter_bank.algebra import Factors
from strategies.adapter_bank.evidence import Evidence, gather
from strategies.adapter_bank.generation import combine_by_map, truncated
from strategies.adapter_bank.shares.decoder import fit_decoder
from strategies.adapter_bank.shares.distances import DISTANCES
from strategies.adapter_bank.shares.generator import (
    DIRECTIONS,
    KERNELS,
    RIDGES,
    FitSetting,
    Generator,
    dual_of,
    errors_left_out,
    principal,
    reconstruction_error,
)
from strategies.adapter_bank.shares.tuning import TunableSum, tune
from strategies.adapter_bank.trial import corrected

VOCABULARY, WIDTH = 300, 16
EMBEDDINGS = numpy.random.default_rng(7).standard_normal((VOCABULARY, WIDTH)).astype(numpy.float32)


class Maps(nn.Module):
    """Two linear maps one after the other."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)
        for layer in (self.first, self.second):
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape, generator=draw), requires_grad=False)

    def forward(self, x_BI):
        return self.second(torch.tanh(self.first(x_BI)))


def a_part(seed, names=("first", "second"), rank=2):
    draw, sizes = torch.Generator().manual_seed(seed), {"first": (5, 6), "second": (3, 5)}
    return {
        name: Factors(
            torch.randn(rank, sizes[name][1], generator=draw), torch.randn(sizes[name][0], rank, generator=draw)
        )
        for name in names
    }


# Tuning.


def test_a_tunable_sum_computes_what_the_corrected_weights_do():
    model, parts = Maps(), [a_part(0), a_part(1, ("first",)), a_part(2, rank=3)]
    shares = {"first": numpy.array([1.0, -0.5, 0.3]), "second": numpy.array([0.2, 0.0, 2.0])}
    x_BI = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    total = TunableSum(model, parts, [1.0, 0.0, 0.0])
    with torch.no_grad():
        total.shares_MP.copy_(torch.tensor(numpy.stack([shares[name] for name in total.names])))

    with total.added() as summed:
        found = summed(x_BI)
    with corrected(model, combine_by_map(parts, shares)) as exact:
        torch.testing.assert_close(found, exact(x_BI))
    assert not torch.equal(model(x_BI), found) and torch.equal(model(x_BI), Maps()(x_BI))


def test_tuning_finds_the_shares_that_made_the_answers_map_by_map():
    model, parts = Maps(), [a_part(seed) for seed in range(3)]
    wanted = {"first": numpy.array([1.0, 0.3, 0.0]), "second": numpy.array([1.0, 0.0, -0.4])}
    draw = torch.Generator().manual_seed(1)
    seen, kept = torch.randn(48, 6, generator=draw), torch.randn(16, 6, generator=draw)
    with corrected(model, combine_by_map(parts, wanted)) as exact:
        answers, others = exact(seen), exact(kept)
    total = TunableSum(model, parts, [1.0, 0.0, 0.0])

    with total.added() as summed:
        found = tune(
            total,
            lambda step: (summed(seen) - answers).square().mean(),
            lambda: (summed(kept) - others).square().mean().item(),
        )

    assert found.gained and min(found.losses) < 0.05 * found.losses[0]
    assert all(abs(found.shares[name] - wanted[name]).max() < 0.15 for name in wanted)


def test_tuning_keeps_the_start_where_rows_that_were_held_back_get_worse():
    total = TunableSum(Maps(), [a_part(0), a_part(1)], [1.0, 0.0])

    found = tune(total, lambda step: total.shares_MP.square().sum(), lambda: -total.shares_MP.sum().item())

    assert not found.gained and found.num_steps == 10  # two looks without a gain
    assert all(shares.tolist() == [1.0, 0.0] for shares in found.shares.values())


def test_what_is_written_of_a_sum_says_what_its_rank_leaves_out():
    parts = [a_part(seed) for seed in range(3)]
    exact = combine_by_map(parts, {name: numpy.ones(3) for name in ("first", "second")})

    made, error = truncated(exact, 2)

    missed = sum(float((made[name].delta() - one.delta()).square().sum()) for name, one in exact.items())
    whole = sum(float(one.delta().square().sum()) for one in exact.values())
    assert error == pytest.approx((missed / whole) ** 0.5, rel=1e-4) and 0.05 < error < 1


# Distances over the tokens that occur.


@pytest.mark.parametrize("name", ["js", "js_answers", "kl"])
def test_tokens_that_never_occur_may_be_counted_together(name):
    evidence = [some_evidence(seed, 30 * seed, 30 * seed + 60) for seed in range(3)]
    part = (lambda one: one.answers) if name == "js_answers" else (lambda one: one.tokens)
    own, *others = (part(one).density(VOCABULARY) for one in evidence)

    def kl(p, q):
        return float((p * numpy.log(p / q)).sum())

    def js(p, q):
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2

    dense = [(kl if name == "kl" else js)(own, other) for other in others]

    numpy.testing.assert_allclose(DISTANCES[name](evidence[0], evidence[1:]), dense, rtol=1e-6)


# The generator.


def some_evidence(seed, low=0, high=VOCABULARY):
    draw = numpy.random.default_rng(seed)
    rows = [(draw.integers(low, high, 30).astype(numpy.int32), numpy.arange(30) > 20) for _ in range(24)]
    return gather(rows, EMBEDDINGS)


def planted(count=24, hidden=3, noise=0.02):
    """Data sets whose mean embedding says linearly what their adapters are; with the inner products of two maps."""
    draw = numpy.random.default_rng(3)
    topics_NH = draw.standard_normal((count, hidden))
    lift_HD = draw.standard_normal((hidden, WIDTH))
    evidence = []
    for topic_H in topics_NH:
        rows_KD = topic_H @ lift_HD + 0.1 * draw.standard_normal((24, WIDTH))
        counts = some_evidence(0)
        evidence.append(Evidence(counts.tokens, counts.answers, rows_KD.astype(numpy.float16), VOCABULARY, 24))
    grams, whole = {}, {}
    for name, size in (("first", 30), ("second", 20)):
        deltas_NS = topics_NH @ draw.standard_normal((hidden, size)) + noise * draw.standard_normal((count, size))
        grams[name], whole[name] = deltas_NS @ deltas_NS.T, deltas_NS
    return evidence, grams, whole


def missed(shares, whole, place, keep):
    """Of the squares of an adapter what its sum of the others leaves out."""
    made = {name: shares[name] @ deltas[keep] for name, deltas in whole.items()}
    gone = sum(float(((made[name] - deltas[place]) ** 2).sum()) for name, deltas in whole.items())
    return gone / sum(float((deltas[place] ** 2).sum()) for deltas in whole.values())


def test_a_generator_without_ridge_gives_each_known_data_set_its_own_adapter():
    evidence, grams, whole = planted(count=8, hidden=8)
    made = Generator.fit(evidence, grams, FitSetting("embedding", 1e-9, 8), range(8))

    for place, one in enumerate(evidence):
        assert missed(made.shares(one), whole, place, list(range(8))) < 1e-4


def test_all_directions_are_a_round_trip_and_fewer_are_the_best_of_their_number():
    _, grams, whole = planted()
    gram, deltas = grams["first"], whole["first"]
    values = numpy.linalg.svd(deltas, compute_uv=False)

    for count in (24, 2):
        u_NK = principal(gram, count)
        left = deltas - u_NK @ (u_NK.T @ deltas)

        assert float((left**2).sum()) == pytest.approx(float((values[count:] ** 2).sum()), abs=1e-6)


def test_shares_sum_to_one_whatever_the_ridge():
    evidence, _, _ = planted()
    kernel = numpy.stack([KERNELS["embedding"](one, evidence) for one in evidence])

    for ridge in (1e-6, 1.0, 1e6):
        assert dual_of(kernel, kernel[3], ridge).sum() == pytest.approx(1)
    numpy.testing.assert_allclose(dual_of(kernel, kernel[3], 1e9), 1 / 24, atol=1e-6)


def test_the_error_by_inner_products_is_that_of_the_corrections():
    _, grams, whole = planted()
    others, shares = list(range(1, 24)), numpy.random.default_rng(0).standard_normal(23)

    found = reconstruction_error(grams["first"], 0, others, shares)

    exact = float(((shares @ whole["first"][others] - whole["first"][0]) ** 2).sum())
    assert found == pytest.approx(exact, rel=1e-6)


def test_data_sets_left_out_are_reconstructed_and_shuffled_ones_are_not():
    evidence, grams, whole = planted()
    errors = errors_left_out(evidence, grams, ["embedding"])
    setting = min(errors, key=errors.get)
    assert len(errors) == len(RIDGES) * len(DIRECTIONS) and errors[setting] < 0.3
    keep = list(range(1, 24))
    rotated = [evidence[0], *(evidence[keep[at - 1]] for at in range(23))]

    right, wrong = (
        missed(Generator.fit(given, grams, setting, keep).shares(evidence[0]), whole, 0, keep)
        for given in (evidence, rotated)
    )

    assert right < 0.3 and wrong > 2 * right


def test_the_decoder_overfits_four_data_sets_and_is_the_same_for_the_same_seed():
    evidence, grams, whole = planted(count=4, hidden=4)

    made, again = (fit_decoder(evidence, grams, 4) for _ in range(2))

    keep = list(range(4))
    for place, one in enumerate(evidence):
        shares = made.shares(one)
        assert missed(shares, whole, place, keep) < 0.05
        assert all(numpy.array_equal(shares[name], other) for name, other in again.shares(one).items())
