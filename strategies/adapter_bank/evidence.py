"""What a bank keeps of a data set: enough to tell how far another one is, far less than the rows.

Token counts of all tokens and of the answers, and a sketch: for some rows the mean of the base model's own token
embeddings, in fewer dimensions by one fixed random projection (Johnson-Lindenstrauss).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy

_ROWS, _DIMENSIONS = 256, 64  # of a sketch
_MOST_VOCABULARY = 2**24
_STORED = {  # name -> type and number of dimensions
    **{f"{part}_ids": (numpy.int32, 1) for part in ("tokens", "answers")},
    **{f"{part}_counts": (numpy.float32, 1) for part in ("tokens", "answers")},
    "sketch": (numpy.float16, 2),
    "sizes": (numpy.int64, 1),
}
SMOOTHING = 1.0  # pseudo-tokens, spread over the vocabulary


@dataclass(frozen=True)
class TokenCounts:
    """Tokens and how often each occurs, ordered by token."""

    ids: numpy.ndarray  # int32
    counts: numpy.ndarray  # float32

    @classmethod
    def of(cls, rows: Iterable[numpy.ndarray]) -> TokenCounts:
        rows = list(rows)
        ids, counts = numpy.unique(numpy.concatenate(rows) if rows else numpy.empty(0, numpy.int32), return_counts=True)
        return cls(ids.astype(numpy.int32), counts.astype(numpy.float32))

    def density(self, vocabulary: int) -> numpy.ndarray:
        """Smoothed and normalised: every token has some mass, so that no ratio is infinite."""
        dense = numpy.full(vocabulary, SMOOTHING / vocabulary)
        dense[self.ids] += self.counts
        return dense / dense.sum()


@dataclass(frozen=True)
class Evidence:
    """The sufficient statistics of a data set for every distance."""

    tokens: TokenCounts  # of whole rows
    answers: TokenCounts  # of what is learnt
    sketch_KD: numpy.ndarray  # float16
    vocabulary: int
    num_rows: int

    @property
    def digest(self) -> str:
        parts = (self.tokens.ids, self.tokens.counts, self.answers.ids, self.answers.counts, self.sketch_KD)
        return hashlib.sha256(b"".join(numpy.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()

    def arrays(self) -> dict[str, numpy.ndarray]:
        """As stored; `from_arrays` is the inverse for what is sound."""
        return {
            "tokens_ids": self.tokens.ids,
            "tokens_counts": self.tokens.counts,
            "answers_ids": self.answers.ids,
            "answers_counts": self.answers.counts,
            "sketch": self.sketch_KD,
            "sizes": numpy.array([self.vocabulary, self.num_rows], numpy.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, numpy.ndarray]) -> Evidence:
        """Raises ValueError for arrays that are missing, of other types or shapes, or no counts of a vocabulary."""
        if missing := [name for name in _STORED if name not in arrays]:
            raise ValueError(f"it has no {', '.join(missing)}")
        for name, (kind, dimensions) in _STORED.items():
            if arrays[name].dtype != kind or arrays[name].ndim != dimensions:
                raise ValueError(f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}")
        if arrays["sizes"].shape != (2,):
            raise ValueError("sizes are those of the vocabulary and of the rows")
        vocabulary, num_rows = (int(number) for number in arrays["sizes"])
        if not 0 < vocabulary <= _MOST_VOCABULARY or num_rows < 0:
            raise ValueError(f"a vocabulary of {vocabulary} and {num_rows} rows cannot be")
        if not numpy.isfinite(arrays["sketch"]).all() or 0 in arrays["sketch"].shape:
            raise ValueError("its sketch is empty or not finite")
        tokens, answers = (
            _checked(TokenCounts(arrays[f"{part}_ids"], arrays[f"{part}_counts"]), vocabulary)
            for part in ("tokens", "answers")
        )
        return cls(tokens, answers, arrays["sketch"], vocabulary, num_rows)

    def is_like(self, other: Evidence) -> bool:
        """Whether both are of one vocabulary and one size of sketch, so that a distance has a meaning."""
        return self.vocabulary == other.vocabulary and self.sketch_KD.shape[1] == other.sketch_KD.shape[1]


def _checked(counts: TokenCounts, vocabulary: int) -> TokenCounts:
    ids, numbers = counts.ids, counts.counts
    if len(ids) != len(numbers) or not (numpy.isfinite(numbers).all() and (numbers >= 0).all()):
        raise ValueError("its counts are not those of its tokens")
    if len(ids) and not (ids[0] >= 0 and ids[-1] < vocabulary and (numpy.diff(ids) > 0).all()):
        raise ValueError("its tokens are not in order, or beyond the vocabulary")
    return counts


def gather(
    rows: Iterable[tuple[numpy.ndarray, numpy.ndarray]], embeddings_VH: numpy.ndarray, most_rows: int = 20_000
) -> Evidence:
    """Evidence of rows of (token ids, whether each is learnt); of longer sets the first `most_rows`.

    Raises ValueError without rows.
    """
    tokens, answers = [], []
    for ids, learnt in rows:
        tokens.append(ids)
        answers.append(ids[learnt])
        if len(tokens) == most_rows:
            break
    if not tokens:
        raise ValueError("a data set without rows cannot be compared")
    chosen = numpy.linspace(0, len(tokens) - 1, min(_ROWS, len(tokens))).astype(int)
    means_KH = numpy.stack([embeddings_VH[tokens[row]].mean(0) for row in chosen])
    generator = numpy.random.default_rng(0)
    projection_HD = generator.standard_normal((means_KH.shape[1], _DIMENSIONS)) / numpy.sqrt(_DIMENSIONS)
    sketch = (means_KH @ projection_HD).astype(numpy.float16)
    return Evidence(TokenCounts.of(tokens), TokenCounts.of(answers), sketch, embeddings_VH.shape[0], len(tokens))
