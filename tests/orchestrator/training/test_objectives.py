"""A job over pairs from its file to its result: planned, trained, resumed bit by bit, handed back, measured."""

import pytest
from safetensors.numpy import load_file

from orchestrator.bank.library import add_run
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.runs import model_card
from orchestrator.runs.events import Evaluation, Note, QualityReport
from orchestrator.training.model.references import FOLDER
from orchestrator.training.workers import finished, preflight
from orchestrator.training.workers.bench import bench_training
from orchestrator.training.workers.experiment import Experiment
from orchestrator.training.workers.worker import work
from strategies.adapter_bank.store import Bank
from tests.cases.training import begun, trained
from tests.conftest import write_jsonl
from tests.strategies.objectives.test_steps import labelled, pairs

REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", pairs(24))
    write_jsonl(folder / "marked.jsonl", labelled(24))
    for name, more in {
        "dpo": "objective: {type: dpo, beta: 0.5}\nmethod: {type: lora, lora_r: 4}\n",
        "once": "objective: dpo\nmethod: {type: lora, lora_r: 4}\n",
        "full": "objective: {type: dpo, beta: 0.5}\nmethod: {type: full}\n",
        "orpo": "objective: orpo\nmethod: {type: lora, lora_r: 4}\n",
        "kto": "objective: {type: kto, beta: 0.5}\nmethod: {type: lora, lora_r: 4}\n",
    }.items():
        epochs = 1 if name == "once" else 4
        (folder / f"{name}.yaml").write_text(
            f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
            f"data: {{train: {'marked' if name == 'kto' else 'train'}.jsonl, eval: {{split: 0.25}}, max_length: 96}}\n"
            f"train: {{num_train_epochs: {epochs}, global_batch_size: 6, learning_rate: 5e-3, optim: adamw_torch}}\n"
            "eval: {eval_steps: 6}\ncheckpoint: {save_steps: 6, save_total_limit: 5, load_best_model_at_end: false}\n"
            + more
        )
    return folder


@pytest.fixture(scope="module")
def dpo(folder):
    return trained(folder / "dpo.yaml", "eval.before=true", name="dpo")[0]


def rewards_of(events):
    return [event.rewards for event in events]


def test_a_run_tells_loss_and_rewards_of_every_step_of_held_out_pairs_and_of_both_ends(dpo):
    run = dpo
    steps = list(run.steps().values())
    first, last = steps[0], steps[-1]

    assert len(steps) == 12
    assert first.loss == pytest.approx(0.693147, rel=1e-4)
    assert set(first.rewards) == REWARDS
    assert first.rewards["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert last.loss < 0.5 and last.rewards["rewards/margins"] > 0.5
    assert [set(event.extra) for event in run.events_of(Evaluation)] == [REWARDS, REWARDS]
    before, after = (event for event in run.events_of(QualityReport))
    assert before.eval_loss == pytest.approx(0.693147, rel=1e-4)
    assert after.eval_loss < before.eval_loss
    assert after.extra["rewards/margins"] > before.extra["rewards/margins"]


def test_the_plan_says_what_is_trained_and_where_the_reference_comes_from(folder, dpo):
    run = dpo
    plan = run.plan()

    assert plan.objective["type"] == "dpo" and plan.objective["beta"] == 0.5
    assert plan.stores_reference
    assert "a forward pass of each row before the first step" in plan.reasons["objective.type"]
    assert plan.max_length == 96 and plan.techniques.max_length == 192
    assert "Objective: type=dpo, beta=0.5" in "\n".join(
        model_card.card_of(model_card.subject_of(run, run.job(), run.path))
    )

    once = prepare(read_job(folder / "once.yaml"), lambda text: None).plan
    assert not once.stores_reference
    assert "the base with the adapter off" in once.reasons["objective.type"]


def test_a_resumed_run_continues_bit_by_bit_from_the_reference_it_began_with(folder, dpo):
    whole = dpo
    run, _, node = begun(folder / "dpo.yaml", name="resumed")
    run.stop_file.touch()
    work(run, 0, 1, node, 0)
    kept = load_file(run.path / FOLDER / "logps.safetensors")
    run.stop_file.unlink()

    work(run, 0, 1, node, 0)

    assert [step.loss for step in run.steps().values()] == [step.loss for step in whole.steps().values()]
    again = load_file(run.path / FOLDER / "logps.safetensors")
    assert all((again[key] == kept[key]).all() for key in kept) and len(kept) == 2


def test_a_damaged_reference_is_named_and_computed_again(folder):
    run, _, node = begun(folder / "full.yaml", name="damaged")
    run.stop_file.touch()
    work(run, 0, 1, node, 0)
    run.stop_file.unlink()
    file = run.path / FOLDER / "logps.safetensors"
    kept = load_file(file)
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)

    work(run, 0, 1, node, 0)

    assert any("are damaged" in note.text for note in run.events_of(Note))
    again = load_file(file)
    assert all(kept[key] == pytest.approx(again[key], rel=1e-5) for key in kept)


def test_a_finished_run_is_measured_again_with_the_same_rewards(folder, dpo):
    run = dpo
    (after,) = [event for event in run.events_of(QualityReport) if event.when == "after"]

    found = finished.evaluate(run, run.job(), datasets(run.data())[1])

    assert found["eval_loss"] == pytest.approx(after.eval_loss, rel=1e-4)
    assert found["rewards/margins"] == pytest.approx(after.extra["rewards/margins"], rel=1e-3)


def test_a_model_all_of_whose_weights_trained_is_measured_beside_the_one_it_was(folder):
    run, _ = trained(folder / "full.yaml", name="full")
    (after,) = [event for event in run.events_of(QualityReport) if event.when == "after"]

    found = finished.evaluate(run, run.job(), datasets(run.data())[1])

    assert found["eval_loss"] == pytest.approx(after.eval_loss, rel=1e-4)
    assert found["rewards/margins"] == pytest.approx(after.extra["rewards/margins"], rel=1e-3)
    assert found["rewards/margins"] > 0.1


def test_an_objective_without_a_reference_keeps_none(folder):
    run, _ = trained(folder / "orpo.yaml", name="orpo")

    assert not (run.path / FOLDER).exists()
    assert not run.plan().stores_reference and "objective.type" not in run.plan().reasons
    losses = [step.loss for step in run.steps().values()]
    assert losses[-1] < losses[0]


def test_trials_and_benchmarks_run_an_objective_too(folder):
    job = read_job(folder / "dpo.yaml", ["cluster.num_workers=1", f"checkpoint.output_dir={folder / 'trials'}"])
    ready = prepare(job, lambda text: None)
    data, held_out = datasets(ready.data_files)

    trial = Experiment(job, ready.plan, ready.data_files.model, data, held_out)
    loss = trial.train_to(4)
    found = bench_training(job, ready, 1, lambda text: None)

    assert loss < 0.69 and trial.quality()["rewards/margins"] > 0
    assert found["throughput"]["samples_per_s"] > 0
    assert preflight.preflight(job, ready, lambda text: None)["longest_batch_tokens"] > 0


def test_the_bank_refuses_what_it_could_not_compare(dpo, tmp_path):
    with pytest.raises(JobError, match="trained by dpo, and the bank compares adapters"):
        add_run(Bank(tmp_path / "bank", create=True), dpo)


def test_answers_that_are_marked_train_without_pairs_and_resume_bit_by_bit(folder):
    run, _ = trained(folder / "kto.yaml", "eval.before=true", name="kto")
    before, after = run.events_of(QualityReport)

    assert before.eval_loss == pytest.approx(0.5, rel=1e-5)
    assert after.eval_loss < 0.48
    assert set(after.extra) >= REWARDS - {"rewards/accuracies"}
    assert after.extra["rewards/margins"] > 0.1
    again = finished.evaluate(run, run.job(), datasets(run.data())[1])
    assert again["eval_loss"] == pytest.approx(after.eval_loss, rel=1e-4)

    resumed, _, node = begun(folder / "kto.yaml", name="kto-resumed")
    resumed.stop_file.touch()
    work(resumed, 0, 1, node, 0)
    resumed.stop_file.unlink()
    work(resumed, 0, 1, node, 0)
    assert [step.loss for step in resumed.steps().values()] == [step.loss for step in run.steps().values()]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["strategy.mode=pipeline"], "objective.type dpo beside strategy.mode: pipeline"),
        (["strategy.mode=zero3"], "beside strategy.mode: zero3"),
        (["strategy.deepspeed={}"], "beside strategy.deepspeed"),
        (["strategy.offload=weights"], "beside strategy.offload: weights"),
        (["strategy.local_steps=2"], "beside strategy.local_steps"),
        (["train.torch_compile=true"], "beside train.torch_compile"),
        (["train.cache_frozen_activations=true"], "beside train.cache_frozen_activations"),
        (["method={type: experimental_lsp_offload}"], "beside method"),
        (["method={type: experimental_boosted_lora, samples: hard}"], "beside method.samples: hard"),
        (["bank.add=true"], "beside bank.add"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_anything_starts(folder, overrides, fault):
    with pytest.raises(JobError, match=fault):
        prepare(read_job(folder / "dpo.yaml", overrides), lambda text: None)
