"""Several sources of rows: how much comes from each, what is drawn, and what is in both train and eval."""

import json
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.data.prepare import datasets, prepare_data
from orchestrator.data.rows.formats import convert
from orchestrator.data.rows.likeness import fingerprint, nearly_equal, plain_text, sketch
from orchestrator.data.samples import renderer_for
from orchestrator.data.sizes import rough_lengths
from orchestrator.data.survey import survey
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle.inspect_data import inspect_data
from tests.conftest import CHAT_TEMPLATE, SMALL_MODEL, write_jsonl

COLOURS = ["red", "green", "blue", "small", "large"]


@pytest.fixture
def mixed(tmp_path):
    """A job over a.jsonl (40 rows that begin with a) and b.jsonl (10 rows that begin with b)."""
    for name, count in (("a", 40), ("b", 10)):
        rows = [{"prompt": f"{name} {n} sees {COLOURS[n % 5]}", "completion": f"cat {n * 7}"} for n in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)

    def make(*train, **data):
        document = {"train": list(train), "chat_template": "chat.jinja", **data}
        return parse_job(json.dumps({"model": {"model_name_or_path": str(SMALL_MODEL)}, "data": document}), tmp_path)

    return make


def prepared(job, tmp_path):
    said = []
    return prepare_data(job, SMALL_MODEL, 256, tmp_path / "cache", said.append), said


def sources(data):
    return Counter(Path(data.source(n).rpartition(":")[0]).stem for n in range(len(data)))


def test_weights_make_the_shares_and_workers_see_the_same(mixed, tmp_path):
    job = mixed({"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl", "weight": 3})

    made, _ = prepared(job, tmp_path)

    assert sources(made.train) == {"a": 20, "b": 30}
    assert made.train.statistics.samples == 50
    assert max(Counter(made.train.source(n) for n in range(50)).values()) == 3
    again, _ = datasets(made.files)
    assert again.digest == made.train.digest and [again.source(n) for n in range(50)] == [
        made.train.source(n) for n in range(50)
    ]
    assert len(rough_lengths(job, 256)[0]) == 50


def test_another_weight_tokenises_nothing_anew(mixed, tmp_path):
    prepared(mixed({"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2}), tmp_path)

    made, _ = prepared(mixed({"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 1.5}), tmp_path)

    assert made.cached and sources(made.train) == {"a": 40, "b": 15}


def test_held_out_rows_are_taken_before_any_is_repeated(mixed, tmp_path):
    job = mixed({"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 4}, eval={"split": 0.2})

    made, _ = prepared(job, tmp_path)

    held = {made.held_out.source(n) for n in range(len(made.held_out))}
    assert len(held) == 10 and not held & {made.train.source(n) for n in range(len(made.train))}


def test_sources_of_several_formats_are_read_together(mixed, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [{"frage": "red", "antwort": "cat"}])
    columns = {"prompt": "frage", "completion": "antwort"}

    made, _ = prepared(mixed({"path": "a.jsonl", "max_samples": 3}, {"path": "c.jsonl", "columns": columns}), tmp_path)

    assert sources(made.train) == {"a": 3, "c": 1}


def test_inspect_shows_what_comes_from_each_source(mixed):
    job = mixed({"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl", "max_samples": 4, "weight": 2})

    seen = inspect_data(job, 1, 1)

    assert [(one["path"], one["rows"], one["samples"]) for one in seen["sources"]] == [
        ("a.jsonl", 40, 20),
        ("b.jsonl", 4, 8),
    ]


def test_rows_that_are_held_out_in_other_letters_are_counted_and_said(mixed, tmp_path):
    rows = [{"prompt": "A  3 SEES small!", "completion": "Cat: 21."}, {"prompt": "one", "completion": "two"}]
    write_jsonl(tmp_path / "eval.jsonl", rows)
    job = mixed("a.jsonl", eval="eval.jsonl")

    made, said = prepared(job, tmp_path)

    assert (made.train.statistics.leaked, made.train.statistics.held_out) == (1, 0)
    assert any("1 samples (2.5%) say what a held-out one says" in line for line in said)
    found = survey(job, renderer_for(job, SMALL_MODEL), 256)
    assert found.train.counts.statistics.leaked == 1
    assert any("say what a held-out one says" in line for line in found.lines())


LONG = "the printer on the second floor beside the kitchen prints both sides unless you tell it otherwise"


def test_near_duplicates_are_counted_and_others_are_not(mixed, tmp_path):
    texts = [LONG, f"{LONG} please", LONG.replace("kitchen", "lobby"), "a cat sees a large dog and likes it", LONG]
    write_jsonl(tmp_path / "n.jsonl", [{"text": text} for text in texts])
    job = mixed("n.jsonl")

    found = survey(job, renderer_for(job, SMALL_MODEL), 256).train.counts.statistics

    assert (found.near, found.repeated) == (1, 2)  # equal ones are counted apart


def test_likeness_of_texts():
    one, other = ({"prompt": "Röd  katt?", "completion": "ｂｌｕｅ"}, {"prompt": "röd-katt", "completion": "BLUE!"})

    assert plain_text(convert(one, "prompt_completion")) == "röd katt blue"
    assert fingerprint(plain_text(convert(other, "prompt_completion"))) == fingerprint("röd katt blue")
    system = {
        "messages": [{"role": "system", "content": "x"}, *({"role": r, "content": r} for r in ("user", "assistant"))]
    }
    assert plain_text(convert(system, "messages")) == "user assistant"
    sketches = [sketch(text) for text in (LONG, "", "a", LONG[:-9], LONG)]
    assert nearly_equal(sketches) == {3: 0, 4: 0}
    assert nearly_equal(sketches[:3], [sketch(LONG)]) == {0: 0}
