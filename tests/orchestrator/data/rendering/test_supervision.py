"""What a template lost and where an answer ends, over plain text."""

import pytest

from orchestrator.data.counts import RowCounts, Statistics, check_line, loss_notice, loss_refusal
from orchestrator.data.rendering.supervision import answer_end, find_text, lost_turns, missing_tools
from orchestrator.data.rows.row import BadRow, Row


@pytest.mark.parametrize(
    ("wanted", "text", "found"),
    [
        ("Hello", "a Hello b", "Hello"),
        ("  Hello\n", "<u>Hello</u>", "Hello"),  # trimmed
        ("<think>abc</think>48", "<think>\nabc\n</think>\n\n48", "<think>\nabc\n</think>\n\n48"),  # spread out
        ("<think> a </think> 48", "<think>a</think>48", "<think>a</think>48"),  # trimmed beside tags
        ("one\ntwo", "one two", None),  # a line break was lost
        ("one two", "onetwo", None),
        ("<think>abc</think>48", "48", None),
        ("Hello", "hello", None),
        ("日本 語", "日本 語です", "日本 語"),
    ],
)
def test_a_turns_words_are_found_but_for_whitespace_around_them(wanted, text, found):
    span = find_text(wanted, text)

    assert (text[slice(*span)] if span else None) == found


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ASKED = turns(("system", "Be brief."), ("user", "Be brief. Why?"), ("assistant", "So."))


@pytest.mark.parametrize(
    ("messages", "text", "answer", "lost"),
    [
        (ASKED, "Be brief.|Be brief. Why?|So.", "So.", []),
        (ASKED, "Be brief. Why?|So.", "So.", [0]),  # its words occur, but are the user's
        (ASKED, "Be brief.|So.", "So.", [1]),
        (ASKED, "Be brief. Why?|Be brief.|So.", "So.", []),  # moved behind
        (ASKED, "Be brief.|Be brief. Why? So.|", "|", [2]),  # the answer's words stand in the question alone
        (turns(("user", "a<b"), ("assistant", "c")), "a&lt;b|c", "c", [0]),
        (turns(("user", "SHOUT"), ("assistant", "c")), "shout|c", "c", [0]),
        (turns(("user", "long " * 50), ("assistant", "c")), "long long|c", "c", [0]),
    ],
)
def test_turns_without_a_place_of_their_own_are_lost(messages, text, answer, lost):
    at = text.rindex(answer)

    assert lost_turns(messages, text, [(at, at + len(answer))]) == lost


CALL = {"type": "function", "function": {"name": "find", "arguments": {"place": 'the "big" hall', "floor": 2}}}


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ('find {"place": "the \\"big\\" hall", "floor": 2}', []),
        ('find(place=the "big" hall, floor=2)', []),
        ("find {}", [0]),
        ("", [0]),
    ],
)
def test_names_and_arguments_of_calls_are_words_too(text, lost):
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}

    assert lost_turns([call], text, []) == lost


def test_what_a_tool_answers_may_be_written_as_json():
    turn = {"role": "tool", "content": '{"floor": 2, "name": "café"}'}

    for text in ('got {"floor": 2, "name": "café"}', '"{\\"floor\\": 2, \\"name\\": \\"café\\"}"'):
        assert lost_turns([turn], text, []) == []
    assert lost_turns([turn], '{"floor": 2}', []) == [0]


def test_thoughts_are_words_too():
    turn = {"role": "assistant", "content": "48", "reasoning_content": "four times twelve"}

    assert lost_turns([turn], "<think>four times twelve</think>48", []) == []
    assert lost_turns([turn], "48", []) == [0]


def test_tools_that_a_text_does_not_name_are_missing():
    tools = [{"type": "function", "function": {"name": "find"}}, {"name": "book"}]

    assert missing_tools(tools, "you may call find") == ["book"]


@pytest.mark.parametrize(
    ("text", "content", "answer"),
    [
        ("Hello<|im_end|>\n", "Hello", "Hello<|im_end|>"),
        ("Hello<end_of_turn>\n", "Hello", "Hello<end_of_turn>"),  # no token of the tokenizer
        ("Hello\n", "Hello", None),
        ("Hello", "Hello", None),
        ("Hello", "Hel", "Hello"),
        ("<think>\n\n</think>\n\nHello</s>", "Hello", "<think>\n\n</think>\n\nHello</s>"),
        ("say </s> twice</s>\n", "say </s> twice", "say </s> twice</s>"),
        ("say </s> once\n", "say </s> once", None),  # its own words end nothing
    ],
)
def test_an_answer_ends_with_the_end_of_text_or_what_the_template_writes(text, content, answer):
    eos = "</s>" if "</s>" in text else "<|im_end|>"

    end = answer_end(text, content, eos)

    assert (None if end is None else text[:end]) == answer


def counted(**numbers):
    return vars(Statistics(rows=1000, samples=1000, tokens=10_000, **numbers))


@pytest.mark.parametrize(
    ("numbers", "is_said", "is_refused"),
    [
        ({}, False, False),
        ({"cut_tokens": 90, "truncated": 3}, False, False),
        ({"cut_tokens": 200, "truncated": 9}, True, False),
        ({"dropped": 1, "dropped_tokens": 3}, False, False),
        ({"dropped": 2, "dropped_tokens": 3}, True, False),
        ({"cut_tokens": 2_000, "dropped_tokens": 1_000, "dropped": 5}, True, True),
        ({"dropped": 201}, True, True),
    ],
)
def test_losses_are_said_from_one_percent_and_refused_from_twenty(numbers, is_said, is_refused):
    statistics = counted(**numbers)

    notice, refusal = loss_notice(statistics, "data.train"), loss_refusal(statistics, "data.train")

    assert (notice is not None, refusal is not None) == (is_said, is_refused)
    if notice:
        assert f"{numbers.get('cut_tokens', 0):,} cut" in notice and "of 1,000 rows dropped" in notice


def test_the_check_is_one_line_with_every_count():
    line = check_line(counted(supervised_tokens=4_000, cut_tokens=7, unended=2, repeated=250, held_out=5, per_turn=3))

    assert line.count("\n") == 0
    for part in ("4,000 of 10,000 tokens", "7 tokens cut", "2 answers without an end", "25.0%", "0.5%", "3 convers"):
        assert part in line


def test_broken_rows_of_one_kind_are_one_line_with_their_number():
    counts = RowCounts()
    for line in range(1, 101):
        counts.reject(Row({}, "a.jsonl", line), BadRow(f"turn {line} is empty", "a turn is empty"))
    counts.reject(Row({}, "b.jsonl", 7), BadRow("field 'x' is missing"))

    lines = counts.broken.lines()

    assert lines == [
        "a.jsonl:1: turn 1 is empty (and 99 more such rows: line 2, line 3, line 4, ...)",
        "b.jsonl:7: field 'x' is missing",
    ]
    many = RowCounts()
    for line in range(30):
        many.reject(Row({}, "a.jsonl", line), BadRow(f"fault {line}"))
    assert many.broken.lines()[-1] == "... and 20 more broken rows" and len(many.broken.lines()) == 11
