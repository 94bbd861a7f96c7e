"""Preparing rows beside `datasets.map` with a batched tokenizer, in turns in one process: seconds of the clock.

    python tests/benchmarks/tokenising.py [--rows 7000] [--rounds 5] [--file FILE]

Both read the same JSON lines, write the template's text of each row as token ids to an Arrow file and start from
nothing cached.  Ours also finds the answers, builds the mask of supervised tokens and checks that the template drops
nothing; `with mask` is `datasets.map` with what transformers has for that, which needs a template with marks.
Without a file the rows are conversations of made-up words, 40 to 200 words long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from orchestrator.data.dataset import build
from orchestrator.data.readers.sources import rows_of, sources_of
from orchestrator.data.samples import options_for, renderer_for
from orchestrator.job.job_file import read_job
from orchestrator.job.model_files import locate

ROOT = Path(__file__).resolve().parents[2]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


def make_rows(count: int) -> list[tuple[str, str]]:
    """Questions and answers of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 9))) for _ in range(5000)]

    def text(most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(20, most)))

    return [(text(80), text(120)) for _ in range(count)]


def read_rows(file: Path, count: int) -> list[tuple[str, str]]:
    """Questions and answers of a file with `question` and `answer` or `prompt` and `completion`."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
    return [(one.get("question") or one["prompt"], one.get("answer") or one["completion"]) for one in lines]


def as_messages(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def as_prompt(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


def ours(folder: Path, file: Path) -> tuple[Callable[[Path], Any], Any]:
    """A function that prepares the file's rows into a folder, and the tokenizer."""
    (folder / "job.yaml").write_text(
        json.dumps({"model": {"model_name_or_path": "smollm2-135m-instruct"}, "data": {"train": str(file)}})
    )
    job = read_job(folder / "job.yaml")
    renderer = renderer_for(job, locate("smollm2-135m-instruct", ROOT))
    sources = sources_of(job, job.spec.data.train, "data.train")
    options = options_for(job, 2048)

    def prepare(place: Path) -> Any:
        rows = (row for source, files in sources for row in rows_of(job, source, files))
        return build(rows, renderer, options, place / "made")

    return prepare, renderer.tokenizer


def theirs(tokenizer: Any, file: Path, with_mask: bool) -> Callable[[Path], Any]:
    """A function that does it with datasets.map."""
    import datasets

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, Any]:
        talks = batch.get("messages") or [
            as_messages(*pair)["messages"] for pair in zip(batch["prompt"], batch["completion"], strict=True)
        ]
        if with_mask:
            made = tokenizer.apply_chat_template(
                talks, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
            )
            return {"input_ids": made["input_ids"], "supervised": made["assistant_masks"]}
        texts = tokenizer.apply_chat_template(talks, tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    def prepare(place: Path) -> Any:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(place))
        return rows.map(tokenise, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)

    return prepare


def measure(name: str, rows: list[dict[str, Any]], folder: Path, rounds: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare, tokenizer = ours(folder, file)
    ways = {
        "ours": prepare,
        "datasets.map": theirs(tokenizer, file, False),
        "with mask": theirs(tokenizer, file, True),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    tokens = {}
    for _ in range(rounds + 1):
        for way, act in ways.items():
            place = folder / "place"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            began = time.perf_counter()
            made = act(place)
            taken[way].append(time.perf_counter() - began)
            tokens[way] = int(made.lengths.sum()) if way == "ours" else sum(map(len, made["input_ids"]))
    assert tokens["ours"] == tokens["datasets.map"], tokens
    ratios = {
        way: statistics.median(other / own for own, other in zip(taken["ours"][1:], taken[way][1:], strict=True))
        for way in ways
    }
    for way, seconds in taken.items():
        shown = " ".join(f"{one:.2f}" for one in seconds[1:])
        print(f"{name:10} {way:14} {shown}   {ratios[way]:.2f} x ours", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=7000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", type=Path, help="JSON lines with question and answer")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = read_rows(asked.file, asked.rows) if asked.file else make_rows(asked.rows)
    with tempfile.TemporaryDirectory() as name:
        for kind, make in (("messages", as_messages), ("prompts", as_prompt)):
            measure(kind, [make(*pair) for pair in rows], Path(name), asked.rounds)


if __name__ == "__main__":
    main()
