"""What a run in stages records of each stage, and where that is shown: events, status, the report, MLflow."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.distributed as dist

from clusters.capability import ClusterCapability, Link
from orchestrator.job.job_file import read_job, spec_with
from orchestrator.job.model_files import read_config
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.lifecycle.prepare import plan_job, sizes_of
from orchestrator.planning import workload
from orchestrator.planning.plan import Plan
from orchestrator.report.blocks import Figure, Table
from orchestrator.report.run import report_of_run
from orchestrator.runs.events import StageTimeline, StepReport, parse_lines, read_event
from orchestrator.runs.mirror.tracking import sync
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.worker_stats import stages_of_run, stats_of_run, timelines
from orchestrator.training.model.loading import load_data
from strategies.pipeline.schedule import operations
from strategies.pipeline.wire_size import message_bytes
from tests.cli import called
from tests.conftest import rows, write_jsonl
from tests.orchestrator.conftest import Listener, train_here
from tests.processes import run_ranks

LAYERS, HIDDEN, SAMPLES, STEPS = 6, 64, 6, 4
JOB = """\
name: tiny
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64, packing: false}}
method: {{lora_r: 4}}
train: {{global_batch_size: 6, per_device_train_batch_size: 1, max_steps: 4, learning_rate: 1e-2}}
eval: {{max_new_tokens: 4, max_rows: 2, eval_steps: 2}}
checkpoint: {{save_steps: 4, output_dir: {runs}}}
tracking: {{report_to: []}}
"""


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("place")
    config = AutoConfig.from_pretrained(model_folder)
    config.num_hidden_layers, config.hidden_size = LAYERS, HIDDEN
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl", rows(18))
    write_jsonl(folder / "eval.jsonl", rows(4, start=100))
    (folder / "job.yaml").write_text(JOB.format(model=folder / "model", runs=folder / "runs"))
    return folder


def part_of_pipeline(rank, size, port, path):
    from orchestrator.training.workers import worker

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    run = RunFolder(path)
    try:
        worker.work(run, rank, size, run.plan().nodes[rank].node, 0)
    finally:
        dist.destroy_process_group()


def train_in(num_stages):
    """In place of Ray: as many machines like this one, the planner's own pipeline over them, a process a stage."""

    def train(training, *_):
        run = training.run
        (node,) = run.capability().nodes
        names = [f"box-{number}" for number in range(num_stages)]
        links = tuple(Link(pair, 1e9, 1e-4) for pair in itertools.combinations(names, 2))
        machines = tuple(dataclasses.replace(node, name=name) for name in names)
        job = run.job()
        pipeline = {"strategy.mode": "pipeline", "cluster.num_workers": num_stages}
        job = dataclasses.replace(job, spec=spec_with(job.spec, pipeline))
        config = read_config(run.path.parent.parent / "model")
        shape, sizes = workload.model_shape(config), sizes_of(*load_data(run))
        plan, _ = plan_job(job, config, shape, ClusterCapability(machines, links), sizes)
        run.keep("plan.json", plan.to_json())
        run_ranks(part_of_pipeline, num_stages, run.path)
        training.report()

    return train


def submit(place, name, how):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_of_a_job, "_train_on_ray", how)
        return path_of_a_job.submit(read_job(place / "job.yaml"), Listener(), name)


@pytest.fixture(scope="module", params=[2, 3], ids=["two stages", "three stages"])
def run(request, place):
    return submit(place, f"stages-{request.param}", train_in(request.param))


@pytest.fixture(scope="module")
def whole(place):
    return submit(place, "whole", train_here)


def reports(run):
    return [report for _, report in sorted(run.steps().items())]


def test_a_stage_computes_and_waits_within_its_step(run):
    for report in reports(run):
        for busy_s, wait_s, worker_s in zip(report.stage_busy_s, report.stage_wait_s, report.worker_s, strict=True):
            assert busy_s > 0 and wait_s > 0
            assert busy_s + wait_s <= worker_s + 1e-4  # rounded; a worker's own, which may begin before the first one's
            assert busy_s <= report.seconds


def test_what_is_sent_is_what_the_formula_says(run):
    plan = run.plan()
    (wire,) = {part.techniques.stage.wire for part in plan.nodes}
    ways = [1, *[2] * (len(plan.nodes) - 2), 1]  # the ends have one neighbour, the others two
    for report in reports(run):
        messages = message_bytes(report.tokens, HIDDEN, wire)  # of all micro-batches: rows have no padding

        assert report.stage_bytes_sent == [way * messages for way in ways] == report.stage_bytes_received
    assert len(reports(run)) == STEPS


def test_one_step_is_recorded_pass_by_pass(run):
    (timeline,) = run.events_of(StageTimeline)
    plan, report = run.plan(), run.steps()[3]

    assert timeline.step == 3 and len(timeline.stages) == len(plan.nodes)
    for rank, (stage, part) in enumerate(zip(timeline.stages, plan.nodes, strict=True)):
        own = part.techniques.stage
        expected = [(one.is_forward, one.micro_batch) for one in operations(rank, own.count, SAMPLES, own.ahead)]
        assert [(bool(kind), number) for kind, number, *_ in stage.passes] == expected
        ends = [0.0, *(end for *_, end in stage.passes)]
        assert all(end <= begin for end, (*_, begin, _) in zip(ends, stage.passes, strict=False))
        assert sum(end - begin for *_, begin, end in stage.passes) == pytest.approx(report.stage_busy_s[rank], abs=1e-3)
    assert min(stage.begin_s for stage in timeline.stages) == 0.0
    # One clock for all: what was handed on had been computed.
    for earlier, later in itertools.pairwise(timeline.stages):
        handed = {number: end for kind, number, _, end in earlier.passes if kind}
        begun = {number: begin for kind, number, begin, _ in later.passes if kind}
        assert all(begun[number] >= handed[number] - 2e-2 for number in handed)


def test_events_of_stages_come_back_from_their_lines(run):
    for event in [*run.events_of(StageTimeline), *run.events_of(StepReport)]:
        assert read_event(json.loads(json.dumps(event.to_json()))) == event
    line = json.dumps({"event": "timeline", "time": 1.0, "step": 3, "stages": [{"stage": 0}]})
    assert parse_lines(line.encode() + b"\n") == []


def test_workers_of_a_pipeline_are_measured_by_what_they_compute(run):
    by_worker, stages = stats_of_run(run.events()[0]), stages_of_run(run.plan(), run.events()[0])

    assert [one.share for one in by_worker] == [1.0] * len(stages)  # all of them see every token
    assert [one.seconds for one in by_worker] == [one.busy_s for one in stages]
    assert [one.bytes_sent for one in by_worker] == [one.bytes_sent for one in stages]


def test_the_plan_keeps_what_its_step_was_simulated_from(run):
    plan = run.plan()
    predicted, measured = timelines(plan, run.events()[0])

    assert Plan.from_json(plan.to_json()) == plan
    assert plan.pipelines[0].simulation.step_s < plan.step_s
    assert [one.stage for one in predicted] == [one.stage for one in measured]
    assert max(one.end_s for one in predicted) == pytest.approx(plan.pipelines[0].simulation.step_s)
    for simulated, found in zip(predicted, measured, strict=True):
        assert [one[:2] for one in simulated.passes] == [one[:2] for one in found.passes]
        waiting_s = plan.pipelines[0].simulation.waiting_s[simulated.stage]
        assert sum(end - begin for begin, end in simulated.waits) == pytest.approx(waiting_s)


def test_status_shows_each_stage(run, place):
    shown = called("status", run.path, cwd=place, check=0).stdout
    found = json.loads(called("status", run.path, "--json", cwd=place, check=0).stdout)["stages"]

    rows = stages_of_run(run.plan(), run.events()[0])
    assert found == [row.to_json() for row in rows]
    lines = [line.split() for line in shown.splitlines()]
    for row in rows:
        (at,) = (number for number, line in enumerate(lines) if line[:1] == [row.place] and row.layers in line)
        predicted = next(line for line in lines[at:] if line[:1] == ["predicted"])
        assert f"{row.busy_share:.0%}" in lines[at] and f"{row.predicted_busy_share:.0%}" in predicted
    assert sum(one["end_layer"] - one["first_layer"] for one in found) == LAYERS
    for one in found:
        assert 0 < one["busy_share"] < 1 and one["wait_s"] > 0 and one["peak_bytes"] > 2**20
        assert one["predicted_peak_bytes"] > 2**20
        assert one["predicted_bytes_sent"] == pytest.approx(one["bytes_sent"], rel=0.2)


def test_the_report_has_the_numbers_and_the_picture(run):
    sections = {one.title: one.blocks for one in report_of_run(run, run.job(), "en").sections}

    table, figure = sections["Stages"]
    assert isinstance(table, Table) and len(table.rows) == 2 * len(run.plan().nodes) and len(table.marked) == 1
    assert isinstance(figure, Figure)
    assert all(word in figure.svg for word in ("predicted: ", "measured: ", "stage 0", "forward", "backward", "waits"))


def test_mlflow_gets_each_stage(run, store):
    client, uri = store
    job = run.job()
    tracked = {"tracking.report_to": ["mlflow"], "tracking.mlflow_uri": uri, "tracking.experiment": run.run_id}
    sync(run, dataclasses.replace(job, spec=spec_with(job.spec, tracked)))

    (found,) = client.search_runs([client.get_experiment_by_name(run.run_id).experiment_id])
    metrics = found.data.metrics
    last = reports(run)[-1]
    for rank in range(len(run.plan().nodes)):
        assert metrics[f"stage/{rank}/busy_s"] == last.stage_busy_s[rank]
        assert metrics[f"stage/{rank}/bytes_sent"] == last.stage_bytes_sent[rank]
        assert metrics[f"stage/{rank}/predicted_peak_bytes"] == run.plan().nodes[rank].memory.total_bytes


def test_a_run_without_stages_has_none_of_this(whole, place):
    found = json.loads(called("status", whole.path, "--json", cwd=place, check=0).stdout)

    assert "stages" not in found and not whole.events_of(StageTimeline)
    assert all("stage_busy_s" not in report.to_json() for report in reports(whole))
    assert "pipeline" not in json.loads((whole.path / "plan.json").read_text())
    assert "Stages" not in [one.title for one in report_of_run(whole, whole.job(), "en").sections]
