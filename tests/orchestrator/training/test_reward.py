"""A job that trains a score from its file to its result: planned, resumed, handed back for transformers and PEFT."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.export.write import ExportWish, export
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.runs.events import Evaluation, QualityReport
from orchestrator.serving.catalog import Catalog
from orchestrator.training.workers import finished
from orchestrator.training.workers.worker import work
from strategies.step.supervised_logits import inner_model
from tests.cases.training import begun, trained
from tests.conftest import write_jsonl
from tests.strategies.objectives.test_steps import pairs, with_margins


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", with_margins(pairs(24)))
    for name, method in {"lora": "{type: lora, lora_r: 4}", "full": "{type: full}"}.items():
        (folder / f"{name}.yaml").write_text(
            f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
            "data: {train: train.jsonl, eval: {split: 0.25}, max_length: 96}\n"
            "objective: {type: reward, center_rewards_coefficient: 0.01}\n"
            "train: {num_train_epochs: 4, global_batch_size: 6, learning_rate: 5e-3, optim: adamw_torch}\n"
            "eval: {eval_steps: 6}\ncheckpoint: {save_steps: 6, load_best_model_at_end: false}\n"
            f"method: {method}\n"
        )
    return folder


@pytest.fixture(scope="module")
def lora(folder):
    return trained(folder / "lora.yaml", "eval.before=true", name="lora")


def test_a_run_learns_scores_and_measures_held_out_pairs_at_both_ends(lora):
    run, _ = lora
    steps = list(run.steps().values())

    assert len(steps) == 12
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert "rewards/accuracies" in steps[-1].rewards
    assert all("rewards/margins" in event.extra for event in run.events_of(Evaluation))
    before, after = run.events_of(QualityReport)
    assert after.eval_loss < before.eval_loss
    assert after.extra["rewards/accuracies"] >= before.extra["rewards/accuracies"]


def test_the_plan_counts_the_score_and_no_logits(lora):
    run, _ = lora
    plan = run.plan()

    assert plan.nodes[0].memory.logits_bytes < 10_000
    assert plan.metrics == ()
    assert plan.num_trainable_parameters == 2 * 4 * 1024 + 64
    assert not (run.path / "reference").exists()


@pytest.mark.parametrize("name", ["lora", "full"])
def test_transformers_and_peft_load_what_is_handed_back_and_give_the_trained_scores(name, folder, lora, model_folder):
    run, job = lora if name == "lora" else trained(folder / "full.yaml", name="full")
    held_out = datasets(run.data())[1]
    (after,) = [event for event in run.events_of(QualityReport) if event.when == "after"]

    if name == "lora":
        base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(run.path / "model", dtype=torch.float32).eval()
        assert inner_model(model).config.num_labels == 1

        assert "score" in dict(model.named_children())
    if name == "lora":  # transformers' own loader, which the card names as well
        other = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1, dtype=torch.float32)
        other.load_adapter(str(run.path / "adapter"))
        ids = torch.arange(3, 19)[None]
        with torch.no_grad():
            assert torch.allclose(other.eval()(ids).logits, model(ids).logits, rtol=1e-5)

    right = 0.0
    with torch.no_grad():
        for index in range(len(held_out)):
            chosen, rejected = (
                model(torch.tensor(ids.copy(), dtype=torch.long)[None]).logits.item()
                for ids, _ in held_out.documents_of(index)
            )
            right += chosen - rejected
    assert right / len(held_out) == pytest.approx(after.extra["rewards/margins"], rel=1e-4)
    again = finished.evaluate(run, job, held_out)
    assert again["eval_loss"] == pytest.approx(after.eval_loss, rel=1e-4)


def test_a_resumed_run_continues_bit_by_bit(folder, lora):
    run, _, node = begun(folder / "lora.yaml", name="resumed")
    run.stop_file.touch()
    work(run, 0, 1, node, 0)
    run.stop_file.unlink()

    work(run, 0, 1, node, 0)

    assert [step.loss for step in run.steps().values()] == [step.loss for step in lora[0].steps().values()]


def test_the_card_says_what_it_is_and_its_code_gives_a_score(lora, capsys):
    run, _ = lora
    card = (run.path / "adapter" / "README.md").read_text()

    code = card.split("```python\n")[1].split("```")[0]
    exec(code, {})

    float(capsys.readouterr().out.strip().splitlines()[-1])
    assert "Objective: type=reward, center_rewards_coefficient=0.01" in card
    assert "AutoModelForSequenceClassification" in card and "generate" not in card
    assert "Not with llama.cpp" in card
    assert not (run.path / "adapter" / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(run.path / "adapter").chat_template


def test_what_needs_text_is_refused_with_what_it_is_instead(lora, tmp_path):
    run, job = lora
    served = Catalog(None, lambda text: None)

    for call in (
        lambda: served.add(run.run_id, run.path.parent),
        lambda: served.add(str(run.path / "adapter"), run.path.parent),
        lambda: export(run, tmp_path / "gguf", ExportWish("gguf"), lambda text: None),
        lambda: finished.merge(run, job, tmp_path / "merged"),
    ):
        with pytest.raises(JobError, match=r"gives (documents|texts) a score"):
            call()


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["eval.metrics=[exact_match]"], "beside eval.metrics: .* writes no answers"),
        (["eval.max_new_tokens=8"], "beside eval.max_new_tokens"),
        (["train.loss_type=chunked_nll"], "beside train.loss_type"),
        (["data.completion_only_loss=false"], "beside data.completion_only_loss"),
        (["strategy.mode=pipeline"], "beside strategy.mode: pipeline"),
        (["strategy.offload=weights"], "beside strategy.offload: weights"),
        (["method={type: experimental_shira}"], "experimental_shira does not train a score"),
    ],
)
def test_what_a_score_cannot_be_combined_with_is_refused_before_anything_starts(folder, overrides, fault):
    with pytest.raises(JobError, match=fault):
        prepare(read_job(folder / "lora.yaml", overrides), lambda text: None)


def test_a_margin_that_is_no_number_is_a_broken_row(folder, tmp_path):
    rows = [row | {"margin": "much"} for row in pairs(4)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)

    with pytest.raises(JobError, match="field 'margin' is 'much', no finite number"):
        prepare(read_job(folder / "lora.yaml", [f"data.train={file}"]), lambda text: None)
