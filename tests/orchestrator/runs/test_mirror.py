"""What people find in their tracker: who, from what, on which data, which curves, and a model that answers."""

import importlib.util
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import Job, spec_with
from orchestrator.runs.events import StepReport, TrackingReport
from orchestrator.runs.mirror import tracking
from orchestrator.runs.mirror.local_trackers import check_installed
from orchestrator.runs.mirror.state import Sent
from orchestrator.runs.run_folder import RunFolder
from tests.orchestrator.conftest import JOB


def tracked(run: RunFolder, **values) -> Job:
    """The job of a run with other wishes of tracking."""
    job = run.job()
    return replace(job, spec=spec_with(job.spec, {f"tracking.{key}": value for key, value in values.items()}))


@pytest.fixture(scope="module")
def copied(finished, tmp_path_factory):
    """The finished run in the folder of runs of a project, so that what is written beside it harms no other test."""
    return RunFolder(shutil.copytree(finished.path, tmp_path_factory.mktemp("box") / "shop-bot" / "runs" / "first"))


@pytest.fixture(scope="module")
def sent(store, copied):
    """The run as MLflow has it."""
    client, uri = store
    tracking.sync(copied, tracked(copied, report_to=["mlflow"], mlflow_uri=uri))
    return client.get_run(Sent.of(copied).mlflow_run_id)


def test_the_experiment_is_the_project_and_the_run_says_who_and_from_what(store, sent, copied):
    client, _ = store
    tags = sent.data.tags

    assert client.get_experiment(sent.info.experiment_id).name == "shop-bot"
    assert tags["mlflow.user"] and tags["mlflow.source.name"].endswith("job.yaml")
    assert tags["mlflow.note.content"].startswith("tiny: lora of ")


def test_parameters_are_what_was_stated_or_decided(sent):
    params = sent.data.params

    assert params["train.max_steps"] == "4" and params["plan.method.type"] == "lora"
    assert "train.adam_beta1" not in params and "kubernetes.image" not in params
    assert len(params) < 50


def test_a_run_begins_and_ends_there_when_it_did_here(sent, copied):
    events, _ = copied.events()

    assert sent.info.start_time == pytest.approx(1000 * events[0].time, abs=1)
    assert sent.info.end_time == pytest.approx(1000 * events[-1].time, abs=1)


def test_the_data_are_inputs_with_digest_and_columns(sent, copied):
    inputs = {one.tags[0].value: one.dataset for one in sent.inputs.dataset_inputs}

    assert set(inputs) == {"training", "evaluation"}
    assert inputs["training"].name == "train.jsonl"
    assert inputs["training"].digest == copied.data().train_digest[:36]
    assert "input_ids" in inputs["training"].schema and '"samples": 16' in inputs["training"].profile


def test_sources_of_every_form_are_named():
    from orchestrator.job.sections.training import HeldOutFraction, Source
    from orchestrator.runs.mirror.store import paths_of

    assert paths_of("a.jsonl") == ["a.jsonl"]
    assert paths_of([Source(path="a.jsonl"), "b.csv"]) == ["a.jsonl", "b.csv"]
    assert paths_of(HeldOutFraction(split=0.1)) == [] == paths_of(None)


def test_names_of_curves_are_grouped_by_a_slash(sent):
    names = set(sent.data.metrics)

    assert {"loss", "eval_loss", "before/eval_loss", "after/eval_loss"} <= names
    assert not {name for name in names if "." in name}


def test_the_model_has_its_method_and_its_scores(store, sent, copied):
    client, _ = store

    model = client.get_logged_model(Sent.of(copied).model_id)

    scores = {metric.key: (metric.value, metric.dataset_name) for metric in model.metrics}
    assert scores["after/eval_loss"] == (copied.result().after.eval_loss, "eval.jsonl")
    assert model.params["type"] == "lora" and model.params["lora_r"] == "4" and model.params["base"] == "model"


def test_the_model_is_in_the_registry_and_answers_as_it_was_handed_back(store, sent, copied):
    import mlflow
    import pandas
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    client, uri = store
    model_id = Sent.of(copied).model_id
    mlflow.set_tracking_uri(uri)
    client.create_registered_model("shop")
    version = client.create_model_version("shop", f"models:/{model_id}", sent.info.run_id, model_id=model_id)
    loaded = mlflow.pyfunc.load_model(f"models:/shop/{version.version}")
    answers = loaded.predict(pandas.DataFrame({"prompt": ["the cat sees", "one"]}), {"max_new_tokens": 5})

    adapter = copied.path / "adapter"
    tokenizer, base = AutoTokenizer.from_pretrained(adapter), AutoModelForCausalLM.from_pretrained(copied.data().model)
    model = PeftModel.from_pretrained(base, adapter).eval()
    messages = [{"role": "user", "content": "the cat sees"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    wanted = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answers[0] == tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert len(answers) == 2 and loaded.metadata.signature.inputs.input_names() == ["prompt"]
    files = {file.path for file in client.list_artifacts(sent.info.run_id)}
    assert "adapter" not in files and "plan.json" in files  # it is in the model, once


def scalars(file: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of each point of an event file (TFRecord: length, its checksum, bytes, their checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    content, at, found = file.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack("<Q", content[at : at + 8])
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += 16 + length
    return found


def test_tensorboard_has_every_step_once_also_after_a_resume(copied):
    job = tracked(copied, report_to=["tensorboard"])
    for _ in range(2):
        tracking.Mirror(copied, job).close("finished")

    (file,) = (copied.path / "tensorboard").iterdir()
    losses = [(step, value) for name, step, value in scalars(file) if name == "loss"]
    assert losses == [(step.step, pytest.approx(step.loss)) for step in copied.events_of(StepReport)]
    assert copied.events_of(TrackingReport)[-1].text == f"tensorboard --logdir {copied.path.parent}"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs pip install wandb")
def test_weights_and_biases_has_an_offline_run(copied):
    tracking.Mirror(copied, tracked(copied, report_to=["wandb"])).close("finished")

    (folder,) = (copied.path / "wandb").glob("offline-run-*")
    assert (folder / f"run-{copied.run_id}.wandb").stat().st_size > 1000
    assert copied.events_of(TrackingReport)[-1].text.startswith("wandb sync ")


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_starts(copied, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(JobError, match=r"tracking\.report_to: wandb is not installed: pip install wandb"):
        check_installed(tracked(copied, report_to=["wandb"]))


def test_the_folder_of_runs_names_the_project():
    from orchestrator.runs.mirror.store import project_of

    assert project_of(Path("/data/shop/runs/one")) == "shop"
    assert project_of(Path("/data/results/one")) == "results"


assert "tracking: {{report_to: []}}" in JOB  # the fixtures' runs are mirrored by these tests alone
