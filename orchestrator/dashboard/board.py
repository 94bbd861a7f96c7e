"""The runs of a folder as rows of a table, and what of them changed since a moment.

A look asks the kernel for the times of two files of each run; only a run whose files changed is read, and of a live
one only what was appended.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import OrderedDict
from pathlib import Path
from threading import RLock
from typing import Any

from clusters.safe.masking import masked_values
from orchestrator.errors import JobError
from orchestrator.planning.plan import Plan
from orchestrator.remote.record import Remote
from orchestrator.runs.run_folder import RunFolder, folders_in, state_without_driver
from orchestrator.runs.search_folder import SearchFolder
from orchestrator.runs.summary.facts import RunFacts, facts_of_whole_run, model_name_of
from orchestrator.runs.summary.follow import FollowedRun
from orchestrator.runs.summary.time_left import time_left

Row = dict[str, Any]
_MOST_FOLLOWED = 8  # runs whose summary stays in memory, those beside that are live
_LOOK_S = 0.3  # that a look may take: of a thousand runs that nobody has read yet the newest are there at once
_AGAIN_S = 30.0  # after which names are listed in any case: a folder may become a run without a trace above it
_COARSE_NS = 2 * 10**9  # the coarsest clock of a file system


class Board:
    """What is known of a folder's runs.  Of several threads, one looks at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.serial = 0  # of the last change
        self.is_behind = False  # whether the last look ended before it had read everything
        self._lock = RLock()
        self._rows: dict[str, tuple[int, Row]] = {}  # run -> serial of its last change, its row
        self._seen: dict[str, tuple[int, ...]] = {}  # run -> how its files were
        self._live: set[str] = set()
        self._followed: OrderedDict[str, FollowedRun] = OrderedDict()
        self._plans: dict[str, tuple[tuple[int, ...], Plan]] = {}
        self._runs: dict[str, RunFolder] = {}  # and searches
        self._listed_ns, self._listed_s = -1, -math.inf

    def since(self, serial: int) -> tuple[list[Row], int]:
        """Look, and the rows that changed after `serial`, oldest change first; a run that is gone is `{run, gone}`.

        `is_behind` afterwards where there are runs that were not read yet.
        """
        with self._lock:
            self._look()
            changed = sorted((number, name) for name, (number, _) in self._rows.items() if number > serial)
            return [self._rows[name][1] for _, name in changed], self.serial

    def run(self, name: str) -> RunFolder | None:
        """A run or a search by its folder's name."""
        with self._lock:
            if name not in self._runs:
                self._list_runs()
            return self._runs.get(name)

    def row(self, run: RunFolder) -> Row:
        """What is known of a run now."""
        with self._lock:
            self._look_at(run)
            return self._rows[run.run_id][1]

    def follow(self, run: RunFolder) -> FollowedRun:
        """The run's events up to now.  Raises JobError."""
        with self._lock:
            found = self._followed.get(run.run_id) or FollowedRun(run)
            found.update()
            self._followed[run.run_id] = found
            self._followed.move_to_end(run.run_id)
            for name in [one for one in self._followed if one not in self._live][: -_MOST_FOLLOWED or None]:
                del self._followed[name]
            return found

    def plan(self, run: RunFolder) -> Plan | None:
        """A run's plan, None where it has none yet.  Raises JobError."""
        identity = _times(f"{run.path}/plan.json")
        if identity == (0,):
            return None
        with self._lock:
            known = self._plans.get(run.run_id)
            if known is None or known[0] != identity:
                known = self._plans[run.run_id] = identity, run.plan()
                others = [one for one in self._plans if one not in self._live and one != run.run_id]
                for name in others[:-_MOST_FOLLOWED]:
                    del self._plans[name]
            return known[1]

    def _look(self) -> None:
        self._list_runs()
        until = time.monotonic() + _LOOK_S
        for run in self._runs.values():
            if self._look_at(run) and time.monotonic() > until:
                self.is_behind = True
                return
        self.is_behind = False

    def _list_runs(self) -> None:
        try:
            changed_ns = self.folder.stat().st_mtime_ns
        except OSError:
            changed_ns = 0
        now = time.monotonic()
        is_settled = changed_ns + _COARSE_NS < time.time_ns()
        if changed_ns == self._listed_ns and is_settled and now - self._listed_s < _AGAIN_S:
            return
        self._listed_ns, self._listed_s = changed_ns, now
        with contextlib.suppress(JobError):
            there = {path.name: path for path in folders_in(self.folder)}
            for name in self._runs.keys() - there.keys():
                del self._runs[name]
                self._change(name, {"run": name, "gone": True})
                self._seen.pop(name, None)
                self._followed.pop(name, None)
                self._live.discard(name)
            new = RunFolder.in_order(RunFolder(there[name]) for name in there.keys() - self._runs.keys())
            for name in [run.run_id for run in reversed(new)]:  # the newest are read first
                for found in (RunFolder(there[name]), SearchFolder(there[name])):
                    if found.has_started:
                        self._runs[name] = found

    def _look_at(self, run: RunFolder) -> bool:
        """Whether it had to be read."""
        name, path = run.run_id, str(run.path)
        seen = (*_times(f"{path}/events.jsonl"), *_times(f"{path}/.lock"))
        if isinstance(run, SearchFolder):
            seen += (*_times(f"{path}/trials.jsonl"), *_times(f"{path}/summary.json"))
        if self._seen.get(name) == seen and name not in self._live:
            return False
        is_live = run.is_locked()
        if self._seen.get(name) == seen and is_live:
            return False
        self._seen[name] = seen
        self._live.add(name) if is_live else self._live.discard(name)
        self._change(name, masked_values(self._row_of(run, is_live)))
        return True

    def _change(self, name: str, row: Row) -> None:
        if name not in self._rows or self._rows[name][1] != row:
            self.serial += 1
            self._rows[name] = self.serial, row

    def _row_of(self, run: RunFolder, is_live: bool) -> Row:
        try:
            if isinstance(run, SearchFolder):
                return _row_of_search(run, is_live)
            if is_live:
                return self._row_of_live(run)
            remote, facts = Remote.of(run), facts_of_whole_run(run)
            row = _row_of_facts(run, facts)
            if remote and not remote.is_closed:
                row |= {"state": "sent", "where": remote.address}
            return row
        except JobError as error:
            state = "running" if is_live else "damaged"
            return {"run": run.run_id, "kind": run.kind, "state": state, "damage": str(error)}

    def _row_of_live(self, run: RunFolder) -> Row:
        found, plan = self.follow(run).summary, self.plan(run)
        last = found.last_step
        row = {
            "run": run.run_id,
            "kind": run.kind,
            "state": "running",
            "doing": found.doing,
            "model": model_name_of(run),
            "method": plan.method["type"] if plan else None,
            "step": last.step if last else 0,
            "num_steps": plan.num_steps if plan else None,
            "loss": finite(last.loss) if last else None,
            "before": finite(found.loss_before),
            "after": finite(found.loss_after),
            "tokens_per_s": finite(last.tokens_per_s) if last else None,
            "started": found.started,
        }
        if found.progress:
            row |= {"done": found.progress.done, "total": found.progress.total}
        if plan:
            left = time_left(found, plan)
            row |= {"left_s": round(left.seconds, 1), "left_is_measured": left.is_measured}
        return row


def _row_of_facts(run: RunFolder, facts: RunFacts) -> Row:
    return {
        "run": run.run_id,
        "kind": run.kind,
        "state": state_without_driver(facts.state),
        "model": facts.model,
        "method": facts.method,
        "step": facts.step,
        "num_steps": facts.num_steps,
        "loss": finite(facts.loss),
        "before": finite(facts.loss_before),
        "after": finite(facts.loss_after),
        "tokens_per_s": finite(facts.tokens_per_s),
        "started": facts.started,
        "error": facts.error if facts.state == "failed" else None,
    }


def _row_of_search(run: SearchFolder, is_live: bool) -> Row:
    trials = run.trials()
    losses = [trial.eval_loss for trial in trials if finite(trial.eval_loss) is not None]
    return {
        "run": run.run_id,
        "kind": run.kind,
        "state": "running" if is_live else run.state(),
        "step": len(trials),
        "after": min((loss for loss in losses if loss is not None), default=None),
        "started": run.began_ns() / 1e9,
    }


def finite(value: float | None) -> float | None:
    """None for what no JSON number can say."""
    return value if value is not None and math.isfinite(value) else None


def _times(path: str) -> tuple[int, ...]:
    """How a file is to the kernel; (0,) where none is."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path for each of thousands of names takes longer than the question
    except OSError:
        return (0,)
    return found.st_ino, found.st_size, found.st_mtime_ns
