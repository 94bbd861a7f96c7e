"""A search by its command: Ray Tune, the tiny model, MLflow, and the report of its result."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.search_folder import SearchFolder
from tests.cli import called
from tests.conftest import rows, write_jsonl
from tests.processes import free_port, orchestrator, outcome, start, start_python, wait_for

SPACE = (
    "{method.lora_r: [2, 8], model.dtype: [float32], data.packing: [true, false],"
    " train.per_device_train_batch_size: [1, 4]}"
)


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searches")
    write_jsonl(folder / "train.jsonl", rows(80))
    write_jsonl(folder / "eval.jsonl", rows(8, start=100))
    (folder / "job.yaml").write_text(
        f"""\
name: tiny
model: {{model_name_or_path: {model_folder}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64}}
method: {{type: lora}}
train: {{global_batch_size: 8, num_train_epochs: 2, learning_rate: 1e-2}}
cost: {{power_w: 100}}
search: {{space: {SPACE}, budget: {{trials: 4}}, trial_steps: 4, scheduler: none}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def searched(place):
    done = orchestrator("search", "job.yaml", "--json", cwd=place, check=0)
    told = json.loads(done.stdout)
    return SearchFolder(Path(told["path"])), told


def test_trials_ran_and_are_compared_with_their_predictions(searched):
    folder, told = searched

    assert folder.state() == "finished"
    assert len(told["trials"]) == 4
    for trial in told["trials"]:
        assert trial["status"] == "finished" and trial["steps"] == 4, trial
        assert trial["predicted_step_s"] > 0 and trial["step_s"] > 0
        assert trial["tensors_bytes"] == pytest.approx(trial["predicted_tensors_bytes"], rel=0.6)
        assert trial["curve"][-1][1] < trial["curve"][0][1]
    assert len({json.dumps(trial["point"], sort_keys=True) for trial in told["trials"]}) == 4


def test_one_process_ran_all_trials(searched):
    """Set-up of the second trial takes no import of torch: it is much shorter than the first."""
    _, told = searched

    first, *others = [trial["seconds"] for trial in told["trials"]]
    assert min(others) < first


def test_the_recommended_job_validates_and_is_what_was_found(searched):
    folder, told = searched

    chosen = told["recommended"]
    done = called("plan", folder.path / "recommended.yaml", "--json", cwd=folder.path.parent, check=0)

    planned = json.loads(done.stdout)
    assert planned["method"]["lora_r"] == chosen["point"]["method.lora_r"]
    assert planned["nodes"][0]["techniques"]["packing"] == chosen["point"]["data.packing"]
    assert chosen["cost"] > 0 and chosen["total_s"] > 0


def test_mlflow_has_a_run_with_a_nested_run_a_trial(searched):
    from mlflow.tracking import MlflowClient

    folder, _ = searched
    client = MlflowClient(f"sqlite:///{folder.path.parent / 'mlflow.db'}")
    parent_id = folder.read_json("tracking.json")["mlflow_run_id"]

    parent = client.get_run(parent_id)
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'")

    assert len(nested) == 4
    best = [run for run in nested if run.data.tags["best"] == "true"]
    assert [run.info.run_id for run in best] == [parent.data.tags["best_trial"]]
    assert all("step_s" in run.data.metrics and "predicted_step_s" in run.data.metrics for run in nested)
    assert {"summary.json", "report.html"} <= {file.path for file in client.list_artifacts(parent_id)}


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_the_report_has_all_its_parts(searched, lang):
    folder, _ = searched

    done = called("report", folder.run_id, "--lang", lang, "--json", cwd=folder.path.parent.parent, check=0)

    page = Path(json.loads(done.stdout)["report"]).read_text()
    assert page.count("<figure") == 4
    assert "recommended.yaml" in page and "EUR" in page


def test_status_and_list_know_a_search(searched):
    folder, _ = searched

    shown = called("status", folder.run_id, cwd=folder.path.parent.parent, check=0).stdout

    assert "recommended" in shown and "in every trial" in shown
    assert RunFolder.all(folder.path.parent) == []  # a search is not a run


@pytest.mark.slow
def test_an_interrupted_search_resumes_with_the_remaining_trials(place):
    known = {one.path for one in SearchFolder.all(place / "runs")}
    process = start("search", "job.yaml", "--json", "--trials", "8", cwd=place)

    def with_a_trial():
        return [one for one in SearchFolder.all(place / "runs") if one.path not in known and one.trials()]

    (folder,) = wait_for(with_a_trial, process)
    process.send_signal(signal.SIGINT)
    done = outcome(process)
    assert done.returncode == 5 and "continues with the remaining trials" in done.output
    before = folder.trials()

    orchestrator("resume", folder.run_id, "--json", cwd=place, check=0)

    after = folder.trials()
    assert after[: len(before)] == before and len(after) == 8
    assert len({trial.key for trial in after}) == 8


def test_a_trial_that_fails_is_a_data_point_and_the_search_continues(place):
    """A learning rate of 1e30 diverges; the other trial does not."""
    space = "{train.learning_rate: [1.0e+30, 0.01]}"
    done = orchestrator("search", "job.yaml", "--json", "--set", f"search.space={space}", cwd=place, check=0)

    told = json.loads(done.stdout)
    by_rate = {trial["point"]["train.learning_rate"]: trial for trial in told["trials"]}
    assert by_rate[1e30]["status"] == "failed" and "not a number" in by_rate[1e30]["reason"]
    assert told["recommended"]["point"]["train.learning_rate"] == 0.01
    assert told["failed"] == [by_rate[1e30]["number"]] and told["wasted_seconds"] > 0


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["search.space={model.dtype: []}"], 2, "search.space"),
        (["search.space={data.max_length: [64], train.optim: [adamw_bnb_16bit]}"], 2, "it should be"),
        (["search.budget.minutes=0.0001"], 2, "one trial takes about"),
        (["search.metric=rouge_l", "eval.metrics=[exact_match]"], 2, "never measured"),
        (["search.nodes=idle"], 3, "would use every machine"),
        (["search.space={method.type: [full]}", "goal.max_hours=0.0000001"], 3, "goal.max_hours"),
    ],
)
def test_an_impossible_search_is_refused_before_anything_starts(place, overrides, code, says):
    began = set(SearchFolder.all(place / "runs"))

    arguments = [part for override in overrides for part in ("--set", override)]
    done = called("search", "job.yaml", *arguments, cwd=place)

    assert done.returncode == code and says in done.stderr, done.stdout + done.stderr
    assert "starting Ray" not in done.stdout
    assert {one.path for one in SearchFolder.all(place / "runs")} == {one.path for one in began}


def test_bench_dissects_a_step_and_compares_with_itself(place):
    first = json.loads(orchestrator("bench", "job.yaml", "--steps", "2", "--json", cwd=place, check=0).stdout)

    assert first["throughput"]["tokens_per_s"] > 0
    assert sum(first["phases"].values()) == pytest.approx(first["step_s"], rel=0.9)
    assert {"attention", "matrix products", "lora"} <= set(first["parts"])
    done = called("bench", "--compare", first["file"], first["file"], cwd=place, check=0)
    assert "x1.00" in done.stdout
    wrong = called("bench", "--compare", "job.yaml", first["file"], cwd=place)
    assert wrong.returncode == 2 and "is not JSON" in wrong.stderr


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_is_a_data_point(place):
    """As the kernel does where memory runs out."""
    process = start("search", "job.yaml", "--json", "--trials", "3", cwd=place)
    mine = psutil.Process(process.pid)

    def kill_a_runner():
        for child in mine.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "_Runner" in " ".join(child.cmdline()):
                    child.kill()
                    return True
        return False

    wait_for(kill_a_runner, process)
    done = outcome(process)
    assert done.returncode == 0, done.output

    told = json.loads(done.stdout)
    (lost,) = [trial for trial in told["trials"] if trial["status"] == "failed"]
    assert "killed" in lost["reason"] and len(told["trials"]) == 3
    assert told["recommended"]["trial"] != lost["number"]


RANK_AND_RATE = ("--set", "search.space={method.lora_r: [2, 8], train.learning_rate: [0.001, 0.01]}")


@pytest.mark.slow
def test_trials_of_one_layout_share_a_base_model_and_come_to_what_each_does_alone(place):
    asked = ("search", "job.yaml", "--json", "--trials", "4", "--set", "search.scheduler=asha", *RANK_AND_RATE)
    done = orchestrator(*asked, cwd=place, check=0)
    alone = json.loads(orchestrator(*asked, "--set", "search.share_base=never", cwd=place, check=0).stdout)

    told = json.loads(done.stdout)
    assert "share one base model in one worker" in " ".join(done.stderr.split())
    assert all(trial["time"]["runs_together"] > 1 for trial in told["trials"])
    expected = {json.dumps(trial["point"]): dict(trial["curve"]) for trial in alone["trials"]}
    for trial in told["trials"]:
        known = expected[json.dumps(trial["point"])]
        assert [loss for _, loss in trial["curve"]] == pytest.approx([known[step] for step, _ in trial["curve"]], 1e-5)
    assert told["recommended"]["point"] == alone["recommended"]["point"]


@pytest.mark.slow
def test_trials_whose_common_process_is_killed_are_tried_again_alone(place):
    options = ("--set", "search.trial_steps=40", *RANK_AND_RATE)
    process = start("search", "job.yaml", "--json", "--trials", "4", *options, cwd=place)
    mine = psutil.Process(process.pid)

    def kill_the_trainer():
        for child in mine.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ResidentTrainer" in " ".join(child.cmdline()):
                    child.kill()
                    return True
        return False

    wait_for(kill_the_trainer, process)
    done = outcome(process)
    assert done.returncode == 0, done.output

    told = json.loads(done.stdout)
    assert "is tried again by itself" in done.output and len(told["trials"]) == 4
    assert all(trial["status"] == "finished" and trial["predicted_step_s"] for trial in told["trials"])


@pytest.mark.slow
def test_ranges_a_metric_of_answers_and_the_median_rule(place):
    space = "{train.learning_rate: {loguniform: [1.0e-3, 3.0e-2]}, data.packing: [true, false]}"
    options = ("search.scheduler=median", "search.metric=rouge_l", "eval.max_new_tokens=8", f"search.space={space}")
    arguments = [part for option in options for part in ("--set", option)]
    told = json.loads(
        orchestrator("search", "job.yaml", "--json", "--trials", "6", *arguments, cwd=place, check=0).stdout
    )

    rates = [trial["point"]["train.learning_rate"] for trial in told["trials"]]
    assert len(rates) == 6 and len(set(rates)) > 2 and all(1e-3 <= rate <= 3e-2 for rate in rates)
    finished = [trial for trial in told["trials"] if trial["status"] == "finished"]
    assert finished and all(0 <= trial["quality"]["rouge_l"] <= 1 for trial in finished)
    by_number = {trial["number"]: trial for trial in finished}
    chosen = by_number[told["recommended"]["trial"]]
    assert told["recommended"]["lack"] == pytest.approx(1 - chosen["quality"]["rouge_l"])


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["minutes=0.2", "node_hours=0.002"])
def test_a_search_ends_with_its_budget(place, budget):
    """12 s and 7.2 s: some trials of about two seconds, not all of them; on a busy machine none."""
    space = "{train.per_device_train_batch_size: [1, 2, 4, 8], data.packing: [true, false], method.lora_r: [2, 4, 8]}"
    arguments = ("--set", f"search.budget.{budget}", "--set", f"search.space={space}", "--trials", "24")
    told = json.loads(
        orchestrator(
            "search", "job.yaml", "--json", *arguments, "--set", "search.trial_steps=60", cwd=place, check=0
        ).stdout
    )

    assert told["state"] == "finished" and len(told["trials"]) < 24


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_without_the_planner_what_cannot_run_is_a_trial_that_failed(place, sampler):
    space = "{model.attn_implementation: [document, sdpa], data.packing: [true, false], model.dtype: [float32]}"
    told = json.loads(
        orchestrator(
            *("search", "job.yaml", "--json", "--sampler", sampler, "--trials", "4", "--set", f"search.space={space}"),
            cwd=place,
            check=0,
        ).stdout
    )

    assert len(told["trials"]) == 4 and len({json.dumps(trial["point"]) for trial in told["trials"]}) == 4
    (failed,) = [trial for trial in told["trials"] if trial["status"] == "failed"]
    assert failed["reason"] == "model.attn_implementation: document needs data.packing: true"
    assert told["recommended"] is not None


@pytest.mark.slow
def test_a_study_goes_through_its_list(place):
    done = orchestrator(
        "search", "job.yaml", "--study", "default", "--lengths", "32,64", "--set", "search.trial_steps=2", "--json",
        cwd=place, check=0,
    )  # fmt: skip

    told = json.loads(done.stdout)
    assert len(told["trials"]) == 32
    measured = {trial["name"]: trial for trial in told["trials"] if trial["status"] == "finished"}
    assert {"baseline @32", "packing @64", "bf16 @64"} <= set(measured)
    longer = measured["gradient checkpointing @64"]["tensors_bytes"]
    assert longer < measured["baseline @64"]["tensors_bytes"]


@pytest.mark.slow
def test_a_study_goes_through_several_models(place, model_folder, tmp_path):
    (tmp_path / "two.yaml").write_text(
        "baseline: {model.dtype: float32, data.packing: false}\none_factor: {packing: {data.packing: true}}\n"
    )
    shutil.copytree(model_folder, tmp_path / "other")
    before = len(SearchFolder.all(place / "runs"))

    names = f"{model_folder},{tmp_path / 'other'}"
    shown = orchestrator(
        "search", "job.yaml", "--study", tmp_path / "two.yaml", "--models", names, cwd=place, check=0
    ).stdout

    first, second = SearchFolder.all(place / "runs")[before:]
    assert [trial.name for folder in (first, second) for trial in folder.trials()] == ["baseline", "packing"] * 2
    assert shown.count("an epoch") >= 2 and "other" in (second.path / "search.yaml").read_text()


@pytest.mark.slow
def test_a_search_is_sent_to_an_mlflow_server(searched, tmp_path):
    import urllib.request

    from mlflow.tracking import MlflowClient

    from orchestrator.job.job_file import parse_job
    from orchestrator.runs.mirror.tracking import sync_search

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    stores = ("--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", tmp_path / "art")
    server = start_python(
        *("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1, *stores),
        cwd=tmp_path,
        output=tmp_path / "server.log",
    )

    def answers():
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            return True
        return False

    wait_for(answers, server)
    folder, _ = searched
    job = parse_job((folder.path / "search.yaml").read_text(), folder.path, "job", [f"tracking.mlflow_uri={uri}"])

    assert sync_search(folder, job) == uri

    client = MlflowClient(uri)
    parent = folder.read_json("tracking.json")["mlflow_run_id"]
    experiment = client.get_experiment_by_name("default").experiment_id
    assert len(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")) == 4
    assert "summary.json" in {file.path for file in client.list_artifacts(parent)}
