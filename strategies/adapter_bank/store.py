"""The bank on disk: a folder an adapter, named by the digest of its content.

    BANK/objects/ab/abcdef.../    adapter_config.json adapter_model.safetensors card.json evidence.safetensors
    BANK/broken/                  what `verify --repair` put aside
    BANK/.lock                    held while writing

The folders are all there is: a copy of them, or some of them, is a bank.  A folder is written beside its place and
renamed into it under the lock, so it is whole or absent, and of two writers of one adapter or one name the
second sees the first.  A bank may come from anybody: a folder that is a link, is not named by its digest or has a card
that is wrong is damaged, which is reported and stops nothing else.  Importing this loads no torch.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from clusters.safe.reading import BadInput, checked_path, kind_of, printable
from clusters.safe.writing import sync
from strategies.adapter_bank.adapter import Adapter, Unusable
from strategies.adapter_bank.card import CARD, AdapterCard, BankError, card_of, is_digest, mistakes
from strategies.adapter_bank.folders import (
    EVIDENCE,
    card_in,
    check,
    check_bytes,
    delete,
    digest_of,
    read_evidence,
    write,
    write_card,
)

if TYPE_CHECKING:  # numpy waits until a data set is looked at
    from strategies.adapter_bank.evidence import Evidence

_BUSY_S, _LOOK_S = 60.0, 0.05
_UNDER_WAY = ".under-way-"


@dataclass(frozen=True)
class Damaged:
    """Something in a bank that is no adapter of it, and why."""

    path: Path
    reason: str
    name: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Contents:
    """What a bank holds."""

    cards: list[AdapterCard]  # oldest first
    damaged: list[Damaged]


class Bank:
    """Adapters that were trained, by name or by the start of their digest."""

    def __init__(self, path: Path, create: bool = False) -> None:
        """Raises BankError where there is none and none is to be made; it is made when something comes in."""
        try:
            self.path = checked_path(path)
            kinds = kind_of(self.path), kind_of(self.path / "objects")
        except BadInput as error:
            raise BankError(f"bank: {error}") from None
        for place, kind in zip((self.path, self.path / "objects"), kinds, strict=True):
            if kind not in (None, "folder"):
                raise BankError(f"{printable(str(place))} is a {kind}; a bank is a folder")
        self._objects = self.path / "objects"
        if self._objects.is_symlink():
            raise BankError(f"{printable(str(self._objects))} is a link; name the folder itself as the bank")
        if not create and kinds[1] is None:
            raise BankError(f"{printable(str(self.path))} holds no bank; `orchestrator bank add` makes one")

    # Reading.

    def contents(self) -> Contents:
        """Cards and what is damaged.  Raises BankError only where the bank as a whole cannot be read."""
        cards, sound, damaged = [], [], []
        known: dict[str, AdapterCard] = {}
        for folder in self._folders():
            try:
                cards.append(_card_at(folder))
            except BankError as error:
                if os.path.lexists(folder):  # else it was removed meanwhile
                    damaged.append(Damaged(folder, str(error), _shown(folder)))
        for card in sorted(cards, key=lambda card: (card.added, card.digest)):
            if (first := known.setdefault(card.name, card)) is not card:
                why = f"{first.digest[:12]} is called {card.name} too; `orchestrator bank rm` one of them by its digest"
                damaged.append(Damaged(self.folder(card.digest), why, card.digest[:12]))
            else:
                sound.append(card)
        return Contents(sound, damaged)

    def cards(self, base_digest: str | None = None) -> list[AdapterCard]:
        """All that are sound, oldest first; of one base if asked."""
        return [card for card in self.contents().cards if base_digest in (None, card.base_digest)]

    def find(self, which: str) -> AdapterCard:
        """By name, or by at least 6 characters of the digest.

        Raises BankError: with the reason for one that is damaged, else with the nearest names.
        """
        found = self.find_all(which)
        if isinstance(found, Damaged):
            raise BankError(f"{found}. `orchestrator bank verify --repair` puts it aside")
        return found

    def find_all(self, which: str) -> AdapterCard | Damaged:
        """The same, with what is damaged, which is known by its digest alone.  Raises BankError."""
        contents = self.contents()
        named = [card for card in contents.cards if card.name == which]
        starts: list[AdapterCard | Damaged] = []
        if not named and len(which) >= 6:
            starts += [card for card in contents.cards if card.digest.startswith(which)]
            starts += [one for one in contents.damaged if one.path.name.startswith(which)]
        found = [*named, *starts]
        if len(found) == 1:
            return found[0]
        shown, here = printable(which[:80]), printable(str(self.path))
        if found:
            raise BankError(f"{shown} matches {len(found)} digests; give more characters")
        import difflib

        near = difflib.get_close_matches(which, [card.name for card in contents.cards], 3)
        raise BankError(f"{here} has no adapter {shown!r}" + (f"; it has {', '.join(near)}" if near else ""))

    def name_of(self, folder: Path) -> str | None:
        """What an adapter of this content is called here."""
        known = self._known(digest_of(folder))
        return known and known.name

    def of_data(self, base_digest: str, data_digest: str) -> list[AdapterCard]:
        """Adapters that were trained on this very data."""
        return [card for card in self.cards(base_digest) if card.data_digest == data_digest]

    def folder(self, digest: str) -> Path:
        """Where an adapter lies.  Raises BankError for a text that is no digest, such as a path."""
        if not is_digest(digest):
            raise BankError(f"{printable(digest[:80])!r} is no digest: 64 hex digits")
        return self._objects / digest[:2] / digest

    def adapter(self, card: AdapterCard) -> Adapter:
        """Its bytes compared with its digest.  Raises BankError where they changed, Unusable where it is broken."""
        folder = self.folder(card.digest)
        if not folder.is_dir():
            raise BankError(f"{card.name}: its folder {folder} is gone")
        check_bytes(folder, card)
        return Adapter(folder)

    def evidence(self, card: AdapterCard) -> Evidence | None:
        """What is known of its data; None where nothing is.  Raises BankError for a broken file."""
        file = self.folder(card.digest) / EVIDENCE
        return read_evidence(file, card) if card.evidence_digest else None

    def verify(self, repair: bool = False) -> list[Damaged]:
        """What is wrong, every byte read again: changed bytes, cards that lie, folders that are no adapter.

        `repair` puts that aside into BANK/broken.
        """
        contents = self.contents()
        wrong = list(contents.damaged)
        for card in contents.cards:
            try:
                check(self.folder(card.digest))
            except (Unusable, BankError) as error:
                if self.folder(card.digest).exists():  # else it was removed meanwhile
                    wrong.append(Damaged(self.folder(card.digest), str(error), card.name))
        if repair and wrong:
            with self.writing():
                for one in wrong:
                    self._put_aside(one.path)
        return wrong

    # Writing.

    def add(self, source: Path, card: AdapterCard, evidence: Evidence | None = None) -> AdapterCard:
        """Take in an adapter folder; the card as it stands then.

        The same content twice is one adapter, which keeps what either card states, the later first.
        Raises Unusable for what is not a finite LoRA adapter, BankError for a name that another one bears or that is
        none, or shapes other than those of this base's adapters.
        """
        adapter = Adapter(source)
        adapter.corrections()
        card = _complete(card, adapter, digest_of(source), evidence)
        if wrong := mistakes(card):
            raise BankError(f"{'; '.join(wrong)}. --name gives another name")
        with self.writing():
            return self.place(adapter, card, evidence, self.cards())

    def place(
        self, adapter: Adapter, card: AdapterCard, evidence: Evidence | None, others: list[AdapterCard]
    ) -> AdapterCard:
        """The last part of `add`, under the lock, with the cards that are there.  Raises BankError, Unusable."""
        if known := self._known(card.digest):
            stated = {key: value for key, value in card.as_dict().items() if value not in (None, [], {}, "")}
            card = card_of({**known.as_dict(), **stated, "added": known.added})
            if evidence is None and card.evidence_digest:
                try:
                    evidence = read_evidence(self.folder(card.digest) / EVIDENCE, card)
                except BankError:
                    card = replace(card, evidence_digest=None, num_rows=None)
        if any(one.name == card.name and one.digest != card.digest for one in others):
            raise BankError(f"another adapter is called {card.name}; give a --name, or remove that one first")
        self._fits(adapter, card, others)
        temporary = self.temporary_name("new")
        try:
            write(temporary, adapter.folder, card, evidence)
            self._settle(temporary, card)
        finally:
            delete(temporary)
        return card

    def remove(self, which: AdapterCard | Damaged) -> None:
        """Nothing outside the bank goes: of a link the link alone."""
        folder = which.path if isinstance(which, Damaged) else self.folder(which.digest)
        with self.writing():
            if os.path.lexists(folder):
                os.rename(self._inside(folder), trash := self.temporary_name("removed"))
                delete(trash)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the bank, which nobody else writes to meanwhile; what a killed writer left is cleared away.

        Raises BankError where another writer holds it for a minute.
        """
        self._objects.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path / ".lock", flags, 0o644)
        except OSError as error:
            raise BankError(f"{self.path / '.lock'} cannot be opened: {error.strerror}") from None
        try:
            _lock(descriptor, self.path)
            for left_over in self._objects.glob(f"{_UNDER_WAY}*"):
                delete(left_over)
            yield
        finally:
            os.close(descriptor)

    def temporary_name(self, what: str) -> Path:
        """A new name for a folder made under the lock; found without a lock, it is a leftover."""
        return self._objects / f"{_UNDER_WAY}{what}-{uuid.uuid4().hex[:8]}"

    # Inside.

    def _folders(self) -> Iterator[Path]:
        """What lies where adapters do; names with a leading dot are a file system's own."""
        try:
            if not self._objects.exists():
                return
            for shard in _visible(self._objects):
                is_shard = len(shard.name) == 2 and shard.is_dir() and not shard.is_symlink()
                yield from _visible(shard) if is_shard else (shard,)
        except OSError as error:
            raise BankError(f"{self._objects} cannot be read: {error.strerror}") from None

    def _known(self, digest: str) -> AdapterCard | None:
        folder = self.folder(digest)
        try:
            return _card_at(folder) if folder.is_dir() else None
        except BankError:
            return None  # it is damaged: what comes in takes its place

    def _fits(self, adapter: Adapter, card: AdapterCard, cards: list[AdapterCard]) -> None:
        """Against one adapter of the same base: adapters of one model fit each other.  Raises Unusable."""
        from strategies.adapter_bank.generation import same_shapes

        for other in cards:
            if other.base_digest == card.base_digest and other.digest != card.digest:
                try:
                    known = self.adapter(other)
                except (BankError, Unusable):
                    continue  # a damaged one says nothing
                same_shapes([known, adapter])
                break

    def _settle(self, temporary: Path, card: AdapterCard) -> None:
        """Move a written folder to its place; the same content keeps its bytes and gets the newer card."""
        folder = self.folder(card.digest)
        self._inside(folder).parent.mkdir(exist_ok=True)
        try:
            known = check(folder) if os.path.lexists(folder) else None
        except (BankError, Unusable):
            known = self._put_aside(folder)
        if known is None:
            os.replace(temporary, folder)
        elif known.evidence_digest == card.evidence_digest:
            os.replace(temporary / CARD, folder / CARD)
        else:  # at no moment is there a card of other evidence
            write_card(folder, replace(card, evidence_digest=None))
            os.replace(temporary / EVIDENCE, folder / EVIDENCE)
            os.replace(temporary / CARD, folder / CARD)
        sync(folder)
        sync(folder.parent)

    def _put_aside(self, path: Path) -> None:
        broken = self.path / "broken"
        if broken.is_symlink():
            raise BankError(f"{broken} is a link; make it a folder")
        broken.mkdir(exist_ok=True)
        if os.path.lexists(path):
            os.rename(self._inside(path), broken / f"{path.name[:200]}-{uuid.uuid4().hex[:4]}")

    def _inside(self, path: Path) -> Path:
        """The path, which lies in this bank itself and not through a link.  Raises BankError."""
        if path.parent.resolve() != path.parent or self._objects not in (path.parent, path.parent.parent):
            raise BankError(f"{printable(str(path))} does not lie in the bank")
        return path


def _card_at(folder: Path) -> AdapterCard:
    """The card of an adapter in its place.  Raises BankError for anything else that may lie there."""
    if is_digest(folder.name) and folder.parent.name != folder.name[:2]:
        raise BankError(f"lies in {printable(folder.parent.name)} and not in {folder.name[:2]}")
    return card_in(folder)


def _complete(card: AdapterCard, adapter: Adapter, digest: str, evidence: Evidence | None) -> AdapterCard:
    """The card with what the adapter and the evidence themselves say."""
    values = {
        **asdict(card),
        "ranks": adapter.ranks,
        "targets": sorted({name.rsplit(".", 1)[-1] for name in adapter.targets}),
        "num_parameters": adapter.num_parameters,
        "digest": digest,
        "added": card.added or datetime.now(UTC).isoformat(),  # cards are ordered by it
    }
    if evidence is not None:
        values |= {"evidence_digest": evidence.digest, "num_rows": evidence.num_rows}
    return AdapterCard(**values)


def _lock(descriptor: int, path: Path) -> None:
    import fcntl  # not on Windows, where a bank is only read

    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BankError(f"{path}: another process has been writing to it for {_BUSY_S:.0f} s") from None
            time.sleep(_LOOK_S)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _shown(path: Path) -> str:
    return path.name[:12] if is_digest(path.name) else printable(path.name[:80])
