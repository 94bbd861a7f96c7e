"""The bank on disk: a folder an adapter, named by the digest of its content, and an index over them.

    BANK/index.sqlite                   names, cards and evidence; made again from the folders where it is lost
    BANK/objects/ab/abcdef.../          adapter_config.json adapter_model.safetensors card.json evidence.safetensors

A folder is written beside its place and renamed into it while its writer holds the index, so it is whole or absent, and
named where it is there; two writers of the same adapter end with one.  Importing this loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Adapter, Unusable

if TYPE_CHECKING:  # numpy waits until a data set is looked at
    from strategies.adapter_bank.evidence import Evidence

CARD, EVIDENCE = "card.json", "evidence.safetensors"
_PAYLOAD = (CONFIG, WEIGHTS)  # what the digest is of; cards may be told more later
_BUSY_S = 60.0
_SCHEMA = (
    "CREATE TABLE adapters ("
    "digest TEXT PRIMARY KEY, name TEXT UNIQUE NOT NULL, base TEXT NOT NULL, data TEXT, card TEXT NOT NULL)",
    "CREATE INDEX by_base ON adapters (base)",
    "CREATE INDEX by_data ON adapters (data)",
)


class BankError(ValueError):
    """What cannot be done with a bank; the text says why and what to do."""


@dataclass(frozen=True)
class Card:
    """What is known of an adapter."""

    name: str
    base_name: str
    base_digest: str  # of the base model's weights
    ranks: list[int] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)  # kinds of linear maps
    num_parameters: int = 0
    data_digest: str | None = None  # of the data files' bytes
    evidence_digest: str | None = None
    num_rows: int | None = None
    scores: dict[str, Any] = field(default_factory=dict)  # before and after, on held-out rows
    licence: str | None = None
    method: str = "lora"
    made_from: list[dict[str, Any]] = field(default_factory=list)  # of generated ones: who, and how much
    run_id: str | None = None
    added: str = ""
    digest: str = ""

    @property
    def held_out_loss(self) -> tuple[float | None, float | None]:
        """Before and after its training, in nats a token."""
        before, after = (self.scores.get(when, {}).get("eval_loss") for when in ("before", "after"))
        return before, after

    @property
    def losses_told(self) -> str:
        """As one reads them: 3.863 -> 0.683."""
        return " -> ".join(f"{value:.3f}" for value in self.held_out_loss if value is not None)


class Bank:
    """Adapters that were trained, by name or by the start of their digest."""

    def __init__(self, path: Path, create: bool = False) -> None:
        """Raises BankError where there is none and none is to be made; it is made when something comes in."""
        self.path = path.expanduser()
        if not create and not (self.path / "objects").is_dir():
            raise BankError(f"{self.path} holds no bank; `orchestrator bank add` makes one")

    # Reading.

    def cards(self, base_digest: str | None = None) -> list[Card]:
        """All cards, oldest first, from the index alone; of one base if asked."""
        where, values = ("WHERE base = ?", (base_digest,)) if base_digest else ("", ())
        with self._index() as index:
            rows = index.execute(f"SELECT card FROM adapters {where} ORDER BY rowid", values).fetchall()
        return [_card(text) for (text,) in rows]

    def find(self, which: str) -> Card:
        """By name, or by at least 6 characters of the digest.  Raises BankError with the nearest names."""
        with self._index() as index:
            found = index.execute("SELECT card FROM adapters WHERE name = ?", (which,)).fetchall()
            if not found and len(which) >= 6:
                pattern = which.replace("%", "") + "%"
                found = index.execute("SELECT card FROM adapters WHERE digest LIKE ?", (pattern,)).fetchall()
            if len(found) == 1:
                return _card(found[0][0])
            names = [name for (name,) in index.execute("SELECT name FROM adapters ORDER BY rowid")]
        if found:
            raise BankError(f"{which} is the start of {len(found)} digests; give more of it")
        import difflib

        near = difflib.get_close_matches(which, names, 3)
        raise BankError(f"{self.path} has no adapter {which!r}" + (f"; it has {', '.join(near)}" if near else ""))

    def name_of(self, folder: Path) -> str | None:
        """What an adapter of this content is called here."""
        known = self._known(digest_of(folder))
        return known and known.name

    def of_data(self, base_digest: str, data_digest: str) -> list[Card]:
        """Adapters that were trained on this very data."""
        with self._index() as index:
            asked = "SELECT card FROM adapters WHERE base = ? AND data = ? ORDER BY rowid"
            return [_card(text) for (text,) in index.execute(asked, (base_digest, data_digest))]

    def folder(self, digest: str) -> Path:
        return self.path / "objects" / digest[:2] / digest

    def adapter(self, card: Card) -> Adapter:
        """Raises BankError where its folder is lost, Unusable where it is broken."""
        folder = self.folder(card.digest)
        if not folder.is_dir():
            raise BankError(f"{card.name} is in the index, and its folder is gone: `orchestrator bank verify --repair`")
        return Adapter(folder)

    def evidence(self, card: Card) -> Evidence | None:
        """What is known of its data; None where nothing is.  Raises BankError for a broken file."""
        file = self.folder(card.digest) / EVIDENCE
        if not card.evidence_digest or not file.exists():
            return None
        return _read_evidence(file, card)

    # Writing.

    def add(self, source: Path, card: Card, evidence: Evidence | None = None) -> Card:
        """Take in an adapter folder; the card as it stands then.

        The same content twice is one adapter, of which all is known that was told either time, the later first.
        Raises Unusable for what is not a finite LoRA adapter, BankError for a name that another one bears, or shapes
        other than those of this base's adapters.
        """
        from safetensors.numpy import save_file

        adapter = Adapter(source)
        adapter.corrections()
        card = self._complete(card, adapter, digest_of(source), evidence)
        if known := self._known(card.digest):
            told = {key: value for key, value in asdict(card).items() if value not in (None, [], {}, "")}
            card = Card(**{**asdict(known), **told, "added": known.added})
        self._fits(adapter, card)

        def write(folder: Path) -> None:
            folder.mkdir(parents=True)
            for name in _PAYLOAD:
                shutil.copyfile(source / name, folder / name)
            if evidence is not None:
                save_file(evidence.arrays(), folder / EVIDENCE)
            (folder / CARD).write_text(json.dumps(asdict(card), indent=1, ensure_ascii=False), encoding="utf-8")

        self._place(card, write)
        return card

    def remove(self, card: Card) -> None:
        folder, trash = self.folder(card.digest), self.path / f".removed-{uuid.uuid4().hex[:8]}"
        with self._index(to_write=True) as index:
            index.execute("DELETE FROM adapters WHERE digest = ?", (card.digest,))
            if folder.is_dir():
                folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def verify(self, repair: bool = False) -> list[str]:
        """What is wrong: changed bytes, cards that lie, folders without an entry, entries without a folder.

        `repair` puts what is broken aside into BANK/broken and makes the index again.
        """
        wrong: list[str] = []
        known = {card.digest: card for card in self.cards()}
        for folder in self._folders():
            try:
                self._check(folder)
                if folder.name not in known:
                    wrong.append(f"{folder.name[:12]} is not in the index")
            except (Unusable, BankError) as error:
                wrong.append(f"{known[folder.name].name if folder.name in known else folder.name[:12]}: {error}")
                if repair:
                    (self.path / "broken").mkdir(exist_ok=True)
                    folder.rename(self.path / "broken" / f"{folder.name}-{uuid.uuid4().hex[:4]}")
            known.pop(folder.name, None)
        wrong += [f"{card.name} is in the index, and its folder is gone" for card in known.values()]
        if repair and wrong:
            self.index_again()
        return wrong

    def index_again(self) -> int:
        """The index from the folders; how many there are."""
        with self._index(to_write=True) as index:
            return self._enter_folders(index)

    def export(self, file: Path, cards: Iterable[Card]) -> int:
        """A tar of adapters for another bank; it appears whole or not at all.  How many are in it."""
        temporary, count = file.with_name(f".{file.name}.tmp-{uuid.uuid4().hex[:8]}"), 0
        try:
            with tarfile.open(temporary, "w") as tar:
                for card in cards:
                    self.adapter(card)
                    tar.add(self.folder(card.digest), card.digest)
                    count += 1
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        return count

    def import_(self, file: Path) -> list[Card]:
        """Take in a tar that `export` made; each adapter is checked against its digest.  Raises BankError."""
        work, taken = self.path / f".import-{uuid.uuid4().hex[:8]}", []
        try:
            with tarfile.open(file) as tar:
                tar.extractall(work, filter="data")
            for folder in sorted(work.iterdir()):
                card = self._check(folder)
                evidence = _read_evidence(folder / EVIDENCE, card) if card.evidence_digest else None
                taken.append(self.add(folder, card, evidence))
        except (OSError, tarfile.TarError) as error:
            raise BankError(f"{file} is no export of a bank: {error}") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return taken

    # Inside.

    def _complete(self, card: Card, adapter: Adapter, digest: str, evidence: Evidence | None) -> Card:
        told = {
            **asdict(card),
            "ranks": adapter.ranks,
            "targets": sorted({name.rsplit(".", 1)[-1] for name in adapter.targets}),
            "num_parameters": adapter.num_parameters,
            "digest": digest,
            "added": card.added or datetime.now(UTC).isoformat(),  # cards are ordered by it
        }
        if evidence is not None:
            told |= {"evidence_digest": evidence.digest, "num_rows": evidence.num_rows}
        return Card(**told)

    def _known(self, digest: str) -> Card | None:
        if not (self.path / "objects").is_dir():
            return None
        with self._index() as index:
            found = index.execute("SELECT card FROM adapters WHERE digest = ?", (digest,)).fetchone()
        return _card(found[0]) if found else None

    def _fits(self, adapter: Adapter, card: Card) -> None:
        """Against one adapter of the same base: adapters of one model fit each other."""
        with self._index() as index:
            found = index.execute("SELECT card FROM adapters WHERE base = ? LIMIT 1", (card.base_digest,)).fetchone()
        if not found or _card(found[0]).digest == card.digest:
            return
        from strategies.adapter_bank.generation import same_shapes

        try:
            same_shapes([self.adapter(_card(found[0])), adapter])
        except ValueError as error:
            raise BankError(str(error)) from None

    def _place(self, card: Card, write: Any) -> None:
        """The folder and its entry, both or none.  Raises BankError for a name that another adapter bears."""
        folder, temporary = self.folder(card.digest), self.path / f".new-{uuid.uuid4().hex[:8]}"
        try:
            write(temporary)
            with self._index(to_write=True) as index:
                taken = index.execute("SELECT digest FROM adapters WHERE name = ?", (card.name,)).fetchone()
                if taken and taken[0] != card.digest:
                    raise BankError(f"another adapter is called {card.name}; give a --name, or remove that one first")
                folder.parent.mkdir(exist_ok=True)
                if folder.is_dir():  # the same content: the card may be newer
                    for name in (EVIDENCE, CARD):
                        if (temporary / name).exists():
                            os.replace(temporary / name, folder / name)
                else:
                    os.replace(temporary, folder)
                _enter(index, [card])
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _enter_folders(self, index: sqlite3.Connection) -> int:
        cards = []
        for folder in self._folders():
            try:
                cards.append(_card((folder / CARD).read_text(encoding="utf-8")))
            except (OSError, BankError):
                continue  # verify names it
        index.execute("DELETE FROM adapters")
        _enter(index, sorted(cards, key=lambda card: card.added))
        return len(cards)

    def _check(self, folder: Path) -> Card:
        """An adapter's folder against its digests.  Raises BankError or Unusable."""
        try:
            card = _card((folder / CARD).read_text(encoding="utf-8"))
        except OSError as error:
            raise BankError(f"its card cannot be read: {error}") from None
        if digest_of(folder) != card.digest:
            raise BankError("its bytes are not those that were added; import it again or remove it")
        Adapter(folder)
        if card.evidence_digest:
            _read_evidence(folder / EVIDENCE, card)
        return card

    def _folders(self) -> Iterator[Path]:
        yield from (folder for folder in sorted((self.path / "objects").glob("??/*")) if folder.is_dir())

    @contextmanager
    def _index(self, to_write: bool = False) -> Iterator[sqlite3.Connection]:
        """The index; whoever writes has it alone until the end."""
        (self.path / "objects").mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path / "index.sqlite", timeout=_BUSY_S)
        try:
            with connection:
                if to_write or _is_empty(connection):
                    connection.execute("BEGIN IMMEDIATE")
                if _is_empty(connection):  # still, now that nobody else can be making it
                    for statement in _SCHEMA:
                        connection.execute(statement)
                    self._enter_folders(connection)
                yield connection
        except sqlite3.DatabaseError as error:
            raise BankError(
                f"{self.path}/index.sqlite cannot be used ({error}); delete it, and it is made again"
            ) from None
        finally:
            connection.close()


def _is_empty(index: sqlite3.Connection) -> bool:
    return index.execute("SELECT 1 FROM sqlite_master").fetchone() is None


def _enter(index: sqlite3.Connection, cards: Iterable[Card]) -> None:
    rows = [(c.digest, c.name, c.base_digest, c.data_digest, json.dumps(asdict(c), ensure_ascii=False)) for c in cards]
    index.executemany("INSERT OR REPLACE INTO adapters VALUES (?, ?, ?, ?, ?)", rows)


def digest_of(folder: Path) -> str:
    """Of an adapter: its configuration and its weights.  Raises Unusable where one is missing."""
    whole = hashlib.sha256()
    for name in _PAYLOAD:
        try:
            with (folder / name).open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise Unusable(f"{folder / name} cannot be read: {error.strerror}") from None
    return whole.hexdigest()


def base_digest(folder: Path) -> str:
    """Of a base model's weights: the name, size, header and a sample of each file, so that it takes no second."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise BankError(f"{folder} holds no model weights to know the base by")
    whole = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        whole.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for part in range(16):
                stream.seek(part * size // 16)
                whole.update(stream.read(1 << 16))
    return whole.hexdigest()


def _card(text: str) -> Card:
    try:
        return Card(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise BankError(f"its card is broken: {error}") from None


def _read_evidence(file: Path, card: Card) -> Evidence:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from strategies.adapter_bank.evidence import Evidence

    try:
        evidence = Evidence.from_arrays(load_file(file))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BankError(f"what is known of the data of {card.name} cannot be read: {error}") from None
    if evidence.digest != card.evidence_digest:
        raise BankError(f"what is known of the data of {card.name} has changed; add the adapter again")
    return evidence
