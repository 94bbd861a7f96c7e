"""What training gained by each metric that is a mean over answers, with how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.runs.comparison.intervals import Interval, of_mean, of_scores

Scores = Mapping[str, Sequence[float]]  # of each metric, a score an answer


@dataclass(frozen=True)
class Gain:
    """A metric after training, and its difference from before on the same answers."""

    answers: int
    after: Interval
    difference: Interval | None  # None where the base was not measured on the same answers

    @property
    def text(self) -> str:
        """Both in percent, and whether the difference may be chance."""
        after = f"{_percent(self.after.low)} to {_percent(self.after.high)} (95 %, {self.answers} answers)"
        if self.difference is None:
            return after
        low, high = 100 * self.difference.low, 100 * self.difference.high
        chance = ", which may be chance" if low <= 0 <= high else ""
        return f"{after}; gained {low:+.1f} to {high:+.1f} points{chance}"


def gains(before: Scores, after: Scores) -> dict[str, Gain]:
    """Of each metric that has a score an answer.  Differences are paired: the same prompts, in the same order."""
    found = {}
    for metric, scores in after.items():
        old = before.get(metric, ())
        pairs = zip(scores, old, strict=True) if len(old) == len(scores) else None
        difference = _of_differences([new - old for new, old in pairs]) if pairs else None
        if scores:
            found[metric] = Gain(len(scores), of_scores(scores), difference)
    return found


def _of_differences(scores: Sequence[float]) -> Interval:
    """Of scores in [0, 1]: no more than the whole is gained."""
    found = of_mean(scores)
    return Interval(found.value, max(-1.0, found.low), min(1.0, found.high))


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"
