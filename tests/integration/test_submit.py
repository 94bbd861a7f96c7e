"""A whole job: `python -m orchestrator submit` as a process, embedded Ray, MLflow in SQLite."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from orchestrator.runs.events import Evaluation, QualityReport, StateChange, TrackingReport
from orchestrator.runs.run_folder import RunFolder
from tests.cli import called
from tests.conftest import rows, write_jsonl
from tests.processes import kill, orchestrator, outcome, start, wait_for

NUM_STEPS = 180
DOWN = "http://127.0.0.1:9"  # an MLflow server that nobody runs


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    """A folder with a job over the tiny model, long enough to be interrupted, under a name that is not ASCII."""
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(40))
    write_jsonl(folder / "eval.jsonl", rows(8, start=100))
    (folder / "job.yaml").write_text(
        f"""\
name: 日本語
model: {{model_name_or_path: {model_folder}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64}}
method: {{lora_r: 4}}
train: {{global_batch_size: 8, max_steps: {NUM_STEPS}, learning_rate: 3e-3}}
checkpoint: {{save_steps: 30}}
eval: {{max_new_tokens: 8, eval_steps: 100}}
""",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """An uninterrupted run, submitted for machines."""
    done = orchestrator("submit", "job.yaml", "--json", cwd=place, check=0)
    told = json.loads(done.stdout)
    return RunFolder(Path(told["path"])), told


def losses(run):
    return {step: report.loss for step, report in run.steps().items()}


@pytest.mark.slow
def test_weights_that_stream_from_the_model_s_files_train_evaluate_and_answer_as_resident_ones(place):
    found = []
    for offload in ("none", "weights"):
        here = [
            "--set",
            "train.max_steps=6",
            "--set",
            "train.gradient_checkpointing=true",
            "--set",
            "eval.eval_steps=3",
        ]
        done = orchestrator(
            "submit", "job.yaml", "--json", *here, "--set", f"strategy.offload={offload}", cwd=place, check=0
        )
        run = RunFolder(Path(json.loads(done.stdout)["path"]))
        quality = [one.eval_loss for kind in (Evaluation, QualityReport) for one in run.events_of(kind)]
        weights = load_file(run.path / "adapter" / "adapter_model.safetensors")
        found.append((losses(run), quality, weights))
        assert run.plan().techniques.offload == offload

    (losses_a, quality_a, weights_a), (losses_b, quality_b, weights_b) = found
    assert losses_a == losses_b and len(losses_a) == 6
    assert quality_a == quality_b and len(quality_a) == 4
    assert all((weights_a[name] == weights_b[name]).all() for name in weights_a | weights_b)


def test_the_run_folder_holds_the_whole_story(finished):
    run, told = finished

    names = {path.name for path in run.path.iterdir()}
    assert {
        "job.yaml",
        "capability.json",
        "plan.json",
        "events.jsonl",
        "result.json",
        "checkpoints",
        "adapter",
    } <= names
    assert sorted(run.steps()) == list(range(1, NUM_STEPS + 1))
    assert run.state() == "finished"
    result = told["result"]
    assert result["after"]["eval_loss"] < 0.7 * result["before"]["eval_loss"]
    assert 0 <= result["after"]["exact_match"] <= 1
    assert len(result["after"]["samples"]) == 3
    assert 2 <= len(list(run.checkpoints.iterdir())) <= 3
    assert "Started training worker group" in (run.logs / "ray-train.log").read_text()  # written by the driver itself


def test_the_adapter_loads_in_plain_peft_and_has_a_card(finished, model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, _ = finished

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(run.path / "adapter"))

    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    card = (run.path / "adapter" / "README.md").read_text()
    assert "Data digest" in card and "eval_loss" in card


def test_the_merged_model_gives_the_logits_of_base_and_adapter(finished, place, model_folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, _ = finished

    called("merge", "merged", run.run_id, cwd=place, check=0)

    merged = AutoModelForCausalLM.from_pretrained(place / "merged").eval()
    both = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), str(run.path / "adapter")
    ).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        difference = (merged(ids).logits - both(ids).logits).abs().max().item()
        moved = (merged(ids).logits - both.unload()(ids).logits).abs().max().item()
    assert difference < 1e-4 < moved
    assert called("merge", "merged", run.run_id, cwd=place).returncode == 2


def test_evaluating_again_gives_the_same_numbers(finished, place):
    run, told = finished

    again = json.loads(called("evaluate", run.run_id, "--json", cwd=place, check=0).stdout)

    assert again["eval_loss"] == pytest.approx(told["result"]["after"]["eval_loss"], rel=1e-5)
    assert again["exact_match"] == told["result"]["after"]["exact_match"]


def told_plan(run):
    from orchestrator.planning.plan import Plan

    return Plan.from_json((run.path / "plan.json").read_text())


def test_mlflow_mirrors_the_run(finished, place):
    from mlflow.tracking import MlflowClient

    run, told = finished
    client = MlflowClient(f"sqlite:///{run.path.parent / 'mlflow.db'}")

    mirrored = client.get_run(run.read_json("tracking.json")["mlflow_run_id"])
    history = client.get_metric_history(mirrored.info.run_id, "loss")
    assert mirrored.info.status == "FINISHED"
    assert {metric.step: metric.value for metric in history} == losses(run)
    assert mirrored.data.params["train.learning_rate"] == "0.003"
    assert mirrored.data.params["plan.data.packing"] == str(told_plan(run).techniques.packing)
    assert mirrored.data.metrics["measured_step_s"] > 0 < mirrored.data.metrics["predicted_step_s"]
    assert mirrored.data.metrics["after/eval_loss"] == told["result"]["after"]["eval_loss"]
    artifacts = {item.path for item in client.list_artifacts(mirrored.info.run_id)}
    assert {"plan.json", "result.json", "events.jsonl"} <= artifacts
    assert client.get_logged_model(run.read_json("tracking.json")["model_id"]).name == "adapter"
    called("sync", run.run_id, cwd=place, check=0)
    assert len(client.get_metric_history(mirrored.info.run_id, "loss")) == NUM_STEPS  # nothing is sent twice


def test_list_status_and_logs_show_it(finished, place):
    run, _ = finished

    listed = json.loads(called("list", "--json", cwd=place, check=0).stdout)
    row = json.loads(called("status", run.run_id, "--json", cwd=place, check=0).stdout)
    log = called("logs", run.run_id, cwd=place, check=0).stdout

    assert run.run_id in {row["run"] for row in listed}
    assert (row["state"], row["step"]) == ("finished", NUM_STEPS)
    assert f"step={NUM_STEPS}" in log
    assert "finished" in called("status", run.run_id, cwd=place, check=0).stdout
    assert called("stop", run.run_id, cwd=place).returncode == 2
    assert called("resume", run.run_id, cwd=place).returncode == 2


def test_a_run_is_continued_by_its_own_job_and_data_only(finished, place):
    run, _ = finished
    names = ("submit", "job.yaml", "--run-id", run.run_id)
    before = (run.path / "events.jsonl").read_bytes()
    rows_before = (place / "train.jsonl").read_bytes()

    same = called(*names, "--json", cwd=place, check=0)
    other = called(*names, "-s", "train.learning_rate=1e-4", cwd=place, check=2)
    try:
        write_jsonl(place / "train.jsonl", rows(41))
        changed = called(*names, cwd=place, check=2)
    finally:
        (place / "train.jsonl").write_bytes(rows_before)

    assert json.loads(same.stdout)["run"] == run.run_id
    assert "train.learning_rate is 0.0001, was 0.003" in " ".join(other.stderr.split())
    assert "data.train: the files have changed since" in " ".join(changed.stderr.split())
    assert (run.path / "events.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def resumed(finished, place):
    """A run that was killed, then hung up on, then resumed to its end, while MLflow's server was down."""
    before = {run.run_id for run in RunFolder.all(place / "runs")}

    def newest():
        return next((run for run in RunFolder.all(place / "runs") if run.run_id not in before), None)

    process = start("submit", "job.yaml", "-s", f"tracking.mlflow_uri={DOWN}", cwd=place)
    run = wait_for(newest, process)
    wait_for(lambda: max(run.steps(), default=0) >= 40, process)
    assert kill(process) > 3, "Ray's processes are not descendants of the driver"
    last = max(run.steps())
    assert last < NUM_STEPS and run.state() == "interrupted"

    process = start("resume", run.run_id, cwd=place)
    wait_for(lambda: max(run.steps()) >= last + 20, process)
    process.send_signal(signal.SIGHUP)  # as a terminal that is closed; it ends as by Ctrl-C and SIGTERM
    done = outcome(process)
    assert done.returncode == 5, done.output
    assert "orchestrator resume" in done.output
    assert run.state() == "stopped"
    stopped_at = max(run.steps())
    assert (run.checkpoints / f"step-{stopped_at:08d}").is_dir()

    orchestrator("resume", run.run_id, cwd=place, check=0)
    return run


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_terminal_that_closes_interrupts_as_ctrl_c_does(finished, place, name):
    run, _ = finished
    with run.lock():  # so that `logs --follow` waits for more
        process = start("logs", run.run_id, "--follow", cwd=place)
        process.stdout.readline()
        process.send_signal(getattr(signal, name))
        done = outcome(process)

    assert done.returncode == 130 and "Traceback" not in done.output


def test_killed_then_interrupted_then_resumed_equals_uninterrupted_bit_by_bit(finished, resumed):
    (reference, _), run = finished, resumed

    assert losses(run) == losses(reference)
    samples = {step: report.samples for step, report in run.steps().items()}
    assert samples == {step: report.samples for step, report in reference.steps().items()}
    ours, theirs = (r.path / "adapter" / "adapter_model.safetensors" for r in (run, reference))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow  # of the parts, tests/orchestrator/training proves it
def test_two_workers_see_the_same_losses_as_one(finished, place):
    reference, _ = finished

    done = orchestrator("submit", "job.yaml", "--json", "-s", "cluster.num_workers=2", cwd=place, check=0)

    run = RunFolder(Path(json.loads(done.stdout)["path"]))
    ours, theirs = losses(run), losses(reference)
    for step in range(1, 21):  # later, rounding has grown through Adam
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step


def test_a_run_whose_server_was_down_is_sent_later(resumed, place):
    run = resumed
    events = run.events()[0]
    began = max(at for at, event in enumerate(events) if isinstance(event, StateChange) and event.state == "running")
    failures = [event for event in events[began:] if isinstance(event, TrackingReport)]
    assert len(failures) in (1, 2)  # at the end, and once before where the run took longer than a minute
    assert all(not failure.ok and "orchestrator sync" in failure.text for failure in failures)
    assert called("sync", run.run_id, cwd=place).returncode == 4

    job = run.path / "job.yaml"
    job.write_text(job.read_text().replace(DOWN, f"sqlite:///{place / 'later.db'}"))
    called("sync", run.run_id, cwd=place, check=0)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place / 'later.db'}")
    history = client.get_metric_history(run.read_json("tracking.json")["mlflow_run_id"], "loss")
    assert {metric.step: metric.value for metric in history} == losses(run)


def test_a_worker_that_fails_ends_with_its_reason_and_exit_code_five(place, model_folder):
    done = orchestrator(
        "submit", "job.yaml", "-s", "train.learning_rate=1e30", "-s", "train.max_grad_norm=0", "-s", "train.optim=sgd",
        "-s", "eval.before=false", "-s", "tracking.report_to=[]", cwd=place,
    )  # fmt: skip

    assert done.returncode == 5, done.output
    assert "is not a number (samples" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.slow  # what it proves at length, tests/strategies/test_sharding.py proves of the parts
def test_weights_divided_by_zero_3_train_and_are_handed_back_whole(finished, place):
    reference, _ = finished

    divided = ("-s", "cluster.num_workers=2", "-s", "strategy.mode=zero3", "-s", "tracking.report_to=[]")
    done = orchestrator("submit", "job.yaml", "--json", *divided, cwd=place, check=0)

    run = RunFolder(Path(json.loads(done.stdout)["path"]))
    ours, theirs = losses(run), losses(reference)
    for step in range(1, 21):
        assert ours[step] == pytest.approx(theirs[step], rel=1e-4), step
    assert (
        load_file(run.path / "adapter" / "adapter_model.safetensors").keys()
        == load_file(reference.path / "adapter" / "adapter_model.safetensors").keys()
    )
    assert run.read_json("result.json")["after"]["eval_loss"] == pytest.approx(
        reference.read_json("result.json")["after"]["eval_loss"], rel=1e-3
    )


@pytest.mark.slow  # of the taking itself, tests/orchestrator/runs/test_locks.py proves it many times
def test_of_two_jobs_that_are_submitted_under_one_name_at_once_one_is_refused_and_the_other_trains_its_own(place):
    short = ("-s", "train.max_steps=4", "-s", "eval.eval_steps=null", "-s", "tracking.report_to=[]")
    for number in range(3):
        names = ("submit", "job.yaml", "--run-id", f"both-{number}", *short)
        both = {rank: start(*names, "-s", f"method.lora_r={rank}", cwd=place) for rank in (2, 6)}
        done = {rank: outcome(process) for rank, process in both.items()}

        codes = {rank: one.returncode for rank, one in done.items()}
        assert sorted(codes.values()) == [0, 2], done
        (trained,) = (rank for rank, code in codes.items() if code == 0)
        run = RunFolder.find(f"both-{number}", place / "runs")
        config = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == run.job().spec.method.lora_r == run.plan().method["lora_r"] == trained
        assert f"both-{number}" in done[8 - trained].output


@pytest.mark.slow
def test_experts_of_lora_are_submitted_evaluated_and_refused_a_merge(place):
    """MixLoRA through Ray: what the plan says before training holds of the result."""
    method = "method={type: experimental_mixlora, num_experts: 4, lora_r: 2}"
    options = ("--set", method, "--set", "train.max_steps=6", "--set", "eval.eval_steps=3")
    done = orchestrator("submit", "job.yaml", "--json", *options, cwd=place, check=0)
    run = RunFolder(Path(json.loads(done.stdout)["path"]))

    again = orchestrator("evaluate", str(run.path), "--json", cwd=place, check=0)
    refused = orchestrator("merge", "plain", str(run.path), cwd=place, check=2)
    stated = orchestrator("plan", "job.yaml", *options, cwd=place, check=0)

    steps = list(run.steps().values())
    assert len(steps) == 6 and all(step.extra_loss["experts/evenness"] > 0.5 for step in steps)
    assert run.events_of(StateChange)[-1].state == "finished"
    assert json.loads(again.stdout)["eval_loss"] == pytest.approx(run.result().after.scores["eval_loss"], abs=1e-5)
    assert "is not merged: each token passes experts of its own choice" in refused.stderr
    assert "Loads with this program alone" in stated.stdout and not (place / "plain").exists()


@pytest.mark.slow  # of the parts, tests/orchestrator/training/test_pruned_jobs.py proves it
def test_two_workers_prune_a_model_and_hand_it_back_smaller(place):
    from transformers import AutoModelForCausalLM

    keys = ["method={type: experimental_pruned_lora, ratio: 0.5}", "cluster.num_workers=2", "train.max_steps=30"]
    stated = [part for key in [*keys, "eval.eval_steps=10"] for part in ("--set", key)]

    done = orchestrator("submit", "job.yaml", "--json", *stated, cwd=place, check=0)

    told = json.loads(done.stdout)
    run = RunFolder(Path(told["path"]))
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert model.config.intermediate_size == 64 and len(run.plan().nodes) == 2
    assert f": {sum(p.numel() for p in model.parameters()):,} of" in run.plan().reasons["method.type"]
    assert told["result"]["after"]["eval_loss"] < told["result"]["before"]["eval_loss"]
    assert run.result().handed_back.step >= 15
    assert "gives the logits of what was trained" in run.result().check
    assert "Sizes: 64 of 128 channels of each MLP remain" in (run.path / "model" / "README.md").read_text()
