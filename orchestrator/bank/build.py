"""`bank build`: an adapter for each data set of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from orchestrator.bank.hooks import BANK_HOOKS
from orchestrator.bank.library import add_run, bank_of
from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job.job_file import Job
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.lifecycle.together.submit import Submission, submit_together
from orchestrator.runs.events import Event, StateChange
from strategies.adapter_bank.adapter import Unusable
from strategies.adapter_bank.card import AdapterCard, BankError


class _Ends(Quiet):
    """Says when a run is trained, for those who wait for many."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say

    def event(self, event: Event) -> None:
        if isinstance(event, StateChange) and event.state == "finished":
            self._say(f"{self._name}: trained")


def build_bank(folder: Path, job_with: Callable[[list[str]], Job], say: Callable[[str], None]) -> list[AdapterCard]:
    """An adapter in the bank for each FOLDER/NAME that holds train.jsonl; finished ones are not trained again.

    Those that can share a base model train together.  One that fails does not stop the others.  Raises JobError
    for a folder without data sets, and in the end where some failed.
    """
    found = sorted(one for one in folder.glob("*/") if (one / "train.jsonl").is_file()) if folder.is_dir() else []
    if not found:
        raise JobError(f"{folder} holds no NAME/train.jsonl; each data set is a folder of its own")
    jobs: list[Submission] = []
    for one in found:
        held_out = f"data.eval={json.dumps(str((one / 'eval.jsonl').absolute()))}"
        job = job_with(
            [
                f"data.train={json.dumps(str((one / 'train.jsonl').absolute()))}",
                *([held_out] if (one / "eval.jsonl").is_file() else []),
                f"name={json.dumps(one.name)}",
            ]
        )
        jobs.append(Submission(job, _Ends(one.name, say), f"bank-{one.name}"))
    say(f"{len(jobs)} data sets")
    cards, failed = [], []
    for one, own, outcome in zip(found, jobs, submit_together(jobs, say, BANK_HOOKS), strict=True):
        try:
            if isinstance(outcome, OrchestratorError):
                raise outcome
            cards.append(card := add_run(bank_of(own.job, create=True), outcome, one.name))
            if losses := card.loss_change:
                say(f"{one.name}: held-out loss {losses}")
        except (OrchestratorError, BankError, Unusable) as error:
            failed.append(one.name)
            say(f"{one.name}: {error}")
    if failed:
        raise JobError(f"{len(failed)} of {len(found)} failed ({', '.join(failed)}); the same command tries them again")
    return cards
