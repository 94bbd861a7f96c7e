"""`bank build`: an adapter for each data set of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from orchestrator.bank.hooks import BANK_HOOKS
from orchestrator.bank.library import add_run, bank_of
from orchestrator.errors import ClusterError, JobError, OrchestratorError, Stopped
from orchestrator.job.job_file import Job
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.lifecycle.run import submit
from strategies.adapter_bank.adapter import Unusable
from strategies.adapter_bank.card import AdapterCard, BankError


def build_bank(folder: Path, job_with: Callable[[list[str]], Job], say: Callable[[str], None]) -> list[AdapterCard]:
    """An adapter in the bank for each FOLDER/NAME that holds train.jsonl; finished ones are not trained again.

    One that fails does not stop the others.  Raises JobError for a folder without data sets, and in the end where some
    failed.
    """
    found = sorted(one for one in folder.glob("*/") if (one / "train.jsonl").is_file()) if folder.is_dir() else []
    if not found:
        raise JobError(f"{folder} holds no NAME/train.jsonl; each data set is a folder of its own")
    cards, failed = [], []
    for number, one in enumerate(found, 1):
        held_out = f"data.eval={json.dumps(str((one / 'eval.jsonl').absolute()))}"
        job = job_with(
            [
                f"data.train={json.dumps(str((one / 'train.jsonl').absolute()))}",
                *([held_out] if (one / "eval.jsonl").is_file() else []),
                f"name={json.dumps(one.name)}",
            ]
        )
        say(f"{number}/{len(found)} {one.name}")
        try:
            run = submit(job, Quiet(), f"bank-{one.name}", BANK_HOOKS)
            cards.append(card := add_run(bank_of(job, create=True), run, one.name))
            if losses := card.loss_change:
                say(f"{one.name}: held-out loss {losses}")
        except (Stopped, ClusterError):
            raise
        except (OrchestratorError, BankError, Unusable) as error:
            failed.append(one.name)
            say(f"{one.name}: {error}")
    if failed:
        raise JobError(f"{len(failed)} of {len(found)} failed ({', '.join(failed)}); the same command tries them again")
    return cards
