"""Rows of a chosen and a rejected answer: whatever tool wrote them, the same two documents with the answer trained."""

import pytest

from orchestrator.data.counts import RowCounts
from orchestrator.data.dataset import Dataset, build
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.formats import read_example
from orchestrator.data.rows.preferences import read_labelled, read_preference
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.data.samples import TokenizeOptions, tokenise
from orchestrator.errors import JobError
from tests.conftest import CHAT_TEMPLATE, SHARED

OPTIONS = TokenizeOptions("auto", "", 64, "auto", True, "pairs")
ASK, GOOD, BAD = "the cat", "sees a dog", "likes one bird"


def turn(role, content):
    return {"role": role, "content": content}


def read(values):
    return read_preference(Row(values, "rows.jsonl", 1))


WHOLE = [turn("system", "s"), turn("user", ASK), turn("assistant", "one"), turn("user", "and the dog")]


@pytest.mark.parametrize("asked", [ASK, "and the dog", [turn("user", ASK)]])
def test_whole_conversations_beside_a_question_are_read_as_conversations(asked):
    answers = {"chosen": [*WHOLE, turn("assistant", GOOD)], "rejected": [*WHOLE, turn("assistant", BAD)]}

    found, expected = read({"prompt": asked, **answers}), read(answers)

    assert [told(one) for one in found.both] == [told(one) for one in expected.both]
    assert [content for _, content, trained in told(found.chosen) if trained][-1] == GOOD


def test_conversations_that_do_not_hold_the_question_are_refused():
    answers = {"chosen": [*WHOLE, turn("assistant", GOOD)], "rejected": [*WHOLE, turn("assistant", BAD)]}

    with pytest.raises(BadRow, match=r"whole conversations that do not begin alike with field 'prompt'\. Remove that"):
        read({"prompt": "the bird", **answers})


def told(example):
    return [(one["role"], one["content"], one.get("train", True)) for one in example.messages]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": [turn("user", ASK)], "chosen": [turn("assistant", GOOD)], "rejected": [turn("assistant", BAD)]},
        {
            "chosen": [turn("user", ASK), turn("assistant", GOOD)],
            "rejected": [turn("user", ASK), turn("assistant", BAD)],
        },
        {
            "prompt": ASK,
            "chosen": [turn("user", ASK), turn("assistant", GOOD)],
            "rejected": [turn("user", ASK), turn("assistant", BAD)],
            "score_chosen": 8.0,
        },
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        {"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD},
        {"messages": [turn("user", ASK)], "chosen": turn("assistant", GOOD), "rejected": turn("assistant", BAD)},
        {"question": ASK, "chosen": GOOD, "rejected": BAD},
        {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD},
        {
            "input": {"messages": [turn("user", ASK)]},
            "preferred_output": [turn("assistant", GOOD)],
            "non_preferred_output": [turn("assistant", BAD)],
        },
        {"messages": [turn("user", ASK), turn("assistant", GOOD)], "rejected_response": BAD},
    ],
    ids=[
        "TRL",
        "TRL with turns",
        "TRL without prompt",
        "UltraFeedback",
        "LLaMA-Factory ShareGPT",
        "LLaMA-Factory Alpaca",
        "Axolotl chat_template",
        "Axolotl chatml.intel",
        "Axolotl chatml.argilla",
        "OpenAI",
        "ms-swift",
    ],
)
def test_every_tools_pairs_are_one_question_with_two_answers(values):
    found = read(values)

    for example, answer in ((found.chosen, GOOD), (found.rejected, BAD)):
        assert told(example)[0][:2] == ("user", ASK)
        assert told(example)[1:] == [("assistant", answer, True)]


def test_earlier_answers_are_read_and_the_last_ones_trained_with_the_system_prompt_in_both():
    history = [turn("user", "one"), turn("assistant", "two"), turn("user", ASK)]

    found = read({"system": "a small cat", "messages": history, "chosen": GOOD, "rejected": BAD})

    for example in found.both:
        assert told(example)[0][:2] == ("system", "a small cat")
        assert told(example)[2] == ("assistant", "two", False)
        assert [one for one in told(example) if one[0] == "assistant" and one[2]] == [told(example)[-1]]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"prompt": ASK, "completion": GOOD}, "are no preference"),
        ({"prompt": ASK, "chosen": GOOD}, "'rejected' of the pair 'chosen' and 'rejected' is missing"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": " "}, "'rejected' .* is missing"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, "nothing to prefer"),
        ({"chosen": GOOD, "rejected": BAD}, "needs its question"),
        (
            {"chosen": [turn("user", "a"), turn("assistant", "b")], "rejected": [turn("user", "c")] * 2},
            "no turn in common",
        ),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "label": True}, "good or bad"),
        ({"prompt": ASK, "chosen": 3, "rejected": BAD}, "'chosen' is a int, neither text nor turns"),
    ],
)
def test_a_row_that_is_no_pair_says_why(values, fault):
    with pytest.raises(BadRow, match=fault):
        read(values)


def test_what_is_told_of_a_pair_names_the_columns_of_its_file():
    shared = {"conversations": [{"from": "human", "value": ASK, "id": 3}]}

    found = read({**shared, "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}})

    told_of = " ".join(found.readings)
    assert all(f"under {key!r}" in told_of for key in ("conversations", "chosen", "rejected"))
    assert found.ignored == ("conversations[].id",)
    with pytest.raises(BadRow, match="'rejected' of the pair"):
        read({"instruction": ASK, "chosen": GOOD, "rejected": " "})


def test_a_pair_among_single_answers_names_the_objective():
    with pytest.raises(BadRow, match="one of `objective: dpo, ipo, simpo, orpo, reward`, or name the better answer"):
        read_example(Row({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, "rows.jsonl", 1), "auto")


@pytest.mark.parametrize(
    ("values", "is_good"),
    [
        ({"prompt": ASK, "completion": GOOD, "label": True}, True),
        ({"prompt": [turn("user", ASK)], "completion": [turn("assistant", GOOD)], "label": False}, False),
        ({"instruction": ASK, "input": "", "output": GOOD, "kto_tag": True}, True),
        ({"messages": [turn("user", ASK), turn("assistant", GOOD)], "label": "false"}, False),
        ({"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}], "kto_tag": 0}, False),
        ({"question": ASK, "completion": GOOD, "label": 1}, True),
    ],
    ids=["TRL", "TRL with turns", "LLaMA-Factory Alpaca", "LLaMA-Factory", "LLaMA-Factory ShareGPT", "Axolotl"],
)
def test_every_tools_labelled_rows_are_a_question_and_an_answer_that_is_good_or_bad(values, is_good):
    found = read_labelled(Row(values, "rows.jsonl", 1))

    assert found.is_good is is_good
    assert told(found.example)[0][:2] == ("user", ASK)
    assert told(found.example)[1:] == [("assistant", GOOD, True)]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"prompt": ASK, "completion": GOOD}, "hold no label"),
        ({"prompt": ASK, "completion": GOOD, "label": "maybe"}, "'maybe', neither true nor false"),
        ({"prompt": ASK, "completion": GOOD, "label": None}, "neither true nor false"),
        ({"text": GOOD, "label": True}, "needs a question and an answer"),
        ({"messages": [turn("assistant", GOOD)], "label": True}, "holds no question and answer"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "label": True}, "needs a question and an answer"),
    ],
)
def test_a_row_that_is_no_labelled_one_says_why(values, fault):
    with pytest.raises(BadRow, match=fault):
        read_labelled(Row(values, "rows.jsonl", 1))


def test_an_answer_to_another_question_is_made_of_neighbours(tokenizer, tmp_path):
    options = TokenizeOptions("auto", "", 64, "auto", True, "labelled")
    rows = [{"prompt": f"{ASK} {n}", "completion": " ".join(["dog"] * n), "label": n % 2 == 0} for n in range(1, 6)]
    made = (Row(one, "rows.jsonl", number) for number, one in enumerate(rows, start=1))

    data = build(made, Renderer(tokenizer, CHAT_TEMPLATE), options, tmp_path / "samples")

    assert data.labels.tolist() == [False, True, False, True, False]
    for index in range(5):
        ids, mask = data.mismatched(index)
        assert len(ids) == len(mask) == data.mismatched_lengths[index] <= data.lengths.max()
        assert f"{ASK} {index + 1}" in tokenizer.decode(ids)
        answer = tokenizer.decode(ids[mask])
        other = " ".join(["dog"] * (index or 5))
        assert f"{other}<|im_end|>".startswith(answer) and answer


def samples_of(tokenizer, values, options=OPTIONS):
    counts = RowCounts()
    rows = [Row(one, "rows.jsonl", number) for number, one in enumerate(values, start=1)]
    made = list(tokenise(rows, Renderer(tokenizer, CHAT_TEMPLATE), options, counts))
    return [sample for _, samples in made for sample in samples], counts


def test_a_pair_is_one_sample_of_two_documents_that_share_their_prompt(tokenizer):
    (sample,), counts = samples_of(tokenizer, [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}])

    first, second = sample["document_lengths"]
    chosen, rejected = sample["input_ids"][:first], sample["input_ids"][first:]
    assert len(rejected) == second
    asked = chosen[: sample["prompt_length"]]
    assert asked == rejected[: len(asked)]
    learnt = [token for token, is_learnt in zip(sample["input_ids"], sample["supervised"], strict=True) if is_learnt]
    assert tokenizer.decode(learnt) == f"{GOOD}<|im_end|>{BAD}<|im_end|>"
    assert sample["document_supervised"] == sample["document_answers"]
    assert sample["reference"] == GOOD
    assert (counts.statistics.samples, counts.statistics.longest) == (1, max(first, second))
    assert counts.statistics.formats == {"preference": 1}


def test_where_prompts_are_learnt_the_chosen_ones_are_and_answers_stay_known(tokenizer):
    options = TokenizeOptions("auto", "", 64, "auto", True, "pairs", learns_prompts=True)

    (sample,), _ = samples_of(tokenizer, [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}], options)

    first = sample["document_lengths"][0]
    assert sample["supervised"][:first] == [False] + [True] * (first - 1)
    assert sample["supervised"][first:] == sample["answer"][first:]
    answer = [token for token, own in zip(sample["input_ids"][:first], sample["answer"], strict=False) if own]
    assert tokenizer.decode(answer) == f"{GOOD}<|im_end|>"


def test_an_answer_that_does_not_fit_is_cut_and_a_prompt_that_leaves_no_room_drops_the_pair(tokenizer):
    long = " ".join(["cat"] * 80)
    rows = [{"prompt": ASK, "chosen": long, "rejected": BAD}, {"prompt": long, "chosen": GOOD, "rejected": BAD}]

    (sample,), counts = samples_of(tokenizer, rows)

    assert sample["document_lengths"][0] == 64
    assert sample["reference"] is None
    assert (counts.statistics.truncated, counts.statistics.dropped) == (1, 1)


def test_a_data_set_gives_documents_counts_and_subsets(tokenizer, tmp_path):
    rows = [{"prompt": ASK, "chosen": " ".join(["dog"] * n), "rejected": BAD} for n in range(1, 6)]
    made = (Row(one, "rows.jsonl", number) for number, one in enumerate(rows, start=1))

    data = build(made, Renderer(tokenizer, CHAT_TEMPLATE), OPTIONS, tmp_path / "samples")

    part = data.select([4, 1])
    for kept, index in enumerate([4, 1]):
        (chosen, _), (rejected, _) = part.documents_of(kept)
        assert [*chosen, *rejected] == data.tokens(index)[0].tolist()
        assert part.documents.lengths[kept].tolist() == [len(chosen), len(rejected)]
        assert part.padded_lengths[kept] == 2 * max(len(chosen), len(rejected))
    assert part.num_counted([0, 1]) == 2
    assert part.num_chosen_tokens([0]) == part.documents.supervised[0, 0] < part.num_supervised[0]
    assert isinstance(part, Dataset)


def test_a_text_that_would_be_split_is_refused_for_pairs(job_text, tmp_path):
    from orchestrator.data.samples import options_for
    from orchestrator.job.job_file import parse_job

    job = parse_job(job_text + "objective: dpo\n", tmp_path, overrides=["data.overlong=split"])

    with pytest.raises(JobError, match="cut an answer from its prompt"):
        options_for(job, 64)


@pytest.mark.skipif(not (SHARED / "assets/data/llamafactory_demo").is_dir(), reason="needs ../shared/assets")
def test_llama_factorys_demo_is_read_whole():
    import json

    rows = json.loads((SHARED / "assets/data/llamafactory_demo/dpo_en_demo.json").read_text())

    found = [read(row) for row in rows]

    assert len(found) == 300
    assert not any(one.ignored for one in found)
    marked = json.loads((SHARED / "assets/data/llamafactory_demo/kto_en_demo.json").read_text())
    assert sum(read_labelled(Row(row, "rows.json", 1)).is_good for row in marked) == 150
    assert found[0].chosen.messages[-1]["content"] == rows[0]["chosen"]["value"]
