"""Many people's templates and conversations: what each answer is, or why the row cannot be learnt."""

import copy

import pytest

from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.formats import convert
from orchestrator.data.rows.row import BadRow
from tests.conftest import CHAT_TEMPLATE

_TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def each(content: str) -> str:
    """ChatML with another expression for a turn's content."""
    return _TURN.replace("CONTENT", content) + _PROMPT


def marked(inside: str) -> str:
    """ChatML whose assistant's turns are `inside`, with marks."""
    return _TURN.replace(
        "{{ CONTENT }}<|im_end|>",
        f"{{% if m['role'] == 'assistant' %}}{inside}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}",
    )


def say(*contents: str, system: str | None = None, first: str = "user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    turns = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


ONE = say("red cat", "blue dog")
TWO = say("red cat", "blue dog", "one", "two")
SPACED = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
SPACED += "{% if add_generation_prompt %}assistant: {% endif %}"
END_ONCE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
END_ONCE += "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
SYSTEM_FIRST = "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
SYSTEM_FIRST += "{% if m.role == 'user' %}[INST] {% if system and loop.index0 == 1 %}{{ system }}\n\n{% endif %}"
SYSTEM_FIRST += (
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

LEARNT = {
    "ChatML": (CHAT_TEMPLATE, TWO, ["blue dog<|im_end|>two<|im_end|>"]),
    "trimmed": (each("m.content | trim"), say("red cat", " blue dog\n"), ["blue dog<|im_end|>"]),
    "no prompt for the assistant": (
        _TURN.replace("CONTENT", "m.content"),
        ONE,
        ["<|im_start|>assistant\nblue dog<|im_end|>"],
    ),
    "a prompt that ends in a space": (SPACED, ONE, ["blue dog<|im_end|>"]),
    "an end of the conversation alone": (END_ONCE, TWO, ["blue dog\n<|im_end|>", "two\n<|im_end|>"]),
    "a system prompt within a turn": (
        SYSTEM_FIRST,
        say("red cat", "blue dog", system="small"),
        [" blue dog<|im_end|>"],
    ),
    "the assistant first, without a prompt": (
        SYSTEM_FIRST,
        say("hi", "red", "blue", first="assistant"),
        ["hi<|im_end|> blue<|im_end|>"],
    ),
    "marks": (
        marked("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"),
        TWO,
        ["blue dog<|im_end|>two<|im_end|>"],
    ),
    "marks in two pieces that touch": (
        marked("{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"),
        TWO,
        ["blue dog<|im_end|>two<|im_end|>"],
    ),
    "a conversation that ends with a question": (CHAT_TEMPLATE, TWO[:3], ["blue dog<|im_end|>"]),
}


@pytest.fixture(scope="module")
def with_bos(tokenizer):
    """The tokenizer with a token that begins a text."""
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "<|endoftext|>"
    return changed


def supervised(tokenizer, tokens):
    return tokenizer.decode([i for i, mask in zip(tokens.input_ids, tokens.supervised, strict=True) if mask])


@pytest.mark.parametrize("name", LEARNT)
def test_the_answers_with_their_ends_are_learnt_and_nothing_else(tokenizer, name):
    template, turns, expected = LEARNT[name]

    samples = Renderer(tokenizer, template).render(convert({"messages": turns}, "messages"))

    assert [supervised(tokenizer, tokens) for tokens in samples] == expected


BROKEN = {
    "lower case": (each("m.content | lower"), say("Red", "Blue"), "turn 1 (user): the chat template drops"),
    "escaped": (each("m.content | e"), say("a < b", "c"), "turn 1 (user): the chat template drops"),
    "cut short": (each("m.content[:5]"), say("red", "blue dog"), "turn 2 (assistant): the chat template drops"),
    "lines joined": (each("m.content | replace('\n', ' ')"), say("a\nb", "c"), "turn 1 (user): the chat template"),
    "the last turns alone": (
        each("m.content").replace("in messages", "in messages[-2:]"),
        TWO,
        "turn 1 (user): the chat template drops",
    ),
    "a system turn in the prompt alone": (  # as Mistral-7B-Instruct-v0.3 writes it
        SYSTEM_FIRST.replace("loop.index0 == 1", "loop.last"),
        say("red cat", "blue dog", system="small"),
        "turn 1 (system): the chat template drops",
    ),
    "thoughts begun by the prompt": (CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>{%"), ONE, "<think>"),
    "a count of turns": ("{{ messages | length }}" + CHAT_TEMPLATE, ONE, "cannot be located"),
    "no end": (CHAT_TEMPLATE.replace("<|im_end|>", ""), ONE, "would never learn to stop"),
    "marks before the end": (
        marked("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"),
        ONE,
        "never learn",
    ),
    "marks of every turn": (
        _TURN.replace("{{ CONTENT }}<|im_end|>", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"),
        ONE,
        "marks 2 spans in a conversation with 1",
    ),
    "marks beside the words": (
        marked("{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}"),
        ONE,
        "drops",
    ),
    "the row holds the beginning": (
        "<|endoftext|>" + CHAT_TEMPLATE,
        say("<|endoftext|>red", "blue"),
        "rendered already",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_a_template_spoils_is_broken_and_says_so(with_bos, name):
    template, turns, words = BROKEN[name]

    with pytest.raises(BadRow) as caught:
        Renderer(with_bos, template).render(convert({"messages": turns}, "messages"))

    assert words in str(caught.value) and ("data.chat_template" in str(caught.value) or "`text`" in str(caught.value))


CUT = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>"


def test_thoughts_of_earlier_answers_are_learnt_before_the_template_cuts_them(tokenizer):
    template = _TURN.replace("{{ CONTENT }}<|im_end|>", CUT) + _PROMPT
    turns = say("red", "<think>small</think>blue", "one", "<think>large</think>two")

    samples = Renderer(tokenizer, template).render(convert({"messages": turns}, "messages"))

    ends = [f"{turn['content']}<|im_end|>" for turn in turns[1::2]]
    assert [supervised(tokenizer, tokens) for tokens in samples] == ends
    assert "small" not in tokenizer.decode(samples[1].input_ids)


def test_a_turn_lost_in_one_of_several_samples_is_named_by_its_number_in_the_row(tokenizer):
    spoilt = CUT.replace("m.content }}", "m.content | replace('one', 'o') }}")
    template = _TURN.replace("{{ CONTENT }}<|im_end|>", spoilt)
    turns = say("red", "<think>x</think>blue", "one", "two")

    with pytest.raises(BadRow, match=r"turn 3 \(user\): the chat template drops a part of it: 'one'"):
        Renderer(tokenizer, template + _PROMPT).render(convert({"messages": turns}, "messages"))


def test_a_template_that_does_not_know_tools_breaks_rows_that_have_them(tokenizer):
    tools = [{"type": "function", "function": {"name": "find", "description": "", "parameters": {}}}]
    row = convert({"messages": ONE, "tools": tools}, "messages")

    with pytest.raises(BadRow, match="drops the tool 'find'"):
        Renderer(tokenizer, CHAT_TEMPLATE).render(row)
    [tokens] = Renderer(tokenizer, "{{ tools | tojson if tools else '' }}" + CHAT_TEMPLATE).render(row)

    assert supervised(tokenizer, tokens) == "blue dog<|im_end|>"


def test_a_turn_that_is_not_to_be_learnt_is_read_only(tokenizer):
    turns = [TWO[0], {**TWO[1], "train": False}, *TWO[2:]]

    for template in (CHAT_TEMPLATE, LEARNT["marks"][0], END_ONCE):
        [tokens] = Renderer(tokenizer, template).render(convert({"messages": turns}, "messages"))

        assert supervised(tokenizer, tokens).rstrip() in ("two<|im_end|>", "two\n<|im_end|>")


@pytest.mark.parametrize(
    ("template", "turns"), [(CHAT_TEMPLATE, TWO), (SPACED, ONE), (END_ONCE, TWO), (SYSTEM_FIRST, TWO)]
)
def test_the_prompt_of_a_sample_is_tokenised_as_inference_tokenises_it(tokenizer, template, turns):
    tokens = Renderer(tokenizer, template).render(convert({"messages": turns}, "messages"))[-1]

    asked = tokenizer.apply_chat_template(
        turns[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert tokens.input_ids[: tokens.prompt_length] == tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert tokens.answer == turns[-1]["content"]


def test_a_beginning_of_text_is_never_doubled(with_bos):
    bos = with_bos.bos_token_id

    [twice] = Renderer(with_bos, "{{ bos_token }}{{ bos_token }}" + CHAT_TEMPLATE).render(
        convert({"messages": ONE}, "messages")
    )
    [plain] = Renderer(with_bos, None).render(convert({"text": "<|endoftext|><|endoftext|>red cat"}, "text"))

    assert twice.bos_doubled and twice.input_ids.count(bos) == 1 and supervised(with_bos, twice) == "blue dog<|im_end|>"
    assert plain.bos_doubled and plain.input_ids.count(bos) == 1 and plain.input_ids[-1] == with_bos.eos_token_id
