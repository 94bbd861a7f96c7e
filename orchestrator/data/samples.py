"""Rows -> samples: read, rendered, cut to length, and everything that happens to them counted."""

from __future__ import annotations

import array
import contextlib
import gc
import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clusters.safe.reading import first_line, printable
from orchestrator.data.counts import RowCounts
from orchestrator.data.rendering.chat import template_of
from orchestrator.data.rendering.template import Renderer, Tokens
from orchestrator.data.rendering.together import Underway
from orchestrator.data.rows import preferences
from orchestrator.data.rows.formats import Example, read_example
from orchestrator.data.rows.likeness import fingerprint, plain_text
from orchestrator.data.rows.preferences import Labelled, Preference
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.job.paths import read_text_file
from orchestrator.job.sections.training import Source
from strategies.model.tokenizer import load_tokenizer
from strategies.objectives.contract import RowKind

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
    rows: RowKind = "answers"
    learns_prompts: bool = False  # of chosen documents
    reads_margins: bool = False  # of pairs: how much better the chosen answer is

    @property
    def deciding(self) -> dict[str, Any]:
        """What the samples depend on; of single answers as before there were others, so that their caches stay."""
        later = ("rows", "learns_prompts") if self.rows == "answers" else ()
        later += () if self.reads_margins else ("reads_margins",)
        return {key: value for key, value in asdict(self).items() if key not in later}


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
    objective = job.spec.build_objective()
    stated = [one for key in (data.train, data.eval) for one in (key if isinstance(key, list) else [key])]
    formats = {data.format, *(one.format for one in stated if isinstance(one, Source))}
    if objective.is_by_document and formats != {"auto"}:
        raise JobError(f"data.format: such rows are told by their columns; leave it auto with {objective.name}")
    if objective.is_by_document and data.overlong == "split":
        raise JobError("data.overlong: split would cut an answer from its prompt; set it to truncate or drop")
    return TokenizeOptions(
        data.format,
        data.instruction,
        max_length,
        data.overlong,
        data.strict,
        objective.rows,
        objective.learns_prompts,
        objective.reads_margins,
    )


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
    with contextlib.ExitStack() as stack:
        for number, (batch, results) in enumerate(_rendered(_batches(rows, options, counts.formats), renderer)):
            if number == 1:  # after it Python looks through everything once more, which few rows are not worth
                stack.enter_context(_garbage_among_new_objects())
            rendered = iter(results)
            for one in batch:
                counts.statistics.rows += 1
                made = [next(rendered) for _ in one.examples]
                try:
                    samples = _samples_of(one, made, renderer, options, counts)
                except BadRow as reason:
                    counts.reject(one.row, reason)
                    reject(one.row, reason)
                else:
                    yield one.row, samples


@contextlib.contextmanager
def _garbage_among_new_objects() -> Iterator[None]:
    """Leave what the libraries made, 400,000 objects, out of searches for garbage: they took a tenth of the time."""
    if is_first := not gc.get_freeze_count():  # else somebody leaves it out for longer
        gc.freeze()
    try:
        yield
    finally:
        if is_first:
            gc.unfreeze()


@dataclass(frozen=True)
class _ReadRow:
    """A row as an example of its format, or why it is none."""

    row: Row
    row_format: str = ""
    example: Example | Preference | Labelled | None = None
    fault: BadRow | None = None

    @property
    def examples(self) -> tuple[Example, ...]:
        """Those to be rendered: one, two of a preference, none of a broken row."""
        if isinstance(self.example, Preference | Labelled):
            return self.example.both
        return (self.example,) if self.example else ()

    @property
    def num_characters(self) -> int:
        return sum(
            len(one.text or "") + sum(len(str(turn.get("content"))) for turn in one.messages) for one in self.examples
        )


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
                begun = batch, renderer.begin([example for one in batch for example in one.examples], pool)
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
        return _ReadRow(row, *_read(row, options, formats))
    except BadRow as fault:
        return _ReadRow(row, fault=fault)


def _read(row: Row, options: TokenizeOptions, formats: dict[str, str]) -> tuple[str, Example | Preference | Labelled]:
    """The format of a row, and the row as what is trained on.  Raises BadRow."""
    if options.rows == "answers":
        return read_example(row, options.format, options.instruction, formats)
    if options.rows == "labelled":
        formats.setdefault(row.file, preferences.LABELLED)
        return preferences.LABELLED, preferences.read_labelled(row)
    formats.setdefault(row.file, preferences.NAME)
    return preferences.NAME, preferences.read_preference(row, options.reads_margins)


def read_only(rows: Iterable[Row], options: TokenizeOptions, counts: RowCounts) -> None:
    """Count rows that are read and not rendered: for machines without a tokenizer."""
    for row in rows:
        counts.statistics.rows += 1
        try:
            counts.read(*_read(row, options, counts.formats))
        except BadRow as reason:
            counts.reject(row, reason)


def _samples_of(
    read: _ReadRow,
    made: Sequence[list[Tokens] | Exception],
    renderer: Renderer,
    options: TokenizeOptions,
    counts: RowCounts,
) -> list[dict[str, Any]]:
    if read.example is None:
        raise read.fault or AssertionError("a row is read or broken")
    for one in made:
        if not isinstance(one, list):
            raise one
    if isinstance(read.example, Preference | Labelled):
        return _documents_of(read, [one for one in made if isinstance(one, list)], options, counts)
    (rendered,) = [one for one in made if isinstance(one, list)]
    example, statistics = read.example, counts.statistics
    if example.text is not None and (marks := renderer.foreign_marks(example.text)):
        reading = f"the text holds {', '.join(marks[:3])}, not a token of this model: it is split into several tokens"
        example = replace(example, readings=(*example.readings, reading))
    counts.read(read.row_format, example)
    pieces = [(tokens, piece) for tokens in rendered for piece in _fit(tokens, options, example.text is not None)]
    pieces = [(tokens, piece) for tokens, piece in pieces if any(piece.supervised)]
    samples = [_sample(tokens, piece) | _of_row(read) for tokens, piece in pieces]
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


def _documents_of(
    read: _ReadRow, made: Sequence[list[Tokens]], options: TokenizeOptions, counts: RowCounts
) -> list[dict[str, Any]]:
    """The sample of a row of whole documents, those end to end; none where nothing of an answer fits."""
    assert isinstance(read.example, Preference | Labelled)
    if any(len(rendered) != 1 for rendered in made):
        raise BadRow(
            "the chat template writes earlier turns of an answer differently once later ones follow, so that it is no"
            " one document. Give an answer of one turn"
        )
    statistics, whole = counts.statistics, [rendered[0] for rendered in made]
    counts.read(read.row_format, read.example)
    pieces = [piece for tokens in whole for piece in _fit(tokens, options, is_text=False)]
    given, kept = (sum(len(one.input_ids) for one in documents) for documents in (whole, pieces))
    differ = len({tuple(piece.input_ids) for piece in pieces}) == len(whole)
    if not differ or not all(any(piece.supervised) for piece in pieces):
        statistics.dropped += 1
        statistics.dropped_tokens += given
        return []
    sample = _document_sample(pieces, options.learns_prompts) | _of_row(read)
    sample["label"] = read.example.is_good if isinstance(read.example, Labelled) else None
    sample["margin"] = read.example.margin if isinstance(read.example, Preference) else None
    sample["reference"] = whole[0].answer if len(pieces[0].input_ids) == len(whole[0].input_ids) else None
    statistics.samples += 1
    statistics.tokens += kept
    statistics.cut_tokens += given - kept
    statistics.supervised_tokens += sample["num_supervised"]
    statistics.longest = max(statistics.longest, *sample["document_lengths"])
    statistics.truncated += kept != given
    statistics.bos_doubled += any(tokens.bos_doubled for tokens in whole)
    statistics.unended += sum(
        not tokens.ended or _is_cut(tokens, piece) for tokens, piece in zip(whole, pieces, strict=True)
    )
    return [sample]


def _document_sample(pieces: Sequence[Tokens], learns_prompts: bool) -> dict[str, Any]:
    """Documents end to end, of a pair the chosen one first.

    `supervised` are the tokens that are predicted, `answer` those of the answers.
    """
    first, *others = pieces
    learnt = [False] + [True] * (len(first.input_ids) - 1) if learns_prompts else first.supervised
    masks = [learnt, *(piece.supervised for piece in others)]
    ids = [token for piece in pieces for token in piece.input_ids]
    joined = Tokens(ids, [one for mask in masks for one in mask], first.prompt_length)
    return _sample(joined, joined) | {
        "input_ids": ids,
        "answer": [one for piece in pieces for one in piece.supervised],
        "document_lengths": [len(piece.input_ids) for piece in pieces],
        "document_supervised": [sum(mask) for mask in masks],
        "document_answers": [sum(piece.supervised) for piece in pieces],
    }


def _of_row(read: _ReadRow) -> dict[str, Any]:
    """What samples have of their row: where it stands and what it says, of a pair with the better answer."""
    plain = plain_text(read.examples[0])
    return {"source": read.row.where, "plain": plain, "text_fingerprint": fingerprint(plain)}


def _sample(tokens: Tokens, piece: Tokens) -> dict[str, Any]:
    ids = array.array("i", piece.input_ids)  # the numbers themselves: laid end to end later they are copied as bytes
    return {
        "input_ids": ids,
        "supervised": piece.supervised,
        "num_supervised": piece.supervised.count(True),
        "fingerprint": int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little", signed=True),
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
