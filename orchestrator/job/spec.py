"""JobSpec: what the user wants, as a job file's sections state it.  `job_file.py` reads files into it.

`auto` stays as it is: the plan resolves it, with the reason.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from clusters.safe.reading import NAME_PATTERN
from orchestrator.job.scoring.answers import pattern_mistake
from orchestrator.job.scoring.functions import name_mistakes
from orchestrator.job.sections.machines import (
    ClusterSection,
    CostSection,
    GoalSection,
    KubernetesSection,
    StrategySection,
)
from orchestrator.job.sections.methods import METHOD_SECTIONS, AnyMethod, AutoMethod
from orchestrator.job.sections.objectives import DEFAULT_OBJECTIVE, OBJECTIVE_SECTIONS, AnyObjective
from orchestrator.job.sections.search import BankSection, SearchSection, TrackingSection
from orchestrator.job.sections.section import Section, key
from orchestrator.job.sections.training import (
    CheckpointSection,
    DataSection,
    EvalSection,
    ModelSection,
    TrainSection,
)
from strategies import METHODS, OBJECTIVES, schedules
from strategies.objectives.contract import Objective
from strategies.optimizers import OPTIMIZERS


class JobSpec(Section):
    """What the user wants."""

    version: Literal[1] = key(1, "version of this format")
    name: str = key("job", "name of the job; run folders start with it", pattern=NAME_PATTERN)
    model: ModelSection
    data: DataSection
    method: AnyMethod = Field(  # type: ignore[valid-type]
        default_factory=AutoMethod, description="how the model is trained"
    )
    objective: AnyObjective = Field(  # type: ignore[valid-type]
        default_factory=OBJECTIVE_SECTIONS[DEFAULT_OBJECTIVE],
        description="what training makes better: answers that are copied, or answers that are preferred",
    )
    train: TrainSection = Field(default_factory=TrainSection, description="optimisation")
    goal: GoalSection = Field(default_factory=GoalSection, description="what the plan aims at")
    cost: CostSection = Field(default_factory=CostSection, description="prices")
    strategy: StrategySection = Field(default_factory=StrategySection, description="layout on the machines")
    cluster: ClusterSection = Field(default_factory=ClusterSection, description="where it runs")
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="what is kept")
    eval: EvalSection = Field(default_factory=EvalSection, description="how quality is measured")
    tracking: TrackingSection = Field(default_factory=TrackingSection, description="where results are mirrored")
    kubernetes: KubernetesSection = Field(
        default_factory=KubernetesSection, description="what a RayJob needs that no plan knows"
    )
    search: SearchSection = Field(default_factory=SearchSection, description="what `search` tries")
    bank: BankSection = Field(default_factory=BankSection, description="adapters that were trained already")

    def methods(self) -> list[Any]:
        """The methods that may be used, with their options: the one the job states, or each of them for `auto`."""
        if self.method.type not in METHODS:
            known = [method() for name, method in METHODS.items() if not name.startswith("experimental_")]
            return [method for method in known if method.full_rank or not self.goal.full_rank]
        options = {name: getattr(self.method, name) for name in type(self.method).model_fields if name != "type"}
        return [METHODS[self.method.type](**options)]

    def build_objective(self) -> Objective:
        """The objective with its options.  Raises ValueError for options that do not go together."""
        options = {name: getattr(self.objective, name) for name in type(self.objective).model_fields if name != "type"}
        return OBJECTIVES[self.objective.type](**options)

    def find_conflicts(self) -> list[str]:
        """Values that are right by themselves and do not go together, a sentence each."""
        found = [pattern] if (pattern := pattern_mistake(self.eval.answer_pattern)) else []
        if self.eval.metrics != "auto":
            found += name_mistakes(self.eval.metrics)
        for name, price in self.cost.nodes.items():
            given = sorted({"purchase", "years"} & set(price.model_dump(exclude_unset=True, exclude_none=True)))
            if price.per_hour is not None and given:
                found.append(
                    f"cost.nodes.{name} has {' and '.join(given)} and per_hour; give purchase with years, or per_hour"
                )
        train = self.train
        found += schedules.mistakes(train.lr_scheduler_type, train.lr_scheduler_kwargs, train.learning_rate)
        if train.optim != "auto":
            found += OPTIMIZERS[train.optim].schedule_mistakes(train.optim, train.model_dump(exclude_unset=True))
        try:
            self.build_objective()
        except ValueError as error:
            found.append(f"objective.{error}")
        return found


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation
    for name, info in JobSpec.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
TYPED_SECTIONS = {"method": METHOD_SECTIONS, "objective": OBJECTIVE_SECTIONS}  # whose `type` says which keys they have
