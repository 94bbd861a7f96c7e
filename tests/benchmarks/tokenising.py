"""Preparing rows beside `datasets.map` with a batched tokenizer, in turns in one process: seconds of computing.

    python tests/benchmarks/tokenising.py [--rows 7000] [--rounds 5] [--file FILE] [--words 20 80 120]
    python tests/benchmarks/tokenising.py large [--rows 1000000] [--words 20 80 120] [--rows-file FILE] [--ways WAY ...]

Both read the same JSON lines, write the template's text of each row as token ids to an Arrow file and start from
nothing cached.  Ours also finds the answers, builds the mask of supervised tokens and checks that the template drops
nothing; `with mask` is `datasets.map` with what transformers has for that, which needs a template with marks.
Without a file the rows are conversations of made-up words, 40 to 200 words long.  `large` prepares many rows once, each
way in a process of its own on one core: seconds, rows a second, and the memory that it took beyond what it began with.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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


def made_up(count: int, least: int = 20, question: int = 80, answer: int = 120) -> Iterator[tuple[str, str]]:
    """Questions and answers of so many made-up words at most, and at least."""
    draw = random.Random(0)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 9))) for _ in range(5000)]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    return ((text(question), text(answer)) for _ in range(count))


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
            began = time.process_time()
            made = act(place)
            taken[way].append(time.process_time() - began)
            tokens[way] = int(made.lengths.sum()) if way == "ours" else sum(map(len, made["input_ids"]))
    assert tokens["ours"] == tokens["datasets.map"], tokens
    ratios = {
        way: statistics.median(other / own for own, other in zip(taken["ours"][1:], taken[way][1:], strict=True))
        for way in ways
    }
    for way, seconds in taken.items():
        shown = " ".join(f"{one:.2f}" for one in seconds[1:])
        print(f"{name:10} {way:14} {shown}   median {ratios[way]:.2f} x ours", flush=True)


WAYS = ("ours", "datasets.map", "with mask")


def prepare_once(way: str, file: Path, folder: Path) -> None:
    """Prepare the file's rows and print what it took, as JSON: the work of one process."""
    import datasets

    datasets.disable_progress_bars()
    prepare, tokenizer = ours(folder, file)
    act = prepare if way == "ours" else theirs(tokenizer, file, way == "with mask")
    with Memory() as memory:
        clock, computed = time.perf_counter(), time.process_time()
        made = act(new_folder(folder / "place"))
        seconds, cpu = time.perf_counter() - clock, time.process_time() - computed
    rows = len(made.lengths) if way == "ours" else len(made)
    print(json.dumps({"rows": rows, "s": seconds, "cpu_s": cpu, "before": memory.before, "peak": memory.peak}))


class Memory:
    """The most bytes of its own that this process holds in the block; pages of files that it reads are not its own."""

    def __enter__(self) -> Memory:
        self.before = self.peak = own_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, own_bytes())


def own_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def new_folder(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def large(asked: argparse.Namespace) -> None:
    """Prepare many rows, each way in a process."""
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        file = asked.rows_file or Path(name) / "rows.jsonl"
        if not file.exists():
            with file.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(as_messages(*pair)) + "\n" for pair in made_up(asked.rows, *asked.words))
        print(f"{asked.rows} rows, {file.stat().st_size / 1e6:.0f} MB", flush=True)
        for way in asked.ways:
            command = [sys.executable, __file__, "once", way, str(file), name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            grown = (found["peak"] - found["before"]) / 2**20
            print(
                f"{way:14} {found['s']:7.1f} s  {found['cpu_s']:7.1f} s of computing  {found['rows'] / found['s']:7.0f}"
                f" rows/s  {grown:6.0f} MiB beyond {found['before'] / 2**20:.0f} MiB",
                flush=True,
            )


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1:2] == ["once"]:
        prepare_once(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, nargs=3, default=[20, 80, 120], help="at least; most of both parts")
    if sys.argv[1:2] == ["large"]:
        parser.add_argument("large")
        parser.add_argument("--rows", type=int, default=1_000_000)
        parser.add_argument("--rows-file", type=Path, help="where the rows are written and found again")
        parser.add_argument("--folder", type=Path, help="where the work is done; default: that of temporary files")
        parser.add_argument("--ways", nargs="*", default=WAYS[:2], choices=WAYS)
        large(parser.parse_args())
        return
    parser.add_argument("--rows", type=int, default=7000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", type=Path, help="JSON lines with question and answer")
    asked = parser.parse_args()
    rows = read_rows(asked.file, asked.rows) if asked.file else list(made_up(asked.rows, *asked.words))
    with tempfile.TemporaryDirectory() as name:
        for kind, make in (("messages", as_messages), ("prompts", as_prompt)):
            measure(kind, [make(*pair) for pair in rows], Path(name), asked.rounds)


if __name__ == "__main__":
    main()
