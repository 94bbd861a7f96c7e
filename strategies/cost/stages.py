"""What a stage of a pipeline costs on each device as a function of its layers; `pipeline` cuts by it.  Pure arithmetic.

Memory and seconds of a stage are affine in its layers, and memory in its micro-batches in flight, so a method's
estimates of a few stages give all.  Where the moment of the peak changes with the layers, the line through two of them
lies above the peak: a cut may be a little too careful.  The stages that are chosen are estimated as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import Method, StrategyPlan
from strategies.cost.phases import forward_share
from strategies.cost.pipeline import Line, Pass, Role, Way
from strategies.workload import StagePart, Techniques, Workload


@dataclass(frozen=True)
class Place:
    """A device that may have a stage: its limits, and the settings that are worth an estimate."""

    device: DeviceCapability
    node: NodeCapability
    device_bytes: float
    host_bytes: float  # of the node's own memory
    settings: tuple[Techniques, ...]  # the plainest first; without a stage
    kind: Hashable = None  # places of one kind cost the same; None = of its own


@dataclass(frozen=True)
class StageMemory:
    """Memory of a stage at two numbers of layers, on the device and on its host."""

    device: tuple[float, float]
    host: tuple[float, float]

    def interpolate(self, other: StageMemory, part: float) -> StageMemory:
        """On the line through both: `part` of the way to the other, or beyond it."""

        def between(one: tuple[float, float], two: tuple[float, float]) -> tuple[float, float]:
            return one[0] + part * (two[0] - one[0]), one[1] + part * (two[1] - one[1])

        return StageMemory(between(self.device, other.device), between(self.host, other.host))


@dataclass
class StageCosts:
    """The ways in which each of some places could compute stages of a model, with one layout of micro-batches."""

    method: Method
    workload: Workload
    places: Sequence[Place]
    needed: Callable[[StrategyPlan, Place], float]  # what a device must have for a plan
    margins: dict[int, float] = field(default_factory=dict)  # of a place's limits, where the lines were too hopeful
    _plans: dict[tuple[int, Techniques, float], StrategyPlan] = field(default_factory=dict, init=False)
    _ways: dict[tuple[int, Role], list[Way]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        known: dict[Hashable, int] = {}
        kinds = [number if one.kind is None else (one.kind,) for number, one in enumerate(self.places)]
        self._first = [known.setdefault(kind, number) for number, kind in enumerate(kinds)]

    @property
    def num_layers(self) -> int:
        return self.workload.shape.num_layers

    def tighten(self, place: int) -> None:
        """Use 3 % less of a place's memory than before."""
        place = self._first[place]
        self.margins[place] = 0.97 * self.margins.get(place, 1.0)
        self._ways.clear()

    def ways(self, place: int, role: Role) -> list[Way]:
        """The ways to compute a stage in this role at a place, each with room for at least one layer."""
        place = self._first[place]
        if (place, role) not in self._ways:
            settings = self.places[place].settings
            if not role.is_last:  # the loss is computed elsewhere
                settings = tuple(dict.fromkeys(replace(one, loss_type=settings[0].loss_type) for one in settings))
            found: list[Way] = []
            whole = set[str]()  # kernels with which all layers fit: what saves more memory only takes longer
            for one in settings:
                if one.attn_implementation not in whole:
                    found.append(self._way(place, role, one))
                    whole |= {one.attn_implementation} if found[-1].most_layers >= self.num_layers else set()
            self._ways[place, role] = [way for way in found if way.most_layers > 0]
        return self._ways[place, role]

    def plan(self, place: int, techniques: Techniques, share: float = 1.0) -> StrategyPlan:
        """The method's estimate of a stage of a pipeline that has this share of each step's samples."""
        key = place, techniques, share = self._first[place], techniques, share
        if key not in self._plans:
            at, workload = self.places[place], replace(self.workload, share=share)
            self._plans[key] = self.method.estimate(workload, at.device, at.node, techniques)
        return self._plans[key]

    def layer_s(self, place: int) -> float:
        """Seconds of a micro-batch that each further layer adds at a place, with the plainest settings."""
        few, many = self._counts
        one, role = self.places[place].settings[0], Role(False, False, 2)
        first, last = (pass_of(self.plan(place, self._probe(one, role, n, 2))).total_s for n in (few, many))
        return min((last - first) / (many - few), last / many)

    def may_fit(self) -> bool:
        """Whether all layers fit somewhere, as stages in the middle."""
        role = Role(False, False, 1)
        most = [max((way.most_layers for way in self.ways(n, role)), default=0) for n in range(len(self.places))]
        return sum(most) >= self.num_layers

    @property
    def _counts(self) -> tuple[int, int]:
        """Numbers of layers of the two stages that are estimated: one, and nearly all."""
        return 1, max(2, self.num_layers - 2)

    def _probe(self, one: Techniques, role: Role, layers: int, flight: int) -> Techniques:
        """Settings of a stage in a role, with so many micro-batches in flight where it is not the last."""
        if role.is_first and role.is_last:
            return replace(one, stage=StagePart(0, 1, 0, layers))
        if role.is_last:
            return replace(one, stage=StagePart(1, 2, self.num_layers - layers, self.num_layers))
        index = 0 if role.is_first else 1
        return replace(one, stage=StagePart(index, index + flight, index, index + layers))

    def _way(self, place: int, role: Role, one: Techniques) -> Way:
        few, many = self._counts
        inner = role if role.is_last else replace(role, is_first=False)
        plans = [self.plan(place, self._probe(one, inner, layers, 2)) for layers in (few, many)]
        held = self._held(place, plans)
        if not role.is_last and role.num_in_flight != 2:
            more = [self.plan(place, self._probe(one, inner, layers, 3)) for layers in (few, many)]
            held = held.interpolate(self._held(place, more), role.num_in_flight - 2)
        device, host = (_line(values, few, many) for values in (held.device, held.host))
        if role.is_first and not role.is_last:  # a stage in the middle, and the embedding
            first = self._held(place, [self.plan(place, self._probe(one, role, few, 2))] * 2)
            middle = self._held(place, plans)
            device = replace(device, fixed=device.fixed + first.device[0] - middle.device[0])
            host = replace(host, fixed=host.fixed + first.host[0] - middle.host[0])
        margin, at = self.margins.get(place, 1.0), self.places[place]
        most = min(device.most_layers(margin * at.device_bytes), host.most_layers(margin * at.host_bytes))
        passes = [pass_of(plan) for plan in plans]
        forward = _line((passes[0].forward_s, passes[1].forward_s), few, many)
        backward = _line((passes[0].backward_s, passes[1].backward_s), few, many)
        return Way(forward, backward, most, one, _line((plans[0].gradient_bytes, plans[1].gradient_bytes), few, many))

    def _held(self, place: int, plans: Sequence[StrategyPlan]) -> StageMemory:
        few, many = plans
        needed = [self.needed(plan, self.places[place]) for plan in plans]
        return StageMemory((needed[0], needed[1]), (few.memory.host_bytes, many.memory.host_bytes))


def pass_of(plan: StrategyPlan) -> Pass:
    """A micro-batch's part of a plan's step, its update excluded."""
    seconds = (plan.time.step_s - plan.time.update_s) / plan.num_micro_batches
    share = forward_share(plan.techniques)
    return Pass(share * seconds, (1 - share) * seconds)


def _line(values: tuple[float, float], few: int, many: int) -> Line:
    slope = (values[1] - values[0]) / (many - few)
    return Line(values[0] - slope * few, slope)
