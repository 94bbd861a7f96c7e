"""Whether every token of a model's tokenizer has a row in its embedding, by their files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, kind_of, printable, read_json
from orchestrator.errors import JobError, bad_input_as_job_error

_MAX_BYTES = 256 * 2**20  # of a tokenizer.json; that of Gemma 3 has 33 MB
# Placeholders of images and sounds that text models share with their larger relatives: no row of text holds them.
_OF_OTHER_MEDIA = ("image", "audio", "video", "vision", "speech")


def check_tokens(folder: Path, vocab_size: int) -> None:
    """Raises JobError where the tokenizer of a model folder has tokens that its embedding has no row for."""
    with bad_input_as_job_error("model.model_name_or_path"):
        tokens = tokens_from(folder, vocab_size)
    beyond = {place: text for place, text in tokens.items() if not _is_of_other_media(text)}
    if beyond:
        shown = ", ".join(f"{printable(text)!r} (number {place})" for place, text in sorted(beyond.items())[:3])
        raise JobError(
            f"model.model_name_or_path: the tokenizer has {max(tokens) + 1:,} tokens, the model's embedding"
            f" {vocab_size:,} rows: {shown} {'has' if len(beyond) == 1 else 'have'} none. Enlarge the model and save"
            " it: model.resize_token_embeddings(len(tokenizer)); or give the tokenizer that belongs to it"
        )


def tokens_from(folder: Path, first: int) -> dict[int, str]:
    """The tokens numbered `first` or higher, by number, of a fast or a slow tokenizer's files.  Raises BadInput."""
    found: dict[int, str] = {}
    if kind_of(folder / "tokenizer.json"):
        values = _mapping(folder / "tokenizer.json")
        model, added = values.get("model"), values.get("added_tokens")
        found |= _tokens_of_vocab(model.get("vocab") if isinstance(model, dict) else None, first)
        for one in added if isinstance(added, list) else ():
            if isinstance(one, dict):
                found |= _tokens_of_vocab({str(one.get("content")): one.get("id")}, first)
        return found
    for name in ("vocab.json", "added_tokens.json"):
        if kind_of(folder / name):
            found |= _tokens_of_vocab(_mapping(folder / name), first)
    if kind_of(folder / "tokenizer_config.json"):
        decoder = _mapping(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for number, one in decoder.items() if isinstance(decoder, dict) else ():
            if number.isdigit() and len(number) < 10 and isinstance(one, dict):
                found |= _tokens_of_vocab({str(one.get("content")): int(number)}, first)
    return found


def _mapping(file: Path) -> dict[str, Any]:
    values = read_json(file, _MAX_BYTES, allow_nan=True)
    if not isinstance(values, dict):
        raise BadInput(f"{file}: holds a {type(values).__name__}, not an object with named fields")
    return values


def _tokens_of_vocab(vocab: Any, first: int) -> dict[int, str]:
    """Of {text: number} (BPE, WordPiece) or [[text, score], ...] (Unigram) those from a number on."""
    if isinstance(vocab, dict):
        return {number: text for text, number in vocab.items() if type(number) is int and number >= first}
    if isinstance(vocab, list):
        return {
            first + at: str(one[0] if isinstance(one, list) and one else one) for at, one in enumerate(vocab[first:])
        }
    return {}


def _is_of_other_media(text: str) -> bool:
    return text.startswith("<") and any(word in text.lower() for word in _OF_OTHER_MEDIA)
