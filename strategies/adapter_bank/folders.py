"""One adapter's folder as a bank keeps it: read, checked against its digest, written whole.

What lies there may come from anybody: links are refused, every file is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clusters.safe.reading import BadInput, open_regular, printable
from clusters.safe.writing import sync, write_whole
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Adapter, Unusable
from strategies.adapter_bank.card import CARD, AdapterCard, BankError, is_digest, read_card
from strategies.model.tensor_file import read_header

if TYPE_CHECKING:  # numpy waits until a data set is looked at
    from strategies.adapter_bank.evidence import Evidence

EVIDENCE = "evidence.safetensors"
_PAYLOAD = (CONFIG, WEIGHTS)  # what the digest is of; cards may gain fields later


def card_in(folder: Path) -> AdapterCard:
    """The card of an adapter in its place.  Raises BankError for anything else that may lie there."""
    if folder.is_symlink():
        raise BankError("is a link; a bank holds its own files")
    if not is_digest(folder.name):
        raise BankError("is not an adapter's folder: those are named by their digest")
    if not folder.is_dir():
        raise BankError("is not a folder")
    try:
        if links := [entry.name for entry in os.scandir(folder) if entry.is_symlink()]:
            raise BankError(f"{printable(links[0])} is a link; a bank holds its own files")
    except OSError as error:
        raise BankError(f"cannot be read: {error.strerror}") from None
    card = read_card(folder / CARD)
    if card.digest != folder.name:
        raise BankError(f"its card is that of another adapter ({card.digest[:12]})")
    return card


def check(folder: Path) -> AdapterCard:
    """An adapter's folder against its digests, every byte of it; its card.  Raises BankError or Unusable."""
    card = card_in(folder)
    check_bytes(folder, card)
    Adapter(folder)
    if card.evidence_digest:
        read_evidence(folder / EVIDENCE, card)
    return card


def check_bytes(folder: Path, card: AdapterCard) -> None:
    if digest_of(folder) != card.digest:
        raise BankError(f"{card.name}: its bytes are not those that were added; import it again or remove it")


def digest_of(folder: Path) -> str:
    """Of an adapter: its configuration and its weights.  Raises Unusable where one is missing."""
    whole = hashlib.sha256()
    for name in _PAYLOAD:
        try:
            with open_regular(folder / name) as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        except BadInput as error:
            raise Unusable(str(error)) from None
        except OSError as error:
            raise Unusable(f"{folder / name} cannot be read: {error.strerror}") from None
    return whole.hexdigest()


def base_digest(folder: Path) -> str:
    """Of a base model's weights: the name, size, header and a sample of each file, so that it takes no second."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise BankError(f"{folder} holds no model weights to identify the base by")
    whole = hashlib.sha256()
    for file in files:
        try:
            with open_regular(file) as stream:
                size = os.fstat(stream.fileno()).st_size
                whole.update(f"{file.name} {size}".encode())
                for part in range(16):
                    stream.seek(part * size // 16)
                    whole.update(stream.read(1 << 16))
        except BadInput as error:
            raise BankError(str(error)) from None
    return whole.hexdigest()


def read_evidence(file: Path, card: AdapterCard) -> Evidence:
    """Raises BankError for a file that cannot be read or is of other data than the card says."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from strategies.adapter_bank.evidence import Evidence

    try:
        read_header(file)
        evidence = Evidence.from_arrays(load_file(file))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BankError(f"what is known of the data of {card.name} cannot be read: {error}") from None
    if evidence.digest != card.evidence_digest:
        raise BankError(f"what is known of the data of {card.name} has changed; add the adapter again")
    return evidence


def write(folder: Path, source: Path, card: AdapterCard, evidence: Evidence | None) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    for name in _PAYLOAD:
        shutil.copyfile(source / name, folder / name)
    if digest_of(folder) != card.digest:
        raise BankError(f"{source} was changed while it was read; add it again")
    if evidence is not None:
        save_file(evidence.arrays(), folder / EVIDENCE)
    write_card(folder, card)
    for file in folder.iterdir():
        sync(file)


def write_card(folder: Path, card: AdapterCard) -> None:
    write_whole(folder / CARD, json.dumps(card.as_dict(), indent=1, ensure_ascii=False))


def delete(path: Path) -> None:
    """A folder with what is in it; of a link the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
