"""EVA's start is that of PEFT's own preparation on the same rows, and the training begins as the base."""

import copy

import pytest
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import EvaConfig

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from strategies import METHODS
from strategies.step.step import forward_backward
from strategies.techniques.precision import gradient_scaler
from tests.orchestrator.training.conftest import data_folder  # noqa: F401
from tests.strategies.test_contract import base_model, settings, techniques

EVA = METHODS["lora"](lora_r=4, init_lora_weights="eva")
ROWS = [0, 1, 2, 3, 4, 5, 6, 7]


def learnt(model_folder, data, packing, groups):
    setup = EVA.setup(base_model(EVA, model_folder), settings())
    setup.model.train()
    setup.learner.begin_learning(len(groups))
    for number, rows in enumerate(groups):
        if number:
            setup.learner.next_learning()
        batch = collate(data, rows, packing)
        setup.learner.watch(batch)
        forward_backward(setup, batch, 1, techniques(packing=packing), gradient_scaler("cpu", "float32"))
    return setup, setup.learner.end_learning()


def factors(model, kind):
    return {
        name.split("model.layers.")[1]: p.detach() for name, p in model.named_parameters() if f"lora_{kind}" in name
    }


@pytest.mark.filterwarnings("ignore:lora with eva initialization")  # of PEFT's own preparation
def test_a_begins_with_the_directions_that_pefts_preparation_finds(model_folder, data_folder):  # noqa: F811
    data = Dataset.load(data_folder)
    batch = collate(data, ROWS, packing=False)
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(base_model(EVA, model_folder), config)
    labels = batch.input_ids_BT.masked_fill(~batch.supervised_BT, -100)
    rows = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "labels": labels}
    initialize_lora_eva_weights(theirs, [rows], show_progress_bar=False)

    setup, told = learnt(model_folder, data, False, [ROWS])

    expected, found = factors(theirs, "A"), factors(setup.model, "A")
    assert expected.keys() == found.keys() and len(found) == 14
    for name, a_RI in expected.items():
        ours, wanted = (one.T @ one for one in (found[name], a_RI))  # the space they span
        assert (ours - wanted).norm() < 0.1 * wanted.norm(), name  # both by a randomised decomposition; by chance 1.4
    assert told["maps"] == 14 and told["short"] == 0
    assert all((b_OR == 0).all() for b_OR in factors(setup.model, "B").values())
    assert all(p.grad is None for p in setup.parameters.values())


@pytest.mark.parametrize("groups", [[ROWS], [ROWS[:4], ROWS[4:]]])
def test_packed_rows_and_several_passes_find_much_the_same(groups, model_folder, data_folder):  # noqa: F811
    data = Dataset.load(data_folder)
    whole = factors(learnt(model_folder, data, False, [ROWS])[0].model, "A")

    again = factors(learnt(model_folder, data, False, groups)[0].model, "A")

    for name, a_RI in whole.items():
        overlap = (again[name] @ a_RI.T).square().sum() / len(a_RI)
        assert overlap > 0.5, name  # by chance 0.06; inputs of random weights vary alike in all directions


def test_a_training_with_it_learns_once_and_resumes_with_what_was_learnt(model_folder, data_folder):  # noqa: F811
    from tests.orchestrator.training.test_loop import ONE_BY_ONE, run

    events = []
    losses, _, setup = run(
        model_folder, data_folder, ONE_BY_ONE, options={"lora_r": 4, "init_lora_weights": "eva"}, events=events
    )
    plain = run(model_folder, data_folder, ONE_BY_ONE, options={"lora_r": 4})

    told = [event for event in events if type(event).__name__ == "LearningReport"]
    assert len(told) == 1
    assert losses[0] == pytest.approx(plain[0][0], rel=1e-6)  # B is zero: the base
    assert losses[-1] != plain[0][-1]
    assert copy.copy(setup).learner.is_due(0) and not setup.learner.is_due(1)
