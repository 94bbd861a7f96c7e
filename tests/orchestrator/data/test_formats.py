import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.rows import columns
from orchestrator.data.rows.formats import convert, detect, read_example
from orchestrator.data.rows.row import BadRow, Row

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "name", "question", "answer"),
    [
        ({"messages": CHAT}, "messages", "hi", "hello"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", "p", "c"),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", "i\n\nx", "o"),
        ({"instruction": "i", "output": "o"}, "alpaca", "i", "o"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", "q", "a"),
        ({"text": "great film", "label": "good"}, "classification", "great film", "good"),
        ({"sentence": "great film", "label": 1}, "classification", "great film", "1"),
    ],
)
def test_each_format_is_recognised_and_read(row, name, question, answer):
    assert detect(row) == name

    example = convert(row, name)

    assert [m["content"] for m in example.messages] == [question, answer]
    assert example.reference == answer


def test_plain_text_has_no_reference():
    assert detect({"text": "once"}) == "text"
    assert convert({"text": "once"}, "text").reference is None


def test_classification_puts_the_instruction_first():
    example = convert({"text": "t", "label": "x"}, "classification", instruction="Which intent?")

    assert example.messages[0]["content"] == "Which intent?\nt"


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", "a text that is not JSON"),
        ({"messages": 3}, "messages", "not a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "robot"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "no text"),
        ({"messages": CHAT[:1]}, "messages", "nothing to train on"),
        ({"prompt": "p"}, "prompt_completion", "'completion' is missing"),
        ({"prompt": "p", "completion": 3}, "prompt_completion", "is a int, not text"),
        ({"prompt": "p", "completion": " "}, "prompt_completion", "is empty"),
        ({"text": "t", "label": None}, "classification", "'label' is None"),
    ],
)
def test_a_broken_row_says_why(row, name, reason):
    with pytest.raises(BadRow, match=reason):
        convert(row, name)


def asks(*turns):
    return {"messages": [{"role": role, "content": text} | more for role, text, more in turns]}


ASK, TELL = ("user", "q", {}), ("assistant", "a", {})
CALL = {"name": "stock", "arguments": {"item": "pens"}}
CALLED = {"type": "function", "function": CALL}
TOOL = {"type": "function", "function": {"name": "stock", "parameters": {}}}


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"function": {"name": "stock", "arguments": '{"item": "pens"}'}, "type": "function"}]},
        {"tool_calls": [{"function": CALL}]},
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": CALL},
        {"function_call": {"name": "stock", "arguments": '{"item": "pens"}'}},
        {"tool_calls": None, "function_call": CALL},
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_calls_of_tools_are_read_whichever_way_they_are_written(call, content):
    row = asks(ASK, ("assistant", content, call), ("tool", "41", {"tool_call_id": "c", "name": "stock"}), TELL)

    messages = convert(row, "messages").messages

    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert messages[2] == {"role": "tool", "content": "41", "tool_call_id": "c", "name": "stock"}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [TOOL["function"]]},
        {"functions": [TOOL["function"]]},
        {"tools": TOOL},
    ],
)
def test_tools_are_read_whichever_way_they_are_written(more):
    assert convert(asks(ASK, TELL) | more, "messages").tools == (TOOL,)
    assert convert({"prompt": "q", "completion": "a"} | more, "prompt_completion").tools == (TOOL,)
    assert convert(asks(("system", "s", more), ASK, TELL), "messages").tools == (TOOL,)


@pytest.mark.parametrize("flag", [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0}])
def test_turns_that_are_marked_so_are_read_but_not_learnt(flag):
    row = asks(ASK, ("assistant", "first", flag), ASK, ("assistant", "second", {next(iter(flag)): 1}))

    messages = convert(row, "messages").messages

    assert [message.get("train", True) for message in messages] == [True, False, True, True]


def test_thoughts_are_read_under_one_name():
    for name in ("reasoning_content", "reasoning", "thinking"):
        message = convert(asks(ASK, ("assistant", "a", {name: "hm"})), "messages").messages[-1]

        assert message == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def turns(example):
    return [(message["role"], message["content"]) for message in example.messages]


PLAIN = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "expected", "reading"),
    [
        (asks(("developer", "s", {}), ASK, TELL), [("system", "s"), *PLAIN], "'developer' is read as system"),
        (asks(("User", "q", {}), ("Model", "a", {})), PLAIN, "'Model' is read as assistant"),
        (
            asks(ASK, ("function", "1", {"name": "f"}), TELL),
            [("user", "q"), ("tool", "1"), ("assistant", "a")],
            "'function' is read as tool",
        ),
        (
            {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            PLAIN,
            "'from' and 'value' under 'messages'",
        ),
        ({"conversations": asks(ASK, TELL)["messages"]}, PLAIN, "'role' and 'content' under 'conversations'"),
        (asks(("user", [{"type": "text", "text": "q"}, ""], {}), TELL), PLAIN, "in parts"),
        ({"messages": json.dumps(asks(ASK, TELL)["messages"])}, PLAIN, "field 'messages' is read as turns in JSON"),
        ({"question": "q", "answer": "a"}, PLAIN, "'question', 'answer' are read as prompt and completion"),
        ({"query": "q", "response": "a"}, PLAIN, "'query', 'response'"),
        (
            {"instruction": "q", "context": "c", "response": "a"},
            [("user", "q\n\nc"), ("assistant", "a")],
            "'instruction', 'context', 'response' are read as instruction, input and output",
        ),
        ({"prompt": asks(ASK)["messages"], "completion": asks(TELL)["messages"]}, PLAIN, None),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), *PLAIN], "'question'"),
    ],
)
def test_unusual_names_are_read_and_named(row, expected, reading):
    example = convert(row, detect(row))

    assert turns(example) == expected
    assert (reading or "") in " ".join(example.readings) and bool(example.readings) == (reading is not None)


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        ("messages", asks(ASK, TELL)),
        ("sharegpt", {"conversations": asks(ASK, TELL)["messages"]}),
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
    ],
)
def test_system_prompts_of_rows_stand_first(row_format, row):
    assert turns(convert(row | {"system": "s"}, row_format)) == [("system", "s"), *PLAIN]
    for nothing in (None, "", float("nan")):
        assert turns(convert(row | {"system": nothing}, row_format)) == PLAIN


def test_the_answer_alone_is_learnt_where_prompt_and_completion_are_turns():
    row = {"prompt": asks(ASK, TELL, ASK)["messages"], "completion": asks(TELL)["messages"]}

    assert [m.get("train", True) for m in convert(row, "prompt_completion").messages] == [True, False, True, True]


NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "completion": NAN}, "field 'completion' is NaN, a missing value"),
        ({"prompt": None, "completion": "a"}, "field 'prompt' is null, a missing value"),
        ({"prompt": "q", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "q", "completion": 0}, "is a int, not text"),
        ({"instruction": "q", "input": 0, "output": "a"}, "field 'input' is a int, not text"),
        ({"text": NAN}, "field 'text' is NaN"),
        ({"text": "t", "label": NAN}, "field 'label' is nan"),
        ({"text": "t", "label": float("inf")}, "field 'label' is inf"),
        ({"text": "t", "label": ["a", "b"]}, "it must be a text or a number"),
        ({"prompt": "q", "completion": "a", "label": False}, "answer is good or bad"),
        ({"prompt": "q", "completion": "a", "label": 1}, "keep the good rows alone"),
        (asks(ASK, TELL) | {"chosen": "x", "rejected": "y"}, "which answer is the better one"),
        ({"prompt": "q", "completion": "a", "images": ["x.png"]}, "only text is trained"),
        ({"prompt": "q", "completion": "a", "weight": 0.5}, "how much it counts"),
        ({"instruction": "q", "output": "a", "history": "old"}, "not JSON"),
        ({"instruction": "q", "output": "a", "history": [["a"]]}, "item 1 is not a pair"),
        (asks(ASK, TELL) | {"history": [["a", "b"]]}, "the earlier turns"),
        (asks(ASK, TELL) | {"tools": "no json"}, "field 'tools' is a text that is not JSON"),
        ({"messages": str([{"role": "user", "content": "q"}])}, "these are Python's quotes: in pandas"),
        (asks(ASK, TELL) | {"tools": [{"type": "x"}]}, "not a function with a 'name'"),
        (asks(("system", "other", {}), ASK, TELL) | {"system": "s"}, "two different system prompts"),
        ({"text": "t", "system": "s"}, "the system prompt"),
        (asks(ASK, ("assistant", None, {})), r"turn 2 \(assistant\) has no text in 'content'"),
        (asks(ASK, ("assistant", NAN, {})), "has no text"),
        (asks(ASK, TELL, ASK, ("assistant", " ", {})), r"turn 4 \(assistant\) is empty"),
        (asks(ASK, ("assistant", "a", {"weight": 0})), "no assistant turn is trained"),
        (asks(ASK, ("assistant", "a", {"weight": 0.5})), "not in part"),
        (asks(("user", "q", {"train": True}), TELL), "only assistant turns are trained"),
        (asks(("user", "q", {"name": "Ann"}), TELL), "who speaks"),
        (asks(("user", "q", {"images": ["x"]}), TELL), "only text is trained"),
        (asks(("user", [{"type": "image_url", "image_url": {}}], {}), TELL), "part of type 'image_url'"),
        (asks(("user", {"text": "q"}, {}), TELL), "content of the type dict"),
        (asks(ASK, ("assistant", "", {"refusal": "I cannot"})), "model declined"),
        (asks(("user", "q", {"tool_calls": [CALL]}), TELL), "only the assistant calls"),
        (asks(ASK, ("assistant", "", {"tool_calls": [{"id": "x"}]})), "tool call without a 'name'"),
        (asks(ASK, ("assistant", "", {"tool_calls": [{"name": "f", "arguments": "{"}]})), "not JSON"),
        (
            asks(ASK, ("assistant", "", {"tool_calls": [{"name": "f", "arguments": [1]}]})),
            "not an object with named values",
        ),
        (asks(("user", "q", {"thinking": "hm"}), TELL), "reasoning is text of assistant turns"),
        (asks(ASK, ("assistant", "a", {"thinking": "x", "reasoning": "y"})), "different reasoning"),
        (asks(ASK, ("assistant", "", {"tool_calls": [CALL], "function_call": CALL})), "both 'tool_calls' and"),
        ({"messages": [{"speaker": "Ann", "text": "q"}]}, "has no role; its fields are"),
        ({"conversations": [{"from": "function_call", "value": "run it"}]}, "not JSON"),
    ],
)
def test_what_would_be_lost_is_refused_with_field_loss_and_way_out(row, told):
    with pytest.raises(BadRow, match=told) as caught:
        convert(row, detect(row))

    assert caught.value.kind and caught.value.reason == str(caught.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "are a preference"),
        ({"text": "t", "chosen": "a", "rejected": "b"}, "are a preference"),
        ({"a": "q", "b": "a"}, r"which is what, for example data.columns: \{prompt: a, completion: b\}"),
        ({"Frage": "q", "Antwort": "a"}, r"data.columns: \{prompt: Frage, completion: Antwort\}"),
        ({"id": 3, "query": "q", "positive": "a", "negative": "b"}, r"\{prompt: query, completion: positive\}"),
        ({"input_ids": [1], "labels": [1]}, "are tokens"),
        ({"problem": "q", "solution": "a", "answer": "b"}, "fit no known format"),
        ({"question": "q", "response": "a", "answer": "b"}, "fit no known format"),
        ({}, "fit no known format"),
    ],
)
def test_rows_of_no_format_say_why(row, told):
    with pytest.raises(BadRow, match=told):
        read_example(Row(row, "file", 1), "auto")


@pytest.mark.parametrize(
    ("row", "usual"),
    [
        ({"text": "t", "Label": "spam"}, {"text": "t", "label": "spam"}),
        ({"prompt": "p", "completion": "c", "System": "s"}, {"prompt": "p", "completion": "c", "system": "s"}),
    ],
)
def test_a_known_column_means_the_same_in_capitals(row, usual):
    found, expected = (read_example(Row(one, "file", 1), "auto") for one in (row, usual))

    assert found[0] == expected[0] and found[1].messages == expected[1].messages and not found[1].ignored


def test_zero_is_a_label_and_whole_numbers_of_pandas_are_whole():
    assert convert({"text": "t", "label": 0}, "classification").reference == "0"
    assert convert({"text": "t", "label": False}, "classification").reference == "False"
    assert convert({"text": "t", "label": 1.0}, "classification").reference == "1"
    assert convert({"instruction": "q", "input": NAN, "output": "a"}, "alpaca").messages[0]["content"] == "q"


def test_words_for_missing_values_are_counted():
    example = read_example(Row({"instruction": "q", "input": "nan", "output": "a"}, "file", 1), "auto")[1]

    assert example.readings == ("field 'input' is the text 'nan', which some tools write for a missing value",)


def test_an_empty_history_is_none_also_in_a_csv_file():
    for nothing in ("", "[]", [], None):
        assert turns(convert({"instruction": "q", "output": "a", "history": nothing}, "alpaca")) == PLAIN


def test_columns_that_are_not_used_are_named_where_they_hold_something():
    row = asks(("user", "q", {"id": 1}), ("assistant", "a", {"id": 2, "time": None})) | {"source": "x", "url": None}

    assert convert(row, "messages").ignored == ("source", "messages[].id")


def test_the_first_row_of_a_file_decides_for_the_others():
    detected = {}
    read_example(Row({"text": "t"}, "file", 1), "auto", "", detected)

    with pytest.raises(BadRow, match="the file's first row is read as text, this one looks like alpaca"):
        read_example(Row({"instruction": "q", "output": "a"}, "file", 2), "auto", "", detected)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "name", "weight"]), inner)
    ),
    max_leaves=8,
)
used = {name for groups in columns._USED.values() for group in groups for name in group}
fields = st.sampled_from(sorted(used | set(columns.refusals("prompt_completion"))))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(fields, values))
def test_junk_rows_are_bad_rows_never_tracebacks(row):
    try:
        read_example(Row(row, "file", 1), "auto")
    except BadRow as error:
        assert error.reason and error.kind
