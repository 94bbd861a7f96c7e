"""Corrections of several jobs added to one map's outputs: their numbers, and that none of one job meets another's."""

import math

import pytest
import torch

from strategies.multi_lora.corrections import AddCorrections, TokenRange

# Tokens 8 and 9 are of a job without a correction, 13 too.
PARTS = (TokenRange(0, 3, 2.0), TokenRange(3, 8, 0.5), TokenRange(10, 13, 1.0))
RANKS = (2, 5, 1)
TOKENS, INPUTS, OUTPUTS = 14, 6, 7


def tensors(dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)

    def one(*sizes):
        return torch.randn(*sizes, generator=draw, dtype=torch.float64).to(dtype)

    weights = [weight for rank in RANKS for weight in (one(rank, INPUTS), one(OUTPUTS, rank))]
    return [one(TOKENS, OUTPUTS), one(TOKENS, INPUTS), *weights]


def one_by_one(y_TO, x_TI, *weights):
    pairs = list(zip(PARTS, weights[::2], weights[1::2], strict=True))
    rows = []
    for token in range(TOKENS):
        own = [(part, a, b) for part, a, b in pairs if part.start <= token < part.end]
        rows.append(y_TO[token] + sum(part.scaling * b @ (a @ x_TI[token]) for part, a, b in own))
    return torch.stack(rows)


def with_gradients(compute, given):
    leaves = [one.clone().requires_grad_() for one in given]
    y_TO = leaves[0] * 1  # as a map's outputs, it is no leaf
    out = compute(y_TO, *leaves[1:])
    (out.float() * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def added(y_TO, x_TI, *weights):
    return AddCorrections.apply(y_TO, x_TI, PARTS, *weights)


def test_outputs_and_all_gradients_are_those_of_each_token_by_itself():
    found, wanted = (with_gradients(compute, tensors()) for compute in (added, one_by_one))

    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_tokens_in_half_precision_are_corrected_in_fp32(dtype):
    given = tensors(dtype)

    found = with_gradients(added, given)

    wanted = with_gradients(one_by_one, [one.double() for one in given])
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype and torch.allclose(one.double(), other, atol=0.06, rtol=0.02)


def test_weights_in_fp32_beside_a_row_in_bf16_keep_their_precision_under_autocast():
    y, x, *weights = tensors(torch.bfloat16)
    masters = [weight.float() for weight in weights]

    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(added, [y, x, *masters])

    assert [one.dtype for one in found[:3]] == [torch.bfloat16] * 3
    assert all(grad.dtype == torch.float32 for grad in found[3:])
    wanted = with_gradients(one_by_one, [one.double() for one in (y, x, *masters)])
    assert all(torch.allclose(a.double(), b, atol=0.06, rtol=0.02) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("spoilt", ["tokens", "weights"])
def test_what_is_not_finite_stays_with_its_own_job(spoilt):
    given = tensors()
    sound = with_gradients(added, given)
    if spoilt == "tokens":
        given[1][PARTS[1].start : PARTS[1].end] = math.nan
    else:
        given[4].fill_(math.inf)
        given[5].fill_(math.nan)

    found = with_gradients(added, given)

    of_others = torch.ones(TOKENS, dtype=torch.bool)
    of_others[PARTS[1].start : PARTS[1].end] = False
    assert not found[0][~of_others].isfinite().any()
    assert torch.equal(found[0][of_others], sound[0][of_others])
    assert torch.equal(found[2][of_others], sound[2][of_others])
    assert all(torch.equal(found[number], sound[number]) for number in (3, 4, 7, 8))


def test_a_row_whose_inputs_need_no_gradient_has_none():
    y, x, *weights = tensors()
    leaves = [weight.requires_grad_() for weight in weights]

    AddCorrections.apply(y * 1, x, PARTS, *leaves).sum().backward()

    assert x.grad is None and all(leaf.grad is not None for leaf in leaves)
