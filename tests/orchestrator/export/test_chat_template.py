"""A chat template as texts around turns: what it renders, and nothing of a template that is more than that."""

import pytest

from orchestrator.export.chat_template import TurnTexts, turn_texts
from tests.cases.models import TEMPLATES
from tests.conftest import CHAT_TEMPLATE

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture
def with_template(tokenizer):
    before = tokenizer.chat_template, tokenizer.bos_token

    def change(template, bos="<|endoftext|>"):
        tokenizer.chat_template, tokenizer.bos_token = template, bos
        return tokenizer

    yield change
    tokenizer.chat_template, tokenizer.bos_token = before


def test_chatml_is_its_texts(with_template):
    found = turn_texts(with_template(CHAT_TEMPLATE))

    assert found == TurnTexts(
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        opening="<|im_start|>assistant\n",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
    )


def test_ollama_gets_it_as_a_loop_over_messages(with_template):
    found = turn_texts(with_template(LLAMA3))

    assert found.as_ollama() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>\n\n{{ .Content }}'
        '<|eot_id|>{{ else if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        '{{ else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        "{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_system_text_of_its_own_is_known(with_template):
    found = turn_texts(with_template(TEMPLATES["llama-defaultsys"]))

    assert found.default_system == "You are Tinybot, made by nobody."
    assert found.render([{"role": "user", "content": "Hi"}]).startswith("<|im_start|>system\nYou are Tinybot")


@pytest.mark.parametrize("name", ["llama-gemma", "llama-silentdrop", "llama-noeos"])
def test_templates_without_a_system_turn_or_special_tokens_have_such_a_form(with_template, name):
    tokenizer = with_template(TEMPLATES[name])
    found = turn_texts(tokenizer)

    assert (found.system is None) == (name != "llama-noeos")
    talk = [{"role": role, "content": f"text {n}"} for n, role in enumerate(("user", "assistant", "user"))]
    wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert found.render(talk) == wanted.removeprefix("<|endoftext|>")


SYSTEM_IN_USER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 == 1 and messages[0]['role'] =="
    " 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
ONLY_THE_LAST_TURN = "{{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    "template", [TEMPLATES["llama-qwen3"], ONLY_THE_LAST_TURN, "{{ raise_exception('no') }}", None]
)
def test_a_template_that_is_more_than_texts_has_none(with_template, template):
    assert turn_texts(with_template(template)) is None


def test_a_system_text_inside_the_users_turn_is_no_system_turn(with_template):
    assert turn_texts(with_template(SYSTEM_IN_USER)).system is None
