"""How long the rows are, without preparing them: for a plan in a second, on a machine without torch."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path

from orchestrator import models
from orchestrator.data.formats import Example, read_example
from orchestrator.data.row import BadRow
from orchestrator.data.sources import rows_of, sources_of
from orchestrator.errors import JobError
from orchestrator.jobfile import Job

_ROWS_COUNTED = 2000  # their lengths stand for the rest
_BYTES_PER_TOKEN = 4.0  # of UTF-8: English words, and Japanese at three bytes a character
_TOKENS_PER_TURN = 4  # what a chat template puts around one


def rough_lengths(job: Job, max_length: int, key: str = "train") -> tuple[list[int], int]:
    """Tokens of each row of `data.KEY`, cut at `max_length`, and how many of all are supervised.

    Counted with the model's own tokenizer.json where the `tokenizers` package is installed, else from bytes; beyond the
    first rows drawn from them.  Raises JobError for rows that fit no format.
    """
    count = _counter(job)
    lengths: list[int] = []
    supervised, total = 0, 0
    detected: dict[str, str] = {}
    for source, files in sources_of(job, getattr(job.spec.data, key), f"data.{key}"):
        wanted = source.format if source.format != "auto" else job.spec.data.format
        for row in rows_of(source, files):
            try:
                _, example = read_example(row, wanted, job.spec.data.instruction, detected)
            except BadRow:
                continue
            total += 1
            if len(lengths) >= _ROWS_COUNTED:
                continue
            length, answer = _tokens(example, count)
            lengths.append(max(1, min(length, max_length)))
            supervised += min(answer, lengths[-1])
    if not lengths:
        raise JobError(f"data.{key} holds no row that could be read; `orchestrator validate` says why")
    draw = random.Random(0)
    counted = len(lengths)
    lengths += draw.choices(lengths[:counted], k=total - counted)
    return lengths, max(1, round(supervised * total / counted))


def _tokens(example: Example, count: Callable[[str], int]) -> tuple[int, int]:
    """Tokens of an example and how many of them an assistant wrote to be learnt."""
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
    folder = models.local_folder(job.spec.model.model_name_or_path, job.folder)
    file = (folder or Path()) / "tokenizer.json"
    if folder is not None and file.is_file() and importlib.util.find_spec("tokenizers"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return lambda text: max(1, round(len(text.encode("utf-8")) / _BYTES_PER_TOKEN))
