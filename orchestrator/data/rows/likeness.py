"""Which texts say the same: equal but for capitals, punctuation and spaces, or nearly so (MinHash over characters).

Broder, "On the resemblance and containment of documents", 1997.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from orchestrator.data.rows.formats import Example

if TYPE_CHECKING:
    import numpy

ALIKE = 0.8  # share of equal hashes from which two texts count as nearly equal: an estimate of their shared shingles
_SHINGLE = 8  # characters
_HASHES, _BAND = 32, 4  # hashes of a text; those of a band are compared first, all where one band is equal
MOST_COMPARED = 100_000  # texts: their hashes lie in memory, about 1.5 kB each
_LONGEST = 8192  # characters that are looked at
_WORD_BREAK = re.compile(r"[\W_]+")
_BLANKS = {code: " " for code in range(128) if not chr(code).isalnum()}


def plain_text(example: Example) -> str:
    """What a row says but for capitals, punctuation and spaces: its text, or its turns without the system's."""
    if example.text is not None:
        return _plain(example.text)
    return _plain(" ".join(str(turn["content"] or "") for turn in example.messages if turn["role"] != "system"))


def _plain(text: str) -> str:
    if text.isascii():  # the same as below, in a tenth of the time
        return " ".join(text.casefold().translate(_BLANKS).split())
    text = unicodedata.normalize("NFKC", text)
    return _WORD_BREAK.sub(" ", text.casefold()).strip()


def fingerprint(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little", signed=True
    )


def sketch(text: str) -> numpy.ndarray:
    """The smallest of each of 32 hashes over a text's shingles (uint32): as many are equal as shingles are shared."""
    import numpy

    characters = numpy.frombuffer(text[:_LONGEST].ljust(_SHINGLE).encode("utf-32-le", "replace"), dtype=numpy.uint32)
    count = len(characters) - _SHINGLE + 1
    hashes = numpy.zeros(count, dtype=numpy.uint64)
    for place in range(_SHINGLE):
        hashes = hashes * numpy.uint64(0x9E3779B97F4A7C15) + characters[place : place + count]
    factors, shifts = _factors()
    mixed = hashes[:, None] * factors + shifts
    return (mixed >> numpy.uint64(32)).min(axis=0).astype(numpy.uint32)


@cache
def _factors() -> Any:
    import numpy

    draw = numpy.random.Generator(numpy.random.Philox(key=[1997, 0]))
    odd = draw.integers(0, 2**63, _HASHES, dtype=numpy.uint64) * numpy.uint64(2) + numpy.uint64(1)
    return odd, draw.integers(0, 2**63, _HASHES, dtype=numpy.uint64)


def nearly_equal(sketches: Sequence[numpy.ndarray], others: Sequence[numpy.ndarray] | None = None) -> dict[int, int]:
    """Number of a text -> the first other one that is nearly equal; among `others` where they are given.

    Of two that are nearly equal the later one is named with the earlier one.
    """
    if not sketches:
        return {}
    import numpy

    own = others is None
    seen: dict[int, int] = {}  # a band -> the first text that has it
    kept = sketches if others is None else others
    for number, one in enumerate(() if own else kept):
        for key in _bands(one):
            seen.setdefault(key, number)
    found: dict[int, int] = {}
    for number, one in enumerate(sketches):
        keys = _bands(one)
        for other in dict.fromkeys(seen[key] for key in keys if key in seen):
            if numpy.count_nonzero(one == kept[other]) >= ALIKE * _HASHES:
                found[number] = other
                break
        for key in keys if own else ():
            seen.setdefault(key, number)
    return found


def _bands(one: numpy.ndarray) -> list[int]:
    return [hash((start, one[start : start + _BAND].tobytes())) for start in range(0, _HASHES, _BAND)]
