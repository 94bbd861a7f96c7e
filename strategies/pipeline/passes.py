"""`Passes` of a stage: micro-batches through a model whose layers lie on several workers.

Every stage computes the list of micro-batches by itself, from the data's index, so shapes, borders of documents and
positions are known everywhere; only hidden states go forward and their gradients backward.  The last stage computes the
loss.  Parts of the loss and gradients are added in the order of one process: the numbers are the same bits.

Legend: B rows, T tokens, H hidden size, N trained tensors of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from strategies.model.heads import cache_keyword
from strategies.pipeline import wire as form
from strategies.pipeline.cut import Received
from strategies.pipeline.exchange import Inbox, Outbox
from strategies.pipeline.schedule import operations
from strategies.pipeline.shortage import Guard, in_rounds
from strategies.step.supervised_logits import Batch, arguments_of, inner_model, loss_sum
from strategies.techniques.precision import autocast
from strategies.train_setup import PassTimes, StepPasses, TrainSetup
from strategies.workload import StagePart, Techniques

T = TypeVar("T")


@dataclass(frozen=True)
class StagePlace:
    """A stage and the workers of its pipeline."""

    stage: StagePart
    ranks: Sequence[int]  # of all stages, in the default process group
    group: Any  # of torch.distributed, of these ranks


class StagePasses:
    """The `Passes` of one stage of a pipeline; every call is made by all its stages together.

    `names` are all trained tensors of the model in their order.
    """

    def __init__(self, setup: TrainSetup, place: StagePlace, names: Sequence[str]) -> None:
        stage, self._ranks, self._group = place.stage, list(place.ranks), place.group
        self._setup, self._stage, self._names = setup, stage, list(names)
        inner = inner_model(setup.model)
        self._decoder = inner.get_decoder()
        self._width = inner.config.get_text_config().hidden_size
        self._dtype: torch.dtype = inner.config.dtype  # of the hidden state
        self._embedding: Received | None = None if stage.is_first else inner.get_input_embeddings()
        self._flag: torch.nn.Parameter | None = None
        lowest = self._lowest_that_trains()
        self.sends_back, self._is_sent_back = lowest < stage.index, lowest <= stage.index and not stage.is_last
        before, after = self._ranks[max(0, stage.index - 1)], self._ranks[min(stage.count - 1, stage.index + 1)]
        depth = stage.ahead + 2
        self._hidden_in, self._hidden_out = Inbox(before, stage.wire, depth), Outbox(after, stage.wire)
        self._gradient_in, self._gradient_out = Inbox(after, stage.wire, depth), Outbox(before, stage.wire)
        self._times = PassTimes()
        self._follow: Callable[[bool, bool], None] = lambda *_: None
        self._num_norms = 0  # of the update to come that have not been summed over the stages

    @property
    def _device(self) -> torch.device:
        return self._setup.device  # where weights are streamed the model moves there after this was made

    @property
    def bytes_sent(self) -> int:
        return self._hidden_out.bytes_sent + self._gradient_out.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._hidden_in.bytes_received + self._gradient_in.bytes_received

    def times(self) -> PassTimes:
        """By the host's clock.  On a GPU a pass ends when what it hands on lies on the host, or when the next message
        is waited for: its copy waits for the device as well.  What a first stage computes last has no such moment.
        """
        return self._times

    def tell_order(self, follow: Callable[[bool, bool], None]) -> None:
        self._follow = follow

    def run(self, micro_batches: Sequence[list[int]], step: StepPasses) -> torch.Tensor:
        batches = [step.take(sample_ids) for sample_ids in micro_batches]
        work = _StepWork(self, batches, step)
        self._times, sent, received = work.times, self.bytes_sent, self.bytes_received
        self._num_norms = 2 if step.scaler.is_enabled() else 1  # one more in `spread_overflow`
        if not self._stage.is_last:
            step.scaler.scale(work.loss)  # it makes its tensors with the first loss, and the update asks for them
        shapes = [self._shape(batch) for batch in batches]
        if not self._stage.is_first:
            self._hidden_in.expect(shapes)
        if self._is_sent_back:
            self._gradient_in.expect(shapes)
        order = operations(self._stage.index, self._stage.count, len(batches), self._stage.ahead)
        for operation, following in zip(order, [*order[1:], None], strict=True):
            self._follow(operation.is_forward, following is None or following.is_forward)
            (work.forward if operation.is_forward else work.backward)(operation.micro_batch)
        self._follow(True, True)  # whatever comes until the next step
        begin = time.perf_counter()
        self._settle()
        work.times.waits.append((begin, time.perf_counter()))
        work.times.bytes_sent, work.times.bytes_received = self.bytes_sent - sent, self.bytes_received - received
        work.guard.check()
        return work.loss

    def each(self, batches: Sequence[list[T]], call: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
        return in_rounds(batches, call, self._agree)

    def _agree(self, short: Mapping[int, str]) -> dict[int, str]:
        self._settle()
        found: dict[int, str] = {}
        for stage, reasons in enumerate(self._gather(short), start=1):
            for number, reason in reasons.items():
                found.setdefault(number, f"stage {stage} of {self._stage.count}: {reason}")
        return dict(sorted(found.items()))

    def end_together(self, reason: str | None) -> None:
        for stage, found in enumerate(self._gather(reason), start=1):
            if found is not None:
                raise MemoryError(f"stage {stage} of {self._stage.count}: {found}")

    def _gather(self, value: T) -> list[T]:
        """The value of every stage."""
        values: list[Any] = [None] * self._stage.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def loss_sum(self, batch: Batch, techniques: Techniques) -> torch.Tensor:
        def compute() -> torch.Tensor:
            own = batch.to(self._device)
            with autocast(self._device.type, techniques.dtype):
                if self._stage.is_last:
                    return loss_sum(self._setup.model, own, techniques.loss_type)
                return self.hidden(own.input_ids_BT, **arguments_of(own))

        guard = Guard()
        found = self._pass_on(guard, self._shape(batch), compute)
        guard.check()
        return found if found is not None and self._stage.is_last else torch.zeros(())

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        def compute() -> torch.Tensor:
            ids = ids_BT.to(self._device)
            if not self._stage.is_last:
                return self.hidden(ids, use_cache=False)
            return self._setup.model(input_ids=ids, use_cache=False).logits.float().cpu().contiguous()

        guard = Guard()
        found = self._pass_on(guard, (*ids_BT.shape, self._width), compute)
        self.end_together(guard.reason)
        vocabulary = inner_model(self._setup.model).config.get_text_config().vocab_size
        logits_BTV = found if found is not None and self._stage.is_last else torch.empty(*ids_BT.shape, vocabulary)
        dist.broadcast(logits_BTV, self._ranks[-1], group=self._group)
        self._settle()
        return logits_BTV

    def gradient_norm(self) -> torch.Tensor:
        """Norms of single tensors in the order of the whole model, then their norm: the bits of one process.

        Every stage adds its part, also one that `leave_update`s.
        """
        place = {name: number for number, name in enumerate(self._names)}
        own = {name: p.grad for name, p in self._setup.parameters.items() if p.grad is not None}
        norms_2N = torch.zeros(2, len(self._names), device=self._device)
        if own:
            at = [place[name] for name in own]
            norms_2N[0, at] = torch.stack([torch.linalg.vector_norm(gradient) for gradient in own.values()]).float()
            norms_2N[1, at] = 1.0
        summed = self._sum_norms(norms_2N.cpu())
        return torch.linalg.vector_norm(summed[0][summed[1] > 0].to(self._device))

    def _sum_norms(self, norms_2N: torch.Tensor) -> torch.Tensor:
        self._num_norms -= 1
        dist.all_reduce(norms_2N, group=self._group)
        return norms_2N

    def leave_update(self) -> None:
        while self._num_norms > 0:
            self._sum_norms(torch.zeros(2, len(self._names)))

    def spread_overflow(self) -> None:
        if self._flag is None:  # a weight that never moves, whose gradient tells this worker's scaler
            self._flag = torch.nn.Parameter(torch.zeros(1, device=self._device))
            self._setup.optimizer.add_param_group({"params": [self._flag], "lr": 0.0, "base_lr": 0.0})
        is_finite = bool(self.gradient_norm().isfinite())
        self._flag.grad = torch.zeros_like(self._flag) if is_finite else torch.full_like(self._flag, torch.inf)

    def hidden(self, ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """What this stage hands on (B, T, H)."""
        return self._decoder(ids_BT, **arguments).last_hidden_state

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        pad_token_id: int,
        eos_token_id: Sequence[int] | None = None,
        stopping_criteria: Sequence[Callable[..., torch.Tensor]] = (),
        **others: Any,
    ) -> torch.Tensor:
        """The last stage chooses the token with the largest logit after each `logits_processor`, all learn it.

        What has been chosen lies on the host: all stages end together where memory runs out on one, which then raises.
        """
        from transformers import DynamicCache

        guard, cache, ids, mask = Guard(), DynamicCache(), input_ids.cpu(), attention_mask.cpu()
        unfinished_B = torch.ones(len(ids), dtype=torch.long)
        new_ids, positions = ids, (mask.cumsum(-1) - 1).clamp_min(0)
        for _number in range(max_new_tokens):
            where = {"attention_mask": mask, "position_ids": positions}
            chosen_B = self._choose(
                guard, new_ids, where, cache, partial(_largest, ids, others.get("logits_processor", ()))
            )
            if chosen_B is None:
                break
            new_ids = (chosen_B * unfinished_B + pad_token_id * (1 - unfinished_B))[:, None]
            ids, mask = torch.cat([ids, new_ids], 1), torch.cat([mask, torch.ones_like(new_ids)], 1)
            positions = positions[:, -1:] + 1
            ended_B = torch.isin(new_ids[:, 0], torch.tensor(list(eos_token_id or ())))
            for criterion in stopping_criteria:
                ended_B |= criterion(ids, None)
            unfinished_B &= ~ended_B
            if not unfinished_B.any():
                break
        self._settle()
        guard.check()
        return ids

    def _choose(
        self,
        guard: Guard,
        ids_BT: torch.Tensor,
        where: Mapping[str, torch.Tensor],
        cache: Any,
        choose: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """The next token of each row (B), chosen by its logits (B, V); None where memory has run out on any stage."""

        def compute() -> torch.Tensor:
            ids, *others = (tensor.to(self._device) for tensor in (ids_BT, *where.values()))
            name = cache_keyword(self._setup.model)
            arguments = {**dict(zip(where, others, strict=True)), "use_cache": True, name: cache}
            if not self._stage.is_last:
                return self.hidden(ids, **arguments)
            logits = self._setup.model(input_ids=ids, logits_to_keep=1, **arguments).logits
            return choose(logits[:, -1].float())

        found = self._pass_on(guard, (*ids_BT.shape, self._width), compute)
        chosen = torch.zeros(len(ids_BT) + 1, dtype=torch.long)
        if guard.shortage is not None:
            chosen[-1] = 1
        elif found is not None and self._stage.is_last:
            chosen[:-1] = found
        dist.all_reduce(chosen, group=self._group)
        return None if chosen[-1] else chosen[:-1]

    def _shape(self, batch: Batch) -> tuple[int, int, int]:
        return (*batch.input_ids_BT.shape, self._width)  # type: ignore[return-value]

    def _pass_on(self, guard: Guard, shape: Sequence[int], compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Receive a hidden state, compute from it, and hand that on where a stage follows."""
        if not self._stage.is_first:
            self._hidden_in.expect([shape])
        arrived = self._next_hidden()

        def entered() -> torch.Tensor:
            self._enter(arrived)
            return compute()

        found = guard(entered)
        if not self._stage.is_last:
            self.hand_on(guard, self._hidden_out, found, shape)
        return found

    def hand_on(self, guard: Guard, outbox: Outbox, tensor: torch.Tensor | None, shape: Sequence[int]) -> None:
        """Send a hidden state or a gradient; zeros where there is none."""
        flat = None if tensor is None else guard(lambda: form.pack(tensor, outbox.wire))
        if flat is None:
            flat = form.pack(torch.zeros(*shape, dtype=self._dtype), outbox.wire)
        outbox.post(flat)

    def _next_hidden(self) -> torch.Tensor | None:
        """What the stage before sent, on the CPU; None on the first stage."""
        return None if self._embedding is None else self._hidden_in.receive()

    def _enter(self, arrived: torch.Tensor | None) -> torch.Tensor | None:
        """Have it stand for the embedding, on the device."""
        if self._embedding is None or arrived is None:
            return None
        hidden_BTH = arrived.to(self._device, self._dtype)
        self._embedding.hidden_BTH = hidden_BTH
        return hidden_BTH

    def _lowest_that_trains(self) -> int:
        """The first stage in which something trains: gradients end there."""
        trains = torch.zeros(self._stage.count)
        trains[self._stage.index] = float(bool(self._setup.parameters))
        dist.all_reduce(trains, group=self._group)
        return int(trains.nonzero()[0])

    def _settle(self) -> None:
        self._hidden_out.settle()
        self._gradient_out.settle()


def _largest(
    ids_BT: torch.Tensor, processors: Sequence[Callable[..., torch.Tensor]], logits_BV: torch.Tensor
) -> torch.Tensor:
    """The token of each row with the largest logit after processing (B), on the host."""
    for process in processors:
        logits_BV = process(ids_BT.to(logits_BV.device), logits_BV)
    return logits_BV.argmax(-1).cpu()


class _StepWork:
    """The passes of one step on one stage.

    Where memory runs out, be it for what arrives or leaves, the stage takes messages and hands on zeros to the step's
    end: its neighbours wait for them, and the whole step is repeated.
    """

    def __init__(self, passes: StagePasses, batches: Sequence[Batch], step: StepPasses) -> None:
        self._passes, self._batches, self._step = passes, batches, step
        self._kept: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}  # what came in and what came of it
        self.loss = torch.zeros((), device=passes._device)
        self.times = PassTimes()
        self.guard = Guard(free=self._kept.clear)

    def forward(self, number: int) -> None:
        passes = self._passes
        begin = self._wait_for(None if passes._stage.is_first else passes._hidden_in)
        arrived = passes._next_hidden()
        result = self.guard(lambda: self._compute(number, arrived))
        if not passes._stage.is_last:
            self._send(passes._hidden_out, number, result)
        self.times.passes.append((True, number, begin, time.perf_counter()))

    def _compute(self, number: int, arrived: torch.Tensor | None) -> torch.Tensor:
        """The hidden state, or the last stage's part of the loss; kept for the backward pass."""
        received = self._passes._enter(arrived)
        if received is not None and self._passes.sends_back:
            received.requires_grad_()
        result = self._result(self._batches[number])
        self._kept[number] = received, result
        return result

    def _result(self, batch: Batch) -> torch.Tensor:
        passes, step = self._passes, self._step
        step.begin(batch)
        with autocast(passes._device.type, step.techniques.dtype):
            if not passes._stage.is_last:
                return passes.hidden(batch.input_ids_BT, **arguments_of(batch))
            part = loss_sum(passes._setup.model, batch, step.techniques.loss_type) / step.num_counted
        self.loss += part.detach()
        return part

    def backward(self, number: int) -> None:
        passes, step = self._passes, self._step
        begin = self._wait_for(passes._gradient_in if passes._is_sent_back else None)
        received, result = self._kept.pop(number, (None, None))
        if number == len(self._batches) - 1:
            step.before_last()
        gradient = passes._gradient_in.receive() if passes._is_sent_back else None
        if result is not None and result.requires_grad:
            step.begin(self._batches[number])  # for what is computed again
            self.guard(lambda: self._go_back(result, gradient))
        if passes.sends_back:
            self._send(passes._gradient_out, number, None if received is None else received.grad)
        self.times.passes.append((False, number, begin, time.perf_counter()))

    def _wait_for(self, inbox: Inbox | None) -> float:
        """Until the next message of an inbox is there; the moment from which this worker computes."""
        if inbox is None:
            return time.perf_counter()
        if self._passes._device.type == "cuda" and self.times.passes:  # what was launched is no waiting
            torch.cuda.current_stream(self._passes._device).synchronize()
            self.times.passes[-1] = (*self.times.passes[-1][:3], time.perf_counter())
        begin = time.perf_counter()
        inbox.wait()
        end = time.perf_counter()
        self.times.waits.append((begin, end))
        return end

    def _go_back(self, result: torch.Tensor, gradient: torch.Tensor | None) -> None:
        seed = None if gradient is None else gradient.to(result.device, result.dtype)
        root = self._step.scaler.scale(result) if self._passes._stage.is_last else result
        root.backward(seed)

    def _send(self, outbox: Outbox, number: int, tensor: torch.Tensor | None) -> None:
        self._passes.hand_on(self.guard, outbox, tensor, self._passes._shape(self._batches[number]))
