"""Which combination is tried next.

`planned` draws from two streams, two of the first for one of the second: what is predicted to be best by the goal,
every prediction corrected by the trials so far; and the rest of the plan's Pareto front, then Optuna's own
suggestions among what could still win.  `optuna` and `random` know nothing of the plan: they are what it is compared
with.  Ranges, of which a plan knows nothing, are always Optuna's.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import optuna

from orchestrator.job.sections.search import LogUniform, RandInt
from orchestrator.job.space import Point, Range, Space, key_of
from orchestrator.planning.goal import by_goal
from orchestrator.search.advice import Advice, Forecast

optuna.logging.set_verbosity(optuna.logging.ERROR)

_TRIES = 30  # of Optuna to name something new
_RIDGE = 1.0  # of the corrections: as if each had been seen once to be 1
_STREAMS = (0, 0, 1)  # 0 = the best predicted, 1 = the front and Optuna


class Corrections:
    """Corrections of predictions by trials: a factor for each value of each key, drawn towards 1 while seen seldom.

    Ridge regression of log(measured / predicted) on the values of the points.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Point, float]] = []
        self._weights: dict[str, float] | None = None

    def learn(self, point: Point, measured: float, predicted: float) -> None:
        self._seen.append((point, math.log(measured / predicted)))
        self._weights = None

    def factor(self, point: Point) -> float:
        """Measured over predicted, as far as it is known."""
        if self._weights is None:
            self._weights = self._solve()
        return math.exp(sum(self._weights.get(name, 0.0) for name in _features(point)))

    def _solve(self) -> dict[str, float]:
        if not self._seen:
            return {}
        names = sorted({name for point, _ in self._seen for name in _features(point)})
        place = {name: index for index, name in enumerate(names)}
        rows = numpy.zeros((len(self._seen), len(names)))
        for row, (point, _) in enumerate(self._seen):
            for name in _features(point):
                rows[row, place[name]] = 1.0
        wanted = numpy.array([value for _, value in self._seen])
        weights = numpy.linalg.solve(rows.T @ rows + _RIDGE * numpy.eye(len(names)), rows.T @ wanted)
        return dict(zip(names, weights.tolist(), strict=True))


def _features(point: Point) -> list[str]:
    return ["any", *(f"{key}={value}" for key, value in point.items())]


@dataclass
class Sampler:
    """Names points to try, each once, and learns from what came of them."""

    space: Space
    advised: Forecast | None  # None for samplers that know no plan
    kind: str
    prefer: str
    objectives: Sequence[str]
    defaults: Callable[[str], Any]  # the job's own value of a range's key
    seed: int

    def __post_init__(self) -> None:
        space, seed = self.space, self.seed
        self.corrections = {"time": Corrections(), "memory": Corrections()}
        directions: list[Any] = ["minimize"] * len(self.objectives)
        self._study = optuna.create_study(directions=directions, sampler=_optuna_sampler(self.kind, seed))
        self._distributions: dict[str, Any] = {
            # Places in the list: values may be lists, which Optuna does not take as choices.
            key: optuna.distributions.CategoricalDistribution(range(len(values)))
            for key, values in space.choices.items()
        }
        self._distributions |= {key: _distribution(values) for key, values in space.ranges.items()}
        self._open: dict[str, optuna.trial.Trial] = {}
        self._tried: set[str] = set()
        self._streams, self._draw = itertools.cycle(_STREAMS), random.Random(seed)

    def ask(self) -> Point | None:
        """The next point; None where nothing is left."""
        if self.advised is None:
            return self._suggest(lambda point: True)
        known, point = self.advised.by_key, None

        def is_known(point: Point) -> bool:
            return key_of(self._choices(point)) in known

        if next(self._streams) == 1:
            front = next((a.point for a in self.advised.worth[: self.advised.num_front] if self._is_new(a.point)), None)
            point = self._enqueue(front) if front else self._suggest(is_known)
        if point is None:
            left = [advice for advice in self.advised.worth if self._is_new(advice.point)]
            point = self._enqueue(min(left, key=self._expected).point) if left else None
        if point is None and self.space.ranges:  # every choice was tried once: other numbers
            point = self._suggest(is_known)
        return point

    def tell(self, point: Point, values: Sequence[float] | None) -> None:
        """What came of a point; None where it failed."""
        self._tried.add(self._name(point))
        trial = self._open.pop(self._name(point), None)
        costs = None if values is None else [float(value) for value in values]
        state = optuna.trial.TrialState.FAIL if costs is None else optuna.trial.TrialState.COMPLETE
        if trial is not None:
            self._study.tell(trial, costs, state=state)
        elif costs is not None:  # of a search before it was resumed
            params = {key: _code(self.space, key, value) for key, value in self._fill(point).items()}
            self._study.add_trial(
                optuna.trial.create_trial(params=params, distributions=self._distributions, values=costs)
            )

    def learn(self, point: Point, time_s: tuple[float, float] | None, memory_bytes: tuple[float, float]) -> None:
        """Measured and predicted of a trial, for the predictions of those that are left; None = no time of its own."""
        if time_s:
            self.corrections["time"].learn(point, *time_s)
        self.corrections["memory"].learn(point, *memory_bytes)

    def _expected(self, advice: Advice) -> tuple[float, ...]:
        """What the goal wants least of, corrected."""
        seconds = advice.plan.total_s * self.corrections["time"].factor(advice.point)
        peak = advice.plan.memory.total_bytes * self.corrections["memory"].factor(advice.point)
        return by_goal(self.prefer, seconds, peak, -advice.score, cost=None)

    def _suggest(self, allowed: Callable[[Point], bool]) -> Point | None:
        choices = self.space.choices
        for _ in range(_TRIES):
            trial = self._new_trial()
            codes = {key: trial.params[key] for key in self._distributions}
            point = {key: choices[key][code] if key in choices else code for key, code in codes.items()}
            if allowed(point) and self._is_new(point):
                self._open[self._name(point)] = trial
                self._tried.add(self._name(point))
                return point
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        # A confident sampler suggests the same points again and again: then any other one.
        left = [point for point in self.space.points() if allowed(point) and self._is_new(point)]
        return self._enqueue(self._draw.choice(left)) if left else None

    def _enqueue(self, choices: Point) -> Point:
        """A point of the plan's, as a trial that Optuna learns from; ranges at the job's own values."""
        point = self._fill(choices)
        self._study.enqueue_trial({key: _code(self.space, key, value) for key, value in point.items()})
        trial = self._new_trial()
        final = {**choices, **{key: point[key] for key in self.space.ranges}}
        self._open[self._name(final)] = trial
        self._tried.add(self._name(final))
        return final

    def _new_trial(self) -> optuna.trial.Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental parts of Optuna, choices that are not strings
            return self._study.ask(self._distributions)

    def _fill(self, point: Point) -> Point:
        """With a value for every key of the space: knobs of other methods at their first, ranges at the job's own."""
        filled = {key: point.get(key, values[0]) for key, values in self.space.choices.items()}
        for key, values in self.space.ranges.items():
            filled[key] = point.get(key, _inside(values, self.defaults(key)))
        return filled

    def _choices(self, point: Point) -> Point:
        return {key: value for key, value in point.items() if key not in self.space.ranges}

    def _is_new(self, point: Point) -> bool:
        if self.space.ranges and set(point) >= set(self.space.ranges):
            return self._name(point) not in self._tried
        return not any(name.startswith(key_of(self._choices(point)) + "|") for name in self._tried)

    def _name(self, point: Point) -> str:
        return f"{key_of(self._choices(point))}|{[point.get(key) for key in self.space.ranges]}"


def _optuna_sampler(kind: str, seed: int) -> Any:
    seed %= 2**32  # what numpy's generators take; a job's seed may be larger
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.samplers.RandomSampler(seed) if kind == "random" else optuna.samplers.TPESampler(seed=seed)


def _code(space: Space, key: str, value: Any) -> Any:
    return space.choices[key].index(value) if key in space.choices else value


def _distribution(values: Range) -> Any:
    if isinstance(values, RandInt):
        return optuna.distributions.IntDistribution(*values.randint)
    if isinstance(values, LogUniform):
        return optuna.distributions.FloatDistribution(*values.loguniform, log=True)
    return optuna.distributions.FloatDistribution(*values.uniform)


def _inside(values: Range, own: Any) -> Any:
    """The job's own value where it lies in the range, else its middle."""
    low, high = next(iter(values.model_dump().values()))
    if isinstance(own, int | float) and low <= own <= high:
        return own
    if isinstance(values, RandInt):
        return (low + high) // 2
    return math.sqrt(low * high) if isinstance(values, LogUniform) else (low + high) / 2
