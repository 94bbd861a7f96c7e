"""Adapters from one bank to another: a plain tar with a folder an adapter, checked before anything is taken in."""

from __future__ import annotations

import os
import re
import tarfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clusters.safe.archives import Bounds, names_in, unpack
from clusters.safe.reading import BadInput, open_regular, printable
from clusters.safe.writing import sync
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Adapter, Unusable
from strategies.adapter_bank.card import CARD, AdapterCard, BankError
from strategies.adapter_bank.folders import EVIDENCE, check, delete, read_evidence
from strategies.adapter_bank.store import Bank, Damaged

_FILES = (CONFIG, WEIGHTS, CARD, EVIDENCE)
_PLACE = re.compile(rf"[0-9a-f]{{64}}/({'|'.join(map(re.escape, _FILES))})")
_MOST_FILES = 200_000


@dataclass(frozen=True)
class Transfer:
    """The adapters that were copied, and those that were refused with the reason."""

    cards: list[AdapterCard]
    refused: list[Damaged]


def export(bank: Bank, file: Path, cards: Iterable[AdapterCard]) -> Transfer:
    """Write adapters into a tar for another bank; it appears whole or not at all.

    One that is damaged is left out.  Raises BankError where none is left, or the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.tmp-{uuid.uuid4().hex[:8]}")
    written, refused = [], []
    try:
        with tarfile.open(temporary, "w") as tar:
            for card in cards:
                folder = bank.folder(card.digest)
                try:
                    check(folder)
                except (BankError, Unusable) as error:
                    refused.append(Damaged(folder, str(error), card.name))
                    continue
                for name in _FILES:
                    if (folder / name).is_file():
                        tar.add(folder / name, f"{card.digest}/{name}")
                written.append(card)
        if not written:
            raise BankError("\n".join(["nothing to export", *map(str, refused)]))
        sync(temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise BankError(f"{printable(str(file))} cannot be written: {error.strerror}") from None
    finally:
        delete(temporary)
    return Transfer(written, refused)


def import_(bank: Bank, file: Path) -> Transfer:
    """Take in a tar that `export` made; each adapter is checked against its digest and comes in whole or not at all.

    Raises BankError for a file that is no such tar: nothing of it comes in then.
    """
    bounds = _checked_bounds(file)
    taken, refused = [], []
    with bank.writing():
        work, others = bank.temporary_name("import"), bank.cards()
        try:
            with open_regular(file) as stream:
                unpack(stream, work, bounds)
            for folder in sorted(work.iterdir()):
                try:
                    taken.append(_take(bank, folder, [*others, *taken]))
                except (BankError, Unusable) as error:
                    refused.append(Damaged(folder, str(error), folder.name[:12]))
        except BadInput as error:
            raise _no_export(file, error) from None
        finally:
            delete(work)
    return Transfer(taken, refused)


def _take(bank: Bank, folder: Path, others: list[AdapterCard]) -> AdapterCard:
    card, adapter = check(folder), Adapter(folder)
    adapter.corrections()
    evidence = read_evidence(folder / EVIDENCE, card) if card.evidence_digest else None
    return bank.place(adapter, card, evidence, others)


def _checked_bounds(file: Path) -> Bounds:
    """The names in it are a bank's, before a bank is made for it.  Raises BankError."""
    try:
        with open_regular(file) as stream:
            if stream.read(2) == b"\x1f\x8b":
                raise BadInput("it is compressed; type: gunzip, then import the .tar")
            stream.seek(0)
            bounds = Bounds(os.fstat(stream.fileno()).st_size, _MOST_FILES)
            names = names_in(stream, bounds)
    except (BadInput, OSError) as error:
        raise _no_export(file, error) from None
    if strange := [name for name in names if not _PLACE.fullmatch(name)]:
        raise _no_export(file, BadInput(f"{printable(strange[0][:200])} is not a file of a bank"))
    if not names:
        raise _no_export(file, BadInput("it is empty"))
    return bounds


def _no_export(file: Path, error: Exception) -> BankError:
    return BankError(f"{printable(str(file))} is not an export of a bank: {error}")
