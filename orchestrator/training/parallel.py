"""Sums over workers.  One worker is a group of one: the same code path, no communication."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from strategies.step.side_stream import SideStream

_PATIENCE = timedelta(hours=1)
BUCKET_BYTES = 4 * 2**20  # enough that a link's bandwidth counts and not its round trip


@dataclass(frozen=True)
class ProcessGroup:
    """The workers of a run and this one's place among them.

    `wire` is where tensors must lie to be sent: a GPU where all workers have one, else the host.  A replica is a copy
    of the model: on one worker, or in stages on several.
    """

    rank: int = 0
    size: int = 1
    wire: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sync_dtype: torch.dtype = torch.float32  # of gradients on the wire
    bucket_bytes: int = BUCKET_BYTES
    alike: bool = True  # the same kind of device everywhere: equal sums move equal weights equally
    process_group: Any = None  # of torch.distributed; None = its default one
    replica_of: tuple[int, ...] = ()  # of each rank: the copy of the model that it is a part of; () = each has its own

    @property
    def replicas(self) -> tuple[int, ...]:
        """The replica of each rank."""
        return self.replica_of or tuple(range(self.size))

    @property
    def replica(self) -> int:
        """This worker's."""
        return self.replicas[self.rank]

    @property
    def num_replicas(self) -> int:
        return max(self.replicas) + 1

    def ranks_of(self, replica: int) -> list[int]:
        """The workers of a replica, in the order of its stages."""
        return [rank for rank, own in enumerate(self.replicas) if own == replica]

    @property
    def leads(self) -> bool:
        """Whether it is the first worker of its replica."""
        return self.rank == self.ranks_of(self.replica)[0]

    def patient(self) -> ProcessGroup:
        """The same workers with a timeout of an hour.  Collective."""
        return self if self.size == 1 else replace(self, process_group=dist.new_group(timeout=_PATIENCE))

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Begin to add up numbers over the workers, in fp64; the returned call waits for the sums."""
        if self.size == 1:
            return lambda: list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.wire)
        work = self._all_reduce(tensor)

        def sums() -> list[float]:
            work.wait()
            return tensor.tolist()

        return sums

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the workers, in fp64."""
        return self.start_sum(values)()

    def at_own_rank(self, value: float) -> list[float]:
        """`value` at this worker's place among zeros: summed over the workers, everybody's value."""
        return [value if rank == self.rank else 0.0 for rank in range(self.size)]

    def gather(self, value: Any) -> list[Any]:
        """The value of every worker, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def gather_flat(self, own: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of one size from every worker, by rank, in the form in which gradients travel."""
        sent = own.to(self.wire, self.sync_dtype)
        if self.size == 1:
            return [own]
        arrived = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(arrived, sent, group=self.process_group)
        return arrived

    def broadcast(self, tensors: Iterable[torch.Tensor], source: int) -> None:
        """Every tensor becomes what the worker of rank `source` holds."""
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self.wire)
            dist.broadcast(sent, source, group=self.process_group)
            tensor.detach().copy_(sent)

    def _all_reduce(self, tensor: torch.Tensor) -> Any:
        return dist.all_reduce(tensor, async_op=True, group=self.process_group)


class GradientSum:
    """Replaces every gradient by its sum over the workers, beginning while the backward pass still runs.

    Gradients travel in buckets, in the order in which the backward pass finishes them.  A bucket leaves when it and all
    before it are ready, so the number and order of collectives is the same on every worker, whatever share it has: what
    has no gradient counts as zero.  Bucketing and overlap as in PyTorch DDP (Li et al., arXiv 2006.15704).

    `first` is called before a step's first bucket leaves; what it raises ends the pass, and nothing has left.  Where
    `holders` are given, gradients are summed among those of each layer alone.
    """

    def __init__(
        self,
        group: ProcessGroup,
        parameters: Iterable[torch.nn.Parameter],
        first: Callable[[], None] = lambda: None,
        holders: Sequence[Holders] | None = None,
    ) -> None:
        self._group, self._first = group, first
        self._buckets: list[list[torch.nn.Parameter]] = []
        self._groups: list[ProcessGroup] = []  # of each bucket
        whole = [(group, list(parameters))] if holders is None else [(one.group, one.parameters) for one in holders]
        for own, shared in whole:
            made = _buckets(shared[::-1], own.bucket_bytes) if own.size > 1 else []
            self._buckets += made
            self._groups += [own] * len(made)
        self._place = {parameter: at for at, bucket in enumerate(self._buckets) for parameter in bucket}
        self._armed = False
        self._missing: list[int] = []
        self._leaving: deque[tuple[torch.Tensor, torch.Event]] = deque()  # on the way from the device to the wire
        self._sent: list[tuple[torch.Tensor, Any]] = []
        self._copies: dict[torch.device, SideStream] = {}
        self.bytes_sent = 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in self._place]

    def arm(self) -> None:
        """The next backward pass is this step's last: what it finishes may leave."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._armed = True

    def flush(self) -> None:
        """Send what has not left yet."""
        self._armed = False
        while self._num_left < len(self._buckets):
            self._send()
        self._reduce(wait=True)

    def abandon(self) -> None:
        """Memory ran out here: the others wait for all buckets, so zeros leave for those that have not."""
        self._armed = False
        for bucket in self._buckets:
            for parameter in bucket:
                parameter.grad = None
        self._leaving.clear()
        while len(self._sent) < len(self._buckets):
            size = sum(parameter.numel() for parameter in self._buckets[len(self._sent)])
            self._start_sum(torch.zeros(size, dtype=self._group.sync_dtype, device=self._group.wire))

    def finish(self) -> None:
        """Wait for all sums and put them in place."""
        self.flush()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter).to(parameter.device, parameter.dtype, non_blocking=True)
        self._sent = []

    def discard(self) -> None:
        """Wait for all sums and forget them: the step is repeated."""
        for _, work in self._sent:
            work.wait()
        self._sent = []

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _ready(self, parameter: torch.nn.Parameter) -> None:
        if not self._armed:
            return
        self._missing[self._place[parameter]] -= 1
        while self._num_left < len(self._buckets) and self._missing[self._num_left] == 0:
            self._send()

    @property
    def _num_left(self) -> int:
        return len(self._sent) + len(self._leaving)

    def _send(self) -> None:
        if not self._num_left:
            self._first()
        bucket, group = self._buckets[self._num_left], self._group
        parts = [p.grad.reshape(-1) if p.grad is not None else p.new_zeros(p.numel()) for p in bucket]
        flat = torch.cat(parts)
        if flat.device.type == group.wire.type:
            self._start_sum(flat.to(group.sync_dtype))
            return
        copies = self._copies.setdefault(flat.device, SideStream(flat.device))
        self._leaving.append(copies.down(flat, group.sync_dtype))
        self._reduce(wait=False)

    def _reduce(self, wait: bool) -> None:
        """Begin the sums of buckets that have reached the wire, in order; without `wait` only of those."""
        while self._leaving and (wait or self._leaving[0][1].query()):
            flat, arrived = self._leaving.popleft()
            arrived.synchronize()
            self._start_sum(flat)

    def _start_sum(self, flat: torch.Tensor) -> None:
        self.bytes_sent += flat.numel() * flat.element_size()
        self._sent.append((flat, self._groups[len(self._sent)]._all_reduce(flat)))


@dataclass(frozen=True)
class Holders:
    """The workers that hold the same layers, where replicas are cut into stages, and what trains in those."""

    group: ProcessGroup
    parameters: list[torch.nn.Parameter]
    first: int  # the first of them, by its rank among all workers


def holders_of(group: ProcessGroup, parameters: Mapping[str, torch.nn.Parameter]) -> list[Holders]:
    """Those that this worker is one of, beside others.  Makes their process groups: collective."""
    ranks_of: dict[str, tuple[int, ...]] = {}
    for rank, names in enumerate(group.gather(list(parameters))):
        for name in names:
            ranks_of[name] = (*ranks_of.get(name, ()), rank)
    found = []
    for ranks in sorted({ranks for ranks in ranks_of.values() if len(ranks) > 1}):
        made = dist.new_group(list(ranks))
        if group.rank in ranks:
            own = replace(group, rank=ranks.index(group.rank), size=len(ranks), process_group=made, replica_of=())
            found.append(Holders(own, [p for name, p in parameters.items() if ranks_of[name] == ranks], ranks[0]))
    return found


def _buckets(parameters: list[torch.nn.Parameter], size_bytes: int) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        needs = parameter.numel() * 4
        if not buckets or room < needs:
            buckets.append([])
            room = size_bytes
        buckets[-1].append(parameter)
        room -= needs
    return buckets
