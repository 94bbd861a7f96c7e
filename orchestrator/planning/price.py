"""What a plan costs: the machines' hours and the electricity.  Unknown prices stay unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.planning.candidates import Candidate

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.spec import JobSpec

_REST_OF_MACHINE_W = 80.0  # board, memory, fans, supply: where only the GPU's own draw is known


@dataclass(frozen=True)
class Price:
    """Money in `currency`; None where a machine's price or draw is unknown."""

    currency: str
    machines: float | None  # rent, or purchase written off over its hours
    electricity: float | None
    energy_wh: float | None

    @property
    def total(self) -> float | None:
        """The sum of what is known; None where nothing is."""
        known = [part for part in (self.machines, self.electricity) if part is not None]
        return sum(known) if known else None


def priced(spec: JobSpec, cluster: ClusterCapability) -> ClusterCapability:
    """The machines with the prices and draws that the job states; what a hardware file declared stays where it is."""
    prices = spec.cost.nodes
    if not prices:
        return cluster

    def one(node: NodeCapability) -> NodeCapability:
        stated = prices.get(node.name) or prices.get("*")
        if stated is None:
            return node
        return replace(
            node,
            purchase_price=stated.purchase or node.purchase_price,
            years=stated.years if stated.purchase else node.years,
            price_per_hour=stated.per_hour or node.price_per_hour,
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
    hours = total_s / 3600
    rates = [_per_hour(spec, node) for node in candidate.nodes]
    rented = [node.price_per_hour is not None for node in candidate.nodes]
    used = [
        [part.slot.device for part in candidate.placed if part.slot.node.name == node.name] for node in candidate.nodes
    ]
    watts = [_watts(spec, node, devices) for node, devices in zip(candidate.nodes, used, strict=True)]
    energy_wh = None if None in watts else hours * sum(w for w in watts if w is not None)
    own = [w for w, is_rented in zip(watts, rented, strict=True) if not is_rented]
    own_wh = None if None in own else hours * sum(w for w in own if w is not None)
    return Price(
        currency=spec.cost.currency,
        machines=None if None in rates else hours * sum(rate for rate in rates if rate is not None),
        electricity=None if own_wh is None else own_wh / 1000 * spec.cost.electricity_per_kwh,
        energy_wh=energy_wh,
    )


def price_of_device(spec: JobSpec, node: NodeCapability, device: DeviceCapability, seconds: float) -> Price:
    """The same of one machine that computes with one device, as a server of answers does."""
    hours, rate, watts = seconds / 3600, _per_hour(spec, node), _watts(spec, node, [device])
    energy_wh = None if watts is None else hours * watts
    is_rented = node.price_per_hour is not None
    electricity = 0.0 if is_rented else None if energy_wh is None else energy_wh / 1000 * spec.cost.electricity_per_kwh
    return Price(spec.cost.currency, None if rate is None else hours * rate, electricity, energy_wh)


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
