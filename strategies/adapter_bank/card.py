"""What is known of an adapter, as its card.json says it.  A card is data from outside until it was read here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, name_mistake, printable, read_json, record

CARD = "card.json"
_MAX_BYTES = 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")  # of SHA-256
_MOST_RANK = 2**31


class BankError(ValueError):
    """What cannot be done with a bank; the text says why and what to do."""


@dataclass(frozen=True)
class AdapterCard:
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
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # before and after, on held-out rows
    licence: str | None = None
    method: str = "lora"
    made_from: list[dict[str, Any]] = field(default_factory=list)  # of generated ones: who, and how much
    run_id: str | None = None
    added: str = ""
    digest: str = ""
    unknown: dict[str, Any] = field(default_factory=dict)  # fields of another version, kept as they are

    @property
    def held_out_loss(self) -> tuple[float | None, float | None]:
        """Before and after its training, in nats a token."""
        before, after = (self.scores.get(when, {}).get("eval_loss") for when in ("before", "after"))
        return before, after

    @property
    def loss_change(self) -> str:
        """Both as a table shows them: 3.863 -> 0.683."""
        return " -> ".join(f"{value:.3f}" for value in self.held_out_loss if value is not None)

    def as_dict(self) -> dict[str, Any]:
        """As card.json holds it; `card_of` is the inverse."""
        return {**{one: getattr(self, one) for one in KNOWN}, **self.unknown}


KNOWN = tuple(one.name for one in fields(AdapterCard) if one.name != "unknown")


def read_card(file: Path) -> AdapterCard:
    """Raises BankError for a file that cannot be read and for a card with a wrong field."""
    try:
        return card_of(read_json(file, _MAX_BYTES))
    except BadInput as error:
        raise BankError(str(error)) from None


def card_of(values: Any) -> AdapterCard:
    """The card that JSON values describe.  Raises BankError naming the fields that are wrong."""
    known = {key: value for key, value in values.items() if key in KNOWN} if isinstance(values, dict) else values
    try:
        card = record(AdapterCard, known, CARD)
    except BadInput as error:
        raise BankError(str(error)) from None
    if wrong := mistakes(card):
        raise BankError(f"{CARD}: {'; '.join(wrong)}")
    return replace(card, unknown={key: value for key, value in values.items() if key not in KNOWN})


def mistakes(card: AdapterCard) -> list[str]:
    """What is wrong with a card's values, each of its right type."""
    wrong = [f"name {mistake}" for mistake in [name_mistake(card.name)] if mistake]
    digests = {"digest": card.digest, "base_digest": card.base_digest}
    digests |= {"data_digest": card.data_digest or "0" * 64, "evidence_digest": card.evidence_digest or "0" * 64}
    wrong += [f"{key} {printable(one[:80])!r}: not 64 hex digits" for key, one in digests.items() if not is_digest(one)]
    if card.run_id is not None and not is_file_name(card.run_id):
        wrong.append(f"run_id {printable(card.run_id[:80])!r}: not the name of a folder")
    if not all(0 < rank < _MOST_RANK for rank in card.ranks):
        wrong.append("ranks: a rank is a whole number of at least 1")
    if min(card.num_parameters, card.num_rows or 0) < 0:
        wrong.append("num_parameters, num_rows: a count is 0 or more")
    return wrong


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 in lower-case hex, which no path is."""
    return _DIGEST.fullmatch(text) is not None


def is_file_name(text: str) -> bool:
    """Whether it names something in a folder: no separator, no leading dot, nothing that is not shown."""
    return 0 < len(text.encode("utf-8", "replace")) <= 255 and not re.search(r"^\.|/", text) and printable(text) == text
