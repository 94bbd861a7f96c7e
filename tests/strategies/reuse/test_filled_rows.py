"""Rows filled up to a multiple of tokens lose and learn what the rows alone do."""

import types

import pytest
import torch

from orchestrator.training.model.kernels import row_multiple
from strategies.reuse.lower_layers import LowerLayers
from strategies.step.step import forward
from strategies.step.supervised_logits import places_of_samples
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques
from tests.strategies.reuse.test_lower_layers import batch_of, loss_and_gradients, model_of
from tests.strategies.test_packing_exact import FAMILIES

TECHNIQUES = Techniques("float32", "document", True, False, 1, 1024)


def setup_of(model, **others):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return TrainSetup(model, torch.optim.SGD(parameters.values()), parameters, lambda *_: None, "peft", **others)


@pytest.mark.parametrize("shares", [False, True], ids=["end to end", "as a tree"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_filled_row_has_the_loss_and_the_gradients_of_its_samples(family, shares):
    model, batch = model_of(family), batch_of([0, 1, 2], shares)
    filled = batch.filled(32)

    loss, gradients = loss_and_gradients(model, filled)

    assert filled.input_ids_BT.shape[1] % 32 == 0 < filled.num_filler < 32
    assert filled.sample_ids == batch.sample_ids
    expected, wanted = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("shares", [False, True], ids=["end to end", "as a tree"])
def test_what_lower_layers_make_of_a_filled_row_serves_rows_of_other_lengths(shares):
    model = model_of()
    setup = setup_of(model, lower=LowerLayers(model), row_multiple=32)
    known = [forward(setup, batch_of([0, 1, 2, 3], shares), 1.0, TECHNIQUES).item()]
    setup.row_multiple = 64

    known.append(forward(setup, batch_of([3, 1], shares), 1.0, TECHNIQUES).item())

    assert setup.lower.count() == batch_of([3, 1], shares).input_ids_BT.numel()
    alone = [loss_and_gradients(model, batch_of(numbers, shares))[0] for numbers in ([0, 1, 2, 3], [3, 1])]
    assert known == pytest.approx(alone, rel=1e-5)


def test_rows_that_fit_and_padded_ones_stay_as_they_are():
    batch = batch_of([0, 1], False)
    length = batch.input_ids_BT.shape[1]

    assert batch.filled(1) is batch
    assert batch.filled(length) is batch
    assert batch.filled(length + 3).num_filler == 3


def test_samples_of_a_filled_row_keep_their_places():
    batch = batch_of([0, 1, 3], False)

    assert places_of_samples(batch.filled(64)).tolist() == places_of_samples(batch).tolist()


@pytest.mark.parametrize("amx", [True, False])
def test_rows_are_filled_for_tiles_and_for_nothing_that_counts_tokens(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    half = Techniques("bfloat16", "document", True, False, 1, 1024)
    model, anything = model_of(), types.SimpleNamespace(device=torch.device("cpu"))

    assert row_multiple(setup_of(model), half) == (32 if amx else 1)
    assert row_multiple(setup_of(model), TECHNIQUES) == 1
    for counting in ("streaming", "learner", "objective", "noise", "extra_loss", "passes", "engine"):
        assert row_multiple(setup_of(model, **{counting: anything}), half) == 1
    model.config.attention_dropout = 0.1
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert row_multiple(setup_of(model), half) == 1
