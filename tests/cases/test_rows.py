"""What people's rows are read as: the cases of data files, folders and paths."""

import gzip
import json
import shutil

import pytest

from orchestrator.data.readers.sources import rows_of, skipped_of, sources_of
from orchestrator.data.rows.formats import read_example
from orchestrator.data.rows.row import BadRow
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job


def read(folder, name="job.yaml", key="train"):
    """Each row of a job's data key as (row, example) or (row, why it is broken)."""
    job = read_job(folder / name)
    value, found, detected = getattr(job.spec.data, key), [], {}
    for source in sources_of(job, value, f"data.{key}"):
        for row in rows_of(job, *source):
            try:
                found.append((row, read_example(row, "auto", "", detected)[1]))
            except BadRow as error:
                found.append((row, error))
    return found


def turns(example):
    assert not isinstance(example, BadRow), example
    return [(message["role"], message["content"]) for message in example.messages]


def skipped(folder, name="job.yaml"):
    job = read_job(folder / name)
    return " ".join(skipped_of(job, job.spec.data.train, "data.train"))


@pytest.fixture
def rows_case(case):
    return lambda name: case(name, with_models=False)


@pytest.mark.parametrize(("name", "told"), [("01", "read as CP932"), ("02", "read as UTF-16")])
def test_files_of_excel_are_read_and_named_by_encoding_and_separator(rows_case, name, told):
    found = read(rows_case(name))

    assert len(found) == 3 and all(len(turns(example)) == 2 for _, example in found)
    assert all(any("\u3040" <= letter <= "\u30ff" for letter in example.reference) for _, example in found)
    assert all(told in example.readings[0] for _, example in found)
    assert all(("separated by tabs" in example.readings[0]) == (name == "02") for _, example in found)


def test_a_csv_cell_of_200_000_characters_is_read(rows_case):
    folder = rows_case("05")
    (folder / "data.csv").write_text(f"prompt,completion\nshort,answer\nlong,{'word ' * 40_000}\n")

    assert [len(example.reference) for _, example in read(folder)] == [6, 200_000]


@pytest.mark.parametrize("name", ["job.yaml", "loose.yaml"])
def test_half_a_surrogate_pair_is_a_broken_row_with_its_line_and_field(rows_case, name):
    found = read(rows_case("06"), name)

    broken = [(row.line, str(error)) for row, error in found if isinstance(error, BadRow)]
    assert [line for line, _ in broken] == [line for line, _ in enumerate(found, start=1) if line % 3 == 2]
    assert all("field 'completion' holds half a surrogate pair" in text and "Fix" in text for _, text in broken)


def test_nan_of_pandas_is_a_missing_value_and_never_a_word(rows_case):
    found = read(rows_case("07"))

    assert turns(found[0][1]) == [("user", "Name the capital of France."), ("assistant", "Paris")]
    assert turns(found[1][1])[0] == ("user", "Translate to German.\n\ngood morning")


def test_system_and_history_of_alpaca_are_turns(rows_case):
    found = read(rows_case("08"))

    assert found and all(
        turns(example)
        == [
            ("system", "You are a clerk at a stationery shop. Answer in three words."),
            ("user", "Do you have notebooks?"),
            ("assistant", "Yes we do."),
            ("user", "And the price?"),
            ("assistant", "Nine euros."),
        ]
        for _, example in found
    )


@pytest.mark.parametrize("name", ["job.yaml", "null.yaml"])
def test_tools_and_calls_of_tools_are_kept(rows_case, name):
    found = read(rows_case("09"), name)

    assert found
    for _, example in found:
        assert turns(example)[1:] == [("assistant", ""), ("tool", "41"), ("assistant", "There are 41 pens.")]
        assert example.messages[1]["tool_calls"][0]["function"] == {"name": "get_stock", "arguments": {"item": "pens"}}
        assert example.tools[0]["function"]["name"] == "get_stock"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("kto.yaml", "field 'label' .* good or bad.*objective: kto.*keep the good rows"),
        ("dpo.yaml", "preference.*objective: dpo.*the better answer"),
    ],
)
def test_judged_answers_are_refused_with_one_reason_for_all_rows(rows_case, name, told):
    found = read(rows_case("10"), name)

    assert found and all(isinstance(error, BadRow) for _, error in found)
    assert len({error.kind for _, error in found}) == 1
    with pytest.raises(BadRow, match=told):
        raise found[0][1]


HELLO = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("name", "expected", "reading"),
    [
        ("parts", HELLO, "content in parts is read as its texts joined"),
        ("rolecontent", HELLO, "turns with 'role' and 'content' under 'conversations' are read as role and content"),
        ("fromvalue", HELLO, "turns with 'from' and 'value' under 'messages' are read as role and content"),
        ("developer", [("system", "Be brief."), *HELLO], "role 'developer' is read as system"),
        ("qa", [("user", "What is 2+2?"), ("assistant", "4")], "fields 'question', 'answer' are read as prompt and"),
        ("dolly", [("user", "Name a colour"), ("assistant", "Blue")], "are read as instruction, input and output"),
        (
            "observation",
            [("user", "Stock of pens?"), ("assistant", ""), ("tool", "41"), ("assistant", "41 pens")],
            "role 'observation' is read as tool",
        ),
    ],
)
def test_odd_roles_and_keys_are_read_and_named(rows_case, name, expected, reading):
    found = read(rows_case("13"), f"{name}.yaml")

    assert found
    for _, example in found:
        assert turns(example) == expected
        assert reading in " ".join(example.readings)
        assert example.ignored == (("category",) if name == "dolly" else ())
    if name == "observation":
        call = {"type": "function", "function": {"name": "stock", "arguments": {}}}
        assert found[0][1].messages[1]["tool_calls"] == [call]


def test_what_datasets_saved_is_read(rows_case, monkeypatch):
    pytest.importorskip("datasets")
    folder = rows_case("14")
    monkeypatch.chdir(folder)
    exec(compile((folder / "make.py").read_text(), "make.py", "exec"), {})

    for name in ("job.yaml", "dict.yaml"):
        found = read(folder, name)
        assert [example.reference for _, example in found] == [f"Floor {number // 10}" for number in range(30)]
    assert "1 other split (test)" in skipped(folder, "dict.yaml")


def pairs(*numbers):
    return "".join(json.dumps({"prompt": f"Room {n}?", "completion": f"Floor {n}"}) + "\n" for n in numbers)


def test_other_splits_of_a_folder_are_not_trained_and_packed_and_upper_case_files_are_read(rows_case):
    folder = rows_case("15")
    (folder / "data" / "validation").mkdir(parents=True)
    (folder / "data/train.jsonl").write_text(pairs(1))
    (folder / "data/test.jsonl").write_text(pairs(2))
    (folder / "data/validation/part.jsonl").write_text(pairs(3))
    (folder / "data/OLD.JSONL").write_text(pairs(4))
    (folder / "data/more.jsonl.gz").write_bytes(gzip.compress(pairs(5).encode()))

    assert sorted(example.reference for _, example in read(folder)) == ["Floor 1", "Floor 4", "Floor 5"]
    assert [example.reference for _, example in read(folder, key="eval")] == ["Floor 2"]
    assert [example.reference for _, example in read(folder, "gz.yaml")] == ["Floor 5"]
    assert [example.reference for _, example in read(folder, "upper.yaml")] == ["Floor 4"]
    assert "split test (test.jsonl)" in skipped(folder) and "split validation" in skipped(folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("s3", "pip install fsspec s3fs"),
        ("slice", "a slice in brackets is not supported"),
        ("typo", "trian.txt does not exist"),
    ],
)
def test_paths_that_are_not_read_say_what_is_and_ask_no_hub(rows_case, name, told, monkeypatch):
    folder = rows_case("31")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))

    with pytest.raises(JobError, match=told):
        read(folder, f"{name}.yaml")


def test_hidden_copies_are_not_trained_twice(rows_case):
    folder = rows_case("67")
    (folder / "data/.ipynb_checkpoints").mkdir(exist_ok=True)
    (folder / "data/__MACOSX").mkdir(exist_ok=True)
    for copy in (".ipynb_checkpoints/train-checkpoint.jsonl", "._train.jsonl", "__MACOSX/._train.jsonl"):
        shutil.copy(folder / "data/train.jsonl", folder / "data" / copy)

    assert [row.values for row, _ in read(folder)] == [row.values for row, _ in read(folder, "clean.yaml")]
    assert "hidden folders" in skipped(folder) and "1 hidden file (._train.jsonl)" in skipped(folder)
