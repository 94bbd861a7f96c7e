"""Calls of functions as the templates of several families write them: what is learnt, and after which prompt."""

import importlib.util
import json
from pathlib import Path

import pytest

from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.formats import convert
from orchestrator.data.rows.row import BadRow

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES = (
    "<|im_start|>system\n<tools>{% for t in tools or [] %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
)  # fmt: skip
LLAMA = (
    "{% for m in messages %}{% if loop.first and tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}<|im_end|>{% endif %}{% if m.tool_calls %}<|im_start|>assistant\n{\"name\": \""
    "{{ m.tool_calls[0].function.name }}\", \"parameters\": "
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|im_end|>"
    "{% elif m.role == 'tool' %}<|im_start|>ipython\n{{ m.content | tojson }}<|im_end|>{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}" + PROMPT
)  # fmt: skip
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.first %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}, "
    "\"id\": \"{{ c.id }}\"}{% endfor %}]{{ eos_token }}{% elif m.role == 'tool' %}[TOOL_RESULTS] {\"content\": "
    "{{ m.content }}, \"call_id\": \"{{ m.tool_call_id }}\"}[/TOOL_RESULTS]{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)  # fmt: skip
DEEPSEEK = (  # joins the arguments as a text, and writes calls only where the content is none
    "{% for m in messages %}{% if loop.first %}{{ tools | tojson }}{% endif %}{% if m.role == 'user' %}"
    "<|User|>{{ m.content }}{% elif m.role == 'tool' %}<|tool_output|>{{ m.content }}<|tool_end|>"
    "{% elif m.tool_calls and not m.content is defined %}<|Assistant|>"
    "{% for c in m.tool_calls %}{{ '<|call|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}"
    "{% endfor %}{{ eos_token }}{% else %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)  # fmt: skip
GPT_OSS = (  # the reasoning before a call is gone once the final answer is there
    "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
    "{% if m.thinking and messages[-1].role != 'assistant' or m.thinking and loop.last %}<|start|>assistant<|analysis|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant to={{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|final|>{{ m.content }}"
    "<|return|>{% endif %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)  # fmt: skip
PLAIN = HERMES.replace("arguments | tojson", "arguments")  # of templates that write whatever they are given
DROPS_CALLS = (
    "{{ tools | tojson }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + PROMPT
)
CALL = '{"item": "pens"}'
ANSWER = "There are 41 pens."
NAMED = '{"name": "get_stock", '
LEARNT = {  # template, the call, the last answer
    "hermes": (HERMES, f'<tool_call>\n{NAMED}"arguments": {CALL}}}\n</tool_call><|im_end|>', f"{ANSWER}<|im_end|>"),
    "llama": (LLAMA, f'{NAMED}"parameters": {CALL}}}<|im_end|>', f"{ANSWER}<|im_end|>"),
    "mistral": (
        MISTRAL,
        f'[TOOL_CALLS] [{NAMED}"arguments": {CALL}, "id": "c1"}}]<|im_end|>',
        f" {ANSWER}<|im_end|>",
    ),
    "deepseek": (DEEPSEEK, f"<|call|>get_stock\n```json\n{CALL}\n```<|im_end|>", f"{ANSWER}<|im_end|>"),
    "plain": (PLAIN, f'<tool_call>\n{NAMED}"arguments": {CALL}}}\n</tool_call><|im_end|>', f"{ANSWER}<|im_end|>"),
    "gpt-oss": (GPT_OSS, f" to=get_stock<|message|>{CALL}<|call|>", f"<|final|>{ANSWER}<|return|>"),
}
STOCK = {
    "type": "function",
    "function": {
        "name": "get_stock",
        "description": "units in stock",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}},
    },
}


def talk(arguments, content, reasoning=None):
    call = {"id": "c1", "type": "function", "function": {"name": "get_stock", "arguments": arguments}}
    turn = {"role": "assistant", "content": content, "tool_calls": [call]}
    turns = [
        {"role": "user", "content": "How many pens are left?"},
        turn | ({"reasoning_content": reasoning} if reasoning else {}),
        {"role": "tool", "tool_call_id": "c1", "name": "get_stock", "content": "41"},
        {"role": "assistant", "content": ANSWER},
    ]
    return {"tools": [STOCK], "messages": turns}


def supervised(tokenizer, tokens):
    return tokenizer.decode([i for i, mask in zip(tokens.input_ids, tokens.supervised, strict=True) if mask])


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("arguments", [{"item": "pens"}, CALL])
@pytest.mark.parametrize("family", LEARNT)
def test_calls_are_learnt_as_the_family_writes_them(tokenizer, family, arguments, content):
    template, *expected = LEARNT[family]

    (tokens,) = Renderer(tokenizer, template).render(convert(talk(arguments, content), "messages"))

    assert supervised(tokenizer, tokens) == "".join(expected)
    whole = tokenizer.decode(tokens.input_ids)
    assert "units in stock" in whole and "41" in whole and whole.rstrip().endswith(expected[-1])
    before = tokenizer.decode(tokens.input_ids[: tokens.prompt_length])
    assert whole == before + whole[len(before) :] and whole[len(before) :].lstrip().startswith(expected[-1].lstrip())


def test_calls_are_json_where_every_token_is_learnt_too(tokenizer):
    (tokens,) = Renderer(tokenizer, PLAIN, assistant_only=False).render(convert(talk({"item": "pens"}, ""), "messages"))

    assert f'"arguments": {CALL}}}' in supervised(tokenizer, tokens)


def test_reasoning_that_later_turns_drop_is_learnt_where_inference_makes_it(tokenizer):
    row = talk({"item": "pens"}, "", "Look it up.")
    renderer = Renderer(tokenizer, GPT_OSS)

    first, last = renderer.render(convert(row, "messages"))

    thought = f"<|analysis|>Look it up.<|end|><|start|>assistant to=get_stock<|message|>{CALL}<|call|>"
    assert [supervised(tokenizer, one) for one in (first, last)] == [thought, f"<|final|>{ANSWER}<|return|>"]
    turns = [dict(turn) for turn in row["messages"][:3]]
    turns[1]["thinking"] = turns[1].pop("reasoning_content")
    seen = tokenizer.apply_chat_template(
        turns, tools=row["tools"], chat_template=GPT_OSS, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(last.input_ids[: last.prompt_length]) == seen and "Look it up." in seen


def test_a_call_that_the_template_drops_is_missed_though_its_words_stand_in_the_tools(tokenizer):
    with pytest.raises(BadRow, match=r"turn 2 \(assistant\): the chat template drops a part of it: 'get_stock'"):
        Renderer(tokenizer, DROPS_CALLS).render(convert(talk({"item": "pens"}, ""), "messages"))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="reads the templates that trl ships")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "gemma4", "lfm2_2_5"])
def test_published_templates_write_calls_that_are_learnt(tokenizer, name):
    found = importlib.util.find_spec("trl")
    source = (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text()
    renderer = Renderer(tokenizer, source)

    samples = renderer.render(convert(talk(json.dumps({"item": "pens"}), None), "messages"))

    learnt = " ".join(supervised(tokenizer, tokens) for tokens in samples)
    assert "get_stock" in learnt and "pens" in learnt and ANSWER in learnt
    assert "How many" not in learnt and "units in stock" not in learnt and "41<" not in learnt
