"""The trials that share base models: which train at a time, and what becomes of each.  No Ray: trainers are given.

A resident trainer a slot holds one base model.  Trials get a place as others end; those whose trainer is lost, or whose
memory runs out beside others, are tried again by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from clusters.units import format_bytes
from orchestrator.runs.search_folder import Trial
from orchestrator.search.sharing import NextTrial, Share, has_place, places_of
from orchestrator.search.trial_run import trial_of
from strategies.contract import MemoryEstimate

_AHEAD = 8  # points that are drawn before it is their turn, to find those that share a base model
_ALONE_AHEAD = 2  # the same of points that cannot share, which gain nothing by being drawn before others have ended
_POLL_S = 0.2

Report = dict[str, Any]


class TrainerLost(Exception):
    """The process of a trainer ended; the text says how."""


class Trainer(Protocol):
    """A process that holds a `ResidentTrainer`."""

    def advance(self, begin: list[NextTrial], proceed: list[int], leave: list[int]) -> None:
        """Call its `advance`; do not wait for it."""
        ...

    def poll(self, timeout_s: float) -> tuple[list[Report], list[str]] | None:
        """What that call came to; None while it is under way.  Raises TrainerLost."""
        ...

    def end(self) -> None: ...


class Drawing(Protocol):
    """What is needed of a search."""

    alone: list[NextTrial]  # for whom comes later: tried by themselves

    def draw(self) -> NextTrial | None:
        """The next point; None where all is drawn."""
        ...

    def started(self, number: int) -> None: ...

    def reported(self, number: int, seconds: float) -> None:
        """How long a trial has taken so far."""
        ...

    def ended(self, trial: Trial) -> None: ...

    def enough(self) -> bool: ...


@dataclass
class _Group:
    """Trials in one trainer, and what it is sent next."""

    share: Share  # of the first
    trainer: Trainer
    running: dict[int, NextTrial] = field(default_factory=dict)
    last: dict[int, Report] = field(default_factory=dict)  # of those that are running
    begin: list[NextTrial] = field(default_factory=list)  # of those, for the next call
    proceed: list[int] = field(default_factory=list)
    leave: list[int] = field(default_factory=list)
    is_busy: bool = False  # a call is under way

    @property
    def shares(self) -> list[Share]:
        return [one.share for one in self.running.values() if isinstance(one.share, Share)]


class SharedTrials:
    """Runs trials as long as there are some that can share."""

    def __init__(
        self,
        search: Drawing,
        start: Callable[[NextTrial, int, MemoryEstimate], Trainer],
        stops: Callable[[int, Report], bool],
        num_slots: int,
        say: Callable[[str], None],
    ) -> None:
        """`start`: a trainer for trials like this one; `stops`: whether a trial ends at its rung, by the scheduler."""
        self._search, self._start, self._stops, self._num_slots, self._say = search, start, stops, num_slots, say
        self._waiting: list[NextTrial] = []
        self._groups: list[_Group] = []
        self._lost: set[Hashable] = set()  # keys of trainers that were lost: their trials do not share again
        self._said: set[str] = set()

    def run(self) -> None:
        """Until nothing is left that can share, or it is enough; what is left waits in the search's `alone`."""
        try:
            while not self._search.enough():
                self._open_groups()
                if not self._groups:
                    break
                for group in list(self._groups):
                    self._turn(group)
            else:
                self._cut_off()
        finally:
            for group in self._groups:
                group.trainer.end()
            self._search.alone += self._waiting

    def _open_groups(self) -> None:
        """A trainer in each free slot for which there are two trials that can share."""
        while len(self._groups) < self._num_slots:
            self._draw_until(lambda: None)
            by_key: dict[Hashable, list[Share]] = {}
            for share in (one.share for one in self._waiting if isinstance(one.share, Share)):
                if share.key not in self._lost:
                    by_key.setdefault(share.key, []).append(share)
            shares = max(by_key.values(), key=len, default=[])
            places, memory = places_of(shares) if shares else (0, None)
            if places < 2 or memory is None:
                return
            self._say(
                f"trials of one layout share one base model in one worker, {places} at a time, with a predicted"
                f" {format_bytes(memory.total_bytes)}; others follow as those end"
            )
            first = next(one for one in self._waiting if one.share is shares[0])
            group = _Group(shares[0], self._start(first, places, memory))
            self._groups.append(group)
            self._fill(group)

    def _turn(self, group: _Group) -> None:
        """Send a group's trainer what is decided, or receive its reports."""
        if not group.is_busy:
            self._fill(group)
            if not group.running:
                group.trainer.end()
                self._groups.remove(group)
                return
            group.trainer.advance(group.begin, group.proceed, group.leave)
            group.begin, group.proceed, group.leave, group.is_busy = [], [], [], True
        try:
            found = group.trainer.poll(_POLL_S / len(self._groups))
        except TrainerLost as error:
            self._lose(group, str(error))
            return
        if found is None:
            return
        group.is_busy = False
        for note in found[1]:
            self._say(note)
        for report in found[0]:
            self._receive(group, report)

    def _fill(self, group: _Group) -> None:
        """Give the group's free places away."""
        while one := self._next(group):
            self._waiting.remove(one)
            group.running[one.number] = one
            group.begin.append(one)
            self._search.started(one.number)
            self._search.reported(one.number, 0.0)

    def _next(self, group: _Group) -> NextTrial | None:
        """The next point that has a place in the group."""
        others = group.shares

        def found() -> NextTrial | None:
            for one in self._waiting:
                share = one.share
                if isinstance(share, Share) and share.key == group.share.key and has_place(share, others):
                    return one
            return None

        if others and not has_place(others[0], others):
            return None  # nobody is drawn for a row that is full
        return self._draw_until(found)

    def _draw_until(self, found: Callable[[], NextTrial | None]) -> NextTrial | None:
        """Draw until one is found among those that wait, or enough wait; of those that cannot share each reason is said
        once."""
        num_alone = 0
        while not (wanted := found()) and len(self._waiting) < _AHEAD and num_alone < _ALONE_AHEAD:
            if (one := self._search.draw()) is None:
                break
            if isinstance(one.share, Share):
                self._waiting.append(one)
                continue
            num_alone += 1
            self._search.alone.append(one)
            if one.share and one.share not in self._said:
                self._said.add(one.share)
                self._say(f"trial {one.number} and those like it are tried by themselves: {one.share}")
        return wanted

    def _receive(self, group: _Group, report: Report) -> None:
        """A trial is at a rung or at its end."""
        number = report["trial"]["number"]
        if report["short_of_memory"] and len(group.running) > 1:
            self._retry(group, number, f"memory ran out beside others ({report['trial']['reason']})")
            return
        self._search.reported(number, report["trial"]["seconds"])
        stops = self._stops(number, report)
        if not report["done"] and not stops:
            group.last[number] = report
            group.proceed.append(number)
            return
        if not report["done"]:
            group.leave.append(number)
        del group.running[number]
        group.last.pop(number, None)
        self._search.ended(trial_of(report))

    def _lose(self, group: _Group, reason: str) -> None:
        """A trainer's process ended: whose fault it was nobody knows."""
        for number in list(group.running):
            self._retry(group, number, f"the process of {len(group.running)} trials ended ({reason})")
        self._lost.add(group.share.key)
        group.trainer.end()
        self._groups.remove(group)

    def _retry(self, group: _Group, number: int, why: str) -> None:
        self._say(f"trial {number} is tried again by itself: {why}")
        self._search.alone.append(group.running.pop(number))
        group.last.pop(number, None)

    def _cut_off(self) -> None:
        """The budget is spent, or the search is to stop: trials are left as they stood at their last report."""
        for group in self._groups:
            for report in group.last.values():
                self._search.ended(trial_of(report))
