"""Runs whose MLflow experiment was deleted, and runs whose store has a password: by the case, and by the commands."""

import json
import stat
from pathlib import Path

import pytest

from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.machines import declared
from orchestrator.runs.events import StateChange
from orchestrator.runs.mirror import tracking
from orchestrator.runs.mirror.state import Sent, TrackingFailed
from orchestrator.runs.run_folder import RunFolder
from tests.processes import orchestrator

PASSWORD = "pa55w0rd"


def with_deleted_experiment(folder):
    """The store that the case's job names, in which its experiment was deleted; its client and the experiment's id."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    number = client.create_experiment("shop", artifact_location=(folder / "kept").as_uri())
    client.delete_experiment(number)
    return client, number


def test_a_run_of_a_deleted_experiment_says_what_to_do_and_both_ways_work(case, monkeypatch):
    from orchestrator.lifecycle.prepare import plan_without_data

    folder = case("49")
    monkeypatch.chdir(folder)  # the job's store is a relative file
    client, number = with_deleted_experiment(folder)
    job = read_job(folder / "job.yaml")
    run = RunFolder.create(folder / "runs", "job")
    run.write("plan.json", plan_without_data(job, declared(Path("home-lab")), lambda text: None).plan.to_json())
    run.write("job.yaml", job.text)
    run.record(StateChange("finished"))

    with pytest.raises(TrackingFailed) as failed:
        tracking.sync(run, job)
    assert "'shop' was deleted there" in str(failed.value) and "sends it later" not in str(failed.value)
    assert f"mlflow experiments restore -x {number}" in str(failed.value)
    assert f"sync {run.run_id} --experiment NAME" in str(failed.value)

    tracking.sync(run, job, "shop-2")
    assert client.get_run(Sent.of(run).mlflow_run_id).info.status == "FINISHED"
    client.restore_experiment(number)
    (run.path / "tracking.json").unlink()
    tracking.sync(run, job)
    (restored,) = client.search_runs([number])
    assert restored.info.status == "FINISHED"


def verb(folder, *arguments, code=0):
    """What a command printed on both channels, in a home of its own."""
    (folder / "t").mkdir(exist_ok=True)
    own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "t"), "COLUMNS": "400"}
    return orchestrator(*arguments, cwd=folder, check=code, **own).output


@pytest.mark.slow
def test_the_commands_of_a_deleted_experiment(case):
    folder = case("49")
    client, number = with_deleted_experiment(folder)

    said = " ".join(verb(folder, "submit", "job.yaml", "--run-id", "first").split())
    assert f"mlflow experiments restore -x {number}" in said and "sync first --experiment NAME" in said
    assert "was deleted there" in verb(folder, "sync", "first", code=4)
    verb(folder, "sync", "first", "--experiment", "shop-2")

    run = client.get_run(Sent.of(RunFolder(folder / "runs" / "first")).mlflow_run_id)
    assert run.info.status == "FINISHED" and len(client.get_metric_history(run.info.run_id, "loss")) == 2


@pytest.mark.slow
def test_a_password_stands_in_the_job_alone_whatever_is_asked_of_its_run(case):
    """Everything that the verbs print, and every file that a run leaves: of the project, of Ray, of the home."""
    folder = case("49")
    uri = f"http://ann:{PASSWORD}@127.0.0.1:9/x?access_token={PASSWORD}"
    set_uri = ("-s", f"tracking.mlflow_uri={json.dumps(uri)}")

    said = verb(folder, "submit", "job.yaml", "--run-id", "first", *set_uri)
    assert "tracking.mlflow_uri holds a password" in said and "http://***@127.0.0.1:9" in said
    said += verb(folder, "validate", "job.yaml", *set_uri)
    said += verb(folder, "plan", "job.yaml", "--json", *set_uri)
    said += verb(folder, "sync", "first", code=4)
    said += verb(folder, "submit", "job.yaml", "--run-id", "first", "-s", f"tracking.mlflow_uri={uri}2", code=2)
    said += verb(folder, "submit", "job.yaml", "--cluster", "http://127.0.0.1:9", *set_uri, code=2)
    for shown in (["status"], ["status", "--json"], ["logs"], ["logs", "--json"], ["list", "--json"], ["report"]):
        said += verb(folder, shown[0], *([] if shown[0] == "list" else ["first"]), *shown[1:])

    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    holding = [file for file in files if PASSWORD.encode() in file.read_bytes()]
    assert PASSWORD not in said and len(files) > 20
    run = folder / "runs" / "first"
    assert sorted(holding) == [run / "job.yaml", run / "recorded.json"]  # the job as it was written, twice
    assert [stat.S_IMODE(file.stat().st_mode) for file in holding] == [0o600, 0o600]
    assert not (folder / "home" / ".ray").exists()
