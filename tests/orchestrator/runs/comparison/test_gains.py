"""Intervals hold what they promise where the truth is known, and the sentence says whether a gain may be chance."""

import numpy
import pytest

from orchestrator.runs.comparison.gains import gains
from orchestrator.runs.comparison.intervals import Interval, of_mean, of_scores, of_share, t_quantile


def holds(found: Interval, truth: float) -> bool:
    return found.low - 1e-12 <= truth <= found.high + 1e-12


@pytest.mark.parametrize(("count", "share"), [(50, 0.3), (200, 0.3), (200, 0.9)])
def test_wilsons_interval_holds_the_share_in_95_of_100_samples(count, share):
    from scipy.stats import binom

    hits = numpy.arange(count + 1)
    covered = [binom.pmf(hit, count, share) for hit in hits if holds(of_share(int(hit), count), share)]

    assert sum(covered) == pytest.approx(0.95, abs=0.02)  # exactly, over all samples: shares come in steps


def differences_of_texts(draw, shape):
    """Scores such as rouge_l's, after less before."""
    return draw.beta(4, 2, shape) - draw.beta(2, 4, shape), 1 / 3


def differences_of_answers(draw, shape):
    """Of right and wrong answers: most stay as they were."""
    return draw.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=shape), 0.1


@pytest.mark.parametrize("count", [20, 60, 200])
@pytest.mark.parametrize("differences", [differences_of_texts, differences_of_answers])
def test_intervals_of_differences_hold_the_truth_in_94_to_96_of_100_samples(differences, count):
    samples, truth = differences(numpy.random.default_rng(1), (num := 20_000 if count < 200 else 8_000, count))
    held = sum(holds(of_mean(sample), truth) for sample in samples.tolist())

    assert held / num == pytest.approx(0.95, abs=0.01)  # chance moves it by 0.0016, of the largest samples 0.0024


def test_the_spread_of_few_scores_is_students():
    from scipy.stats import t

    for degrees in (*range(1, 12), 59, 199, 1000):
        assert t_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=1e-5)


def test_they_are_scipys():
    from scipy.stats import binomtest

    for hits, count in ((0, 7), (3, 7), (7, 7), (80, 100)):
        wanted = binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert of_share(hits, count) == Interval(
            hits / count, *(pytest.approx(one) for one in (wanted.low, wanted.high))
        )


def test_equal_scores_have_no_spread_and_right_or_wrong_ones_wilsons():
    assert of_mean([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert of_scores([1.0, 1.0, 1.0]) == of_share(3, 3)
    assert of_scores([0.1, 0.0, 0.0]).low == 0.0  # a score is none below
    assert of_share(3, 3).low == pytest.approx(0.4385, abs=1e-4)  # of three right answers little is sure


def test_a_clear_gain_and_one_that_may_be_chance_are_told_apart():
    base, better, barely = ({"accuracy": [0.0] * (100 - right) + [1.0] * right} for right in (40, 80, 41))

    clear, chance = gains(base, better)["accuracy"], gains(base, barely)["accuracy"]

    assert clear.text == "71.1 % to 86.7 % (95 %, 100 answers); gained +30.2 to +49.8 points"
    assert chance.text.endswith(", which may be chance")


def test_without_the_same_answers_before_there_is_no_difference():
    after = {"accuracy": [1.0, 0.0]}

    assert gains({}, after)["accuracy"].difference is None
    assert gains({"accuracy": [1.0]}, after)["accuracy"].difference is None
    assert gains(after, {}) == {}


def test_no_more_than_the_whole_is_gained():
    (gain,) = gains({"exact_match": [0.0] * 20}, {"exact_match": [1.0] * 19 + [0.0]}).values()

    assert gain.difference.high == 1.0 and 0.8 < gain.difference.low < gain.difference.value == 0.95
