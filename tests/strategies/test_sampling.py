"""Drawn tokens: their frequencies, and what they depend on."""

import pytest
import torch

from strategies.model.sampling import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])


def draws(sampling, prompts, at=0):
    """The tokens of some prompts at one position."""
    processor = sampling.processor(prompts, 3)
    scores = processor(torch.zeros(len(prompts), 3 + at, dtype=torch.long), LOGITS.repeat(len(prompts), 1))
    return scores.argmax(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature):
    tokens = draws(Sampling(temperature), range(20_000))

    found = torch.bincount(tokens, minlength=5) / 20_000
    assert (found - (LOGITS / temperature).softmax(0)).abs().max() < 0.015


def test_tokens_beyond_top_p_are_never_drawn():
    probabilities = LOGITS.softmax(0)  # 0.64, 0.24, 0.09 ...

    tokens = draws(Sampling(1.0, top_p=0.8), range(5_000))

    found = torch.bincount(tokens, minlength=5) / 5_000
    assert found[2:].sum() == 0
    assert found[0].item() == pytest.approx((probabilities[0] / probabilities[:2].sum()).item(), abs=0.025)


def test_a_token_depends_on_the_seed_the_prompt_and_the_position_alone():
    sampling, prompts = Sampling(1.0, seed=7), list(range(300))
    expected = draws(sampling, prompts)

    assert torch.equal(draws(sampling, prompts[100:]), expected[100:])
    assert torch.equal(draws(sampling, prompts[::-1]).flip(0), expected)
    assert not torch.equal(draws(sampling, prompts, at=1), expected)
    assert not torch.equal(draws(Sampling(1.0, seed=8), prompts), expected)


def test_drawing_leaves_the_random_numbers_of_training_alone():
    before = torch.get_rng_state()

    draws(Sampling(1.0), [0, 1])

    assert torch.equal(torch.get_rng_state(), before)
