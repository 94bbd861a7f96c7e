"""Schedules are transformers' own, asked for a step at a time."""

import inspect

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from orchestrator.job.sections.training import Scheduler
from strategies import schedules
from strategies.schedules import REFUSED, SCHEDULES, lr_factor

OPTIONS = {
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "cosine_with_restarts": {"num_cycles": 3},
    "inverse_sqrt": {"timescale": 5},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 6, "decay_type": "1-sqrt", "min_lr_ratio": 0.05},
}
PEAK, STEPS = 2e-3, 20


def test_every_schedule_of_transformers_is_one_here_or_refused_with_a_reason():
    theirs = {name.value for name in TYPE_TO_SCHEDULER_FUNCTION}

    assert theirs == SCHEDULES.keys() | REFUSED.keys()
    assert set(Scheduler.__args__) == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_options_are_those_of_its_function(name):
    found = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters

    assert set(SCHEDULES[name]) == set(found) - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_of_a_step_is_that_of_transformers_scheduler(name, warmup):
    options = OPTIONS.get(name, {})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, dict(options))
    expected = []
    for _ in range(STEPS + 1):
        expected.append(optimizer.param_groups[0]["lr"] / PEAK)
        optimizer.step()
        scheduler.step()

    factor = lr_factor(name, options, PEAK, STEPS, warmup)

    shift = 1 if warmup else 0  # a warm-up's step 0 would train with rate 0
    assert [factor(step) for step in range(STEPS)] == pytest.approx(expected[shift : STEPS + shift])
    assert schedules.mistakes(name, options, PEAK) == []
    assert [factor(7), factor(3)] == [factor(7), factor(3)]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("cosine", {"cycles": 2}, "cosine has no such option; did you mean num_cycles?"),
        ("linear", {"power": 2}, "linear has no such option; known: none"),
        ("polynomial", {"power": -1}, "it must be a number of at least 0"),
        ("polynomial", {"lr_end": 0.1}, "the schedule ends at 0.1, and train.learning_rate is 0.002"),
        ("inverse_sqrt", {"timescale": 0}, "it must be a number of steps of at least 1"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "steep"}, "one of linear, cosine, 1-sqrt"),
        ("cosine_with_min_lr", {"min_lr": 1e-4, "min_lr_rate": 0.1}, "needs one of min_lr"),
    ],
)
def test_options_that_cannot_be_are_named(name, options, told):
    (found,) = schedules.mistakes(name, options, PEAK)

    assert told in found


def test_phases_that_are_not_the_training_are_named():
    wanted = {"num_decay_steps": 8}

    assert schedules.step_mistakes("warmup_stable_decay", wanted, 20, 4) == []
    (found,) = schedules.step_mistakes("warmup_stable_decay", wanted | {"num_stable_steps": 20}, 20, 4)
    assert "4 of warm-up, 20 at the peak, 8 of decay do not make the 20 steps" in found
