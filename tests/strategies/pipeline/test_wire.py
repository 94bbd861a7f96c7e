"""What travels between stages: its bytes, and what of the numbers arrives."""

import math

import pytest
import torch

from strategies.pipeline.wire import buffer, num_bytes, pack, unpack
from strategies.pipeline.wire_size import int8_parts, message_bytes, num_outliers

WIRES = ["float32", "bfloat16", "int8"]
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 7, 8), (2, 5, 63), (2, 5, 64), (1, 9, 65), (2, 4, 200), (4, 16, 576)]


def hidden_states(*shape, seed=0):
    """As between the layers of a trained model: channels of unlike sizes, a few of them hundreds of times the rest."""
    random = torch.Generator().manual_seed(seed)
    channels = torch.randn(shape[-1], generator=random).mul(0.7).exp()
    channels[torch.randperm(shape[-1], generator=random)[: max(1, shape[-1] // 200)]] *= 300
    return torch.randn(*shape, generator=random) * channels


def gradients(*shape, seed=0):
    """As of a loss of many tokens: small, and of each token by orders of magnitude larger or smaller."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(*shape[:-1], 1, generator=random).mul(2).exp() * 1e-6
    return torch.randn(*shape, generator=random) * tokens


def there(tensor, wire):
    return unpack(pack(tensor, wire), tensor.shape, wire)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wire", WIRES)
def test_a_message_has_the_bytes_that_the_planner_counts(wire, shape):
    packed, room = pack(hidden_states(*shape), wire), buffer(shape, wire)

    assert (
        packed.nbytes == room.nbytes == num_bytes(shape, wire) == message_bytes(math.prod(shape[:-1]), shape[-1], wire)
    )
    assert packed.dtype == room.dtype and packed.shape == room.shape and packed.device.type == "cpu"


def test_a_message_in_int8_of_576_wide_tokens_is_a_byte_a_value_and_a_sixth_more():
    assert int8_parts(576) == (576, 9 * 4, 8 * 4, 8 * 4)  # codes, scales, places, outliers
    assert message_bytes(2, 576, "int8") == 2 * 676


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("made", [hidden_states, gradients])
def test_wide_forms_lose_nothing_of_their_own_numbers(made, shape):
    tensor = made(*shape)
    short = tensor.bfloat16()

    assert torch.equal(there(tensor, "float32"), tensor)
    assert torch.equal(there(short, "bfloat16"), short)
    assert torch.equal(there(short.float(), "bfloat16"), short)
    assert torch.equal(there(tensor.half(), "float32").half(), tensor.half())


def test_a_tensor_that_does_not_lie_in_one_piece_arrives_as_it_reads():
    tensor = hidden_states(6, 40, 96)[::2, 3:].transpose(0, 1)

    assert torch.equal(there(tensor, "float32"), tensor)
    assert torch.equal(there(tensor, "int8"), there(tensor.contiguous(), "int8"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("made", [hidden_states, gradients])
def test_int8_is_off_by_half_a_step_of_its_block_at_most_and_outliers_by_nothing(made, shape):
    tensor = made(*shape)

    found = there(tensor, "int8")

    rows, arrived = tensor.view(-1, shape[-1]), found.view(-1, shape[-1])
    largest = rows.abs().topk(num_outliers(shape[-1]), dim=1).indices
    assert torch.equal(arrived.gather(1, largest), rows.gather(1, largest))
    rest = rows.scatter(1, largest, 0.0)
    for block, error in zip(rest.split(64, 1), (arrived - rows).abs().split(64, 1), strict=True):
        step = block.abs().amax(1, keepdim=True) / 127
        assert (error <= step * 0.501).all()  # and fp32's own rounding


@pytest.mark.parametrize("made", [hidden_states, gradients])
def test_int8_keeps_hidden_states_and_gradients_within_a_hundredth(made):
    tensor = made(4, 64, 576)

    found = there(tensor, "int8")

    errors = (found - tensor).norm(dim=-1) / tensor.norm(dim=-1)  # of each token
    assert 0 < errors.mean() < 0.007 and errors.max() < 0.01


def test_zeros_stay_zeros():
    assert torch.equal(there(torch.zeros(2, 3, 100), "int8"), torch.zeros(2, 3, 100))


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-44])
def test_tiny_values_keep_their_size(size):
    tensor = gradients(2, 3, 200) / 1e-6 * size

    found = there(tensor, "int8")

    least = torch.finfo(torch.float32).tiny  # of a scale: below it there are no digits left to keep
    assert found.isfinite().all()
    step = tensor.abs().amax(-1, keepdim=True) / 127
    assert ((found - tensor).abs() <= step.clamp_min(least)).all()
    if size > least:
        assert (found - tensor).double().norm() < 0.01 * tensor.double().norm()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("number", [1, 20, 400])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_does_not_become_finite_on_its_way(value, number, wire):
    tensor = gradients(1, 2, 200)
    tensor.view(-1)[:number] = value

    assert not there(tensor, wire)[0, 0].isfinite().all()


def test_no_tokens_make_an_empty_message():
    for wire in WIRES:
        assert there(torch.zeros(0, 3, 64), wire).shape == (0, 3, 64)
