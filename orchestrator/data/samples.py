"""Rows -> samples: read, rendered, cut to length, and everything that happens to them counted."""

from __future__ import annotations

import array
import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clusters.safe.reading import first_line, printable
from orchestrator.data.chat import template_of
from orchestrator.data.counts import RowCounts
from orchestrator.data.rows.formats import Example, read_example
from orchestrator.data.rows.likeness import fingerprint, plain_text
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.data.template import Renderer, Tokens
from orchestrator.data.together import Underway
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.job.paths import read_text_file
from strategies.model.tokenizer import load_tokenizer

_ROWS_A_BATCH = 256
_CHARACTERS_A_BATCH = 2**20  # that a batch ends behind: long texts are not held by the hundred


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides how one row becomes tokens, beside the renderer."""

    format: str
    instruction: str
    max_length: int | None  # None = keep every token
    overlong: str
    strict: bool


def _no_tokenizer(folder: Path, reason: str) -> JobError:
    return JobError(
        f"model.model_name_or_path: the tokenizer in {folder} cannot be loaded: {printable(reason)}."
        " Fetch or copy its files again (tokenizer.json and tokenizer_config.json of the model it belongs to)"
    )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def renderer_for(job: Job, model_folder: Path) -> Renderer:
    """The renderer of a job: its tokenizer with its chat template."""
    importlib.import_module("transformers")  # where it is absent the command line names what to install
    try:
        tokenizer = load_tokenizer(model_folder, job.spec.model.trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exceptions, transformers a dozen types
        reason = first_line(error)
        if not any((model_folder / name).exists() for name in _TOKENIZER_FILES):
            reason = f"none of its files is there ({', '.join(_TOKENIZER_FILES)})"
        raise _no_tokenizer(model_folder, reason) from None
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):  # made from config.json alone by some families
        raise _no_tokenizer(model_folder, "its vocabulary is empty")
    data = job.spec.data
    for key, text in (("system_prompt", data.system_prompt), ("instruction", data.instruction)):
        if text and any("\ud800" <= character <= "\udfff" for character in text):
            raise JobError(
                f"data.{key}: {printable(text[:60])!r} holds half a surrogate pair, which cannot be tokenised"
            )
    own = template_text(job)
    template = template_of(tokenizer) if own is None else own
    return Renderer(
        tokenizer,
        template,
        data.assistant_only_loss,
        data.completion_only_loss,
        data.system_prompt,
        data.train_on_eos,
    )


def template_text(job: Job) -> str | None:
    """The chat template that the job brings; None where it takes the tokenizer's.  Raises JobError."""
    setting = job.spec.data.chat_template
    return None if setting == "tokenizer" else read_text_file(setting, "data.chat_template", job.folder)


def options_for(job: Job, max_length: int | None) -> TokenizeOptions:
    """How the rows of a job become tokens."""
    data = job.spec.data
    return TokenizeOptions(data.format, data.instruction, max_length, data.overlong, data.strict)


def tokenise(
    rows: Iterable[Row],
    renderer: Renderer,
    options: TokenizeOptions,
    counts: RowCounts,
    reject: Callable[[Row, BadRow], None] = lambda row, reason: None,
) -> Iterator[tuple[Row, list[dict[str, Any]]]]:
    """Each good row with its samples (none when dropped, several when split), all rows counted.

    A broken row goes to `reject` with the reason.  Rows are read two batches ahead: one is tokenised while the next one
    is rendered.  Raises JobError where no row can be rendered.
    """
    for batch, results in _rendered(_batches(rows, options, counts.formats), renderer):
        rendered = iter(results)
        for one in batch:
            counts.statistics.rows += 1
            try:
                samples = _samples_of(one, next(rendered) if one.example else one.fault, renderer, options, counts)
            except BadRow as reason:
                counts.reject(one.row, reason)
                reject(one.row, reason)
            else:
                yield one.row, samples


@dataclass(frozen=True)
class _ReadRow:
    """A row as an example of its format, or why it is none."""

    row: Row
    row_format: str = ""
    example: Example | None = None
    fault: BadRow | None = None

    @property
    def num_characters(self) -> int:
        if self.example is None:
            return 0
        return len(self.example.text or "") + sum(len(str(turn.get("content"))) for turn in self.example.messages)


def _rendered(
    batches: Iterator[list[_ReadRow]], renderer: Renderer
) -> Iterator[tuple[list[_ReadRow], list[list[Tokens] | Exception]]]:
    """Each batch with what its examples became; what ends the batches early is raised behind those before it."""
    with ThreadPoolExecutor(1) as pool:
        begun: tuple[list[_ReadRow], Underway[list[Tokens]]] | None = None
        failure = None
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                batch, failure = None, error
            before = begun
            begun = None
            if batch is not None:
                begun = batch, renderer.begin([one.example for one in batch if one.example], pool)
            if before:
                yield before[0], before[1].results()
            if batch is None:
                break
    if failure is not None:
        raise failure


def _batches(rows: Iterable[Row], options: TokenizeOptions, formats: dict[str, str]) -> Iterator[list[_ReadRow]]:
    """The rows in batches of a bounded size; what ends their file early is raised behind those before it."""
    source, failure = iter(rows), None
    is_full = True
    while is_full and failure is None:
        batch: list[_ReadRow] = []
        num_characters, is_full = 0, False
        try:
            for row in source:
                batch.append(_read_row(row, options, formats))
                num_characters += batch[-1].num_characters
                if is_full := len(batch) == _ROWS_A_BATCH or num_characters > _CHARACTERS_A_BATCH:
                    break
        except Exception as error:
            failure = error
        if batch:
            yield batch
    if failure is not None:
        raise failure


def _read_row(row: Row, options: TokenizeOptions, formats: dict[str, str]) -> _ReadRow:
    try:
        row_format, example = read_example(row, options.format, options.instruction, formats)
        return _ReadRow(row, row_format, example)
    except BadRow as fault:
        return _ReadRow(row, fault=fault)


def read_only(rows: Iterable[Row], options: TokenizeOptions, counts: RowCounts) -> None:
    """Count rows that are read and not rendered: for machines without a tokenizer."""
    for row in rows:
        counts.statistics.rows += 1
        try:
            row_format, example = read_example(row, options.format, options.instruction, counts.formats)
            counts.read(row_format, example)
        except BadRow as reason:
            counts.reject(row, reason)


def _samples_of(
    read: _ReadRow,
    rendered: list[Tokens] | Exception | None,
    renderer: Renderer,
    options: TokenizeOptions,
    counts: RowCounts,
) -> list[dict[str, Any]]:
    if not isinstance(rendered, list):
        raise rendered or AssertionError("a row is read or broken")
    assert read.example
    row, example, statistics = read.row, read.example, counts.statistics
    if example.text is not None and (marks := renderer.foreign_marks(example.text)):
        reading = f"the text holds {', '.join(marks[:3])}, not a token of this model: it is split into several tokens"
        example = replace(example, readings=(*example.readings, reading))
    counts.read(read.row_format, example)
    pieces = [(tokens, piece) for tokens in rendered for piece in _fit(tokens, options, example.text is not None)]
    pieces = [(tokens, piece) for tokens, piece in pieces if any(piece.supervised)]
    plain = plain_text(example)
    of_row = {"source": row.where, "plain": plain, "text_fingerprint": fingerprint(plain)}
    samples = [_sample(tokens, piece) | of_row for tokens, piece in pieces]
    given = sum(len(tokens.input_ids) for tokens in rendered)
    kept = sum(len(piece.input_ids) - piece.num_repeated for _, piece in pieces)
    if not samples:
        statistics.dropped += 1
        statistics.dropped_tokens += given
        return []
    statistics.samples += len(samples)
    statistics.tokens += sum(len(sample["input_ids"]) for sample in samples)
    statistics.cut_tokens += given - kept
    statistics.supervised_tokens += sum(sample["num_supervised"] for sample in samples)
    statistics.longest = max(statistics.longest, *(len(sample["input_ids"]) for sample in samples))
    statistics.truncated += len(pieces) != len(rendered) or kept != given
    statistics.per_turn += len(rendered) > 1
    statistics.bos_doubled += any(tokens.bos_doubled for tokens in rendered)
    statistics.unended += sum(not tokens.ended or _is_cut(tokens, piece) for tokens, piece in pieces)
    return samples


def _sample(tokens: Tokens, piece: Tokens) -> dict[str, Any]:
    ids = piece.input_ids
    return {
        "input_ids": ids,
        "supervised": piece.supervised,
        "num_supervised": piece.supervised.count(True),
        "fingerprint": int.from_bytes(
            hashlib.blake2b(array.array("i", ids).tobytes(), digest_size=8).digest(), "little", signed=True
        ),
        "prompt_length": piece.prompt_length,
        "reference": tokens.answer if len(ids) == len(tokens.input_ids) else None,
    }


def _is_cut(tokens: Tokens, piece: Tokens) -> bool:
    """Whether a piece ends within an answer; a piece of plain text ends where the next one begins."""
    length = len(piece.input_ids)
    return tokens.answer is not None and length < len(tokens.input_ids) and any(tokens.supervised[length:])


def _fit(tokens: Tokens, options: TokenizeOptions, is_text: bool) -> list[Tokens]:
    limit = options.max_length
    if limit is None or len(tokens.input_ids) <= limit:
        return [tokens]
    if options.overlong == "drop":
        return []
    if options.overlong == "split" or (options.overlong == "auto" and is_text):
        # Each piece begins with the last token of the one before, so that every token is predicted once.
        return [_piece(tokens, start, limit) for start in range(0, len(tokens.input_ids) - 1, limit - 1)]
    return [_piece(tokens, 0, limit)]


def _piece(tokens: Tokens, start: int, limit: int) -> Tokens:
    ids, mask = tokens.input_ids[start : start + limit], tokens.supervised[start : start + limit]
    return Tokens(ids, [False, *mask[1:]], 0, num_repeated=int(start > 0))
