"""fp16: a step whose gradients left its range is repeated at a smaller scale and said, never lost."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.errors import Diverged
from orchestrator.runs.events import StepReport
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from strategies.methods.lora import Lora
from strategies.step import document_attention
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques

FP16 = Techniques("float16", "sdpa", False, False, 8, 64)
STEPS = 2


def trained(model_folder, data_folder, scale, before=lambda setup: None, local_batch_size=None):
    """(step events, notes, trained weights as one vector)"""
    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float16, attn_implementation="sdpa")
    settings = TrainSettings(1e-2, 0.0, "sgd", 0.9, 0.999, 1e-8, FP16, 3)
    setup = Lora(lora_r=4, bias="all").setup(model, settings)
    before(setup)
    steps, notes = [], []

    def record(event):
        (steps if isinstance(event, StepReport) else notes).append(event)

    held = {"scale": scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
    train(
        Training(
            setup,
            (data := Dataset.load(data_folder)),
            None,
            Order(len(data), 8, seed=5, num_train_epochs=1, max_steps=STEPS),
            Schedule(lambda step: 1.0, 1.0, 0, 100, None, None),
            FP16,
            ProcessGroup(),
            Progress(loss_scale=held),
            Hooks(record, lambda now: None, lambda: None),
            local_batch_size=local_batch_size,
        )
    )
    return steps, notes, torch.cat([p.detach().flatten() for p in setup.parameters.values()])


def test_a_step_whose_gradients_overflow_is_repeated_and_said(model_folder, data_folder):
    _, _, wanted = trained(model_folder, data_folder, 2.0**8)

    steps, notes, weights = trained(model_folder, data_folder, 2.0**40)

    assert [event.step for event in steps] == list(range(1, STEPS + 1))
    assert (weights - wanted).norm() <= 0.01 * wanted.norm()
    assert all(math.isfinite(event.grad_norm) for event in steps)
    assert steps[0].loss_scale == 2.0 ** (40 - sum("repeated" in getattr(note, "text", "") for note in notes)) < 2.0**40


def test_a_local_step_whose_gradients_overflow_is_repeated_too(model_folder, data_folder):
    wanted_steps, _, wanted = trained(model_folder, data_folder, 2.0**8, local_batch_size=4)

    steps, notes, weights = trained(model_folder, data_folder, 2.0**40, local_batch_size=4)

    assert (weights - wanted).norm() <= 0.01 * wanted.norm()
    assert [event.loss for event in steps] == pytest.approx([event.loss for event in wanted_steps], rel=1e-2)
    assert steps[0].loss_scale == 2.0 ** (40 - sum("repeated" in getattr(note, "text", "") for note in notes)) < 2.0**40


def test_gradients_that_overflow_at_any_scale_end_the_run(model_folder, data_folder):
    def broken(setup):
        next(iter(setup.parameters.values())).register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(Diverged, match="a gradient of step 1 is not a number"):
        trained(model_folder, data_folder, 4.0, broken)


def test_biases_trained_beside_adapters_are_fp32(model_folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    settings = TrainSettings(1e-2, 0.0, "sgd", 0.9, 0.999, 1e-8, FP16, 3)

    setup = Lora(lora_r=4, bias="all").setup(model, settings)

    biases = {name: p.dtype for name, p in setup.parameters.items() if name.endswith("bias")}
    assert biases and set(biases.values()) == {torch.float32}
