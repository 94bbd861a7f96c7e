"""One worker for several runs over one base model: each in a thread, of which exactly one runs at a time.

Each run does what it does alone (workers/worker.py): preflight, evaluation, loop, checkpoints, hand-back.  Only the
passes of training are shared.  A run that fails is recorded as failed and the others continue.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.runs.events import Note
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.determinism import deterministic
from orchestrator.training.together.seat import SharedModel, SharedSeat
from orchestrator.training.workers.failures import record_failure
from orchestrator.training.workers.worker import work
from strategies.contract import MemoryEstimate
from strategies.multi_lora.turns import Turn, take_turns
from strategies.step import thread_waits


@dataclass(frozen=True)
class SharedWork:
    """What a worker of several runs does, in place of `worker.work`; Ray sends it there."""

    folders: tuple[str, ...]  # of the runs
    places: int  # of them that train at a time
    memory: MemoryEstimate  # of those together
    num_workers: int = 1  # of this machine that train side by side

    def __call__(self, first: RunFolder, rank: int, size: int, node: str, slot: int) -> None:
        """Train the runs to their ends; `first` is one of them."""
        runs = [RunFolder(Path(folder)) for folder in self.folders]

        def note(text: str) -> None:
            for run in runs:
                run.record(Note(text))

        shared = SharedModel(len(runs), self.memory, note, self.num_workers)
        thread_waits.use_threads(first.plan().part_of(node, slot).threads)
        calls = [partial(_work, shared, run, node, slot) for run in runs]
        with deterministic(first.job().spec.train.deterministic):
            take_turns(calls, self.places, shared.run_pass)


def _work(shared: SharedModel, run: RunFolder, node: str, slot: int, turn: Turn) -> None:
    """One run, to its end or to its failure."""
    try:
        work(run, 0, 1, node, slot, SharedSeat(shared, turn, run.run_id))
    except BaseException as error:
        logging.getLogger("orchestrator.worker").warning("%s failed", run.run_id, exc_info=True)
        record_failure(run, error, node)
