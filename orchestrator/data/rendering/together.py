"""Renderings that wait for token ids run together: what they wait for is tokenised in one call.

A call of a tokenizer takes longer than the tokens of a short text, and one call with many texts uses every core.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Encoded = tuple[list[int], Sequence[tuple[int, int]]]  # token ids, and the characters of each where they were asked for


@dataclass(frozen=True)
class Texts:
    """What a rendering waits for: the tokens of each text, without special ones."""

    texts: tuple[str, ...]
    with_offsets: bool = False


Rendering = Generator[Texts, list[Encoded], T]


class Underway(Generic[T]):
    """Renderings that were begun; what they wait for is tokenised in the thread of `pool`, or when it is asked for.

    A tokenizer's call keeps no other thread waiting: meanwhile the next rows are rendered.
    """

    def __init__(self, tokenizer: Any, renderings: Iterable[Rendering[T]], pool: Executor | None = None) -> None:
        self._tokenizer, self._pool = tokenizer, pool
        self._ended: dict[int, T | Exception] = {}
        self._waiting: dict[int, tuple[Rendering[T], Texts]] = {}
        for number, rendering in enumerate(renderings):
            self._resume(number, rendering, None)
        self._answers = self._ask()

    def results(self) -> list[T | Exception]:
        """What each rendering returns or raises, in their order."""
        while self._waiting:
            asked, self._waiting = self._waiting, {}
            for (number, (rendering, _)), answer in zip(asked.items(), self._answers(), strict=True):
                self._resume(number, rendering, answer)
            self._answers = self._ask()
        return [self._ended[number] for number in range(len(self._ended))]

    def _ask(self) -> Callable[[], list[list[Encoded] | Exception]]:
        asked = [texts for _, texts in self._waiting.values()]
        if self._pool and asked:
            return self._pool.submit(_answer, self._tokenizer, asked).result
        return lambda: _answer(self._tokenizer, asked)

    def _resume(self, number: int, rendering: Rendering[T], answer: list[Encoded] | Exception | None) -> None:
        try:
            if answer is None:
                asks = next(rendering)
            else:
                asks = rendering.throw(answer) if isinstance(answer, Exception) else rendering.send(answer)
            self._waiting[number] = rendering, asks
        except StopIteration as end:
            self._ended[number] = end.value
        except Exception as error:  # whatever it is, it is this row's: it is raised when its turn comes
            self._ended[number] = error


def run_together(tokenizer: Any, renderings: Iterable[Rendering[T]]) -> list[T | Exception]:
    """What each rendering returns or raises, in their order."""
    return Underway(tokenizer, renderings).results()


def _answer(tokenizer: Any, asked: Sequence[Texts]) -> list[list[Encoded] | Exception]:
    """The tokens of all texts, in one call with offsets and one without."""
    answers: list[list[Encoded] | Exception] = [[] for _ in asked]
    for with_offsets in (True, False):
        places = [place for place, one in enumerate(asked) if one.with_offsets == with_offsets]
        texts = [text for place in places for text in asked[place].texts]
        if not texts:
            continue
        try:
            found = iter(encode(tokenizer, texts, with_offsets))
        except Exception:  # one text that the tokenizer refuses: each on its own finds it
            for place in places:
                answers[place] = _answer_alone(tokenizer, asked[place])
        else:
            for place in places:
                answers[place] = [next(found) for _ in asked[place].texts]
    return answers


def _answer_alone(tokenizer: Any, asked: Texts) -> list[Encoded] | Exception:
    try:
        return [one for text in asked.texts for one in encode(tokenizer, [text], asked.with_offsets)]
    except Exception as error:
        return error


class Offsets(Sequence[tuple[int, int]]):
    """The characters of each token, looked up when asked for: a list of all takes as long as the tokens themselves."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, place: Any) -> Any:
        found = None if isinstance(place, slice) or place < 0 else self._encoding.token_to_chars(place)
        return self._encoding.offsets[place] if found is None else found

    def first_from(self, character: int) -> int:
        """The number of the first token that begins at this character or behind it."""
        at = self._encoding.char_to_token(character)
        if at is not None and self._encoding.token_to_chars(at)[0] == character:
            return at
        return token_at(list(self), character)


def token_at(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """The number of the first token that begins at this character or behind it."""
    if isinstance(offsets, Offsets):
        return offsets.first_from(character)
    return bisect.bisect_left(offsets, character, key=lambda offset: offset[0])


@lru_cache(maxsize=8)
def _backend(tokenizer: Any) -> Any:
    """The tokenizer below one of transformers where it does the same alone; None where it does not."""
    backend, probe = getattr(tokenizer, "backend_tokenizer", None), "a B\n c."
    if backend is None:
        return None
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]  # also takes truncation and padding off it
    return backend if backend.encode(probe, add_special_tokens=False).ids == plain else None


def encode(tokenizer: Any, texts: Sequence[str], with_offsets: bool) -> list[Encoded]:
    """Token ids of each text, without special tokens; with the first character and the one after the last of each."""
    if backend := _backend(tokenizer):
        found = (backend.encode_batch if with_offsets else backend.encode_batch_fast)(
            list(texts), add_special_tokens=False
        )
        return [(one.ids, Offsets(one) if with_offsets else []) for one in found]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=with_offsets,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids = encoded["input_ids"]
    offsets = encoded["offset_mapping"] if with_offsets else [[]] * len(ids)
    return list(zip(ids, offsets, strict=True))
