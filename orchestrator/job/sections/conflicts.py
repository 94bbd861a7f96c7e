"""Values of a job that are right by themselves and do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.job.scoring.answers import pattern_mistake
from orchestrator.job.scoring.functions import name_mistakes
from strategies import schedules

if TYPE_CHECKING:  # it is made of the sections
    from orchestrator.job.spec import JobSpec


def find_conflicts(spec: JobSpec) -> list[str]:
    """A sentence for each."""
    found = [pattern] if (pattern := pattern_mistake(spec.eval.answer_pattern)) else []
    if spec.eval.metrics != "auto":
        found += name_mistakes(spec.eval.metrics)
    train = spec.train
    found += schedules.mistakes(train.lr_scheduler_type, train.lr_scheduler_kwargs, train.learning_rate)
    try:
        spec.build_objective()
    except ValueError as error:
        found.append(f"objective.{error}")
    return found
