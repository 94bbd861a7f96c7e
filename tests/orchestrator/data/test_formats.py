import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.formats import convert, detect
from orchestrator.data.row import BadRow

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
        ({"messages": "hi"}, "messages", "not a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "robot"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "no text"),
        ({"messages": CHAT[:1]}, "messages", "nothing to learn"),
        ({"prompt": "p"}, "prompt_completion", "'completion' is missing"),
        ({"prompt": "p", "completion": 3}, "prompt_completion", "is a int, not text"),
        ({"prompt": "p", "completion": " "}, "prompt_completion", "is empty"),
        ({"text": "t", "label": None}, "classification", "'label' is None"),
    ],
)
def test_a_broken_row_says_why(row, name, reason):
    with pytest.raises(BadRow, match=reason):
        convert(row, name)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
    ),
    max_leaves=8,
)
fields = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "sentence", "label"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(fields, values))
def test_junk_rows_are_bad_rows_never_tracebacks(row):
    name = detect(row)
    if name:
        try:
            convert(row, name)
        except BadRow as reason:
            assert str(reason)
