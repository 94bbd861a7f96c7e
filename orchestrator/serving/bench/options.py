"""What a serving benchmark is to measure, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.errors import JobError
from orchestrator.serving.engine_choice import ENGINES, EngineOptions
from orchestrator.serving.router import MOST_WAITING

BENCH_MODELS = ("base", "tuned", "merged")
BENCH_ENGINES = tuple(engine for engine in ENGINES if engine != "auto")


@dataclass(frozen=True)
class ServeBench:
    """What is to be measured."""

    engines: tuple[str, ...] = BENCH_ENGINES
    models: tuple[str, ...] = BENCH_MODELS  # tuned: what the run made, an adapter or a whole model
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    new_tokens: int = 32
    prompt_tokens: int | None = None  # None: the run's held-out prompts
    num_adapters: int = 4  # 0: adapters are not mixed
    repeats: int = 3
    options: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        for option, given, known in (("engines", self.engines, BENCH_ENGINES), ("models", self.models, BENCH_MODELS)):
            if not given or not set(given) <= set(known):
                raise JobError(f"--{option} {','.join(given)}: give one or more of {', '.join(known)}")
        if not self.concurrency:
            raise JobError("--concurrency: give at least one number, e.g. 1,4,16")
        if max(self.concurrency) > MOST_WAITING:
            raise JobError(
                f"--concurrency {max(self.concurrency)}: a server takes {MOST_WAITING} requests at a time; give at most"
                " so many"
            )
        if self.num_adapters == 1:
            raise JobError("--adapters 1: one adapter cannot be mixed; give at least 2, or 0 to leave it out")
