"""The mask of supervised tokens is right, or the job is refused."""

import pytest

from orchestrator.data.rendering.chat import template_of
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.formats import convert
from orchestrator.data.rows.row import BadRow
from orchestrator.errors import JobError
from tests.conftest import CHAT_TEMPLATE

TALK = {
    "messages": [
        {"role": "user", "content": "red cat"},
        {"role": "assistant", "content": "blue dog"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
    ]
}
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def supervised_text(tokenizer, tokens):
    return tokenizer.decode([i for i, mask in zip(tokens.input_ids, tokens.supervised, strict=True) if mask])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_only_the_assistants_words_and_their_ends_are_supervised(tokenizer, template):
    [tokens] = Renderer(tokenizer, template).render(convert(TALK, "messages"))

    assert supervised_text(tokenizer, tokens) == "blue dog<|im_end|>two<|im_end|>"
    prompt = tokenizer.decode(tokens.input_ids[: tokens.prompt_length])
    assert prompt.endswith("<|im_start|>assistant\n")
    assert "two" not in prompt


def test_every_token_but_the_first_when_asked(tokenizer):
    [tokens] = Renderer(tokenizer, CHAT_TEMPLATE, assistant_only=False).render(convert(TALK, "messages"))

    assert tokens.supervised == [False] + [True] * (len(tokens.input_ids) - 1)


def test_a_system_prompt_is_put_first_unless_there_is_one(tokenizer):
    renderer = Renderer(tokenizer, CHAT_TEMPLATE, system_prompt="small large")

    text = tokenizer.decode(renderer.render(convert(TALK, "messages"))[0].input_ids)

    assert text.startswith("<|im_start|>system\nsmall large<|im_end|>")


def test_without_a_template_prompt_and_completion_are_laid_end_to_end(tokenizer):
    [tokens] = Renderer(tokenizer, None).render(convert({"prompt": "red ", "completion": "cat"}, "prompt_completion"))

    assert supervised_text(tokenizer, tokens) == "cat<|im_end|>"
    with pytest.raises(JobError, match="no chat template"):
        Renderer(tokenizer, None).render(convert(TALK, "messages"))


def test_text_is_supervised_throughout_and_ends(tokenizer):
    [tokens] = Renderer(tokenizer, None).render(convert({"text": "the cat"}, "text"))

    assert tokens.input_ids[-1] == tokenizer.eos_token_id
    assert tokens.supervised == [False] + [True] * (len(tokens.input_ids) - 1)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            MARKED.replace("{% generation %}", "{% generation %}{% endgeneration %}").replace(
                "<|im_end|>{% endgeneration %}", "<|im_end|>"
            ),
            "no token",
        ),
        ("{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}", "every token"),
        ("{{ messages | length }}: {% for m in messages %}{{ m['content'] }}{% endfor %}", "cannot be located"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages", "refuses"),
    ],
)
def test_a_template_that_gives_a_wrong_mask_is_refused_with_the_remedy(tokenizer, template, words):
    with pytest.raises(BadRow, match=words):
        Renderer(tokenizer, template).render(convert(TALK, "messages"))


def test_marks_of_another_models_template_are_found(tokenizer):
    renderer = Renderer(tokenizer, None)

    assert renderer.foreign_marks("<|im_start|>user\nred <b>cat</b> a <| b<|im_end|>") == []
    assert renderer.foreign_marks("<s>[INST] red [/INST] cat</s><|eot_id|>") == ["<s>", "</s>", "<|eot_id|>"]


def test_the_template_of_a_tokenizer_with_several_is_its_default(tokenizer, monkeypatch):
    assert template_of(tokenizer) == CHAT_TEMPLATE

    monkeypatch.setattr(tokenizer, "chat_template", {"default": "a", "tool_use": "b"})

    assert template_of(tokenizer) == "a"


@pytest.mark.parametrize("more", [{}, {"system": "be brief"}, {"history": [["one", "two"]]}])
def test_a_prompt_is_learnt_where_the_job_says_so_whatever_stands_before_it(tokenizer, more):
    row = {"prompt": "the cat", "completion": "sees", **more}

    (tokens,) = Renderer(tokenizer, CHAT_TEMPLATE, completion_only=False).render(convert(row, "prompt_completion"))

    assert all(tokens.supervised[1:])
