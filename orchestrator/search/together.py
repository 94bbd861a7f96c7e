"""The trials that share base models: which train at a time, and what becomes of each.  No Ray: trainers are given.

A resident trainer a slot of a node holds one base model.  Trials get a place as others end, by what is predicted for
that node; those whose trainer is lost, or whose memory runs out beside others, are tried again by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from clusters.units import format_bytes
from orchestrator.runs.search_folder import Trial
from orchestrator.search.sharing import NextTrial, Share, has_place, places_of
from orchestrator.search.trial_run import trial_of
from strategies.contract import MemoryEstimate

_AHEAD = 8  # points that are drawn before it is their turn, to find those that share a base model
_ALONE_AHEAD = 2  # the same of points that cannot share, which gain nothing by being drawn before others have ended
_POLL_S = 0.2
_LEAST = 2  # trials with which a trainer begins: one gains nothing

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

    node: str
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
        return [share for one in self.running.values() if (share := share_at(one, self.node))]


def share_at(one: NextTrial, node: str) -> Share | None:
    """With whom a trial can share a base model on a node."""
    return one.shares.get(node) if isinstance(one.shares, dict) else None


def _only_at(one: NextTrial, node: str) -> NextTrial:
    """A trial as a node gets it."""
    return replace(one, plans={node: one.plans[node]})


class SharedTrials:
    """Runs trials as long as there are some that can share."""

    def __init__(
        self,
        search: Drawing,
        start: Callable[[NextTrial, int, MemoryEstimate], Trainer],
        stops: Callable[[int, Report], bool],
        slots: Mapping[str, int],
        say: Callable[[str], None],
    ) -> None:
        """`start`: a trainer for trials like this one, on the node of its plans; `stops`: whether a trial ends at its
        rung, by the scheduler; `slots`: of each node."""
        self._search, self._start, self._stops, self._slots, self._say = search, start, stops, slots, say
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
        """A trainer in each free slot for which there are two trials that can share; others of its places wait until
        all such slots have one."""
        while len(self._groups) < sum(self._slots.values()):
            self._draw_until(lambda: None)
            if not any(self._open_group(node, found) for node, found in self._alike()):
                return

    def _open_group(self, node: str, alike: list[NextTrial]) -> bool:
        """A trainer on a node for the first of these trials, where two of them are predicted to fit."""
        shares = [share for one in alike if (share := share_at(one, node))]
        places, memory = places_of(shares)
        if places < _LEAST:
            return False
        text = (
            f"trials of one layout share one base model in one worker, {places} at a time, with a predicted"
            f" {format_bytes(memory.total_bytes)}; others follow as those end"
        )
        self._say(f"{node}: {text}" if len(self._slots) > 1 else text)
        group = _Group(node, shares[0], self._start(_only_at(alike[0], node), places, memory))
        self._groups.append(group)
        self._fill(group, _LEAST)
        return True

    def _alike(self) -> list[tuple[str, list[NextTrial]]]:
        """Nodes with a free slot, with the trials that wait and could share a base model there: most trials first."""
        taken = Counter(group.node for group in self._groups)
        found: dict[tuple[str, Hashable], list[NextTrial]] = {}
        for node, count in self._slots.items():
            for one in self._waiting if taken[node] < count else ():
                if (share := share_at(one, node)) and share.key not in self._lost:
                    found.setdefault((node, share.key), []).append(one)
        return sorted(((node, alike) for (node, _), alike in found.items()), key=lambda one: -len(one[1]))

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

    def _fill(self, group: _Group, most: int | None = None) -> None:
        """Give the group's free places away, `most` of them now."""
        while (most is None or len(group.running) < most) and (one := self._next(group)):
            self._waiting.remove(one)
            group.running[one.number] = one
            group.begin.append(_only_at(one, group.node))
            self._search.started(one.number)
            self._search.reported(one.number, 0.0)

    def _next(self, group: _Group) -> NextTrial | None:
        """The next point that has a place in the group."""
        others = group.shares

        def found() -> NextTrial | None:
            for one in self._waiting:
                share = share_at(one, group.node)
                if share and share.key == group.share.key and has_place(share, others):
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
            if isinstance(one.shares, dict):
                self._waiting.append(one)
                continue
            num_alone += 1
            self._search.alone.append(one)
            if one.shares and one.shares not in self._said:
                self._said.add(one.shares)
                self._say(f"trial {one.number} and those like it are tried by themselves: {one.shares}")
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
