"""When a training evaluates and saves, and what its progress remembers."""

import dataclasses
import math

import pytest

from orchestrator.training.state import Progress, Schedule

EVERY_THREE = Schedule(lambda step: 0.5, 1.0, seed=0, save_steps=3, eval_steps=3, early_stopping_patience=None)


@pytest.mark.parametrize(("step", "is_last", "due"), [(0, False, False), (2, False, True), (3, True, True)])
def test_evaluations_and_checkpoints_come_every_few_steps_and_after_the_last(step, is_last, due):
    assert EVERY_THREE.evaluates_after(step, is_last) == due
    assert EVERY_THREE.saves_after(step, is_last) == due


def test_without_eval_steps_nothing_is_evaluated():
    schedule = dataclasses.replace(EVERY_THREE, eval_steps=None)

    assert not schedule.evaluates_after(2, is_last=True)


def test_the_best_loss_is_kept_and_patience_ends_the_training():
    progress, improved = Progress(), []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0], start=1):
        progress.step = step
        improved.append(progress.add_eval_loss(loss, patience=2))

    assert improved == [True, True, False, False]
    assert (progress.best_loss, progress.stopped) == (2.0, "early")
    assert progress.eval_losses == {"1": 3.0, "2": 2.0, "3": 2.5, "4": 2.0}


def test_a_held_out_loss_that_is_no_number_is_never_the_best():
    progress, improved = Progress(), []
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, math.inf], start=1):
        progress.step = step
        improved.append(progress.add_eval_loss(loss, patience=2))

    assert improved == [False, True, False, True, False]
    assert (progress.best_loss, progress.evaluations_without_gain, progress.stopped) == (2.0, 1, None)


@pytest.mark.parametrize(("stopped", "after"), [("early", "early"), ("asked", None), ("replan", None), (None, None)])
def test_a_run_that_was_asked_to_stop_continues_from_its_checkpoint_and_one_that_ended_does_not(stopped, after):
    saved = Progress(step=7, tokens=90, stopped=stopped).as_dict() | {"plan_hash": "a", "torch": "2"}

    progress = Progress.from_dict(saved)

    assert progress == Progress(step=7, tokens=90, stopped=after)
