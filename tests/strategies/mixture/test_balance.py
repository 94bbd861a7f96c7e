"""The balance of experts: its value, that layouts change nothing, and what is told of it."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from strategies.measure.trace import Lengths
from strategies.mixture.balance import DocumentRows, LoadBalance
from strategies.mixture.method import MixLora
from strategies.step import document_attention
from strategies.step.passes import SequentialPasses
from strategies.step.step import Update, extra_part, forward, forward_backward, update
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import StepPasses
from tests.processes import run_ranks
from tests.strategies.mixture.test_experts import apart, shaken
from tests.strategies.test_contract import settings, techniques

METHOD = MixLora(num_experts=4, lora_r=4, router_aux_loss_coef=0.7)
TOKENS, SUPERVISED = (20, 12, 9, 15), (9, 5, 2, 11)
WHOLE = Lengths(TOKENS, SUPERVISED)
ONE_BY_ONE = [Lengths((n,), (s,)) for n, s in zip(TOKENS, SUPERVISED, strict=True)]
PACKED = techniques(packing=True, attn_implementation="document")


def a_model(model_folder, attention="sdpa"):
    document_attention.register()
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=attention)


def a_setup(model_folder, attention="sdpa", method=METHOD):
    setup = shaken(method.setup(a_model(model_folder, attention), settings()), size=0.2)
    setup.model.train()
    return setup


def gradients(setup, parts, how=techniques(), num_counted=sum(SUPERVISED)):
    """Of a step whose micro-batches are `parts`: the sum of its losses, gradients, and what is told of the balance."""
    setup.optimizer.zero_grad()
    loss = 0.0
    for part in parts:
        batch = part.batch(how.packing)
        loss += forward_backward(setup, batch, num_counted, how, gradient_scaler("cpu", "float32")).item()
    found = {name: parameter.grad.clone() for name, parameter in setup.parameters.items()}
    return loss, found, setup.extra_loss.metrics_of(setup.extra_loss.take())


def loss_of(balance, probabilities, chosen, tokens, supervised):
    """The loss of one layer's choices over documents end to end in one row."""
    with balance.over(Lengths(tokens, supervised).batch(True)):
        balance.note(0, probabilities, chosen)
    return balance()


def test_even_use_costs_the_coefficient_times_the_choices_and_collapse_costs_more():
    even = torch.full((8, 4), 0.25)
    in_turn = torch.tensor([[0, 1], [2, 3]] * 4)
    collapsed = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 8)

    assert loss_of(LoadBalance(0.1, 4, 1), even, in_turn, (8,), (3,)).item() == pytest.approx(0.1 * 2)
    fallen = loss_of(LoadBalance(0.1, 4, 1), collapsed, torch.tensor([[0, 1]] * 8), (8,), (3,))
    assert fallen.item() == pytest.approx(0.1 * 4 * (1 * 0.5 + 1 * 0.5))


def test_documents_weigh_as_their_supervised_tokens_do():
    probabilities = torch.rand(12, 4).softmax(-1)
    chosen = probabilities.topk(2).indices
    parts = [slice(0, 8), slice(8, 12)]

    whole = loss_of(LoadBalance(1.0, 4, 1), probabilities, chosen, (8, 4), (5, 2))

    alone = [
        loss_of(LoadBalance(1.0, 4, 1), probabilities[part], chosen[part], (n,), (1,))
        for part, n in zip(parts, (8, 4), strict=True)
    ]
    assert whole.item() == pytest.approx((5 * alone[0].item() + 2 * alone[1].item()) / 7)


def test_padding_is_nobodys_and_a_tree_is_refused():
    batch = Lengths((5, 2), (2, 1)).batch(False)
    rows = DocumentRows.of(batch)

    assert rows.member_DN.tolist() == [[1] * 5 + [0] * 5, [0] * 5 + [1, 1, 0, 0, 0]]
    assert rows.weights_D.tolist() == pytest.approx([2 / 3, 1 / 3]) and rows.num_counted == 3
    with pytest.raises(ValueError, match="no document of its own"):
        DocumentRows.of(Lengths((20, 20), (2, 1), common=12).batch(True, True))


def test_gradients_are_those_of_the_loss_and_the_balance_in_one_sum(model_folder):
    setup, without = a_setup(model_folder), dataclasses.replace(METHOD, router_aux_loss_coef=0.0)
    plain, batch = a_setup(model_folder, method=without), WHOLE.batch(False)
    loss, found, told = gradients(setup, [WHOLE])
    same_loss, of_tokens, _ = gradients(plain, [WHOLE])
    setup.optimizer.zero_grad()

    part = forward(setup, batch, sum(SUPERVISED), techniques())
    extra = extra_part(setup, batch, sum(SUPERVISED))
    of_balance = torch.autograd.grad(extra, list(setup.parameters.values()), allow_unused=True)

    assert loss == same_loss == pytest.approx(part.item(), rel=1e-6)
    assert told["experts/aux_loss"] == pytest.approx(extra.item()) and extra.item() > 0.7 * 2
    for name, one in zip(setup.parameters, of_balance, strict=True):
        whole = of_tokens[name] if one is None else of_tokens[name] + one
        assert apart(found[name], whole) < 1e-5
        assert not name.endswith("router") or apart(found[name], of_tokens[name]) > 1e-3


@pytest.mark.parametrize(
    "parts", [ONE_BY_ONE, [Lengths(TOKENS[:2], SUPERVISED[:2]), Lengths(TOKENS[2:], SUPERVISED[2:])]]
)
def test_micro_batches_of_any_size_are_one_step(model_folder, parts):
    setup = a_setup(model_folder)

    (loss, whole, told), (same_loss, parted, also_told) = gradients(setup, [WHOLE]), gradients(setup, parts)

    assert same_loss == pytest.approx(loss, rel=1e-5) and also_told == pytest.approx(told, rel=1e-5)
    for name, gradient in whole.items():
        assert apart(parted[name], gradient) < 5e-5, name


def test_packed_rows_are_padded_ones(model_folder):
    packed, padded = a_setup(model_folder, "document"), a_setup(model_folder)

    loss, whole, told = gradients(padded, [WHOLE])
    same_loss, in_row, also_told = gradients(packed, [WHOLE], PACKED)

    assert same_loss == pytest.approx(loss, rel=1e-5) and also_told == pytest.approx(told, rel=1e-5)
    for name, gradient in whole.items():
        assert apart(in_row[name], gradient) < 1e-4, name


def a_step_of_a_worker(rank, size, port, model_folder, out):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    setup = a_setup(model_folder)
    loss, found, _ = gradients(setup, ONE_BY_ONE[2 * rank : 2 * rank + 2])
    for name in found:
        dist.all_reduce(setup.parameters[name].grad)
    update(setup, gradient_scaler("cpu", "float32"), Update(1.0, 1.0))
    torch.save((loss, {name: parameter.detach() for name, parameter in setup.parameters.items()}), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one(model_folder, tmp_path):
    setup = a_setup(model_folder)
    loss, _, _ = gradients(setup, ONE_BY_ONE)
    update(setup, gradient_scaler("cpu", "float32"), Update(1.0, 1.0))

    run_ranks(a_step_of_a_worker, 2, str(model_folder), str(tmp_path))

    (one_loss, one), (other_loss, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one_loss + other_loss == pytest.approx(loss, rel=1e-5)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    for name, parameter in setup.parameters.items():
        torch.testing.assert_close(one[name], parameter.detach(), rtol=1e-3, atol=2e-4)


def test_the_passes_of_a_step_hold_it_apart_from_the_loss_they_report(model_folder):
    setup = a_setup(model_folder)
    plain = a_setup(model_folder, method=dataclasses.replace(METHOD, router_aux_loss_coef=0.0))

    def run(one):
        step = StepPasses(
            sum(SUPERVISED),
            techniques(),
            gradient_scaler("cpu", "float32"),
            take=lambda ids: ONE_BY_ONE[ids[0]].batch(False),
            begin=lambda batch: None,
            filler=[0],
        )
        return SequentialPasses(one).run([[0], [1], [2], [3]], step).item()

    assert run(setup) == run(plain)
    held_out = SequentialPasses(setup).loss_sum(WHOLE.batch(False), techniques())
    assert held_out.item() == SequentialPasses(plain).loss_sum(WHOLE.batch(False), techniques()).item()


def test_what_is_told_counts_each_token_once_and_is_forgotten(model_folder):
    setup = a_setup(model_folder)
    for part in ONE_BY_ONE:
        forward_backward(setup, part.batch(False), sum(SUPERVISED), techniques(), gradient_scaler("cpu", "float32"))

    counted, loss, *uses = setup.extra_loss.take()

    layers, experts, k = 2, 4, 2
    assert counted == sum(SUPERVISED) and loss > 0 and len(uses) == layers * experts == setup.extra_loss.num_totals - 2
    assert [sum(uses[:experts]), sum(uses[experts:])] == [k * sum(TOKENS)] * layers
    told = setup.extra_loss.metrics_of([counted, loss, *uses])
    shares = [use / (k * sum(TOKENS)) for use in uses]
    entropy = -sum(share * math.log(share) for share in shares if share) / layers / math.log(experts)
    assert told == pytest.approx(
        {"experts/aux_loss": loss / counted, "experts/evenness": entropy, "experts/largest_share": max(shares)}
    )
    assert setup.extra_loss.take() == [0.0] * 10 and setup.extra_loss.metrics_of([0.0] * 10) == {}


def test_evaluations_between_leave_it_as_it_was(model_folder):
    setup = a_setup(model_folder)
    twin = copy.deepcopy(setup.model)
    with setup.extra_loss.over(WHOLE.batch(False)):
        setup.model.eval()
        setup.model(torch.arange(7)[None])
        setup.model.train()
    with pytest.raises(RuntimeError, match="0 of 2 layers have routed this batch"):
        setup.extra_loss()
    assert twin.model.layers[0].mlp.forward.__self__ is twin.model.layers[0].mlp


def test_layers_without_gradients_are_an_error_not_a_missing_balance(model_folder):
    setup = a_setup(model_folder)

    with pytest.raises(RuntimeError, match=r"set train\.gradient_checkpointing: false"), torch.no_grad():
        forward(setup, WHOLE.batch(False), 1, techniques())
