"""Trials over one base model in one process: each in a thread, of which one runs at a time.  No Ray.

A trial waits in its thread, at its rung, for what is decided of it; passes go on for those that are under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from orchestrator.search.trial_run import TrialRun
from strategies.contract import MemoryEstimate
from strategies.multi_lora.turns import Rounds, Turn
from strategies.step import host_memory, thread_waits

_NO_LIMIT = 10**6  # who has a place is decided by who sends the trials


class ResidentTrainer:
    """The process's base model and the trials that share it."""

    def __init__(self, places: int, memory: MemoryEstimate, threads: int) -> None:
        """`memory`: predicted of as many trials as there are places; `threads`: that compute a pass."""
        import orchestrator.training.workers.experiment  # noqa: F401  what trials need
        from orchestrator.training.together.seat import SharedModel

        host_memory.freeze_imports()
        thread_waits.use_threads(threads)
        self._notes: list[str] = []
        self._reports: list[dict[str, Any]] = []
        self._shared = SharedModel(places, memory, self._notes.append)
        self._rounds = Rounds(_NO_LIMIT, self._when_all_wait)
        self._waiting: dict[int, Turn] = {}  # at their rungs
        self._leaving: set[int] = set()

    def advance(
        self, begin: Sequence[Mapping[str, Any]], proceed: Sequence[int], leave: Sequence[int]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Train until a trial has something to report; the reports, and notes on what happened.

        Trials that `leave` give their memory back first, those that `begin` and `proceed` train.
        """
        self._leaving |= {*leave}
        for number in leave:
            self._waiting.pop(number).ready()
        if leave:
            self._rounds.run()
        for number in proceed:
            self._waiting.pop(number).ready()
        for config in begin:
            self._rounds.add(partial(self._try, config))
        while not self._reports and self._rounds.run():
            pass
        reports, notes = list(self._reports), list(self._notes)
        self._reports.clear()
        self._notes.clear()
        return reports, notes

    def _when_all_wait(self) -> None:
        if not self._reports:  # those are decided of first
            self._shared.run_pass()

    def _try(self, config: Mapping[str, Any], turn: Turn) -> None:
        """One trial, in its thread."""
        from orchestrator.training.together.seat import SharedSeat

        number = config["number"]
        seat = SharedSeat(self._shared, turn, str(number))
        trial = TrialRun(config, next(iter(config["plans"])), seat)
        try:
            while True:
                report = trial.step()
                self._reports.append(report)
                self._notes += [f"trial {number}: {note}" for note in trial.notes]
                trial.notes.clear()
                if report["done"]:
                    return
                self._waiting[number] = turn
                turn.wait()
                if number in self._leaving:
                    return
        except BaseException as error:  # whatever it is, it is this trial's
            self._reports.append(trial.failed(error))
        finally:
            trial.close()
