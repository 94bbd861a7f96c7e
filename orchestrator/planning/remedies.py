"""The smallest changes that would make a job fit, each found by planning again with the change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from clusters.hardware import datasheet
from clusters.units import GIB, format_count
from orchestrator.errors import JobError
from orchestrator.job.job_file import spec_with, value_of
from orchestrator.job.spec import JobSpec
from orchestrator.planning.evaluation import HeldOutCounts
from orchestrator.planning.workload import grows_with_workers
from strategies import METHODS
from strategies.techniques.libraries import INSTALL, absent_libraries, with_installed
from strategies.workload import Workload

_MOST = 3
_SHORTEST, _LENGTHS = 128, 64  # max_length in tokens: the least that is proposed, and its steps
_SHORTENS_LITTLE = 0.5  # of max_length: so much of it kept is a smaller change than any other
_MORE_DEVICES = (1, 3, 7)  # two, four or eight in all
_EXPERIMENTAL = "experimental_"
_AMPERE = (8, 0)  # the first with bf16 units
_SWITCHES = (  # what a job may state and the planner would choose, the least change of the result first
    "train.gradient_checkpointing",
    "train.loss_type",
    "strategy.offload",
    "strategy.mode",
    "cluster.num_workers",
    "model.attn_implementation",
    "data.packing",
    "model.dtype",
    "train.optim",
)


@dataclass(frozen=True)
class PlanInputs:
    """What a plan follows from."""

    spec: JobSpec
    workload: Workload
    cluster: ClusterCapability
    max_length: int
    held_out: HeldOutCounts | None = None

    def with_values(self, values: Mapping[str, Any]) -> PlanInputs:
        """The same job with some keys (`section.key`) at other values.  Raises JobError for what cannot be."""
        return replace(self, spec=spec_with(self.spec, values))

    def with_length(self, length: int) -> PlanInputs:
        """The same job with longer samples cut to `length` tokens."""
        work, document = self.workload, length
        length *= self.spec.build_objective().num_documents  # of a sample
        mean = min(work.mean_length, length)
        shorter = replace(
            work,
            longest_sample=min(work.longest_sample, length),
            num_tokens=max(1, round(mean * work.num_samples)),
            num_supervised_tokens=round(work.supervised_fraction * mean * work.num_samples),
            mean_square_length=work.mean_square_length and min(work.mean_square_length, length**2),
            fullest_step_tokens=work.fullest_step_tokens
            and min(work.fullest_step_tokens, work.global_batch_size * length),
        )
        return replace(self.with_values({"data.max_length": document}), workload=shorter, max_length=document)

    def with_layers(self, num_layers: int) -> PlanInputs:
        """The same job with a model as wide and of fewer layers."""
        shape = replace(self.workload.shape, num_layers=num_layers)
        return replace(self, workload=replace(self.workload, shape=shape))


Accepts = Callable[[PlanInputs], bool]


@dataclass(frozen=True)
class Remedy:
    """A change that makes a job fit, for a person, and what a plan then follows from."""

    text: str
    inputs: PlanInputs


def find_remedies(inputs: PlanInputs, accepts: Accepts) -> list[Remedy]:
    """Changes that help, smallest first, at most three: the length, switches, methods, then devices and the model."""
    shorter = _shorter_samples(inputs, accepts)
    is_small = shorter is not None and shorter.inputs.max_length >= _SHORTENS_LITTLE * inputs.max_length
    small = itertools.chain(
        [shorter] if shorter and is_small else [],
        _open_switches(inputs, accepts),
        _installed_libraries(inputs, accepts),
        _usual_methods(inputs, accepts),
        [shorter] if shorter and not is_small else [],
        _experimental_methods(inputs, accepts),
        _more_devices(inputs, accepts),
        _larger_cards(inputs, accepts),
        _smaller_models(inputs, accepts),
    )
    return list(itertools.islice(small, _MOST))


def _shorter_samples(inputs: PlanInputs, accepts: Accepts) -> Remedy | None:
    """The greatest max_length that fits."""
    longest = (inputs.max_length - 1) // _LENGTHS
    fits = _greatest(_SHORTEST // _LENGTHS, longest, lambda count: accepts(inputs.with_length(count * _LENGTHS)))
    if fits is None:
        return None
    length = fits * _LENGTHS
    longest_document = inputs.workload.longest_sample // inputs.spec.build_objective().num_documents
    cuts = "" if length < longest_document else ", which cuts no sample"
    return Remedy(f"data.max_length: {length} instead of {inputs.max_length}{cuts}", inputs.with_length(length))


def _open_switches(inputs: PlanInputs, accepts: Accepts) -> Iterator[Remedy]:
    """Stated switches left to the planner: each alone, and all together where none alone helps."""
    opened = [change for change in _openings(inputs) if change]
    found = [remedy for change in opened if (remedy := _with_values(inputs, change, accepts))]
    if not found and len(opened) > 1:
        together = {key: value for change in opened for key, value in change.items()}
        found = [remedy for remedy in [_with_values(inputs, together, accepts)] if remedy]
    yield from found


def _openings(inputs: PlanInputs) -> Iterator[dict[str, Any]]:
    spec = inputs.spec
    if isinstance(spec.train.per_device_train_batch_size, int):
        size = inputs.workload.global_batch_size // (spec.strategy.local_steps or 1)
        same_step = {} if spec.train.global_batch_size == size else {"train.global_batch_size": size}
        yield {"train.per_device_train_batch_size": "auto"} | same_step
    pipeline = spec.strategy.pipeline
    if pipeline.replicas not in ("auto", 1):
        yield {"strategy.pipeline": pipeline.model_dump(exclude_unset=True) | {"replicas": "auto"}}
    for key in _SWITCHES:
        if key in ("strategy.mode", "cluster.num_workers") and grows_with_workers(spec):
            continue  # a step would have other samples
        if value_of(spec, key) != "auto":
            yield {key: "auto"}


def _installed_libraries(inputs: PlanInputs, accepts: Accepts) -> Iterator[Remedy]:
    """Absent libraries: each alone, and all together where none alone helps."""
    devices = [device for node in inputs.cluster.nodes for device in node.devices]
    absent = list(dict.fromkeys(library for device in devices for library in absent_libraries(device)))

    def installed(*libraries: str) -> Remedy | None:
        equipped = _with_devices(inputs, lambda device: with_installed(device, libraries))
        text = " and ".join(INSTALL[library] for library in libraries)
        return Remedy(text, equipped) if accepts(equipped) else None

    found = [remedy for library in absent if (remedy := installed(library))]
    if not found and len(absent) > 1:
        found = [remedy for remedy in [installed(*absent)] if remedy]
    yield from found


def _usual_methods(inputs: PlanInputs, accepts: Accepts) -> Iterator[Remedy]:
    """Another method, and where none helps by itself the one that keeps most of the length."""
    others = _other_methods(inputs, experimental=False)
    found = [remedy for name in others if (remedy := _with_values(inputs, {"method.type": name}, accepts))]
    yield from found
    if found:
        return
    shorter = [(name, _shorter_samples(inputs.with_values({"method.type": name}), accepts)) for name in others]
    both = [(name, remedy) for name, remedy in shorter if remedy]
    if both:
        name, remedy = max(both, key=lambda pair: pair[1].inputs.max_length)
        yield Remedy(f"{_as_written({'method.type': name})} and {remedy.text}", remedy.inputs)


def _experimental_methods(inputs: PlanInputs, accepts: Accepts) -> Iterator[Remedy]:
    """Those that `auto` passes over: where the job wants full rank, which few methods have, or states one of them."""
    if inputs.spec.goal.full_rank or any(name.startswith(_EXPERIMENTAL) for name in _stated(inputs)):
        for name in _other_methods(inputs, experimental=True):
            if remedy := _with_values(inputs, {"method.type": name}, accepts):
                yield remedy


def _other_methods(inputs: PlanInputs, experimental: bool) -> list[str]:
    """Those in few bits first."""
    others = [
        name
        for name, method in METHODS.items()
        if name.startswith(_EXPERIMENTAL) == experimental and method.is_proposed and name not in _stated(inputs)
    ]
    return sorted(others, key=lambda name: not METHODS[name].is_quantised)


def _stated(inputs: PlanInputs) -> set[str]:
    return {method.name for method in inputs.spec.methods()}


def _more_devices(inputs: PlanInputs, accepts: Accepts) -> Iterator[Remedy]:
    """The fewest devices more, like the largest GPU and in its machine."""
    largest = _largest_gpu(inputs.cluster)
    if largest is None:
        return
    node, card = largest
    for more in _MORE_DEVICES:
        twins = [replace(card, uuid=None, pci_bus_id=None)] * more
        wider = replace(node, devices=(*node.devices, *twins), num_slots=node.num_slots and node.num_slots + more)
        if accepts(changed := _with_node(inputs, node, wider)):
            yield Remedy(f"{more} more {card.name} in {node.name}", changed)
            return


def _larger_cards(inputs: PlanInputs, accepts: Accepts) -> Iterator[Remedy]:
    """The smallest board since Ampere that holds the job, in place of the largest one, or beside the CPU."""
    largest = _largest_gpu(inputs.cluster)
    node, card = largest or (inputs.cluster.nodes[0], None)
    rest = [device for device in node.devices if device is not card]
    sizes: dict[int, datasheet.Accelerator] = {}
    for one in datasheet.CARDS:
        is_larger = card is None or one.usable_bytes > (card.memory_bytes or 0)
        if is_larger and (one.compute_capability or (0, 0)) >= _AMPERE and "Laptop" not in one.name:
            sizes.setdefault(one.memory_bytes, one)
    cards = [sizes[size] for size in sorted(sizes, reverse=True)]

    def with_card(index: int) -> PlanInputs:
        return _with_node(inputs, node, replace(node, devices=(*rest, datasheet.device(cards[index]))))

    smallest = _greatest(0, len(cards) - 1, lambda index: accepts(with_card(index)))
    if smallest is not None:
        size = f"{cards[smallest].memory_bytes / GIB:.0f} GiB, such as {cards[smallest].name}"
        yield Remedy(f"a card of {size}, in {node.name}", with_card(smallest))


def _smaller_models(inputs: PlanInputs, accepts: Accepts) -> Iterator[Remedy]:
    """The largest model as wide as the job's."""
    shape = inputs.workload.shape
    layers = _greatest(1, shape.num_layers - 1, lambda count: accepts(inputs.with_layers(count)))
    if layers is not None:
        smaller = inputs.with_layers(layers)
        size = format_count(smaller.workload.shape.num_parameters)
        yield Remedy(f"a model of at most {size} parameters instead of {format_count(shape.num_parameters)}", smaller)


def _with_values(inputs: PlanInputs, values: Mapping[str, Any], accepts: Accepts) -> Remedy | None:
    """The job with these values, where they help."""
    try:
        changed = inputs.with_values(values)
    except JobError:  # values that exclude each other are no remedy
        return None
    return Remedy(_as_written(values), changed) if accepts(changed) else None


def _as_written(values: Mapping[str, Any]) -> str:
    """Keys and values as in a job file."""
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    flow = {key: f"{{{', '.join(f'{name}: {one}' for name, one in own.items())}}}" for key, own in sections.items()}
    lines = (
        f"method: {{type: {value}}}" if key == "method.type" else f"{key}: {flow.get(key, value)}"
        for key, value in values.items()
    )
    return " and ".join(lines)


def _with_devices(inputs: PlanInputs, change: Callable[[DeviceCapability], DeviceCapability]) -> PlanInputs:
    nodes = [replace(node, devices=tuple(map(change, node.devices))) for node in inputs.cluster.nodes]
    return replace(inputs, cluster=replace(inputs.cluster, nodes=tuple(nodes)))


def _with_node(inputs: PlanInputs, old: NodeCapability, new: NodeCapability) -> PlanInputs:
    nodes = tuple(new if node is old else node for node in inputs.cluster.nodes)
    return replace(inputs, cluster=replace(inputs.cluster, nodes=nodes))


def _largest_gpu(cluster: ClusterCapability) -> tuple[NodeCapability, DeviceCapability] | None:
    found = [(node, device) for node in cluster.nodes for device in node.gpus if device.memory_bytes]
    return max(found, key=lambda pair: pair[1].memory_bytes or 0, default=None)


def _greatest(least: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The greatest number that fits, where all smaller ones fit too; None where not even the least does."""
    if most < least or not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
