import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.rows import columns as contract
from orchestrator.data.rows.columns import columns, holds, missing, turn_fields

FORMATS = ("messages", "sharegpt", "prompt_completion", "alpaca", "classification", "text")

# format, columns -> used, refused where they hold something, ignored and named
TABLE = [
    ("messages", "messages", "messages", "", ""),
    ("messages", "messages system tools id", "messages system tools", "", "id"),
    ("messages", "id messages prompt text", "messages", "", "id prompt text"),
    ("messages", "messages functions parallel_tool_calls", "messages functions", "", "parallel_tool_calls"),
    ("messages", "messages chosen rejected score", "messages", "chosen rejected", "score"),
    ("messages", "messages rejected_response channel", "messages", "rejected_response", "channel"),
    ("messages", "messages label weight images", "messages", "label weight images", ""),
    ("messages", "messages history chat_template_kwargs", "messages", "history chat_template_kwargs", ""),
    ("sharegpt", "conversations system tools", "conversations system tools", "", ""),
    ("sharegpt", "conversation source model", "conversation", "", "source model"),
    ("sharegpt", "conversations image kto_tag", "conversations", "image kto_tag", ""),
    ("prompt_completion", "prompt completion", "prompt completion", "", ""),
    ("prompt_completion", "prompt completion label", "prompt completion", "label", ""),
    ("prompt_completion", "prompt completion system history", "prompt completion system history", "", ""),
    ("prompt_completion", "prompt completion context input", "prompt completion", "context input", ""),
    ("prompt_completion", "prompt completion reasoning", "prompt completion", "reasoning", ""),
    ("prompt_completion", "question answer id", "question answer", "", "id"),
    ("prompt_completion", "input output category", "input output", "", "category"),
    ("prompt_completion", "system_prompt question response", "system_prompt question response", "", ""),
    ("prompt_completion", "question choices answer", "question answer", "choices", ""),
    ("prompt_completion", "prompt completion desirable", "prompt completion", "desirable", ""),
    ("prompt_completion", "prompt response non_preferred_output", "prompt response", "non_preferred_output", ""),
    ("alpaca", "instruction options output", "instruction output", "options", ""),
    ("alpaca", "instruction input output", "instruction input output", "", ""),
    ("alpaca", "instruction input output system history", "instruction input output system history", "", ""),
    ("alpaca", "instruction context response category", "instruction context response", "", "category"),
    ("alpaca", "instruction output text", "instruction output", "", "text"),
    ("alpaca", "instruction output weight train", "instruction output", "weight train", ""),
    ("alpaca", "instruction output chosen", "instruction output", "chosen", ""),
    ("classification", "text label", "text label", "", ""),
    ("classification", "text label instruction prompt context", "text label", "instruction prompt context", ""),
    ("prompt_completion", "prompt completion instruction question", "prompt completion", "instruction", "question"),
    ("alpaca", "instruction input context output", "instruction input output", "context", ""),
    ("messages", "messages context prompt_id", "messages", "context", "prompt_id"),
    ("classification", "sentence label idx", "sentence label", "", "idx"),
    ("classification", "text label label_text", "text label", "", "label_text"),
    ("classification", "text label system text_pair weight", "text label", "system text_pair weight", ""),
    ("text", "text", "text", "", ""),
    ("text", "text url timestamp label", "text", "", "url timestamp label"),
    ("text", "text images tools loss_mask", "text", "images tools loss_mask", ""),
]


@pytest.mark.parametrize(("row_format", "names", "used", "refused", "ignored"), TABLE)
def test_each_column_is_used_refused_or_ignored(row_format, names, used, refused, ignored):
    found = columns(row_format, tuple(names.split()))

    assert [" ".join(part) for part in (found.used, found.refused, found.ignored)] == [used, refused, ignored]


@pytest.mark.parametrize(
    ("names", "used", "refused", "ignored"),
    [
        ("role content", "role content", "", ""),
        ("from value", "from value", "", ""),
        ("role content name tool_calls tool_call_id", "role content name tool_calls tool_call_id", "", ""),
        ("role content weight train loss", "role content weight train loss", "", ""),
        ("role content reasoning_content thinking", "role content reasoning_content thinking", "", ""),
        ("role content id timestamp model", "role content", "", "id timestamp model"),
        ("role content text", "role content", "", "text"),
        ("role content images refusal training_detail", "role content", "images refusal training_detail", ""),
        ("from value masked", "from value", "masked", ""),
    ],
)
def test_each_field_of_a_turn_is_used_refused_or_ignored(names, used, refused, ignored):
    found = turn_fields(tuple(names.split()))

    assert [" ".join(part) for part in (found.used, found.refused, found.ignored)] == [used, refused, ignored]


known = st.sampled_from(sorted({name for row_format in FORMATS for name in contract.refusals(row_format)}))


@given(st.sampled_from(FORMATS), st.lists(known | st.text(max_size=5), unique=True).map(tuple))
def test_no_column_is_lost_and_none_is_sorted_twice(row_format, names):
    for found in (columns(row_format, names), turn_fields(names)):
        assert sorted(found.used + found.refused + found.ignored) == sorted(names)


def test_every_refusal_says_what_is_lost_and_the_way_out():
    for row_format in FORMATS:
        for name, refusal in contract.refusals(row_format).items():
            assert refusal.lost and refusal.way, name
    for name in turn_fields(("images", "mask", "refusal", "label", "image_url", "training_detail")).refused:
        assert contract.turn_refusal(name).lost


@pytest.mark.parametrize("nothing", [None, float("nan"), "", " \n", [], {}, ()])
def test_nothing_is_missing_and_zero_is_not(nothing):
    assert missing(nothing)
    assert not any(missing(value) for value in (0, 0.0, False, "0", "nan", "None", [0], {"a": None}))


@pytest.mark.parametrize(
    ("name", "values", "held"),
    [
        ("label", (True, False, 0, 1, "true", "0", "bad", [1]), True),
        ("label", (None, float("nan"), "", "billing"), False),
        ("weight", (0, 0.5, 2, "0", [1]), True),
        ("weight", (1, 1.0, None, "1"), False),
        ("train", (False, 0), True),
        ("train", (True, 1), False),
        ("images", (["a.png"], "a.png", {"bytes": b""}), True),
        ("images", ([], None, ""), False),
    ],
)
def test_a_refused_column_matters_where_it_holds_something(name, values, held):
    assert [holds(name, value) for value in values] == [held] * len(values)
