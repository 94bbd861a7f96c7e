"""What is handed back is what was trained: reloaded by others' tools it says the same, and knows where to stop."""

import json
import os
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.training.workers import finished
from tests.cases.files import write_case
from tests.cases.training import trained

IDS = torch.arange(40, 72)[None]


def plain_peft(run, base):
    """The adapter as anybody loads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run.path / "adapter")).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


@pytest.fixture(scope="module")
def chat(case_models, tmp_path_factory):
    """Case 41: a tokenizer with a template of its own, trained with another; finished, and its job file's folder."""
    folder = write_case("41", tmp_path_factory.mktemp("a place of cases"))
    case_models.link(folder.parent, ["llama-chatml"])
    overrides = ("train.learning_rate=1e-2", "model.dtype=float32", "data.eval={split: 0.3}", "eval.num_samples=1")
    run, job = trained(folder / "over.yaml", *overrides)
    return run, job, folder


def test_the_template_that_was_trained_with_lies_beside_the_adapter(chat):
    from transformers import AutoTokenizer

    run, _, folder = chat
    tokenizer = AutoTokenizer.from_pretrained(run.path / "adapter")

    assert tokenizer.chat_template == (folder / "chat.jinja").read_text()


def test_the_adapter_names_its_base_as_the_job_does_and_is_readable_by_all(chat):
    run, job, _ = chat
    config = json.loads((run.path / "adapter" / "adapter_config.json").read_text())

    base = job.path(job.spec.model.model_name_or_path).resolve()
    assert config["base_model_name_or_path"] == os.path.relpath(base, (run.path / "adapter").resolve())
    assert (config["lora_alpha"], type(config["lora_alpha"])) == (32, int)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (run.path / "adapter").iterdir()}
    assert set(modes.values()) == {"0o644"} and len(modes) >= 6
    assert (run.path / "adapter").stat().st_mode & 0o777 == 0o755


def test_what_was_compared_is_told_with_its_number(chat):
    run, *_ = chat
    check = run.read_json("result.json")["handed_back"]["check"]

    assert check["largest_difference"] <= check["tolerance"] < 1e-3 < check["largest_logit"]
    assert check["num_weights"] == len(load_file(run.path / "adapter" / "adapter_model.safetensors"))
    assert any(getattr(event, "text", None) == check["text"] for event in run.events()[0])
    assert check["text"] in (run.path / "adapter" / "README.md").read_text()


def test_the_card_says_which_engines_load_it_and_why_another_does_not(chat, tmp_path):
    run, job, _ = chat
    card = (run.path / "adapter" / "README.md").read_text()
    assert "- Loads with: PEFT, transformers, vLLM, llama.cpp, by its converters to GGUF\n" in card
    assert "- Not with" not in card

    finished.merge(run, job, tmp_path / "merged")

    merged = (tmp_path / "merged" / "README.md").read_text()
    assert "- Loads with: transformers, vLLM, llama.cpp, by its converters to GGUF\n" in merged
    assert "- Not with PEFT: it is a whole model" in merged


def test_evaluating_again_gives_the_numbers_of_the_end_of_training(chat):
    run, job, _ = chat
    after = run.read_json("result.json")["after"]

    again = finished.evaluate(run, job, finished.load_data(run)[1])

    assert again["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-6)
    assert again["samples"] == after["samples"]


def code_blocks(folder, language):
    text = (folder / "README.md").read_text()
    return [block.split("```")[0] for block in text.split(f"```{language}\n")[1:]]


def test_the_cards_commands_run_as_they_stand(chat, capsys, tmp_path, monkeypatch):
    from orchestrator.cli.app import app

    run, *_ = chat
    monkeypatch.chdir(tmp_path)

    (program,) = code_blocks(run.path / "adapter", "python")
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    assert torch.equal(logits(names["model"].eval()), logits(plain_peft(run, names["base"].name_or_path)))

    (commands,) = code_blocks(run.path / "adapter", "bash")
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "orchestrator"]
        app(words[3:], standalone_mode=False)
    said = capsys.readouterr().out
    assert "gives the logits" in said and "eval_loss" in said

    (program,) = code_blocks(tmp_path / "merged-model", "python")
    merged = {}
    exec(compile(program, "README.md", "exec"), merged)
    assert (logits(merged["model"].eval()) - logits(names["model"])).abs().max() < 1e-4
    assert merged["tokenizer"].chat_template == names["tokenizer"].chat_template
    assert merged["settings"].eos_token_id == names["settings"].eos_token_id == [2]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_output_matrix_with_an_adapter_of_its_own_merges_to_what_the_adapter_says(chat, tmp_path):
    from transformers import AutoModelForCausalLM

    *_, folder = chat
    adapted = "method.lora_target_modules=[q_proj,lm_head]"
    run, job = trained(folder / "over.yaml", "train.learning_rate=3e-2", adapted, name="tied")
    base = job.path(job.spec.model.model_name_or_path)

    finished.merge(run, job, tmp_path / "merged")

    merged, tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), plain_peft(run, base)
    difference = (logits(merged) - logits(tuned)).abs().max().item()
    moved = (logits(tuned) - logits(AutoModelForCausalLM.from_pretrained(base).eval())).abs().max().item()
    assert difference < 1e-5 < 1e-2 < moved


def calling_its_end(folder, end):
    """The model in `folder` with a tokenizer whose end of text is `end`, and both ends in its generation's settings."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = end
    tokenizer.save_pretrained(folder)
    settings = {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_answers_that_end_their_turn_are_right_though_the_tokenizer_calls_another_token_its_end(case, case_models):
    folder = case("42", with_models=False)
    shutil.copytree(case_models.build("llama-chatml"), folder / "same")
    calling_its_end(folder / "same", "<|im_end|>")
    few = ("model.dtype=float32", "eval.max_rows=4")
    learnt, _ = trained(folder / "same.yaml", "model.model_name_or_path=same", *few, name="learnt")
    shutil.copytree(learnt.path / "model", folder / "learnt-other")
    calling_its_end(folder / "learnt-other", "<|endoftext|>")

    run, _ = trained(folder / "learnt-other.yaml", "model.model_name_or_path=./learnt-other", *few)

    scores = [one.read_json("result.json")["after"]["exact_match"] for one in (learnt, run)]
    assert scores == [1.0, 1.0]
    handed_back = json.loads((run.path / "model" / "generation_config.json").read_text())
    assert set(handed_back["eos_token_id"]) == {0, 2}
