"""What frozen lower layers make of a sample is computed once; losses and gradients stay those of whole passes."""

import os

import pytest
import torch

from strategies.reuse.kept_states import StatesOnDisk
from strategies.reuse.lower_layers import DocumentParts, LowerLayers
from strategies.reuse.row import lay_out
from strategies.step.supervised_logits import Batch, loss_sum
from tests.strategies.reuse.test_exact import CASES, learnt
from tests.strategies.test_packing_exact import FAMILIES, tiny

DOCUMENTS = [torch.tensor(one) for one in CASES["two levels"]]
MASKS = learnt(DOCUMENTS)


def model_of(family="llama", first=1):
    """A model of two layers of which those from `first` on train."""
    model = tiny(family, **FAMILIES[family])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(f".{number}." in name for number in range(first, 2))
    return model


def batch_of(numbers, shares):
    ids, masks = [DOCUMENTS[one] for one in numbers], [MASKS[one] for one in numbers]
    if shares:
        return Batch.of_tree(lay_out(ids, masks), tuple(numbers))
    return Batch(torch.cat(ids)[None], torch.cat(masks)[None], tuple(map(len, ids)), None, tuple(numbers))


def loss_and_gradients(model, batch, lower=None):
    model.zero_grad()
    if lower is None:
        loss = loss_sum(model, batch)
    else:
        with lower.serve(batch.sample_ids, DocumentParts(batch.document_lengths, batch.shared and batch.shared.tree)):
            loss = loss_sum(model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("shares", [False, True], ids=["end to end", "as a tree"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_known_samples_skip_the_lower_layers_and_lose_nothing(family, shares):
    model = model_of(family)
    lower, seen = LowerLayers(model), []
    for module in lower._layers[0].children():
        module.register_forward_pre_hook(lambda *_: seen.append(1))
    loss_and_gradients(model, batch_of([0, 1], shares), lower)
    loss_and_gradients(model, batch_of([2, 3], shares), lower)
    computed = len(seen)

    loss, gradients = loss_and_gradients(model, batch_of([3, 1, 0], shares), lower)  # known from other rows

    assert len(seen) == computed > 0
    assert lower.count() == batch_of([3, 1, 0], shares).input_ids_BT.numel()
    expected, wanted = loss_and_gradients(model, batch_of([3, 1, 0], shares))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_row_with_an_unknown_sample_passes_all_layers_and_is_kept():
    model = model_of()
    lower = LowerLayers(model)
    loss_and_gradients(model, batch_of([0, 1], False), lower)

    found = loss_and_gradients(model, batch_of([0, 2], False), lower)

    assert lower.count() == 0
    assert lower.num_bytes == sum(len(DOCUMENTS[one]) for one in (0, 1, 2)) * 32 * 4
    assert found[0] == loss_and_gradients(model, batch_of([0, 2], False))[0]


def test_what_a_changed_weight_would_make_otherwise_is_computed_again():
    model = model_of()
    lower = LowerLayers(model)
    loss_and_gradients(model, batch_of([0], False), lower)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)  # above all that is kept
    loss_and_gradients(model, batch_of([0], False), lower)
    assert lower.count() > 0
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)

    found = loss_and_gradients(model, batch_of([0], False), lower)

    assert found[0] == loss_and_gradients(model, batch_of([0], False))[0]
    assert lower.count() == 0


@pytest.mark.parametrize(
    ("family", "trains", "named"),
    [("gpt2", "transformer.wpe", "wpe"), ("opt", "model.decoder.embed_positions", "embed_positions")],
)
def test_a_position_embedding_that_trains_is_refused_and_a_last_norm_is_not(family, trains, named):
    model = model_of(family)
    model.get_submodule({"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}[family]).requires_grad_()
    assert LowerLayers(model).num_layers == 1

    model.get_submodule(trains).requires_grad_()

    with pytest.raises(ValueError, match=f"its {named} trains"):
        LowerLayers(model)


def test_what_another_precision_made_is_computed_again():
    model = model_of()
    lower = LowerLayers(model)
    loss_and_gradients(model, batch_of([0], False), lower)

    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(model, batch_of([0], False), lower)
        plain = loss_and_gradients(model, batch_of([0], False))

    assert (found[0], lower.count()) == (plain[0], 0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shares", [False, True], ids=["end to end", "as a tree"])
def test_from_the_disk_a_row_seen_again_has_the_bits_of_one_that_is_computed(tmp_path, shares, dtype):
    model = model_of()
    lower = LowerLayers(model, StatesOnDisk(tmp_path, pytest.fail))
    batch = batch_of([2, 0, 3], shares)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss_and_gradients(model, batch, lower)
        lower.expect(batch.sample_ids, batch.parts)

        loss, gradients = loss_and_gradients(model, batch, lower)

        expected, wanted = loss_and_gradients(model, batch)
    assert lower.count() == batch.input_ids_BT.numel()
    assert loss == expected and torch.equal(gradients, wanted)


def test_a_sample_that_cannot_be_read_back_is_computed_and_kept_again(tmp_path):
    model, notes = model_of(), []
    lower = LowerLayers(model, StatesOnDisk(tmp_path, notes.append))
    loss_and_gradients(model, batch_of([0, 1], False), lower)
    os.pwrite(lower._states._descriptor, b"\xff\xff\xff", 0)

    found = loss_and_gradients(model, batch_of([0, 1], False), lower)

    assert (len(notes), lower.count()) == (1, 0)
    assert found[0] == loss_and_gradients(model, batch_of([0, 1], False))[0]
    loss_and_gradients(model, batch_of([0, 1], False), lower)
    assert (len(notes), lower.count()) == (1, batch_of([0, 1], False).input_ids_BT.numel())


def test_the_lower_layers_are_whole_again_after_a_row_that_failed():
    model = model_of()
    lower = LowerLayers(model)
    loss_and_gradients(model, batch_of([0], False), lower)

    with pytest.raises(RuntimeError), lower.serve((0,), DocumentParts((len(DOCUMENTS[0]),))):
        raise RuntimeError

    assert "forward" not in vars(lower._layers[0])


@pytest.mark.parametrize(("first", "why"), [(0, "its first layer trains"), (2, "none of its layers trains")])
def test_models_without_a_frozen_lower_layer_are_refused_with_the_reason(first, why):
    with pytest.raises(ValueError, match=why):
        LowerLayers(model_of(first=first))


def test_an_embedding_that_trains_is_below_all_layers():
    model = model_of()
    model.get_input_embeddings().weight.requires_grad = True

    with pytest.raises(ValueError, match="its embedding trains"):
        LowerLayers(model)
