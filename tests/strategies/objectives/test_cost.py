"""Memory and work of a step of pairs are predicted as those of single answers: held against real steps."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from strategies import METHODS, OBJECTIVES
from strategies.cost import time
from strategies.cost.reuse import stores_reference
from strategies.measure import trace
from strategies.objectives.losses import build_loss
from strategies.shape import ModelShape
from strategies.step import document_attention
from strategies.step.step import forward_backward
from strategies.step.supervised_logits import DocumentTargets
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques, Workload
from tests.strategies.test_memory import CPU, LLAMA, NODE

CONFIG = {**LLAMA, "num_hidden_layers": 4}
LENGTHS = trace.even(4, 300, 0.5)  # two pairs
ONCE = Workload(
    ModelShape.from_config(CONFIG), 2, 1200, 600, 600, 2, 1, 2, mean_square_length=2 * 300**2, needs_reference=True
)


def techniques(**changes):
    return dataclasses.replace(Techniques("float32", "document", True, False, 1, 1200), **changes)


def batch_of_pairs(stored=None):
    batch = LENGTHS.batch(True)
    tokens_D = torch.tensor(LENGTHS.supervised)
    batch.documents = DocumentTargets(torch.repeat_interleave(torch.arange(4), tokens_D), None, tokens_D, stored)
    return batch


def setup_of(method, objective, settings):
    document_attention.register()
    setup = trace.build(CONFIG, 4, METHODS[method](), settings, "cpu")
    setup.objective = build_loss(OBJECTIVES[objective]())
    return setup


@pytest.mark.parametrize(
    ("objective", "method", "switched"),
    [
        ("dpo", "lora", {}),
        ("dpo", "lora", {"gradient_checkpointing": True}),
        ("dpo", "lora", {"loss_type": "chunked_nll"}),
        ("dpo", "full", {"dtype": "bfloat16"}),
        ("simpo", "lora", {}),
    ],
)
def test_memory_is_that_of_two_documents_and_no_second_model(objective, method, switched):
    chosen = techniques(**switched)
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, chosen, 1)
    stored = torch.zeros(4) if method == "full" else None

    traced = trace.run(lambda: setup_of(method, objective, settings), batch_of_pairs(stored), 2, settings)

    predicted = METHODS[method]().estimate(ONCE, CPU, NODE, chosen).memory.tensors_bytes
    assert predicted == pytest.approx(traced.peak_bytes, rel=0.08)


def counted_flops(stored):
    chosen = techniques()
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, chosen, 1)
    setup = setup_of("lora", "dpo", settings)
    setup.model.train()
    with FlopCounterMode(display=False) as counter:
        forward_backward(setup, batch_of_pairs(stored), 2, chosen, gradient_scaler("cpu", "float32"))
    return counter.get_total_flops()


def test_a_reference_that_is_not_stored_is_a_forward_pass_more():
    lora, chosen = METHODS["lora"](), techniques()
    work = lora.costs(ONCE.shape, chosen).work

    counted = counted_flops(None) / counted_flops(torch.zeros(4))

    with_it = sum(time.flops_per_token(ONCE, chosen, dataclasses.replace(work, reference_passes=1)))
    assert counted == pytest.approx(with_it / sum(time.flops_per_token(ONCE, chosen, work)), rel=0.03)
    assert lora.estimate(ONCE, CPU, NODE, chosen).flops_per_token == pytest.approx(with_it)


def test_the_reference_is_stored_where_rows_are_seen_twice_or_no_adapter_can_be_switched_off():
    twice = dataclasses.replace(ONCE, num_steps=2, num_samples_seen=4)

    assert not stores_reference(ONCE, METHODS["lora"]().starts_as_base)
    assert stores_reference(twice, METHODS["lora"]().starts_as_base)
    for method in (METHODS["full"](), METHODS["lora"](init_lora_weights="pissa"), METHODS["lora"](init_adapter="/a")):
        assert stores_reference(ONCE, method.starts_as_base)
    without = dataclasses.replace(twice, needs_reference=False)
    assert not stores_reference(without, METHODS["full"]().starts_as_base)
    assert (
        METHODS["lora"]().estimate(twice, CPU, NODE, techniques()).time.step_s
        < METHODS["lora"]().estimate(ONCE, CPU, NODE, techniques()).time.step_s
    )


def scored_setup(method, settings):
    document_attention.register()
    values = {key: value for key, value in CONFIG.items() if key != "model_type"}
    config = AutoConfig.for_model(CONFIG["model_type"], **values, num_labels=1)
    dtype = getattr(torch, METHODS[method]().load_dtype(settings.techniques))
    with torch.device("cpu"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation="document")
        setup = METHODS[method]().setup(model, settings)
    if settings.techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    setup.objective = build_loss(OBJECTIVES["reward"]())
    return setup


@pytest.mark.parametrize(
    ("method", "switched"), [("lora", {}), ("lora", {"gradient_checkpointing": True}), ("full", {"dtype": "bfloat16"})]
)
def test_a_score_costs_its_own_weights_and_no_logits(method, switched):
    chosen = techniques(**switched)
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, chosen, 1)
    scored = dataclasses.replace(ONCE, shape=ONCE.shape.with_score(), num_supervised_tokens=4, needs_reference=False)

    traced = trace.run(lambda: scored_setup(method, settings), batch_of_pairs(torch.zeros(4)), 2, settings)

    plan = METHODS[method]().estimate(scored, CPU, NODE, chosen)
    assert plan.memory.tensors_bytes == pytest.approx(traced.peak_bytes, rel=0.08)
    assert plan.memory.logits_bytes < 1000
    setup = scored_setup(method, settings)
    assert plan.num_trainable_parameters == sum(one.numel() for one in setup.parameters.values())
