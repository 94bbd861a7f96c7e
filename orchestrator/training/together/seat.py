"""A run's place among those that train over one base model: its copy of the base, its passes, its part of the time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

from orchestrator.runs.events import StepReport
from orchestrator.training.worker_context import HeaviestLoad
from strategies.contract import MemoryEstimate
from strategies.multi_lora.joint_model import BaseCopies, JointModel
from strategies.multi_lora.passes import JointPasses, JointRow
from strategies.multi_lora.turns import Turn
from strategies.step import document_attention, host_memory
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

_MASKING = ("sdpa", "eager")
_PASSES_A_TRIM = 10


class SharedModel:
    """The base model of several runs, loaded once, and the row in which their micro-batches meet."""

    def __init__(
        self, num_runs: int, memory: MemoryEstimate, note: Callable[[str], None], num_workers: int = 1
    ) -> None:
        """`num_workers`: of this machine that train side by side, each a model of its own."""
        self.num_runs, self.memory, self._note, self.num_workers = num_runs, memory, note, num_workers
        self._base: BaseCopies | None = None
        self._row: JointRow | None = None
        self.passed: list[HeaviestLoad] = []  # in preflights
        self.measured: dict[Hashable, float] = {}  # by what runs measure once
        self._num_passes = 0

    def base(self, load: Callable[[], Any]) -> BaseCopies:
        """The base; the first one who asks loads it."""
        if self._base is None:
            self._base = BaseCopies(load())
        return self._base

    def row(self, attention: str) -> JointRow:
        """The row; all runs plan the same kernel, as their model is the same.

        One that masks scores reads every value of the row: 0 times another job's nan is nan.  `document` takes its
        place, in which no job's values meet another's, for the same numbers up to rounding.
        """
        assert self._base is not None  # a run that joins has a copy of it
        if self._row is None:
            self._row = JointRow(JointModel(self._base), self._note)
            apart = document_attention.NAME if attention in _MASKING else attention
            self._row.model.model.set_attn_implementation(apart)
        return self._row

    def run_pass(self) -> None:
        """One pass for all runs that wait for theirs."""
        assert self._row is not None
        if self._row.backlogs[0].job.setup.device.type == "cpu":
            host_memory.keep()
            if self._num_passes % _PASSES_A_TRIM == 0:
                host_memory.trim()  # passes have ever other sizes, and what jobs keep lies between them
        self._num_passes += 1
        self._row.run_pass()


class SharedSeat:
    """One run's place; its thread alone uses it."""

    def __init__(self, shared: SharedModel, turn: Turn, run_id: str) -> None:
        self._shared, self._turn, self._run_id = shared, turn, run_id
        self._passes: JointPasses | None = None
        self._counted_s = (0.0, 0.0)  # waited and computed, at the last step's end

    @property
    def num_runs(self) -> int:
        """That share the base."""
        return self._shared.num_runs

    @property
    def num_workers(self) -> int:
        """Of this machine that train side by side."""
        return self._shared.num_workers

    @property
    def memory(self) -> MemoryEstimate:
        """Predicted of all that train at a time."""
        return self._shared.memory

    @property
    def others_s(self) -> float:
        """Seconds so far in which other runs of this process were computed while it waited."""
        return self._passes.others_s if self._passes else 0.0

    def copy_base(self, load: Callable[[], Any]) -> Any:
        """Modules of its own over the base's tensors."""
        return self._shared.base(load).copy()

    def has_passed(self, load: HeaviestLoad) -> bool:
        """Whether another run of this process passed a preflight with as much."""
        return any(other.covers(load) for other in self._shared.passed)

    def add_passed(self, load: HeaviestLoad) -> None:
        """Its own preflight went well."""
        self._shared.passed.append(load)

    def measure_once(self, key: Hashable, measure: Callable[[], float]) -> float:
        """What another run with this key has measured in this process, or `measure` now."""
        if key not in self._shared.measured:
            self._shared.measured[key] = measure()
        return self._shared.measured[key]

    @contextlib.contextmanager
    def joined(self, setup: TrainSetup, techniques: Techniques, note: Callable[[str], None]) -> Iterator[None]:
        """Inside the block its micro-batches share passes with those of other runs, where they can."""
        if setup.device.type == "cpu":
            host_memory.trim()  # what its preflight and its first evaluation left between what stays
        row, why = self._shared.row(techniques.attn_implementation), "its rows are padded"
        if techniques.packing:
            self._passes, why = row.join(self._run_id, setup, self._turn)
        else:
            self._passes = JointPasses(setup, row, self._turn, self._run_id, is_joined=False)
        if why:
            note(f"its passes run by themselves, between those of the other runs: {why}")
        setup.passes, self._counted_s = self._passes, (0.0, 0.0)
        try:
            yield
        finally:
            setup.passes = None
            self._passes.leave()
            if setup.device.type == "cpu":
                host_memory.let_go()

    def attributed(self, report: StepReport) -> StepReport:
        """The report of a step whose time is its own: of shared passes its part by tokens."""
        assert self._passes
        now = self._passes.waited_s, self._passes.computed_s
        waited, computed = (one - before for one, before in zip(now, self._counted_s, strict=True))
        self._counted_s = now
        seconds = max(report.seconds - waited, 0.0) + computed
        return replace(report, seconds=round(seconds, 4), tokens_per_s=round(report.tokens / seconds, 1))
