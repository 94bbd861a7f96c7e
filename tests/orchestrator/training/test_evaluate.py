import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.data.dataset import Options, build
from orchestrator.data.files import read_rows
from orchestrator.data.template import Renderer
from orchestrator.training.evaluate import Answer, generate_answers, score
from tests.conftest import CHAT_TEMPLATE, rows, write_jsonl


def answers(*pairs):
    return [Answer("p", reference, generated) for generated, reference in pairs]


def test_exact_match_forgives_outer_space_only():
    assert score(["exact_match"], answers((" a ", "a"), ("A", "a"), ("b", "a"), ("a", "a")))["exact_match"] == 0.5


def test_macro_f1_counts_each_label_alike_and_strange_answers_as_wrong():
    found = answers(("x", "x"), ("x", "x"), ("x", "x"), ("nonsense", "y"))

    scores = score(["accuracy", "macro_f1"], found)

    assert scores == {"accuracy": 0.75, "macro_f1": pytest.approx(0.5)}


def test_text_metrics_are_one_for_equal_texts_and_less_for_others():
    same = score(["rouge_l", "bleu", "chrf"], answers(("the cat sat on the mat", "the cat sat on the mat")))
    other = score(["rouge_l", "bleu", "chrf"], answers(("a dog ran off quickly now", "the cat sat on the mat")))

    assert all(value == pytest.approx(1.0) for value in same.values())
    assert all(value < 0.3 for value in other.values())


def test_generated_answers_equal_one_by_one_generation_and_leave_the_model_as_it_was(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").train()
    file = write_jsonl(tmp_path / "rows.jsonl", rows(9))
    data = build(
        read_rows(file), Renderer(tokenizer, CHAT_TEMPLATE), Options("auto", "", 64, "truncate", True), tmp_path / "out"
    )

    found = generate_answers(model, tokenizer, data, range(9), 6, "float32")

    assert [answer.reference for answer in found] == [row["completion"] for row in rows(9)]
    for index, answer in enumerate(found):
        prompt = torch.tensor(data.prompt(index)[0], dtype=torch.long)[None]
        alone = model.eval().generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=2
        )
        model.train()
        assert tokenizer.decode(alone[0, prompt.shape[1] :], skip_special_tokens=True).strip() == answer.generated
    assert model.training
    assert model.config._attn_implementation == "eager"
