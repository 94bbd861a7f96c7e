"""What the caller of a run hands in: who watches it, and what it does with a bank of adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job
    from orchestrator.planning.plan import InBank, Plan
    from orchestrator.runs.events import Event
    from orchestrator.runs.run_folder import RunFolder


class Watcher(Protocol):
    """Shows the progress of a run: a terminal, a log, nothing."""

    def say(self, text: str) -> None: ...

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None: ...

    def event(self, event: Event) -> None: ...


class Quiet:
    """Shows nothing; errors still come as exceptions."""

    def say(self, text: str) -> None: ...

    def planned(self, run: RunFolder, job: Job, plan: Plan, statistics: dict[str, Any]) -> None: ...

    def event(self, event: Event) -> None: ...


@dataclass(frozen=True)
class BankHooks:
    """What a run does with a bank of adapters: by default it finds nothing and leaves `bank.add` pending."""

    find: Callable[[Job], tuple[InBank, ...]] = lambda job: ()  # adapters that were trained on the job's very data
    add: Callable[[RunFolder, Job], str] | None = None  # of a finished run; returns what came of it


NO_BANK = BankHooks()
