"""When the stages of a pipeline computed in one step: as a run's events hold it, and as the planner simulates it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a list of runs reads no cost model
    from strategies.cost.pipeline import Simulation
    from strategies.train_setup import PassTimes

_DIGITS = 5  # of a second: 10 us


@dataclass(frozen=True)
class StageSpans:
    """One stage's passes and waits in a step; seconds from a moment that all stages have in common."""

    replica: int
    stage: int
    passes: tuple[tuple[int, int, float, float], ...]  # 1 forward or 0 backward, micro-batch, begin, end
    waits: tuple[tuple[float, float], ...]  # begin, end

    @classmethod
    def of(cls, replica: int, stage: int, times: PassTimes, moment: float) -> StageSpans:
        """From the times that a stage recorded; `moment` is the common one, by its own clock."""
        return cls(
            replica,
            stage,
            tuple((int(is_forward), n, begin - moment, end - moment) for is_forward, n, begin, end in times.passes),
            tuple((begin - moment, end - moment) for begin, end in times.waits),
        )

    @property
    def begin_s(self) -> float:
        return min((begin for *_, begin, _ in self.passes), default=0.0)

    @property
    def end_s(self) -> float:
        return max((end for *_, end in self.passes), default=0.0)

    def shift(self, seconds: float) -> StageSpans:
        """The spans by a clock that started so many seconds earlier; waits that round to zero are dropped."""
        waits = ((round(begin + seconds, _DIGITS), round(end + seconds, _DIGITS)) for begin, end in self.waits)
        return replace(
            self,
            passes=tuple(
                (kind, number, round(begin + seconds, _DIGITS), round(end + seconds, _DIGITS))
                for kind, number, begin, end in self.passes
            ),
            waits=tuple((begin, end) for begin, end in waits if end > begin),
        )


def align_to_first_pass(stages: Iterable[StageSpans]) -> list[StageSpans]:
    """The spans with the start of the first pass as the common moment."""
    found = list(stages)
    first = min((one.begin_s for one in found if one.passes), default=0.0)
    return [one.shift(-first) for one in found]


def spans_of_simulation(simulated: Simulation, replica: int = 0) -> list[StageSpans]:
    """The spans of a predicted step; a stage waits whenever it does not compute."""
    found: list[StageSpans] = []
    for stage in range(len(simulated.passes)):
        events = [event for event in simulated.events if event.stage == stage]
        ends = [0.0, *(event.end_s for event in events)]
        begins = [*(event.begin_s for event in events), simulated.step_s]
        found.append(
            StageSpans(
                replica,
                stage,
                tuple((int(event.is_forward), event.micro_batch, event.begin_s, event.end_s) for event in events),
                tuple((end, begin) for end, begin in zip(ends, begins, strict=True) if begin > end),
            )
        )
    return found
