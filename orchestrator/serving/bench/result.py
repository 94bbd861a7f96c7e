"""What `bench RUN --serve` found: rows of measurements, and what was not measured with its reason.

A run's own lies in its folder as bench-serve.json, where its report finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clusters.safe.reading import read_json, record

FILE = "bench-serve.json"
KIND = "serve"


@dataclass(frozen=True)
class Latency:
    """One load, sent several times: latencies over all answers, the rate of each sending.  None: no answer has it."""

    first_token_s: float | None  # median of the seconds from a request to its first text
    first_token_p95_s: float | None
    next_token_s: float | None  # median of the seconds of each further token
    next_token_p95_s: float | None
    tokens_per_s: float  # new tokens of all answers over the whole time; median of the sendings
    tokens_per_s_low: float
    tokens_per_s_high: float
    answers: int
    refused: int
    prompt_tokens: float  # mean of the answers
    new_tokens: float

    def __post_init__(self) -> None:
        if not self.tokens_per_s > 0:
            raise ValueError("tokens_per_s is not above 0")


@dataclass(frozen=True)
class ServeRow(Latency):
    """A model on an engine at one concurrency."""

    engine: str
    model: str  # base, adapter or tuned, merged
    weights: str  # how the engine holds them
    concurrency: int
    requests: int  # of one sending

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.concurrency < 1:
            raise ValueError("concurrency is not above 0")


@dataclass(frozen=True)
class AdaptersRow(Latency):
    """The same requests for one adapter or for several, in an order."""

    order: str  # one: all for one adapter; mixed: in turn for each; grouped: all of one, then all of the next
    num_adapters: int  # that are asked
    concurrency: int
    requests: int


@dataclass(frozen=True)
class NotMeasured:
    """What the benchmark did not measure."""

    engine: str
    model: str
    reason: str


@dataclass(frozen=True)
class ServeResult:
    """All of one benchmark, with the machine and the libraries without which a number means nothing."""

    kind: str
    name: str
    run: str
    model: str
    model_folder: str
    device: str
    threads: int
    torch: str
    transformers: str
    python: str
    time: float  # seconds since 1970
    prompts: str  # which prompts were sent
    num_prompts: int  # different ones
    new_tokens: int  # that each answer was to have
    repeats: int
    rows: list[ServeRow]
    adapters: list[AdaptersRow]
    not_measured: list[NotMeasured]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows: none was measured")

    @property
    def best(self) -> list[ServeRow]:
        """Of each engine and model the row with the highest rate."""
        found: dict[tuple[str, str], ServeRow] = {}
        for row in self.rows:
            key = row.engine, row.model
            if key not in found or row.tokens_per_s > found[key].tokens_per_s:
                found[key] = row
        return list(found.values())


def read(path: Path) -> ServeResult:
    """Raises BadInput for a file that holds no such result."""
    return record(ServeResult, read_json(path), str(path))
