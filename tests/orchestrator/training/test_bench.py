"""A benchmark and a trial of a tiny job, in this process."""

import json

import pytest

from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.run import prepare
from orchestrator.training.workers.bench import bench_training
from orchestrator.training.workers.experiment import Experiment
from strategies.measure import dissect
from tests.conftest import rows, write_jsonl

OVERRIDES = ("cluster.num_workers=1", "tracking.report_to=[]", "eval.before=false")


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    """A job, and what the planner made of it."""
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(20))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "method: {type: lora, lora_r: 4}\n"
        "data: {train: train.jsonl, eval: {split: 0.2}}\n"
        "train: {max_steps: 4, global_batch_size: 4, learning_rate: 3e-2}\n"
        f"checkpoint: {{output_dir: {folder / 'runs'}}}\n"
    )
    job = read_job(folder / "job.yaml", list(OVERRIDES))
    return job, prepare(job, lambda text: None)


def test_a_benchmark_says_where_the_time_and_the_memory_of_a_step_go(tiny):
    job, ready = tiny

    found = json.loads(json.dumps(bench_training(job, ready, 2, lambda text: None)))

    speed = found["throughput"]
    assert found["steps"] == 2 and speed["tokens_per_s"] > speed["supervised_tokens_per_s"] > 0
    assert found["flops_per_s"] == pytest.approx(ready.plan.flops_per_token * speed["computed_tokens_per_s"])
    assert set(found["phases"]) == {*dissect.PHASES, "communication"}
    assert sum(found["phases"].values()) == pytest.approx(4 / speed["samples_per_s"], rel=0.05)
    assert found["operators"] and found["memory"] and "timeline" not in found


def test_a_bus_is_refused_for_a_method_that_uses_none(tiny):
    job, ready = tiny

    with pytest.raises(JobError, match="--bus is for methods that send gradients over one; lora does not"):
        bench_training(job, ready, 1, lambda text: None, bus_bytes_per_s=1e9)


def test_a_trial_that_is_paused_and_continued_learns_what_an_unbroken_one_does(tiny):
    job, ready = tiny
    data, held_out = datasets(ready.data_files)
    in_two, at_once = (Experiment(job, ready.plan, ready.data_files.model, data, held_out) for _ in range(2))

    in_two.train_to(2)
    loss = in_two.train_to(4)

    assert loss == at_once.train_to(4)
    assert [step for step, _ in in_two.curve] == [2, 4]
    assert in_two.tokens_per_s > 0 and in_two.times()["measured_step_s"] > 0
    assert in_two.quality()["eval_loss"] == loss
