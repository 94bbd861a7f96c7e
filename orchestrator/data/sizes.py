"""How long the rows are, without preparing them: for a plan in a second, on a machine without torch."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from orchestrator.data.counts import Statistics, loss_notice
from orchestrator.data.readers.sources import rows_of, sources_of
from orchestrator.data.rows.formats import Example, read_example
from orchestrator.data.rows.preferences import read_labelled, read_preference
from orchestrator.data.rows.row import BadRow
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.job.job_file import Job

_ROWS_COUNTED = 2000  # their lengths stand for the rest
_BYTES_PER_TOKEN = 4.0  # of UTF-8: English words, and Japanese at three bytes a character
_TOKENS_PER_TURN = 4  # what a chat template puts around one


def rough_lengths(
    job: Job, max_length: int, key: str = "train", say: Callable[[str], None] = lambda text: None
) -> tuple[list[int], int]:
    """Tokens of each document of `data.KEY`, none longer than `max_length`, and how many of all are supervised.

    Those of a pair stand one behind the other.

    Reports through `say` what would be cut or dropped, as far as that is known without the chat template.

    Counted with the model's own tokenizer.json where the `tokenizers` package is installed, else from bytes; beyond the
    first rows drawn from them.  Raises JobError for rows that fit no format.
    """
    count, objective = _counter(job), job.spec.build_objective()
    pairs = partial(read_preference, reads_margins=objective.reads_margins)
    reader = {"pairs": pairs, "labelled": read_labelled}.get(objective.rows)
    samples: list[list[int]] = []  # of each the lengths of its documents
    supervised = 0.0
    lost = Statistics()
    detected: dict[str, str] = {}
    sources = sources_of(job, getattr(job.spec.data, key), f"data.{key}")
    draw = random.Random(0)
    for source, files in sources:
        counted: list[list[int]] = []
        answers, total, looked_at = 0, 0, 0
        for row in rows_of(job, source, files):
            try:
                if reader:
                    examples = reader(row).both
                else:
                    examples = (read_example(row, job.spec.data.format, job.spec.data.instruction, detected)[1],)
            except BadRow:
                continue
            total += 1
            if looked_at >= _ROWS_COUNTED // len(sources):
                continue
            looked_at += 1
            sizes = [_row_sizes(one, count, max_length, job.spec.data.overlong, lost) for one in examples]
            if all(pieces for _, pieces in sizes):
                counted += [[pieces[0] for _, pieces in sizes]] if reader else [[piece] for piece in sizes[0][1]]
                answers += sum(min(answer, sum(pieces)) for answer, pieces in sizes)
        lost.rows, lost.samples, lost.tokens = (
            lost.rows + looked_at,
            lost.samples + len(counted),
            lost.tokens + sum(map(sum, counted)),
        )
        if counted:
            wanted = max(1, round(total * source.weight * len(counted) / looked_at))
            more = wanted - len(counted)
            samples += counted + draw.choices(counted, k=more) if more >= 0 else draw.sample(counted, wanted)
            supervised += answers * wanted / len(counted)
    if not samples:
        raise JobError(f"data.{key} holds no row that could be read; `orchestrator validate` shows why")
    if notice := loss_notice(asdict(lost), f"data.{key}"):
        say(f"{notice} (counted roughly, of the first {lost.rows:,} rows)")
    return [length for sample in samples for length in sample], max(1, round(supervised))


def _row_sizes(
    example: Example, count: Callable[[str], int], max_length: int, overlong: str, lost: Statistics
) -> tuple[int, list[int]]:
    """Tokens of a row's answers, and those of each of its samples; what is lost is counted into `lost`."""
    length, answer = _tokens(example, count)
    if length <= max_length:
        return answer, [max(1, length)]
    if overlong == "split" or (overlong == "auto" and example.text is not None):
        return answer, [min(max_length, length - start) for start in range(0, length, max_length)]
    lost.truncated += 1
    # A single answer behind a prompt that is too long is lost whole.
    if overlong == "drop" or (len(example.messages) == 2 and length - answer >= max_length):
        lost.dropped, lost.dropped_tokens = lost.dropped + 1, lost.dropped_tokens + length
        return 0, []
    lost.cut_tokens += length - max_length
    return answer, [max_length]


def _tokens(example: Example, count: Callable[[str], int]) -> tuple[int, int]:
    """Tokens of an example, and how many of them belong to trained assistant turns."""
    if example.text is not None:
        return count(example.text), count(example.text)
    length, answer = count(json.dumps(example.tools)) if example.tools else 0, 0
    for message in example.messages:
        calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
        tokens = count(message.get("reasoning_content", "") + message["content"] + calls) + _TOKENS_PER_TURN
        length += tokens
        answer += tokens if message["role"] == "assistant" and message.get("train", True) else 0
    return length, answer


def _counter(job: Job) -> Callable[[str], int]:
    folder = model_files.local_folder(job.spec.model.model_name_or_path, job.folder)
    file = (folder or Path()) / "tokenizer.json"
    if folder is not None and file.is_file() and importlib.util.find_spec("tokenizers"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return lambda text: max(1, round(len(text.encode("utf-8")) / _BYTES_PER_TOKEN))
