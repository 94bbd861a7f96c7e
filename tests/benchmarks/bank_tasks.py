"""Real tasks for a bank, from the public data beside the checkout: one folder of rows a task.

    python tests/benchmarks/bank_tasks.py FOLDER [--more]
    orchestrator bank build FOLDER --job bank

Each task is FOLDER/NAME/train.jsonl and eval.jsonl of prompts and completions; no row is in both.  Prompts of the T0
sample are the published templates, the others are worded here.  `--more`: 35 tasks beside the 28, most of them like
one of those in other words, in another format or another language.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "shared" / "assets" / "data"
NUM_TRAIN, NUM_HELD_OUT = 140, 50
LONGEST = 560  # characters of prompt and completion
Row = tuple[str, str]

# Names of the bank -> templates of the T0 sample: common_gen both ways.
TEMPLATES = {
    "ag-news-section": "ag_news_which_section_choices",
    "amazon-negative": "amazon_polarity_Is_this_review_negative",
    "app-stars": "app_reviews_convert_to_star_rating",
    "common-gen": "common_gen_random_task_template_prompt",
    "common-topics": "common_gen_topics_from_the_sentence",
    "commonsense-qa": "commonsense_qa_question_answering",
    "cosmos-qa": "cosmos_qa_only_question_answer",
    "mrpc-same": "glue_mrpc_same_thing",
    "qqp-duplicate": "glue_qqp_duplicate",
    "paws-meaning": "paws_labeled_final_Meaning",
    "qasc-correct": "qasc_is_correct_1",
    "quartz-fact": "quartz_answer_question_below",
    "sciq": "sciq_Multiple_Choice_Closed_Book_",
    "social-iqa": "social_i_qa_Show_choices_and_generate_answer",
}


MORE_TEMPLATES = {
    "ag-news-classify": "ag_news_classify",
    "ag-news-reader": "ag_news_recommend",
    "app-rating": "app_reviews_categorize_rating_using_review",
    "common-concepts": "common_gen_sentence_to_concepts",
    "commonsense-open": "commonsense_qa_answer_given_question_without_options",
    "commonsense-index": "commonsense_qa_question_to_answer_index",
    "mrpc-replace": "glue_mrpc_replace",
    "mrpc-paraphrase": "glue_mrpc_generate_paraphrase",
    "qqp-meaning": "glue_qqp_meaning",
    "paws-rewrite": "paws_labeled_final_Rewrite",
    "paws-question": "paws_labeled_final_context_question",
    "qasc-facts": "qasc_qa_with_combined_facts_1",
    "qasc-correct-2": "qasc_is_correct_2",
    "quartz-given": "quartz_given_the_fact_answer_the_q",
    "tomatoes-enjoyed": "rotten_tomatoes_Reviewer_Enjoyment_Yes_No",
    "tomatoes-writer": "rotten_tomatoes_Writer_Expressed_Sentiment",
    "sciq-open": "sciq_Direct_Question_Closed_Book_",
    "social-question": "social_i_qa_Generate_the_question_from_the_answer",
    "social-valid": "social_i_qa_Check_if_a_random_answer_is_valid_or_not",
    "dbpedia-title": "dbpedia_14_given_a_list_of_category_what_does_the_title_belong_to",
}


def _lines(name: str) -> list[dict]:
    text = (DATA / name).read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def _t0(template: str) -> list[Row]:
    rows = _lines("t0_sample/train.jsonl")
    return [(row["prompt"], row["completion"]) for row in rows if row["template"] == template]


def _labelled(name: str, prompt: str, labels: list[str], source: str | None = None) -> list[Row]:
    rows = [row for row in _lines(name) if source in (None, row.get("source"))]
    return [(prompt.format(**row), labels[row["label"]]) for row in rows]


def _requests() -> list[Row]:
    file = Path(__file__).resolve().parents[2] / "orchestrator" / "recipes" / "requests_to_json" / "train.jsonl"
    turns = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [(f"{told['content']} {asked['content']}", answer["content"]) for told, asked, answer in turns]


def _told(name: str) -> list[Row]:
    return [(row["instruction"], row["output"].strip()) for row in _lines(name)]


def _snips() -> list[Row]:
    return [
        (f"Which intent does the request have?\n\n{row['text']}", row["label_name"])
        for row in _lines("snips/train.jsonl")
    ]


def _slots() -> list[Row]:
    return [
        (
            f"List the entities of the request as JSON.\n\n{row['text']}",
            json.dumps({slot["entity"]: slot["text"] for slot in row["slots"]}, ensure_ascii=False),
        )
        for row in _lines("snips/train.jsonl")
    ]


def _clinc() -> list[Row]:
    rows = json.loads((DATA / "clinc150/data_small.json").read_text())["train"]
    return [(f"Name the intent of this message to an assistant: {text}", intent) for text, intent in rows]


def _pairs() -> list[Row]:
    prompt = "{premise}\n\nDoes it follow that {hypothesis} Answer yes or no."
    return _labelled("rte/train.jsonl", prompt, ["yes", "no"])


_FEELS = "Is this review positive or negative?\n\n{text}"
_POLAR = ["negative", "positive"]
TASKS: dict[str, Callable[[], list[Row]]] = {
    **{name: (lambda template=template: _t0(template)) for name, template in TEMPLATES.items()},
    "sst2": lambda: _labelled("sst2/train.jsonl", "Sentiment of the phrase, positive or negative: {text}", _POLAR),
    "yelp": lambda: _labelled("sentiment_sentences/all.jsonl", _FEELS, _POLAR, "yelp"),
    "imdb": lambda: _labelled("sentiment_sentences/all.jsonl", _FEELS, _POLAR, "imdb"),
    "sms-spam": lambda: _labelled("sms_spam/all.jsonl", "Is this message spam?\n\n{text}", ["no", "yes"]),
    "cola": lambda: _labelled("cola/train.jsonl", "Is this sentence good English?\n\n{text}", ["no", "yes"]),
    "rte": _pairs,
    "snips-intent": _snips,
    "snips-slots": _slots,
    "clinc150": _clinc,
    "boolq": lambda: _told("commonsense/boolq_train.json"),
    "openbookqa": lambda: _told("commonsense/openbookqa_train.json"),
    "math-cot": lambda: _told("math_cot/math_data.json"),
    "requests-to-json": _requests,
    "gsm8k": lambda: [(row["question"], row["answer"]) for row in _lines("gsm8k/train.jsonl")],
}


def _as_json(rows: list[Row], key: str) -> list[Row]:
    return [(f"{prompt}\n\nAnswer as JSON.", json.dumps({key: answer})) for prompt, answer in rows]


def _japanese() -> list[Row]:
    """Short ones: a character takes two or three tokens."""
    pairs = [row["utterances"] for row in _lines("instruction_ja/data.jsonl")]
    found = [(asked["text"], answer["text"]) for asked, answer, *_ in pairs]
    return [row for row in found if sum(map(len, row)) <= LONGEST // 5]


def _letters(instruction: str, change: Callable[[str], str]) -> list[Row]:
    texts = [row["text"].strip() for row in _lines("sst2/train.jsonl")[:3000]]
    return [(f"{instruction}\n\n{text}", change(text)) for text in texts if len(text.split()) > 3]


def _numbers() -> list[Row]:
    found = [(row["question"], row["answer"].rsplit("####", 1)[1].strip()) for row in _lines("gsm8k/train.jsonl")]
    return [(f"{question}\n\nAnswer with the number alone.", answer) for question, answer in found]


def _stories() -> list[Row]:
    parts = [story.split(". ", 2) for story in _lines("tinystories/tinystories_1000.json")]
    return [(f"Continue the story: {part[0]}.", f"{part[1]}.") for part in parts if len(part) == 3]


def _verses() -> list[Row]:
    lines = [line for line in (DATA / "tinyshakespeare/input.txt").read_text().splitlines() if len(line) > 30]
    return [(f"The next line of the play: {one}", other) for one, other in list(itertools.pairwise(lines))[::7]]


MORE: dict[str, Callable[[], list[Row]]] = {
    **{name: (lambda template=template: _t0(template)) for name, template in MORE_TEMPLATES.items()},
    "sst2-json": lambda: _as_json(_labelled("sst2/train.jsonl", "{text}", _POLAR), "sentiment"),
    "amazon-cells": lambda: _labelled("sentiment_sentences/all.jsonl", _FEELS, _POLAR, "amazon_cells"),
    "spam-json": lambda: _as_json(_labelled("sms_spam/all.jsonl", "{text}", ["no", "yes"]), "spam"),
    "cola-words": lambda: _labelled(
        "cola/train.jsonl", "{text}\n\nacceptable or unacceptable?", ["unacceptable", "acceptable"]
    ),
    "rte-json": lambda: _as_json(_pairs(), "follows"),
    "snips-json": lambda: _as_json(_snips(), "intent"),
    "clinc150-json": lambda: _as_json(_clinc(), "intent"),
    "gsm8k-number": _numbers,
    "ja-answer": _japanese,
    "upper-case": lambda: _letters("Write this in capital letters.", str.upper),
    "last-word": lambda: _letters("What is the last word?", lambda text: text.split()[-1]),
    "backwards": lambda: _letters("Write the words in reverse order.", lambda text: " ".join(text.split()[::-1])),
    "count-words": lambda: _letters("How many words are these?", lambda text: str(len(text.split()))),
    "story": _stories,
    "verse": _verses,
}


def rows_of(name: str) -> Iterator[dict[str, str]]:
    """A task's rows, shuffled, short ones only, each prompt once."""
    rows = {prompt: completion for prompt, completion in (TASKS | MORE)[name]() if completion.strip()}
    kept = [row for row in rows.items() if sum(map(len, row)) <= LONGEST]
    random.Random(0).shuffle(kept)
    yield from ({"prompt": prompt, "completion": completion} for prompt, completion in kept)


def write(folder: Path, names: Sequence[str] = tuple(TASKS)) -> list[str]:
    """Raises ValueError for a task with too few rows."""
    for name in names:
        rows = list(rows_of(name))[: NUM_TRAIN + NUM_HELD_OUT]
        held = rows[:NUM_HELD_OUT]
        if len(rows) < NUM_HELD_OUT + 80:
            raise ValueError(f"{name}: {len(rows)} rows are too few")
        task = folder / name
        task.mkdir(parents=True, exist_ok=True)
        for file, part in (("train.jsonl", rows[NUM_HELD_OUT:]), ("eval.jsonl", held)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (task / file).write_text(text, encoding="utf-8")
    return list(names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--more", action="store_true", help="the 35 others as well")
    given = parser.parse_args()
    print(len(write(given.folder, [*TASKS, *(MORE if given.more else ())])), "tasks")
