"""What a run's result.json counts."""

import json

import pytest

from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.state import Progress
from orchestrator.training.workers.result import TrainingOutcome, skip_warm_up, sum_energy, write_result


@pytest.mark.parametrize(
    ("of_workers", "summed"),
    [
        ([{"wh": 1.5, "source": "RAPL"}, {"wh": 2.0, "source": "NVML"}], {"wh": 3.5, "source": "NVML and RAPL"}),
        ([{"wh": 1.5, "source": "RAPL"}, {"wh": 2.0, "source": "RAPL"}], {"wh": 3.5, "source": "RAPL"}),
        ([{"wh": 1.5, "source": "RAPL"}, None], None),  # a part would be taken for the whole
        ([None], None),
    ],
)
def test_energy_is_summed_where_every_worker_counts_it(of_workers, summed):
    assert sum_energy(of_workers) == summed


@pytest.mark.parametrize(("steps", "steady"), [([9], [9]), ([9, 1], [1]), ([9, 8, 7, 1, 1, 1, 1], [1, 1, 1, 1])])
def test_the_first_steps_are_warm_up_where_others_follow(steps, steady):
    assert skip_warm_up(steps) == steady


def outcome(first_step):
    return TrainingOutcome(Progress(step=4), first_step, 1.0, 0, None)


def found(train_seconds):
    memory = dict.fromkeys(("predicted_bytes", "measured_peak_bytes"), 1)
    return {"steps": 4, "tokens": 90, "train_seconds": train_seconds, "memory": memory}


def test_a_resumed_run_with_nothing_left_to_train_keeps_the_figures_of_its_training(tmp_path):
    run = RunFolder(tmp_path)
    write_result(run, found(60.0), outcome(first_step=0))

    write_result(run, found(0.1), outcome(first_step=4))

    assert json.loads((tmp_path / "result.json").read_text())["train_seconds"] == 60.0
