"""A whole run in stages: its losses, its checkpoints and what it hands back are those of one process."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from orchestrator.errors import OrchestratorError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.runs.events import Evaluation, HandBack
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.worker_stats import stages_of_run
from strategies.workload import StagePart
from tests.conftest import write_jsonl
from tests.orchestrator.conftest import Listener, train_here
from tests.processes import run_ranks

LAYERS = 5
JOB = """\
name: tiny
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64}}
method: {{lora_r: 4, lora_dropout: 0.1}}
train: {{global_batch_size: 6, per_device_train_batch_size: 1, max_steps: 4, learning_rate: 3e-2}}
eval: {{max_new_tokens: 4, max_rows: 2, eval_steps: 2}}
checkpoint: {{save_steps: 2, output_dir: {runs}}}
tracking: {{report_to: []}}
"""


@pytest.fixture(scope="module")
def deep_model(model_folder, tmp_path_factory):
    """The tiny Llama with five layers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model_folder)
    config.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deep")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(deep_model, tmp_path_factory):
    from tests.conftest import rows

    folder = tmp_path_factory.mktemp("place")
    write_jsonl(folder / "train.jsonl", rows(16))
    write_jsonl(folder / "eval.jsonl", rows(4, start=100))
    (folder / "job.yaml").write_text(JOB.format(model=deep_model, runs=folder / "runs"))
    return folder


def part_of_group(rank, size, port, path, stops_after):
    from orchestrator.training.workers import worker

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    run, save = RunFolder(path), worker.checkpoint.save

    def save_and_stop(folder, held, state):
        if state["step"] == stops_after:
            run.stop_file.touch()
        return save(folder, held, state)

    worker.checkpoint.save = save_and_stop
    try:
        worker.work(run, rank, size, "", rank)
    finally:
        worker.checkpoint.save = save
        dist.destroy_process_group()


def train_in_stages(*replicas, stops_after=None):
    """In place of Ray: a process a stage; `replicas` are the edges of each pipeline's stages."""

    def train(training, *_):
        run = training.run
        plan, parts = run.plan(), []
        for number, edges in enumerate(replicas):
            for index, (first, end) in enumerate(itertools.pairwise(edges)):
                stage = StagePart(index, len(edges) - 1, first, end, ahead=1)
                techniques = dataclasses.replace(plan.techniques, stage=stage)
                own = {"techniques": techniques, "share": 1 / len(replicas), "replica": number}
                own["device"] = plan.nodes[0].device + " of another kind" * number  # which are aligned when they save
                parts.append(dataclasses.replace(plan.nodes[0], **own))
        run.keep("plan.json", dataclasses.replace(plan, nodes=tuple(parts)).to_json())
        run_ranks(part_of_group, len(parts), run.path, stops_after)
        training.report()

    return train


def train_whole(training, *_):
    """In place of Ray: one process, as the planner had it."""
    run = training.run
    plan = run.plan()
    part = dataclasses.replace(plan.nodes[0], techniques=dataclasses.replace(plan.techniques, stage=None), replica=None)
    run.keep("plan.json", dataclasses.replace(plan, nodes=(part,)).to_json())
    train_here(training)


def submit(place, name, how, *overrides):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_of_a_job, "_train_on_ray", how)
        return path_of_a_job.submit(read_job(place / "job.yaml", list(overrides)), Listener(), name)


@pytest.fixture(scope="module")
def whole(place):
    return submit(place, "whole", train_here)


def assert_same_result(run, whole):
    adapters = [load_file(one.path / "adapter" / "adapter_model.safetensors") for one in (run, whole)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
    results = [json.loads((one.path / "result.json").read_text()) for one in (run, whole)]
    for key in ("before", "after"):
        assert {**results[0][key], "seconds": 0} == {**results[1][key], "seconds": 0}


def numbers(run):
    losses = [report.loss for _, report in sorted(run.steps().items())]
    return losses, [one.eval_loss for one in run.events_of(Evaluation)]


def test_a_run_in_three_stages_is_the_run_of_one_process(place, whole):
    run = submit(place, "stages", train_in_stages((0, 1, 3, LAYERS)))

    assert numbers(run) == numbers(whole)
    assert_same_result(run, whole)
    assert run.events_of(HandBack)[-1].text == whole.events_of(HandBack)[-1].text
    for report in run.steps().values():
        assert len(report.stage_busy_s) == 3
        assert all(0 < own < report.seconds for own in report.stage_busy_s)
    assert {report.stage_busy_s for report in whole.steps().values()} == {None}


@pytest.mark.parametrize("then", [None, (0, 2, LAYERS)], ids=["one process", "other stages"])
def test_a_checkpoint_of_stages_is_taken_up_by_any_other_division(then, place, whole):
    with pytest.raises(OrchestratorError, match="stopped as asked"):
        submit(place, f"stopped-{then is None}", train_in_stages((0, 1, 3, LAYERS), stops_after=2))
    how = train_in_stages(then) if then else train_whole

    run = submit(place, f"stopped-{then is None}", how)

    assert numbers(run) == numbers(whole)
    assert_same_result(run, whole)


# Other micro-batches draw other random numbers, and AdamW's first steps follow the signs of vanishing gradients.
PLAIN = "method.lora_dropout=0", "train.optim=sgd"


@pytest.fixture(scope="module")
def plain(place):
    return submit(place, "plain", train_here, *PLAIN)


def assert_nearly_equal(run, whole):
    for found, expected in zip(numbers(run), numbers(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    found, expected = (load_file(one.path / "adapter" / "adapter_model.safetensors") for one in (run, whole))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_two_unequal_pipelines_share_the_samples_of_a_step(place, plain):
    run = submit(place, "pipelines", train_in_stages((0, 2, LAYERS), (0, 1, 3, LAYERS)), *PLAIN)

    assert_nearly_equal(run, plain)


def train_as_planned(training, *_):
    """In place of Ray: a process for each worker of the planner's own plan."""
    run_ranks(part_of_group, training.run.plan().num_workers, training.run.path, None)
    training.report()


@pytest.mark.parametrize("count", [3, 4])
def test_two_pipelines_train_as_they_were_planned(count, place, plain):
    """Of three workers one has all layers beside two stages."""
    stated = f"cluster.num_workers={count}", "strategy.mode=pipeline", "strategy.pipeline={replicas: 2}"
    run = submit(place, f"planned-{count}", train_as_planned, *PLAIN, *stated)

    made = run.plan()
    stages = [(part.techniques.stage.first_layer, part.techniques.stage.end_layer) for part in made.nodes]
    assert made.replica_of in ({3: ((0, 0, 1), (0, 1, 1)), 4: ((0, 0, 1, 1), (0, 0, 0, 1))}[count])
    assert stages.count((0, LAYERS)) == (made.replica_of != (0, 0, 1, 1))
    assert len({part.share for part in made.nodes}) <= 2
    assert_nearly_equal(run, plain)
    assert {row.place for row in stages_of_run(made, run.events()[0])} >= {"0.0", "1.0"}
    for report in run.steps().values():
        assert len(report.stage_busy_s) == count
