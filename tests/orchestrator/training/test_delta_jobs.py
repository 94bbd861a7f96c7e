"""Jobs whose corrections are averaged or kept, from the file to the result: planned, resumed, handed back."""

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.runs import model_card
from orchestrator.runs.events import BetweenReport, LearningReport
from orchestrator.training.workers.worker import work
from tests.cases.training import begun, trained
from tests.conftest import rows, write_jsonl

BOOSTED = "method: {type: experimental_boosted_lora, restart_every: 4, samples: hard, restart_warmup_steps: 1}\n"
RESTARTED = (
    "method: {type: lora, lora_r: 2}\nstrategy: {local_steps: 2, local_steps_merge: product, local_steps_reset: true}\n"
)


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(24))
    for name, more in {"boosted": BOOSTED, "restarted": RESTARTED}.items():
        (folder / f"{name}.yaml").write_text(
            f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
            "data: {train: train.jsonl, eval: {split: 0.25}, max_length: 96}\n"
            "train: {num_train_epochs: 4, global_batch_size: 6, learning_rate: 5e-3, optim: adamw_torch}\n"
            "eval: {eval_steps: 3, before: false}\n"
            "checkpoint: {save_steps: 3, save_total_limit: 5, load_best_model_at_end: false}\n" + more
        )
    return folder


@pytest.mark.parametrize(("name", "rank"), [("boosted", 3), ("restarted", 16)])
def test_a_job_is_planned_trained_resumed_bit_by_bit_and_handed_back(folder, name, rank):
    run, _ = trained(folder / f"{name}.yaml", name=name)
    whole = [step.loss for step in run.steps().values()]
    plan, check = run.plan(), run.result().values["handed_back"]["check"]

    assert plan.memory.total_bytes > 0 and plan.step_s > 0
    assert "gives the logits of what was trained" in check["text"]
    assert f'"r": {rank}' in (run.path / "adapter" / "adapter_config.json").read_text()
    card = "\n".join(model_card.card_of(model_card.subject_of(run, run.job(), run.path)))
    assert "Loads with: PEFT, transformers, vLLM" in card
    assert all("of what" in event.text or "ended" in event.text for event in run.events_of(BetweenReport))

    resumed, _, node = begun(folder / f"{name}.yaml", name=f"{name}-resumed")
    resumed.stop_file.touch()
    work(resumed, 0, 1, node, 0)
    resumed.stop_file.unlink()
    work(resumed, 0, 1, node, 0)

    assert [step.loss for step in resumed.steps().values()] == whole
    assert len(whole) == (12 if name == "boosted" else 8)


def test_weights_of_samples_are_told_in_the_runs_log(folder):
    run, _ = trained(folder / "boosted.yaml", name="told")

    assert [event.step for event in run.events_of(LearningReport)] == [4, 8]


def test_auto_passes_over_boosted_lora(folder):
    ready = prepare(read_job(folder / "boosted.yaml", ["method={type: auto}"]), lambda text: None)

    assert not ready.plan.method["type"].startswith("experimental_")


def test_what_does_not_fit_together_is_refused_before_anything_starts(folder):
    with pytest.raises(JobError, match=r"method\.layers_per_round is 9, the model has 2: lower it"):
        prepare(read_job(folder / "boosted.yaml", ["method.layers_per_round=9"]), lambda text: None)
