"""Rows as people name their columns, down to the tokens that are learnt."""

import json

import pytest

from orchestrator.data.readers.sources import rows_of, sources_of
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.formats import read_example
from orchestrator.data.rows.guess import Guess, guess_columns
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.job.job_file import parse_job
from tests.conftest import CHAT_TEMPLATE, write_jsonl


@pytest.fixture
def rendered(tmp_path, tokenizer):
    """`rendered(row, columns={...})`: the first sample, what is learnt between ⟦ and ⟧, and the row as read."""

    def act(row, **data):
        write_jsonl(tmp_path / "rows.jsonl", [row])
        train = data.pop("train", "rows.jsonl")
        document = {"model": {"model_name_or_path": "none/here"}, "data": {"train": train, **data}}
        job = parse_job(json.dumps(document), tmp_path)
        (found,) = sources_of(job, job.spec.data.train, "data.train")
        (one,) = rows_of(job, *found)
        _, example = read_example(one, "auto")
        (tokens, *_) = Renderer(
            tokenizer, None if example.text else CHAT_TEMPLATE, train_on_eos=job.spec.data.train_on_eos
        ).render(example)
        pieces, before = [], False
        for token, learnt in [*zip(tokens.input_ids, tokens.supervised, strict=True), (None, False)]:
            pieces += ["⟦"] * (learnt and not before) + ["⟧"] * (before and not learnt)
            pieces += [tokenizer.decode([token])] if token is not None else []
            before = learnt
        return "".join(pieces), example

    return act


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return "".join(
        f"<|im_start|>{roles[who]}\n" + (f"⟦{text}<|im_end|>⟧\n" if who == "a" else f"{text}<|im_end|>\n")
        for who, text in turns
    )


ONE = chat(("u", "red cat"), ("a", "blue dog"))
STATED = {
    "columns under any name": (
        {"frage": "red cat", "antwort": "blue dog"},
        {"prompt": "frage", "completion": "antwort"},
        ONE,
    ),
    "a prompt made of two columns": (
        {"about": "red", "ask": "cat", "out": "blue dog"},
        {"prompt": "{about} {ask}", "completion": "out"},
        ONE,
    ),
    "an answer within a column": (
        {"q": "red cat", "answers": {"text": ["blue dog", "one"]}},
        {"prompt": "q", "completion": "answers.text.0"},
        ONE,
    ),
    "an input": (
        {"a": "red", "b": "cat", "c": "blue dog"},
        {"prompt": "a", "input": "b", "completion": "c"},
        chat(("u", "red\n\ncat"), ("a", "blue dog")),
    ),
    "a system prompt": (
        {"a": "red cat", "b": "blue dog", "c": "small"},
        {"prompt": "a", "completion": "b", "system": "c"},
        chat(("s", "small"), ("u", "red cat"), ("a", "blue dog")),
    ),
    "a column of our name that is another one": (
        {"prompt": "id 7", "question": "red cat", "answer": "blue dog"},
        {"prompt": "question", "completion": "answer"},
        ONE,
    ),
    "the better answer of two": (
        {"prompt": "red cat", "chosen": "blue dog", "rejected": "one"},
        {"prompt": "prompt", "completion": "chosen"},
        ONE,
    ),
    "a label": (
        {"review": "red cat", "stars": 4},
        {"text": "review", "label": "stars"},
        chat(("u", "red cat"), ("a", "4")),
    ),
    "plain text": ({"body": "red cat", "url": "x"}, {"text": "body"}, "red⟦ cat<|im_end|>⟧"),
    "turns with keys of their own": (
        {"log": [{"by": "customer", "say": "red cat", "n": 1}, {"by": "agent", "say": "blue dog"}]},
        {"messages": "log", "role": "by", "content": "say"},
        ONE,
    ),
    "turns in a text": (
        {"log": json.dumps([{"by": "customer", "say": "red cat"}, {"by": "agent", "say": "blue dog"}])},
        {"messages": "log", "role": "by", "content": "say"},
        ONE,
    ),
    "turns that are read only": (
        {
            "log": [
                {"role": "user", "content": "red"},
                {"role": "assistant", "content": "cat", "learn": 0},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two", "learn": 1},
            ]
        },
        {"messages": "log", "train": "learn"},
        chat(("u", "red"), ("a", "cat"), ("u", "one"), ("a", "two")).replace("⟦cat<|im_end|>⟧", "cat<|im_end|>"),
    ),
}


@pytest.mark.parametrize("name", STATED)
def test_stated_columns_become_the_right_text(rendered, name):
    row, stated, expected = STATED[name]
    roles = {"customer": "user", "agent": "assistant"} if "by" in stated.values() else {}

    text, example = rendered(row, columns=stated, roles=roles, ignore_columns=["rejected"] if "rejected" in row else [])

    assert text == expected
    assert example.readings[0].startswith("columns are read as stated: ")
    unused = {"id 7": "prompt (another column)", "x": "url"}
    for value, column in unused.items():
        assert (column in example.ignored) == (value in row.values())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "red cat", "answer": "blue dog"}, ONE),
        ({"instruction": "red cat", "response": "blue dog"}, ONE),
        ({"query": "red cat", "reply": "blue dog"}, ONE),
        ({"input": "red cat", "target": "blue dog"}, ONE),
        ({"inputs": "red cat", "targets": "blue dog"}, ONE),
        ({"problem": "red cat", "solution": "blue dog"}, ONE),
        ({"user": "red cat", "assistant": "blue dog"}, ONE),
        ({"system": "small", "user": "red cat", "assistant": "blue dog"}, chat(("s", "small")) + ONE),
        ({"Question ": "red cat", "Answer": "blue dog"}, ONE),
        ({"質問": "red cat", "回答": "blue dog"}, ONE),
        ({"question": "red cat", "answer": "blue dog", "solution": "one"}, ONE),
        ({"dialogue": [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue dog"}]}, ONE),
        ({"chat": [{"from": "human", "value": "red cat"}, {"from": "gpt", "value": "blue dog"}]}, ONE),
    ],
)
def test_columns_are_recognised_by_their_names_and_named(rendered, row, expected):
    text, example = rendered(row)

    assert text == expected
    assert "read as" in " ".join(example.readings) or "are read by" in " ".join(example.readings) or "dialogue" in row
    assert example.ignored == (("solution",) if len(row) == 3 and "solution" in row else ())


TALK = {"messages": "log", "role": "by", "content": "say"}


@pytest.mark.parametrize(
    ("row", "stated", "told"),
    [
        ({"problem": "q", "solution": "a", "answer": "b"}, {}, "Say which is what, for example data.columns"),
        ({"a": "q", "b": "a"}, {"prompt": "q", "completion": "b"}, "no column 'q', which data.columns.prompt names"),
        ({"a": "q", "b": "a"}, {"prompt": "q", "completion": "b"}, "it has: 'a', 'b'"),
        ({"a": "q", "b": "a"}, {"prompt": "{a} {c}", "completion": "b"}, "no column 'c', which data.columns.prompt"),
        ({"a": ["q"], "b": "a"}, {"prompt": "{a}!", "completion": "b"}, "column 'a' is a list, not text"),
        ({"log": [{"by": "x", "say": "y"}]}, TALK, "data.roles: {x: user}"),
    ],
)
def test_columns_that_are_not_there_are_named_with_those_that_are(rendered, row, stated, told):
    with pytest.raises(BadRow) as caught:
        rendered(row, columns=stated)

    assert told in str(caught.value)


def test_a_source_has_columns_of_its_own(rendered):
    source = {"path": "rows.jsonl", "columns": {"prompt": "a", "completion": "b"}}

    text, _ = rendered({"a": "red cat", "b": "blue dog"}, train=source, columns={"prompt": "x", "completion": "y"})

    assert text == ONE


def test_an_optional_column_that_is_not_there_is_named(rendered):
    stated = {"prompt": "a", "completion": "b", "system": "sys"}

    text, example = rendered({"a": "red cat", "b": "blue dog"}, columns=stated)

    assert text == ONE and "column 'sys', which data.columns.system names, is not there" in example.readings


def test_ignored_columns_are_not_read_and_named(rendered):
    row = {"question": "red cat", "answer": "blue dog", "context": "one", "label": False, "empty": None}

    text, example = rendered(row, ignore_columns=["context", "label", "empty"])

    assert text == ONE and set(example.ignored) == {"context", "label"}


TWO = {"messages": [{"role": role, "content": text} for role, text in (("user", "red"), ("assistant", "cat"))] * 2}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("turn", "red<|im_end|> ⟦cat<|im_end|>⟧ red<|im_end|> ⟦cat<|im_end|>⟧"),
        ("last", "red<|im_end|> ⟦cat⟧<|im_end|> red<|im_end|> ⟦cat<|im_end|>⟧"),
        ("none", "red<|im_end|> ⟦cat⟧<|im_end|> red<|im_end|> ⟦cat⟧<|im_end|>"),
        ("all", "red⟦<|im_end|>⟧ ⟦cat<|im_end|>⟧ red⟦<|im_end|>⟧ ⟦cat<|im_end|>⟧"),
    ],
)
def test_the_ends_that_are_learnt_are_those_that_are_stated(rendered, choice, expected):
    text, _ = rendered(TWO, train_on_eos=choice)

    for start in ("<|im_start|>user\n", "<|im_start|>assistant\n"):
        text = text.replace(start, "")
    assert text.replace("\n", " ").strip() == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, Guess()),
        ({"messages": [{"role": "user", "content": "a"}]}, Guess()),
        ({"Question": "a", "Answer": "b", "id": 3}, Guess({"prompt": "Question", "completion": "Answer"})),
        ({"n": 1, "frage": "a", "antwort": "b"}, Guess({"prompt": "frage", "completion": "antwort"}, is_sure=False)),
        ({"body": "a"}, Guess({"text": "body"}, is_sure=False)),
        (
            {"talk": [{"who": "A", "say": "hello there"}, {"who": "B", "say": "hi"}]},
            Guess(
                {"messages": "talk", "role": "who", "content": "say"}, {"A": "user", "B": "assistant"}, is_sure=False
            ),
        ),
        ({"n": 1}, None),
    ],
)
def test_a_mapping_is_guessed_from_names_or_values(row, expected):
    assert guess_columns([Row(row, "file", 1)]) == expected


def test_an_answer_may_be_a_number():
    answers = enumerate(["ja", "110", "nein"])
    rows = [Row({"Frage": f"Frage {n}", "Antwort": answer}, "file", n) for n, answer in answers]

    assert guess_columns(rows) == Guess({"prompt": "Frage", "completion": "Antwort"}, is_sure=False)
