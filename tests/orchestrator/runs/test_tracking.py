"""MLflow as a mirror: states, what was deleted there, kills between two calls, and passwords that never get there."""

import json
import shutil
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.cli.runs import status
from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle.machines import declared
from orchestrator.runs.events import StateChange, StepReport, TrackingReport
from orchestrator.runs.mirror import tracking
from orchestrator.runs.mirror.state import Sent, TrackingFailed, address_of, is_left_running
from orchestrator.runs.run_folder import RunFolder
from tests.conftest import SMALL_MODEL, rows, write_jsonl

PASSWORD = "pa55w0rd"


@pytest.fixture
def run_of(tmp_path):
    """A run folder as `submit` leaves it, with the steps of a run that trained; no training is needed to mirror it."""
    from orchestrator.lifecycle.prepare import plan_without_data

    (tmp_path / "model").mkdir()
    shutil.copy(SMALL_MODEL / "config.json", tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", rows(8))

    def make(uri, experiment="shop", name="tiny", **tracked):
        tracked = json.dumps({"mlflow_uri": uri, "experiment": experiment, **tracked})
        text = f"model: {{model_name_or_path: model}}\ndata: {{train: train.jsonl}}\ntracking: {tracked}\n"
        job = parse_job(text, tmp_path)
        plan = plan_without_data(job, declared(Path("home-lab")), lambda text: None).plan
        run = RunFolder.create(tmp_path / "runs", name)
        run.write("origin.json", json.dumps({"folder": str(tmp_path)}))
        run.write("plan.json", plan.to_json())
        run.write("job.yaml", job.text)
        run.record(StateChange("running", pid=1))
        report(run, 1)
        return run, job

    return make


NUMBERS = ("epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_s", "peak_bytes")


def report(run, step):
    run.record(StepReport(step=step, seconds=1.0, **dict.fromkeys(NUMBERS, 1.0)))


def steps_of(client, run):
    return [metric.step for metric in client.get_metric_history(Sent.of(run).mlflow_run_id, "loss")]


def status_of(client, run):
    return client.get_run(Sent.of(run).mlflow_run_id).info.status


@pytest.mark.parametrize(
    ("state", "wanted"), [("finished", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED"), (None, "KILLED")]
)
def test_how_a_run_ended_is_its_state_there(store, run_of, state, wanted):
    client, uri = store
    run, job = run_of(uri)
    if state:
        run.record(StateChange(state))

    tracking.sync(run, job)

    assert status_of(client, run) == wanted and steps_of(client, run) == [1]


def test_runs_and_experiments_may_have_japanese_names(store, run_of):
    client, uri = store
    run, job = run_of(uri, experiment="実験一", name="日本語")

    tracking.sync(run, job)

    sent = client.get_run(Sent.of(run).mlflow_run_id)
    assert client.get_experiment(sent.info.experiment_id).name == "実験一"
    assert sent.info.run_name == run.run_id and run.run_id.startswith("日本語-")


def test_a_run_that_goes_on_stays_running_and_one_that_is_resumed_runs_again(store, run_of):
    client, uri = store
    run, job = run_of(uri)
    with run.lock():
        tracking.sync(run, job)
        assert status_of(client, run) == "RUNNING"
        assert tracking.complete(run, job) is None  # it goes on: nothing to complete
    assert is_left_running(run)  # its driver is gone

    assert tracking.complete(run, job) == uri
    assert status_of(client, run) == "KILLED" and not is_left_running(run)
    with run.lock():
        report(run, 2)
        tracking.sync(run, job)
        assert status_of(client, run) == "RUNNING"
    run.record(StateChange("finished"))
    assert tracking.complete(run, job) == uri
    assert tracking.complete(run, job) is None
    assert status_of(client, run) == "FINISHED" and steps_of(client, run) == [1, 2]


def test_the_verb_status_mends_what_a_killed_driver_left_running(store, run_of, capfd):
    client, uri = store
    run, job = run_of(uri)
    with run.lock():  # which a driver that is killed lets go of
        tracking.sync(run, job)

    status(str(run.path))

    assert status_of(client, run) == "KILLED"
    assert f"now shows how {run.run_id} ended" in " ".join(capfd.readouterr().err.split())


def test_a_deleted_experiment_is_restored_or_another_takes_the_run(store, run_of):
    client, uri = store
    number = client.create_experiment("gone", artifact_location=Path(uri.removeprefix("sqlite:///")).parent.as_uri())
    client.delete_experiment(number)
    run, job = run_of(uri, "gone")
    run.record(StateChange("finished"))

    with pytest.raises(TrackingFailed) as failed:
        tracking.sync(run, job)
    assert f"the experiment 'gone' was deleted there. Restore it (MLFLOW_TRACKING_URI={uri}" in str(failed.value)
    assert f"mlflow experiments restore -x {number})" in str(failed.value)
    assert f"orchestrator sync {run.run_id} --experiment NAME" in str(failed.value)

    tracking.sync(run, job, "other")
    assert client.get_run(Sent.of(run).mlflow_run_id).data.tags["run_folder"] == str(run.path)
    assert tracking.sync(run, job) == uri  # it stays there

    second, job = run_of(uri, "gone")
    client.restore_experiment(number)
    tracking.sync(second, job)
    assert client.get_run(Sent.of(second).mlflow_run_id).info.experiment_id == number


def test_an_experiment_that_is_deleted_after_its_run_began_is_named_too(store, run_of):
    client, uri = store
    run, job = run_of(uri, "later-gone")
    tracking.sync(run, job)
    client.delete_experiment(client.get_experiment_by_name("later-gone").experiment_id)
    report(run, 2)

    with pytest.raises(TrackingFailed, match="the experiment 'later-gone' was deleted there"):
        tracking.sync(run, job)
    tracking.sync(run, job, "kept")

    assert steps_of(client, run) == [1, 2]  # all of them, in the other


def test_a_deleted_run_is_named_and_one_that_was_thrown_away_is_sent_again(store, run_of):
    client, uri = store
    run, job = run_of(uri)
    tracking.sync(run, job)
    first = Sent.of(run).mlflow_run_id
    client.delete_run(first)
    with pytest.raises(TrackingFailed, match=f"the run {first} was deleted there.*mlflow runs restore -r {first}"):
        tracking.sync(run, job)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:  # as `mlflow gc` and a new server leave it
        for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (first,))

    tracking.sync(run, job)

    assert Sent.of(run).mlflow_run_id != first and steps_of(client, run) == [1]
    assert client.get_run(Sent.of(run).mlflow_run_id).data.params["tracking.experiment"] == "shop"


@pytest.mark.parametrize("left", ["key", "id", "metrics"])
def test_a_kill_between_two_calls_leaves_one_run_that_is_whole_after_the_next(store, run_of, left):
    client, uri = store
    run, job = run_of(uri, f"killed-{left}")
    run.record(StateChange("finished"))
    tracking.sync(run, job)
    sent = json.loads((run.path / "tracking.json").read_text())
    whole = {**client.get_run(sent["mlflow_run_id"]).data.params}
    sent |= {"offset": 0, "has_params": False, "state": "running"}  # as it was when the calls had been made
    sent |= {"mlflow_run_id": None} if left == "key" else {}
    sent |= {"has_params": True} if left == "metrics" else {}
    run.write("tracking.json", json.dumps(sent))

    assert tracking.complete(run, job) == uri

    (only,) = client.search_runs([client.get_experiment_by_name(f"killed-{left}").experiment_id])
    assert only.info.status == "FINISHED" and only.data.params == whole and steps_of(client, run) == [1]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"uri": 1}', '{"uri": "x", "offset": "0"}', "\x00\xff", "null"])
def test_a_damaged_record_of_the_mirror_is_named(run_of, text):
    run, job = run_of("http://127.0.0.1:9")
    (run.path / "tracking.json").write_text(text, encoding="latin-1")

    with pytest.raises(TrackingFailed, match=r"tracking\.json: .*Delete it and `orchestrator sync"):
        tracking.sync(run, job)


def test_the_record_of_an_earlier_version_is_read(run_of):
    run, job = run_of("sqlite:///mlflow.db")
    run.write("tracking.json", json.dumps({"uri": "sqlite:////old/mlflow.db", "asked_uri": "sqlite:///mlflow.db"}))

    assert address_of(run, job) == "sqlite:////old/mlflow.db"


def test_a_relative_file_stays_where_it_was_first_written(store, run_of, tmp_path, monkeypatch):
    _, uri = store
    folder = Path(uri.removeprefix("sqlite:///")).parent
    monkeypatch.chdir(folder)
    run, job = run_of("sqlite:///mlflow.db")
    assert tracking.sync(run, job) == uri

    monkeypatch.chdir(tmp_path)
    assert tracking.sync(run, job) == uri and not (tmp_path / "mlflow.db").exists()


def test_mirrors_of_one_driver_take_turns_send_only_what_is_new_and_watch_the_machine_once(store, run_of, monkeypatch):
    client, uri = store
    now = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tracking.time, "thread_time", lambda: 0.0)
    runs, jobs = zip(*(run_of(uri, name=name) for name in ("first", "second")), strict=True)
    each = [tracking.Mirror(run, job) for run, job in zip(runs, jobs, strict=True)]
    mirrors = tracking.Mirrors(each)
    mirrors.send_if_due()
    assert not any(Sent.of(run) for run in runs)  # not in the first minute

    now[0] = 61.0
    mirrors.send_if_due()
    assert [Sent.of(run) is not None for run in runs] == [True, False]
    mirrors.send_if_due()
    assert [steps_of(client, run) for run in runs] == [[1], [1]]
    assert [mirror._system is not None for mirror in each] == [True, False]

    each[0].close("finished")  # its monitor writes to the store
    report(runs[1], 2)
    client.delete_run(Sent.of(runs[0]).mlflow_run_id)
    now[0] = 92.0
    mirrors.send_if_due()  # the first has nothing new: it would find that its run is gone
    mirrors.send_if_due()
    assert steps_of(client, runs[1]) == [1, 2] and not list(runs[0].events_of(TrackingReport))


@pytest.mark.filterwarnings("ignore:Query string argument")
def test_a_password_stands_in_no_file_but_the_job_and_is_shown_nowhere(store, run_of, capfd):
    """A server that refuses, and a store that takes it: everything that is written or printed is looked through."""
    client, uri = store
    secret = f"http://ann:{PASSWORD}@127.0.0.1:9/x?token={PASSWORD}"
    run, job = run_of(secret)
    mirror = tracking.Mirror(run, job)
    mirror.finish()
    with pytest.raises(TrackingFailed) as failed:
        tracking.sync(run, job)
    (said,) = run.events_of(TrackingReport)
    assert "http://***@127.0.0.1:9/x?token=***" in said.text and PASSWORD not in str(failed.value)
    assert any(PASSWORD not in notice and "tracking.mlflow_uri holds a password" in notice for notice in job.notices)

    # A query that SQLite ignores is the way to a store that works and has a secret in its address.
    run, job = run_of(f"{uri}?password={PASSWORD}")
    shown = tracking.sync(run, job)
    sent = client.get_run(Sent.of(run).mlflow_run_id)
    copied = Path(client.download_artifacts(sent.info.run_id, "job.yaml"))

    assert shown == f"{uri}?password=***" == sent.data.params["tracking.mlflow_uri"]
    assert "password=***" in copied.read_text() and PASSWORD not in copied.read_text()
    files = [file for file in run.path.parent.rglob("*") if file.is_file()]
    holding = {file.name for file in files if PASSWORD.encode() in file.read_bytes()}
    assert holding == {"job.yaml"} and len(files) > 6
    assert stat.S_IMODE((run.path / "job.yaml").stat().st_mode) == 0o600
    assert PASSWORD not in "".join(capfd.readouterr())


def test_a_secret_is_named_and_read_where_it_is_needed(run_of, monkeypatch):
    run, job = run_of("postgresql://${DB_USER}:${DB_PASSWORD}@127.0.0.1:9/${DB}")
    assert job.notices == []
    with pytest.raises(TrackingFailed, match="names DB_USER, which is not set here"):
        tracking.sync(run, job)
    for name, value in {"DB_USER": "ann", "DB_PASSWORD": "p@ss/w:1", "DB": "mlflow"}.items():
        monkeypatch.setenv(name, value)

    assert address_of(run, job) == "postgresql://ann:p%40ss%2Fw%3A1@127.0.0.1:9/mlflow"
    with pytest.raises(TrackingFailed, match=r"MLflow at postgresql://\*\*\*@127.0.0.1:9/mlflow: .*refused"):
        tracking.sync(run, job)


@pytest.mark.parametrize("uri", ["http://a:p w@host", 'http://a:p"w@host', "postgresql://a:\tpw@host/x"])
def test_a_password_that_could_not_be_masked_is_refused_and_not_shown(uri):
    tracked = json.dumps({"mlflow_uri": uri})
    with pytest.raises(JobError) as refused:
        parse_job(f"model: {{model_name_or_path: m}}\ndata: {{train: x}}\ntracking: {tracked}", Path())

    assert "write it percent-encoded" in str(refused.value)
    assert "pw" not in str(refused.value) and "p w" not in str(refused.value)


def test_a_run_that_is_read_again_knows_its_own_store(store, run_of):
    _, uri = store
    run, _ = run_of(uri)

    assert tracking.sync(run, run.job()) == uri


def test_who_sends_waits_until_mlflow_is_imported(store, run_of):
    run, job = run_of(store[1])
    with tracking._loading, ThreadPoolExecutor(1) as pool:  # as the thread that imports it ahead does
        sent = pool.submit(tracking.sync, run, job)
        with pytest.raises(TimeoutError):
            sent.result(0.5)
        tracking._loading.release()
        address = sent.result(60)
        tracking._loading.acquire()

    assert address == store[1]
