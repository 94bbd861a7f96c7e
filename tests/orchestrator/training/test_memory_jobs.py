"""A memory of rows through the loop and as a job: layouts change nothing, a resume is bit-equal, rows are counted."""

import dataclasses

import pytest
import torch

from orchestrator.data.dataset import Dataset
from orchestrator.errors import JobError
from orchestrator.export.write import ExportWish, export
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.runs.events import LearningReport, StepReport
from orchestrator.training.workers import finished, preflight
from orchestrator.training.workers.worker import work
from strategies.lsp_offload.schedule import Lanes
from strategies.sparse_memory.method import SparseMemory
from tests.cases.training import begun, trained
from tests.conftest import rows, write_jsonl
from tests.orchestrator.training.test_streaming import ONE_BY_ONE, PACKED, losses, prepared, run, weights

METHOD = SparseMemory(memory_rows=256, rows_per_token=4, layers_to_transform=[0, 1])


def untaught(model_folder, techniques=ONE_BY_ONE):
    """Routers as they are drawn: what they learn depends on the passes that it is learnt in, in the last bits."""
    setup = prepared(model_folder, techniques, METHOD)
    setup.learner = None
    return setup


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    "techniques",
    [
        dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=3),
        PACKED,
        dataclasses.replace(PACKED, per_device_train_batch_size=1, gradient_checkpointing=True),
    ],
    ids=["3 + 3 + 2", "packed", "packed and checkpointed"],
)
def test_every_layout_moves_the_same_rows_to_the_same_losses(model_folder, data_folder, techniques, max_grad_norm):
    """Rows of padding are read, and do not move."""
    plain, other = untaught(model_folder), untaught(model_folder, techniques)
    expected = run(plain, data_folder, 4, max_grad_norm=max_grad_norm)

    events = run(other, data_folder, 4, techniques, max_grad_norm=max_grad_norm)

    assert losses(events) == pytest.approx(losses(expected), rel=1e-4)
    assert [step.rows_moved for step in events["step"]] == [step.rows_moved for step in expected["step"]]
    for one, two in zip(plain.summed, other.summed, strict=True):
        steps, as_many = (setup.optimizer.state[p]["step"] for setup, p in ((plain, one), (other, two)))
        assert torch.equal(steps, as_many) and 0 < (steps > 0).sum() < 256


def test_beside_the_computation_a_training_goes_the_same_way(model_folder, data_folder):
    plain, beside = prepared(model_folder, method=METHOD), prepared(model_folder, method=METHOD)
    beside.optimizer.lanes = Lanes(overlapped=True)

    assert losses(run(beside, data_folder, 5)) == losses(run(plain, data_folder, 5))
    assert torch.equal(weights(beside), weights(plain))
    beside.streaming.close()


def test_what_crossed_the_bus_and_what_moved_is_recorded(model_folder, data_folder):
    setup = prepared(model_folder, method=METHOD)

    events = run(setup, data_folder, 3)

    transport = setup.optimizer.transport
    assert sum(step.bus_up_bytes for step in events["step"]) == transport.up_bytes > 0
    assert sum(step.bus_down_bytes for step in events["step"]) == transport.down_bytes
    assert all(0 < step.rows_moved < 2 * 256 for step in events["step"])
    assert set(events["step"][0].lane_s) == {"down", "update", "up"} and events["step"][0].lane_s["update"] > 0
    assert [told.step for told in events["learnt"]] == [0] and "routers take off" in events["learnt"][0].text


def test_preflight_leaves_nothing_behind(model_folder, data_folder, tmp_path):
    flown, plain = prepared(model_folder, method=METHOD), prepared(model_folder, method=METHOD)
    data = Dataset.load(data_folder)
    preflight.check(flown, data, data, ONE_BY_ONE, 8, tmp_path / "preflight")

    assert losses(run(flown, data_folder, 3)) == losses(run(plain, data_folder, 3))
    assert torch.equal(weights(flown), weights(plain))


# A job.


@pytest.fixture(scope="module")
def file(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(24))
    write_jsonl(folder / "old.jsonl", rows(40)[32:])
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "data: {train: train.jsonl, eval: old.jsonl, max_length: 96}\n"
        "train: {num_train_epochs: 2, global_batch_size: 6, learning_rate: 2e-2, optim: adamw_torch}\n"
        "eval: {eval_steps: 3, before: false, max_new_tokens: 6, max_rows: 3}\n"
        "checkpoint: {save_steps: 3, save_total_limit: 5, load_best_model_at_end: false}\n"
        "method: {type: experimental_memory, memory_rows: 256, rows_per_token: 4}\n"
    )
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def whole(file):
    return trained(file, name="whole")[0]


def ready(file, *overrides):
    return prepare(read_job(file, list(overrides)), lambda text: None)


def steps_of(run):
    return [(step.loss, step.rows_moved) for step in run.steps().values()]


SURPRISING = ("method.slots=surprising", "method.updated_rows=20")


@pytest.mark.parametrize("options", [(), SURPRISING, ("data.packing=true",)], ids=["all", "surprising", "packed"])
def test_a_job_is_planned_trained_handed_back_and_resumed_bit_by_bit(file, options):
    name = "-".join(["job", *(one[-4:] for one in options)]).replace("=", "")
    run, _ = trained(file, *options, name=name)
    plan, check = run.plan(), run.result().values["handed_back"]["check"]

    assert plan.memory.total_bytes > 256 * 128 * 16 and plan.step_s > 0
    assert "gives the logits of what was trained" in check["text"] and run.result().after.answers > 0

    resumed, _, node = begun(file, *options, name=f"{name}-resumed")
    resumed.stop_file.touch()
    work(resumed, 0, 1, node, 0)
    resumed.stop_file.unlink()
    work(resumed, 0, 1, node, 0)

    assert steps_of(resumed) == steps_of(run) and len(steps_of(run)) == 8
    one, other = (folder.path / "adapter/adapter_model.safetensors" for folder in (run, resumed))
    assert one.read_bytes() == other.read_bytes()
    for of_run in (run, resumed):  # of both sittings, as its tokens are
        assert of_run.result().train_seconds >= sum(step.seconds for step in of_run.steps().values()) - 0.01


def test_surprising_rows_are_chosen_beside_what_the_held_out_rows_read(file):
    run, _ = trained(file, *SURPRISING, name="surprised")

    told = [event for event in run.events_of(LearningReport) if "held-out" in event.text]
    assert len(told) == 1 and told[0].step == 0 and 0 < told[0].extra["rows_read"] < 256
    assert all(0 < step.rows_moved <= 20 for step in run.events_of(StepReport))


def test_without_held_out_rows_nothing_is_surprising(file):
    text = file.read_text().replace("eval: {eval_steps: 3, before: false, max_new_tokens: 6, max_rows: 3}", "")
    bare = file.with_name("bare.yaml")
    bare.write_text(text)

    with pytest.raises(JobError, match=r"experimental_memory with these options needs held-out rows; add data\.eval"):
        ready(bare, *SURPRISING, "data.eval=null")


def test_its_report_and_card_say_what_moved_and_who_loads_it(whole, tmp_path):
    from orchestrator.report.markdown import write_markdown
    from orchestrator.report.run import report_of_run

    write_markdown(report_of_run(whole, whole.job(), "en"), tmp_path / "report.md")
    report, card = (tmp_path / "report.md").read_text(), (whole.path / "adapter/README.md").read_text()

    assert "Over the bus, at the last step: to the host" in report and "rows moved: " in report
    assert "Not with llama.cpp" in report
    assert "library_name: finetune-orchestrator" in card and "Not merged: each token reads rows" in card
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert scope["model"].model.layers[1].mlp.memory.rows.shape == (256, 128) and scope["output"].shape[1] > 1


def test_it_is_evaluated_again_to_the_same_loss_and_never_merged(whole, tmp_path):
    from orchestrator.training.model.loading import load_data

    again = finished.evaluate(whole, whole.job(), load_data(whole)[1])

    assert again["eval_loss"] == pytest.approx(whole.result().after.scores["eval_loss"], abs=1e-6)
    for kind in ("merged", "gguf", "ollama"):
        with pytest.raises(JobError, match="is not merged: each token reads rows of its own choice"):
            export(whole, tmp_path / kind, ExportWish(kind), lambda text: None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("cluster.num_workers=2",), "gradients of single rows are not summed over workers"),
        (("strategy.mode=ddp",), "gradients of single rows are not summed over workers"),
        (("strategy.local_steps=4",), "local steps average weights"),
        (("strategy.mode=pipeline", "cluster.num_workers=2"), "gradients of single rows are not summed over workers"),
        (("method.memory_rows=300",), "a square number of rows: set it to 289"),
        (("method.layers_to_transform=[2]",), "2 is no layer of the model"),
        (("train.optim=sgd",), "set train.optim: auto"),
        (("bank.add=true",), "hands back SPARSE_MEMORY"),
        (("strategy.offload=weights",), "on the host itself"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(file, overrides, words):
    with pytest.raises(JobError, match=words):
        ready(file, *overrides)


def test_auto_passes_over_it(file):
    assert not ready(file, "method={type: auto}").plan.method["type"].startswith("experimental_")
