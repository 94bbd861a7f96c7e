"""Each objective computes what its paper says, restated here from probabilities, and what TRL's trainers compute."""

import dataclasses
import math

import pytest
import torch

from strategies import OBJECTIVES
from strategies.objectives.contract import AnswerScores, DocumentObjective, DocumentScores, Objective, ScoreObjective
from strategies.objectives.dpo import _LOSSES, Dpo
from strategies.objectives.ipo import Ipo
from strategies.objectives.kto import Kto
from strategies.objectives.orpo import Orpo
from strategies.objectives.reward import Reward
from strategies.objectives.simpo import SimPo

# Of three pairs: log p of the chosen and the rejected answer, tokens of each, and the same under the reference.
LOGPS = [(-12.0, -9.5), (-30.0, -31.0), (-4.0, -44.0)]
TOKENS = [(6, 4), (20, 18), (3, 21)]
REFERENCE = [(-13.0, -9.0), (-30.5, -29.0), (-4.5, -40.0)]


def flat(pairs):
    return torch.tensor(pairs, dtype=torch.float64).flatten()


SCORES = AnswerScores(flat(LOGPS), flat(TOKENS), flat(REFERENCE))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_ratios():
    return [(c - rc, r - rr) for (c, r), (rc, rr) in zip(LOGPS, REFERENCE, strict=True)]


def of_pairs(formula):
    """A formula of two numbers, of each pair's log ratios."""
    return [formula(chosen, rejected) for chosen, rejected in log_ratios()]


B = 0.3  # beta of all
EXPECTED = {
    "sigmoid": of_pairs(lambda c, r: -math.log(sigmoid(B * (c - r)))),
    "hinge": of_pairs(lambda c, r: max(0.0, 1 - B * (c - r))),
    "nca_pair": of_pairs(
        lambda c, r: -math.log(sigmoid(B * c)) - 0.5 * math.log(sigmoid(-B * c)) - 0.5 * math.log(sigmoid(-B * r))
    ),
    "bco_pair": of_pairs(lambda c, r: -math.log(sigmoid(B * c)) - math.log(sigmoid(-B * r))),
    "sppo_hard": of_pairs(lambda c, r: (c - 0.5 / B) ** 2 + (r + 0.5 / B) ** 2),
    "apo_zero": of_pairs(lambda c, r: 1 - sigmoid(B * c) + sigmoid(B * r)),
    "apo_down": of_pairs(lambda c, r: sigmoid(B * c) + 1 - sigmoid(B * (c - r))),
    "robust": of_pairs(
        lambda c, r: (-0.9 * math.log(sigmoid(B * (c - r))) + 0.1 * math.log(sigmoid(-B * (c - r)))) / 0.8
    ),
    "exo_pair": of_pairs(
        lambda c, r: sum(p * math.log(p / q) for p, q in ((sigmoid(B * (c - r)), 0.9), (sigmoid(-B * (c - r)), 0.1)))
    ),
    "discopop": of_pairs(
        lambda c, r: (
            -math.log(sigmoid(B * (c - r))) * (1 - sigmoid(B * (c - r) / 0.05))
            + math.exp(-B * (c - r)) * sigmoid(B * (c - r) / 0.05)
        )
    ),
    "sigmoid_norm": [
        -math.log(sigmoid(B * (c / n - r / m))) for (c, r), (n, m) in zip(log_ratios(), TOKENS, strict=True)
    ],
}


@pytest.mark.parametrize("loss_type", _LOSSES)
def test_dpo_and_its_variants_are_what_their_papers_say(loss_type):
    smoothing = {"label_smoothing": 0.1} if loss_type in ("robust", "exo_pair") else {}

    losses = Dpo(beta=B, loss_type=loss_type, **smoothing).losses(SCORES)

    assert losses.tolist() == pytest.approx(EXPECTED[loss_type], rel=1e-9)


def test_ipo_aims_at_a_margin_a_token():
    losses = Ipo(beta=B).losses(SCORES)

    assert losses.tolist() == pytest.approx(
        [(c / n - r / m - 1 / (2 * B)) ** 2 for (c, r), (n, m) in zip(log_ratios(), TOKENS, strict=True)]
    )


def test_simpo_compares_means_a_token_without_a_reference():
    alone = dataclasses.replace(SCORES, reference_D=None)

    losses = SimPo(beta=2.5, simpo_gamma=1.4).losses(alone)

    margins = [2.5 * (c / n - r / m) - 1.4 for (c, r), (n, m) in zip(LOGPS, TOKENS, strict=True)]
    assert losses.tolist() == pytest.approx([-math.log(sigmoid(margin)) for margin in margins])


def test_orpo_compares_odds_without_a_reference_and_exactly_near_certainty():
    sure = AnswerScores(flat([(-1e-9, -3.0), (-2.0, -4.0)]), flat([(1, 2), (2, 2)]), None)

    losses = Orpo(beta=0.2).losses(sure)

    def odds(logp):
        return math.exp(logp) / -math.expm1(logp)

    ratios = [odds(-1e-9) / odds(-1.5), odds(-1.0) / odds(-2.0)]
    assert losses.tolist() == pytest.approx([-0.2 * math.log(sigmoid(math.log(ratio))) for ratio in ratios], rel=1e-6)


def test_a_pair_that_training_has_not_touched_has_the_loss_of_a_coin():
    untouched = dataclasses.replace(SCORES, reference_D=SCORES.logps_D)

    assert Dpo().losses(untouched).tolist() == pytest.approx([math.log(2)] * 3)
    assert Dpo().rewards(untouched).tolist() == [0.0] * 6


@pytest.mark.parametrize("divergence", [0.0, 2.5])
def test_kto_marks_answers_above_and_below_how_far_the_model_has_moved(divergence):
    is_good = torch.tensor([True, False, False, True, True, False])
    scores = dataclasses.replace(SCORES, is_good_D=is_good, divergence=divergence)

    losses = Kto(beta=B, desirable_weight=1.2, undesirable_weight=0.8).losses(scores)

    ratios = [ratio for pair in log_ratios() for ratio in pair]
    assert losses.tolist() == pytest.approx(
        [
            1.2 * (1 - sigmoid(B * (ratio - divergence))) if good else 0.8 * (1 - sigmoid(B * (divergence - ratio)))
            for ratio, good in zip(ratios, is_good.tolist(), strict=True)
        ]
    )


def test_options_that_mean_nothing_together_are_refused():
    with pytest.raises(ValueError, match="label_smoothing is of loss_type robust"):
        Dpo(label_smoothing=0.1)
    with pytest.raises(ValueError, match="divides by label_smoothing"):
        Dpo(loss_type="exo_pair")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_a_frozen_dataclass_that_says_which_rows_it_trains_on(name):
    objective = OBJECTIVES[name]()

    assert dataclasses.is_dataclass(objective) and objective.__dataclass_params__.frozen
    assert isinstance(objective, Objective) and objective.name == name
    by_score, by_likelihood = isinstance(objective, ScoreObjective), isinstance(objective, DocumentObjective)
    assert (by_score or by_likelihood) == objective.is_by_document == (objective.rows != "answers")
    assert by_score == (not objective.writes_text)


def test_a_reward_model_is_bradley_and_terrys_with_margins_and_centred_scores():
    scores, margins = [(1.5, -0.5), (0.25, 2.0)], [0.5, 0.0]

    plain = Reward().score_losses(DocumentScores(flat(scores)))
    centred = Reward(center_rewards_coefficient=0.2).score_losses(DocumentScores(flat(scores), torch.tensor(margins)))

    assert plain.tolist() == pytest.approx([-math.log(sigmoid(c - r)) for c, r in scores])
    assert centred.tolist() == pytest.approx(
        [-math.log(sigmoid(c - r - m)) + 0.2 * (c + r) ** 2 for (c, r), m in zip(scores, margins, strict=True)]
    )
