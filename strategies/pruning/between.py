"""What pruning does between steps: scores are averaged over them, masks move along a schedule and then stay.

Everything is a function of the step and of what lies in the setup's buffers: a resumed run continues alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strategies.pruning.groups import words_of
from strategies.pruning.masks import GroupMasks
from strategies.pruning.schedule import SparsitySchedule
from strategies.pruning.scores import GroupScores


class PruningSteps:
    """The `Between` of pruning."""

    def __init__(
        self,
        masks: GroupMasks,
        scores: GroupScores,
        schedule: SparsitySchedule,
        count_parameters: Callable[[dict[str, int]], int],
    ) -> None:
        """`count_parameters` of the model without so many groups, by kind."""
        self._masks, self._scores, self._schedule = masks, scores, schedule
        self._count_parameters = count_parameters

    def gradients_ready(self, step: int) -> None:
        self._scores.observe(step < self._schedule.end)

    def step_done(self, step: int) -> dict[str, Any] | None:
        done = step + 1
        if not self._schedule.moves(done):
            return None
        part, groups = self._schedule.part(done), self._masks.groups
        removed = {name: one.removed_at(part) for name, one in groups.items()}
        for name, count in removed.items():
            self._masks.remove(name, self._scores.of(name), count, self._scores.may_return)
        parts = " and ".join(words_of(groups[name], count) for name, count in removed.items())
        left = self._count_parameters(removed)
        text = f"{parts} are masked: {left:,} parameters are left"
        if done == self._schedule.end:
            text = (
                f"{parts} are masked: {left:,} parameters are left. From here on masks stay, the rest recovers, and"
                " held-out losses choose what is handed back"
            )
        return {
            "text": text,
            "removed": removed,
            "parameters_left": left,
        }
