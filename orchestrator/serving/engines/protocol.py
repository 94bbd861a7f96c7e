"""What the server asks of an engine, and what comes back.

An engine holds one base model and adapters of it.  It loads an adapter when it is asked for, and what it cannot load
it refuses with a sentence.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ServedModel:
    """What a query may name: a base model, or what was trained from it."""

    name: str
    base: str  # folder of the base model
    folder: str | None = None  # of an adapter or a whole model; None: the base itself
    created: int = 0  # seconds since 1970
    system: str | None = None  # the system message it was trained with, for conversations that have none


@dataclass(frozen=True)
class Query:
    """A text to continue.  Exactly one of `messages`, `prompt` and `tokens` is given."""

    model: ServedModel
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    tokens: list[int] | None = None
    max_tokens: int | None = None  # None: as many as the model's context has room for
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # generate up to max_tokens past tokens that end an answer: for measurements
    logprobs: int | None = None  # how many other tokens are given with their log-probabilities, beside the chosen one


@dataclass(frozen=True)
class TokenScore:
    """A token with its log-probability, and those of the most likely ones in its place."""

    token: str
    bytes: list[int]
    logprob: float
    top: list[TokenScore] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one has a `finish`."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None  # "stop" or "length"
    prompt_tokens: int = 0  # of the last piece
    completion_tokens: int = 0


class Refused(Exception):
    """A query that is not answered, as the OpenAI API says it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


@dataclass(frozen=True)
class EngineState:
    """How an engine is, for /health and /metrics."""

    engine: str
    base: str
    is_ready: bool
    reason: str | None = None  # why it is not
    restarts: int = 0
    counts: Mapping[str, float] = field(default_factory=dict)  # adapter_hits, adapter_loads, adapter_evictions, ...


class ServingEngine(Protocol):
    """One base model with its adapters."""

    async def start(self) -> None:
        """Start what computes; returns when it can answer.  Raises Refused."""
        ...

    def generate(self, query: Query) -> AsyncIterator[Piece]:
        """The answer as it comes.  Raises Refused; an iterator that is closed early ends the computation."""
        ...

    async def unload(self, model: ServedModel) -> None:
        """Forget an adapter that is no longer served."""
        ...

    async def stop(self) -> None: ...

    @property
    def state(self) -> EngineState: ...


def scores_of(values: list[dict[str, Any]]) -> list[TokenScore]:
    """Of their JSON form."""
    return [TokenScore(one["token"], one["bytes"], one["logprob"], scores_of(one["top"])) for one in values]
