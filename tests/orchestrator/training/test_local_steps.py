"""Local steps: what is averaged, what it converges to, and what it sends."""

import copy

import pytest
import torch
import torch.distributed as dist

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.runs.events import StepReport
from orchestrator.training.local_steps import LocalSteps
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.shares import Shares
from orchestrator.training.state import Hooks, Progress, Training
from strategies import METHODS
from strategies.step.state import gather, restore
from strategies.train_setup import TrainSettings, TrainSetup
from tests.orchestrator.training.test_loop import ONE_BY_ONE, SCHEDULE
from tests.orchestrator.training.test_uneven import joined
from tests.processes import run_ranks


def bare(parameter):
    optimizer = torch.optim.AdamW([parameter])
    return TrainSetup(torch.nn.Module(), optimizer, {"weight": parameter}, lambda folder, weights: None, "model")


def test_a_larger_share_makes_more_steps_of_the_same_size():
    local = LocalSteps(bare(torch.nn.Parameter(torch.zeros(1))), 4)

    assert [len(part) for part in local.split(range(12))] == [4, 4, 4]
    assert [len(part) for part in local.split(range(5))] == [4, 1]
    assert local.split([]) == []


def test_the_outer_step_is_nesterovs_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    local = LocalSteps(bare(parameter), 4)
    parameter.data.fill_(0.6)  # what local training made of it
    local.changes_to_gradients(1.0)
    assert parameter.grad.item() == pytest.approx(0.4)
    norm = local.outer_step(0)

    # momentum 0.4, step 0.7 * (0.4 + 0.9 * 0.4)
    assert norm == pytest.approx(0.4)
    assert parameter.item() == pytest.approx(1.0 - 0.7 * (0.4 + 0.9 * 0.4))


def lonely(model_folder, data_folder, group, shares, rounds=6):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    settings = TrainSettings(3e-3, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3)
    setup = METHODS["lora"]().setup(model, settings)
    events = []
    hooks = Hooks(
        lambda event: events.append(event) if isinstance(event, StepReport) else None, lambda now: "x", lambda: None
    )
    order = Order(24, 12, seed=5, num_train_epochs=1, max_steps=rounds)
    train(
        Training(
            setup, Dataset.load(data_folder), None, order, SCHEDULE, ONE_BY_ONE, group, Progress(), hooks, shares, 4
        )
    )
    return [report.loss for report in events], [p.detach().clone() for p in setup.parameters.values()]


def apart(rank, size, port, model_folder, data_folder, out):
    group = joined(rank, size, port)
    losses, weights = lonely(model_folder, data_folder, group, Shares([2 / 3, 1 / 3], is_fixed=True))
    torch.save((losses, weights), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_apart_come_together_and_learn(model_folder, data_folder, tmp_path):
    run_ranks(apart, 2, str(model_folder), data_folder, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone, _ = lonely(model_folder, data_folder, ProcessGroup(), None)

    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert first[0][-1] < 0.98 * first[0][0]
    assert alone[-1] < 0.98 * alone[0]


def test_a_resumed_run_of_local_steps_is_bit_equal(model_folder, data_folder):
    """The outer momentum is in the checkpoint, too."""
    from transformers import AutoModelForCausalLM

    def going(first, rounds, held=None):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
        settings = TrainSettings(3e-3, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3)
        setup = METHODS["lora"]().setup(model, settings)
        if held:
            restore(setup, held)
        events = []
        hooks = Hooks(
            lambda event: events.append(event) if isinstance(event, StepReport) else None, lambda now: "x", lambda: None
        )
        order = Order(24, 12, seed=5, num_train_epochs=1, max_steps=rounds)
        progress = Progress(step=first)
        train(
            Training(
                setup,
                Dataset.load(data_folder),
                None,
                order,
                SCHEDULE,
                ONE_BY_ONE,
                ProcessGroup(),
                progress,
                hooks,
                None,
                4,
            )
        )
        return [report.loss for report in events], setup

    whole, _ = going(0, 4)
    half, setup = going(0, 2)
    rest, _ = going(2, 4, copy.deepcopy(gather(setup)))

    assert half + rest == whole
