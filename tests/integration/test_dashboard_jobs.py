"""A job sent through a dashboard: a real Ray head on loopback with its own token, another home on the client's side."""

from pathlib import Path

import pytest

from orchestrator.runs.events import StepReport
from orchestrator.runs.run_folder import RunFolder
from tests.conftest import rows, write_jsonl
from tests.processes import end, free_port, listens, orchestrator, start, wait_for

JOB = """\
name: sent
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64}}
method: {{lora_r: 4}}
train: {{global_batch_size: 8, max_steps: {steps}, learning_rate: 3e-3}}
checkpoint: {{save_steps: 20}}
eval: {{max_new_tokens: 8, eval_steps: 60}}
{cluster}
tracking: {{report_to: []}}
"""


LONG = 1500


def verb(place, *arguments, code=0, home="home"):
    return orchestrator(*arguments, cwd=place, check=code, HOME=str(place / home)).output


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sender")
    write_jsonl(folder / "train.jsonl", rows(40))
    write_jsonl(folder / "eval.jsonl", rows(8, start=100))
    elsewhere = f"cluster: {{storage: {tmp_path_factory.mktemp('cluster') / 'runs'}}}"
    for name, steps, cluster in (("job", 30, ""), ("long", LONG, elsewhere)):  # the first where runs go by themselves
        text = JOB.format(model=model_folder, steps=steps, cluster=cluster)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def head(place):
    """`orchestrator head` with a dashboard; its address."""
    port, dashboard = free_port(), free_port()
    asked = ("--address", "127.0.0.1", "--name", "box", "--slots", "1", "--port", port, "--dashboard-port", dashboard)
    home, log = str(place / "home"), place / "head.log"
    process = start("head", *asked, cwd=place, output=log, HOME=home, MY_TOKEN=SECRET)
    wait_for(lambda: listens(dashboard), process)
    yield f"http://127.0.0.1:{dashboard}"
    end(process)


@pytest.mark.slow
def test_a_job_is_sent_and_its_adapter_fetched(place, head):
    said = verb(place, "submit", "job.yaml", "--cluster", head)

    (run,) = RunFolder.all(place / "runs")
    assert run.state() == "finished", said
    assert (run.exported() / "adapter_model.safetensors").is_file()
    assert run.read_json("result.json")["steps"] == 30
    assert "step 30/30" in said and "fetched" in said
    assert str(place) not in (run.path / "package" / "job.yaml").read_text()
    assert "finished" in verb(place, "status", run.run_id)
    assert "model ready" in verb(place, "logs", run.run_id)


SECRET = "hf_5ecret5ecret5ecret"  # in the environment of the head


@pytest.mark.slow
def test_a_secret_is_named_and_written_nowhere(place, head):
    text = (place / "job.yaml").read_text()
    (place / "secret.yaml").write_text(text + "cluster: {secrets: [MY_TOKEN]}\n")
    (place / "other.yaml").write_text(text + "cluster: {secrets: [OTHER_TOKEN]}\n")
    assert "OTHER_TOKEN is not set where the job runs" in verb(place, "submit", "other.yaml", "--cluster", head, code=5)
    known = {run.run_id for run in RunFolder.all(place / "runs")}

    verb(place, "submit", "secret.yaml", "--cluster", head)

    (run,) = [run for run in RunFolder.all(place / "runs") if run.run_id not in known]
    assert run.state() == "finished"
    session = Path("/tmp/ray/session_latest/logs").resolve()
    places = [run.path, session, place / "home" / "orchestrator-runs"]
    read = [file for folder in places for file in folder.rglob("*") if file.is_file()]
    assert len(read) > 20
    assert [file for file in read if SECRET.encode() in file.read_bytes()] == []


@pytest.mark.slow
def test_another_shell_stops_it_and_it_is_resumed(place, head):
    known = {run.run_id for run in RunFolder.all(place / "runs")}
    verb(place, "submit", "long.yaml", "--cluster", head, "--detach")
    (run,) = [run for run in RunFolder.all(place / "runs") if run.run_id not in known]
    wait_for(lambda: "step " in verb(place, "logs", run.run_id))

    assert "stops after its current step" in verb(place, "stop", run.run_id)

    wait_for(lambda: "state         stopped" in verb(place, "status", run.run_id))
    verb(place, "fetch", run.run_id)
    reached = max(run.steps())
    assert 0 < reached < LONG

    verb(place, "resume", run.run_id)
    assert run.state() == "finished" and max(run.steps()) == LONG
    losses = [event.step for event in run.events_of(StepReport)]
    assert len(losses) == LONG  # it went on where it stood: no step twice


def test_a_client_without_the_token_and_an_address_without_a_cluster_are_refused(place, head):
    said = verb(place, "submit", "job.yaml", "--cluster", head, code=4, home="stranger")
    assert "requires its token" in said
    said = verb(place, "submit", "job.yaml", "--cluster", f"http://127.0.0.1:{free_port()}", code=4)
    assert "no Ray dashboard" in said
    assert len(RunFolder.all(place / "runs")) == len([p for p in (place / "runs").iterdir() if p.name[0] != "."])


def test_data_beyond_what_ray_takes_is_refused_before_anything_is_sent(place, head):
    with (place / "huge.jsonl").open("wb") as stream:
        stream.truncate(600 * 2**20)
    said = verb(place, "submit", "job.yaml", "--cluster", head, "--set", "data.train=huge.jsonl", code=2)

    assert "cluster.shared_paths" in said and "500.0 MiB" in said
