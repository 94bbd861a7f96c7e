"""GaLore and APOLLO: the moments lie in a low-rank window, and a checkpoint holds them."""

import pytest
import torch

from strategies.methods.low_rank_adamw import LowRankAdamW, Window
from strategies.methods.low_rank_gradients import Galore
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.strategies.test_contract import CPU, NODE, settings, techniques, workload

SETTINGS = TrainSettings(
    1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, Techniques("float32", "sdpa", False, False, 1, 8), 3
)


def made(kind, shape=(12, 8), rank=3, gap=4, scale=1.0):
    weight = torch.nn.Parameter(torch.zeros(*shape))
    return weight, LowRankAdamW([weight], [], Window(kind, rank, gap, scale, seed=1), SETTINGS)


def gradient(seed, shape=(12, 8)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("kind", ["galore", "apollo"])
def test_the_moments_are_as_small_as_the_window(kind, shape):
    weight, optimizer = made(kind, shape)
    weight.grad = gradient(1, shape)

    optimizer.step()

    assert optimizer.state[weight]["exp_avg"].shape == optimizer.state[weight]["exp_avg_sq"].shape == (12, 3)
    assert weight.abs().min() >= 0 and weight.any()
    assert all(torch.is_tensor(value) for value in optimizer.state[weight].values())


def test_galore_moves_inside_the_gradient_s_leading_directions_until_the_next_window():
    weight, optimizer = made("galore")
    for step in range(4):
        weight.grad = gradient(step)
        optimizer.step()
    inside = torch.linalg.svd(gradient(0)).Vh[:3]

    torch.testing.assert_close(weight @ inside.T @ inside, weight.detach())
    weight.grad = gradient(9)
    optimizer.step()
    assert (weight @ inside.T @ inside - weight).norm() > 0.01 * weight.norm()


def test_galore_of_a_gradient_of_that_rank_is_adam_in_its_coordinates():
    """Rank 1: the only coordinate's sign is all that Adam's first step sees."""
    weight, optimizer = made("galore", rank=1)
    outer = torch.outer(torch.arange(1.0, 13.0), torch.ones(8))
    weight.grad = outer.clone()

    optimizer.step()

    torch.testing.assert_close(weight.detach(), torch.full((12, 8), -1e-2 / 8**0.5))


def test_apollo_keeps_each_channel_s_own_direction():
    weight, optimizer = made("apollo")
    weight.grad = gradient(1)

    optimizer.step()

    cosine = torch.nn.functional.cosine_similarity(weight.detach(), -gradient(1), dim=1)
    torch.testing.assert_close(cosine, torch.ones(12))


def test_apollo_s_steps_grow_slowly():
    weight, optimizer = made("apollo")
    weight.grad = gradient(1)
    optimizer.step()
    first = weight.detach().norm()
    before = weight.detach().clone()
    weight.grad = 1000 * gradient(2)
    optimizer.step()

    assert (weight.detach() - before).norm() <= 1.011 * first


@pytest.mark.parametrize("kind", ["galore", "apollo"])
def test_a_restored_state_goes_on_bit_by_bit(kind):
    weight, optimizer = made(kind)
    other, again = made(kind)
    for step in range(9):
        if step == 5:
            with torch.no_grad():
                other.copy_(weight)
            again.state[other] = {key: value.clone() for key, value in optimizer.state[weight].items()}
        weight.grad = gradient(step)
        optimizer.step()
        if step >= 5:
            other.grad = gradient(step)
            again.step()

    assert torch.equal(weight, other)


def test_a_rank_above_every_side_is_plain_adamw_and_it_is_said(model_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)

    setup = Galore(rank=64).setup(model, settings())

    assert "at most 64): plain AdamW" in setup.notes[0]
    assert setup.optimizer._place == {}


def test_the_estimate_counts_the_smaller_moments(model_folder):
    from transformers import AutoConfig

    shape = ModelShape.from_config(AutoConfig.from_pretrained(model_folder).to_dict())

    small, large = (
        Galore(rank=rank).estimate(workload(shape), CPU, NODE, techniques()).memory.optimizer_bytes for rank in (4, 32)
    )

    # Two layers of q, o 64 x 64, k, v 32 x 64, gate, up, down 64 x 128: 8 r longer + 4 r shorter bytes each.
    def seen(rank, sides):
        return 2 * sum(8 * rank * max(s) + 4 * rank * min(s) for s in sides)

    wide = [(64, 64)] * 2 + [(64, 128)] * 3
    narrow = [(32, 64)] * 2
    rest = 8 * (shape.num_parameters - 2 * sum(m * n for m, n in wide + narrow))
    assert small == seen(4, wide + narrow) + rest
    assert large == seen(32, wide) + rest + 8 * 2 * sum(m * n for m, n in narrow)  # a side of 32 is not seen
