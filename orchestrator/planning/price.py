"""What a plan costs: the machines' hours and the electricity.  Unknown prices stay unknown, and are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.planning.candidates import Candidate

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.spec import JobSpec

_MOST_NAMES = 3  # of machines in a phrase
_REST_OF_MACHINE_W = 80.0  # board, memory, fans, supply: where only the GPU's own draw is known


@dataclass(frozen=True)
class Price:
    """Money in `currency`; None where nothing is known of a part.

    Where some machines' price or draw is unknown the parts are those of the others: a lower bound.
    """

    currency: str
    machines: float | None  # rent, or purchase written off over its hours
    electricity: float | None  # of owned machines: a rented one's is in its rate
    energy_wh: float | None  # None where the draw of any machine is unknown
    without_price: tuple[str, ...] = ()  # machines whose price is unknown
    without_draw: tuple[str, ...] = ()  # owned machines whose draw is unknown

    @property
    def total(self) -> float | None:
        """The sum of what is known, at least; None where nothing is."""
        known = [part for part in (self.machines, self.electricity) if part is not None]
        return sum(known) if known else None

    @property
    def lacks_price(self) -> bool:
        return self.machines is None or bool(self.without_price)

    @property
    def lacks_draw(self) -> bool:
        return self.electricity is None or bool(self.without_draw)

    @property
    def is_whole(self) -> bool:
        """Whether the total has all machines' price and electricity."""
        return not self.lacks_price and not self.lacks_draw

    @property
    def unknown(self) -> str:
        """Whose price and draw are unknown, in a phrase; empty where nothing is."""
        parts = (("price", self.without_price), ("draw", self.without_draw))
        return " and ".join(f"the {what} of {_named(names)}" for what, names in parts if names)


def priced(spec: JobSpec, cluster: ClusterCapability) -> ClusterCapability:
    """The machines with the prices and draws that the job states; what a hardware file declared stays where it is."""
    prices = spec.cost.nodes
    if not prices:
        return cluster

    def one(node: NodeCapability) -> NodeCapability:
        stated = prices.get(node.name) or prices.get("*")
        if stated is None:
            return node
        # A machine is bought or rented: what the job states of one takes the place of the other.
        return replace(
            node,
            purchase_price=None if stated.per_hour else stated.purchase or node.purchase_price,
            years=stated.years if stated.purchase or "years" in stated.model_fields_set else node.years,
            price_per_hour=None if stated.purchase else stated.per_hour or node.price_per_hour,
            idle_w=stated.idle_w if stated.idle_w is not None else node.idle_w,
            load_w=stated.load_w or node.load_w,
        )

    return replace(cluster, nodes=tuple(map(one, cluster.nodes)))


def prices_every_plan(spec: JobSpec, cluster: ClusterCapability) -> bool:
    """Whether a plan has a price whichever of the machines it takes: all have an hourly one, or all draws are known."""
    nodes = priced(spec, cluster).nodes
    own = [node for node in nodes if node.price_per_hour is None]
    draws = [_watts(spec, node, [device]) for node in own for device in node.devices]
    return all(_per_hour(spec, node) is not None for node in nodes) or None not in draws


def price_of(spec: JobSpec, candidate: Candidate, total_s: float) -> Price:
    """Hours x (rent or write-off) and watt-hours x tariff, over the nodes that take part.

    The whole job draws as much as its training, which is too much while answers are generated.
    """
    used: dict[str, list[DeviceCapability]] = {}
    for part in candidate.placed:
        used.setdefault(part.slot.node.name, []).append(part.slot.device)
    return _price(spec, [(node, used[node.name]) for node in candidate.nodes], total_s)


def price_of_device(spec: JobSpec, node: NodeCapability, device: DeviceCapability, seconds: float) -> Price:
    """The same of one machine that computes with one device, as a server of answers does."""
    return _price(spec, [(node, [device])], seconds)


def _price(
    spec: JobSpec, machines: Sequence[tuple[NodeCapability, Sequence[DeviceCapability]]], seconds: float
) -> Price:
    """Of machines with the devices that compute there, for so long."""
    hours = seconds / 3600
    rates = {node.name: _per_hour(spec, node) for node, _ in machines}
    watts = {node.name: _watts(spec, node, devices) for node, devices in machines}
    own = {node.name: watts[node.name] for node, _ in machines if node.price_per_hour is None}
    own_w = _sum_of_known(own)
    return Price(
        currency=spec.cost.currency,
        machines=None if (rate := _sum_of_known(rates)) is None else hours * rate,
        electricity=None if own_w is None else hours * own_w / 1000 * spec.cost.electricity_per_kwh,
        energy_wh=None if None in watts.values() else hours * sum(filter(None, watts.values())),
        without_price=tuple(name for name, rate in rates.items() if rate is None),
        without_draw=tuple(name for name, draw in own.items() if draw is None),
    )


def _sum_of_known(figures: Mapping[str, float | None]) -> float | None:
    """0 of no figures; None where there are some, all unknown."""
    known = [figure for figure in figures.values() if figure is not None]
    return sum(known) if known or not figures else None


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    )


def _per_hour(spec: JobSpec, node: NodeCapability) -> float | None:
    if node.price_per_hour is not None:
        return node.price_per_hour
    if node.purchase_price is None:
        return None
    return node.purchase_price / ((node.years or 3.0) * spec.cost.hours_per_year)


def _watts(spec: JobSpec, node: NodeCapability, devices: Sequence[DeviceCapability]) -> float | None:
    """Draw of a machine under load: declared, else its devices' and a typical rest."""
    if node.load_w is not None:
        return node.load_w
    used = [device.power_w for device in devices]
    if used and all(watt is not None for watt in used):
        return sum(watt for watt in used if watt is not None) + (node.idle_w or _REST_OF_MACHINE_W)
    return spec.cost.power_w
