import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.files import find_files, looks_like_hub_name, read_rows
from orchestrator.data.formats import convert, detect
from orchestrator.data.row import BadRow
from orchestrator.errors import JobError

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


def test_all_file_kinds_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    items = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(items))
    (tmp_path / "c.csv").write_text("prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(3)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "d.parquet")

    files = find_files(tmp_path, "data.train")

    assert [file.suffix for file in files] == [".jsonl", ".json", ".csv", ".parquet"]
    for file in files:
        assert [row.values for row in read_rows(file)] == items, file


def test_a_broken_line_is_told_with_its_number(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "x"}\n{"text": \n[1]\n\xff\xfe\n')

    rows = list(read_rows(file))

    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert rows[0].broken is None
    assert "not JSON" in str(rows[1].broken)
    assert "not an object" in str(rows[2].broken)
    assert rows[3].broken


def test_files_that_are_not_there_say_where_paths_start(tmp_path):
    with pytest.raises(JobError, match="relative to the job file"):
        find_files(tmp_path / "none.jsonl", "data.train")
    with pytest.raises(JobError, match="holds no"):
        find_files(tmp_path, "data.train")


def test_hub_names_are_told_from_paths():
    assert looks_like_hub_name("org/name")
    assert not looks_like_hub_name("./name")
    assert not looks_like_hub_name("rows.jsonl")
    assert not looks_like_hub_name("a/b/c")
