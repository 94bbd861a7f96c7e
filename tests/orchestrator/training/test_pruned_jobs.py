"""A job that prunes, from the file to the result: planned, resumed, handed back smaller, loaded by others."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.planning.plan import settings_of
from orchestrator.runs import model_card
from orchestrator.runs.events import BetweenReport, Evaluation, Note
from orchestrator.serving.catalog import open_catalog
from orchestrator.serving.engines.transformers_engine import TransformersEngine
from orchestrator.serving.engines.weights import EngineSettings
from orchestrator.training.workers import finished
from orchestrator.training.workers.worker import work
from strategies.shape import ModelShape
from tests.cases.training import begun, trained
from tests.cli import called
from tests.conftest import rows, write_jsonl
from tests.orchestrator.serving.test_engine import Answers, asked, generated

PRUNED = (
    "method: {type: experimental_pruned_lora, ratio: 0.5, groups: mlp+attention, prune_until: 0.6, mask_every: 2}\n"
)


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(24))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "data: {train: train.jsonl, eval: {split: 0.25}, max_length: 96}\n"
        "train: {num_train_epochs: 4, global_batch_size: 6, learning_rate: 5e-3, optim: adamw_torch}\n"
        "eval: {eval_steps: 2, before: false, max_new_tokens: 4}\n"
        "checkpoint: {save_steps: 4, save_total_limit: 5, load_best_model_at_end: true}\n" + PRUNED
    )
    return folder


@pytest.fixture(scope="module")
def done(folder):
    return trained(folder / "job.yaml")


def test_a_job_is_planned_with_the_sizes_of_what_it_hands_back(folder, done):
    run, _ = done
    plan = run.plan()

    assert plan.memory.total_bytes > 0 and plan.step_s > 0
    assert settings_of(plan)["method.type"] == "experimental_pruned_lora"
    assert plan.reasons["method.type"] == (
        "as the job says; what is handed back: 64 of 128 channels of each MLP and 1 of 2 key-value groups of each"
        " layer remain: 62,784 of 99,648 parameters (37.0% fewer)"
    )
    shown = called("plan", "job.yaml", cwd=folder, check=0).stdout
    assert "62,784 of" in " ".join(shown.split())


def test_what_is_handed_back_is_smaller_and_computes_what_was_trained(done):
    run, _ = done
    place = run.path / "model"
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)

    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = json.loads((place / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (64, 2, 1)
    assert (config["head_dim"], config["hidden_size"]) == (16, 64)
    assert sum(p.numel() for p in model.parameters()) == ModelShape.from_config(config).num_parameters == 62784
    assert sum(tensor.nbytes for tensor in load_file(place / "model.safetensors").values()) == 4 * 62784
    check = run.result().values["handed_back"]["check"]
    assert "gives the logits of what was trained" in check["text"]
    assert check["largest_difference"] <= 1e-5 * max(1.0, check["largest_logit"])
    assert not (run.path / "adapter").exists()


def test_the_step_that_is_handed_back_has_all_of_its_masks(done):
    run, _ = done
    handed = run.result().handed_back

    assert [event.step for event in run.events_of(Evaluation)] == [2, 4, 6, 8, 10, 12]
    assert handed.step >= 7 and len(run.steps()) == 12
    moves = run.events_of(BetweenReport)
    assert [move.step for move in moves] == [3, 5, 7]
    assert moves[-1].extra["removed"] == {"channels": 64, "heads": 1}
    assert any("remain: 62,784" in note.text for note in run.events_of(Note))


def test_the_model_card_says_what_is_smaller_and_what_loads_it(done):
    run, _ = done

    card = "\n".join(model_card.card_of(model_card.subject_of(run, run.job(), run.path / "model")))

    assert "library_name: transformers" in card and "score=lora" in card
    assert "- Sizes: 64 of 128 channels of each MLP and 1 of 2 key-value groups of each layer remain" in card
    assert "- Loads with: transformers, llama.cpp" in card and "narrower than its hidden state was not tried" in card


def test_a_job_that_stopped_amid_the_masks_is_resumed_bit_by_bit(folder, done):
    run, _ = done
    resumed, _, node = begun(folder / "job.yaml", name="resumed")
    resumed.stop_file.touch()
    work(resumed, 0, 1, node, 0)
    assert len(resumed.steps()) < 12
    resumed.stop_file.unlink()
    work(resumed, 0, 1, node, 0)

    assert [s.loss for s in resumed.steps().values()] == [s.loss for s in run.steps().values()]
    for file in ("config.json", "model.safetensors"):
        assert (resumed.path / "model" / file).read_bytes() == (run.path / "model" / file).read_bytes()


def test_it_is_evaluated_merged_and_exported_as_any_model(folder, done, tmp_path):
    run, job = done

    found = finished.evaluate(run, job, finished.load_data(run)[1])
    agreement = finished.merge(run, job, tmp_path / "merged")
    told = called("export", "runs/run", "--hub-folder", "--check", "--json", "--out", tmp_path / "h", cwd=folder)

    assert found["eval_loss"] == pytest.approx(run.result().after.eval_loss, rel=1e-5)
    assert agreement.largest_difference <= agreement.tolerance
    check = json.loads(told.stdout)["check"]
    assert check["engine"] == "transformers" and check["equal"] == check["compared"] > 0


def test_the_transformers_engine_serves_it_beside_its_base(folder, done, tokenizer):
    run, _ = done
    catalog = open_catalog([str(run.path)], folder / "runs", None, pytest.fail)
    pruned, base, answers = catalog.models["run"], catalog.models["base"], Answers()
    engine = TransformersEngine(EngineSettings(base.base, run=str(run.path)), answers)
    queries = [asked(model, number) for number, model in enumerate((pruned, base, pruned))]

    for number, query in enumerate(queries):
        engine.submit(number, query)
        engine.step()
    while engine.is_busy:
        engine.step()

    assert pruned.folder == str(run.path / "model") and not answers.refusals
    for number, query in enumerate(queries):
        tokens = generated(query, tokenizer, base.base)
        assert answers.text(number) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_sixteen_bits_are_handed_back_in_sixteen_bits_and_found_to_agree(folder):
    run, _ = trained(folder / "job.yaml", "model.dtype=bfloat16", "train.max_steps=4", name="half")

    check = run.result().values["handed_back"]["check"]
    assert "gives the logits of what was trained" in check["text"] and "allowed in bfloat16" in check["text"]
    assert {str(t.dtype) for t in load_file(run.path / "model/model.safetensors").values()} == {"torch.bfloat16"}


def test_auto_passes_over_it(folder):
    ready = prepare(read_job(folder / "job.yaml", ["method={type: auto}"]), lambda text: None)

    assert not ready.plan.method["type"].startswith("experimental_")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method.ratio=0.05"], "removes none of them: raise it"),
        (["method.ratio=1.5"], "ratio"),
        (["method.prune_from=0.7"], "lower prune_from"),
        (["strategy={local_steps: 2}"], "local steps let drift apart"),
        (["strategy={mode: zero1}"], "ZeRO"),
        (["strategy={mode: pipeline}"], "needs|stage|pipeline"),
        (["method.score=layer", "method.groups=mlp"], "the first layers and the last stay"),
        (["objective={type: reward}"], "does not train a score|objective"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_starts(folder, settings, words):
    with pytest.raises(JobError, match=words):
        prepare(read_job(folder / "job.yaml", settings), lambda text: None)
