import json

import pytest

from orchestrator.data.dataset import Dataset, TokenizeOptions, build, cache_key
from orchestrator.data.readers.files import read_rows
from orchestrator.data.rendering.template import Renderer
from orchestrator.errors import JobError
from tests.conftest import CHAT_TEMPLATE, rows, write_jsonl


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer, CHAT_TEMPLATE)


def options(**changes):
    return TokenizeOptions(
        **{"format": "auto", "instruction": "", "max_length": 64, "overlong": "truncate", "strict": True} | changes
    )


def make(tmp_path, renderer, items, **changes):
    file = write_jsonl(tmp_path / "rows.jsonl", items)
    return build(read_rows(file), renderer, options(**changes), tmp_path / "out")


def test_samples_come_back_as_they_were_rendered(tmp_path, renderer, tokenizer):
    items = rows(2500)  # more than two record batches

    data = make(tmp_path, renderer, items)

    assert len(data) == 2500
    for index in (0, 999, 1000, 2499):
        ids, supervised = data.tokens(index)
        assert tokenizer.decode(ids[supervised]) == items[index]["completion"] + "<|im_end|>"
        prompt, reference = data.prompt(index)
        assert reference == items[index]["completion"]
        assert tokenizer.decode(prompt).endswith("assistant\n")
        assert data.source(index).endswith(f"rows.jsonl:{index + 1}")
        assert data.lengths[index] == len(ids) and data.num_supervised[index] == supervised.sum()


def test_a_broken_row_stops_everything_and_leaves_nothing(tmp_path, renderer):
    items = [*rows(3), {"prompt": "x"}, {"what": 1}]

    with pytest.raises(JobError) as caught:
        make(tmp_path, renderer, items)

    assert "rows.jsonl:4" in caught.value.mistakes[0] and "completion" in caught.value.mistakes[0]
    assert "rows.jsonl:5" in caught.value.mistakes[1] and "is missing" in caught.value.mistakes[1]
    assert "strict: false" in caught.value.mistakes[-1]
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["rows.jsonl"]


def test_broken_rows_are_counted_and_kept_aside_when_not_strict(tmp_path, renderer):
    data = make(tmp_path, renderer, [*rows(3), {"prompt": "x"}], strict=False)

    assert (data.statistics.samples, data.statistics.rejected) == (3, 1)
    kept = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert kept[0]["row"] == {"prompt": "x"}


def test_long_samples_are_cut_dropped_or_split_and_counted(tmp_path, renderer, tokenizer):
    long = [{"text": "red green blue " * 30}]
    whole = len(tokenizer(long[0]["text"])["input_ids"]) + 1

    cut = make(tmp_path / "a", renderer, long, overlong="truncate") if (tmp_path / "a").mkdir() is None else None
    (tmp_path / "b").mkdir()
    split = make(tmp_path / "b", renderer, long, overlong="split")
    (tmp_path / "c").mkdir()
    drop = make(tmp_path / "c", renderer, [*long, {"text": "red"}], overlong="drop")

    assert (len(cut), cut.statistics.truncated, cut.statistics.longest) == (1, 1, 64)
    assert len(split) == -(-(whole - 1) // 63) and split.statistics.cut_tokens == 0
    assert split.statistics.supervised_tokens == whole - 1, "every token but the first is predicted once"
    assert (len(drop), drop.statistics.dropped) == (1, 1)


def test_a_sample_cut_before_its_answer_is_dropped_not_trained_on_nothing(tmp_path, renderer):
    far = {"prompt": "red green blue " * 40, "completion": "cat"}

    data = make(tmp_path, renderer, [*rows(2), far])

    assert (len(data), data.statistics.dropped) == (2, 1)
    with pytest.raises(JobError, match="no sample is left"):
        (tmp_path / "z").mkdir()
        make(tmp_path / "z", renderer, [far])


def test_holding_out_is_a_partition_decided_by_the_seed(tmp_path, renderer):
    data = make(tmp_path, renderer, rows(50))

    kept, held = data.split(0.2, seed=1)

    assert (len(kept), len(held)) == (40, 10)
    sources = {kept.source(i) for i in range(40)} | {held.source(i) for i in range(10)}
    assert len(sources) == 50
    again = Dataset.load(tmp_path / "out").split(0.2, seed=1)[1]
    assert [held.source(i) for i in range(10)] == [again.source(i) for i in range(10)]


def test_all_samples_of_a_row_are_on_one_side(tmp_path, renderer):
    long = [{"text": " ".join(["one two three four five"] * (n + 30))} for n in range(10)]
    data = make(tmp_path, renderer, long, overlong="split")
    assert len(data) > 20

    kept, held = data.split(0.3, seed=1)

    sides = [{one.source(i) for i in range(len(one))} for one in (kept, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == 3 and len(kept) + len(held) == len(data)
    with pytest.raises(JobError, match="one row cannot be split"):
        (tmp_path / "one").mkdir()
        make(tmp_path / "one", renderer, long[:1], overlong="split").split(0.5, seed=1)


def test_repeated_held_out_rows_are_found(tmp_path, renderer):
    data = make(tmp_path, renderer, rows(20))

    assert data.overlap(data.select([3, 4])) == 2


def test_the_cache_name_follows_everything_the_tokens_depend_on():
    assert cache_key("a", 1) == cache_key("a", 1)
    assert cache_key("a", 1) != cache_key("a", 2)
