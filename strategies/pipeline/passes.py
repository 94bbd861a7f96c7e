"""`Passes` of a stage: micro-batches through a model whose layers lie on several workers.

Every stage computes the list of micro-batches by itself, from the data's index, so shapes, borders of documents and
positions are known everywhere; only hidden states go forward and their gradients backward.  The last stage computes the
loss.  Parts of the loss and gradients are added in the order of one process: the numbers are the same bits.

Legend: B rows, T tokens, H hidden size, N trained tensors of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clusters.safe.reading import first_line
from strategies.pipeline import wire as form
from strategies.pipeline.cut import Received
from strategies.pipeline.exchange import Inbox, Outbox
from strategies.pipeline.schedule import operations
from strategies.step.out_of_memory import is_out_of_memory
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

    def run(self, micro_batches: Sequence[list[int]], step: StepPasses) -> torch.Tensor:
        batches = [step.take(sample_ids) for sample_ids in micro_batches]
        work = _StepWork(self, batches, step)
        self._times, sent, received = work.times, self.bytes_sent, self.bytes_received
        if not self._stage.is_last:
            step.scaler.scale(work.loss)  # it makes its tensors with the first loss, and the update asks for them
        shapes = [self._shape(batch) for batch in batches]
        if not self._stage.is_first:
            self._hidden_in.expect(shapes)
        if self._is_sent_back:
            self._gradient_in.expect(shapes)
        for operation in operations(self._stage.index, self._stage.count, len(batches), self._stage.ahead):
            (work.forward if operation.is_forward else work.backward)(operation.micro_batch)
        begin = time.perf_counter()
        self._settle()
        work.times.waits.append((begin, time.perf_counter()))
        work.times.bytes_sent, work.times.bytes_received = self.bytes_sent - sent, self.bytes_received - received
        if work.shortage is not None:
            raise work.shortage
        return work.loss

    def each(self, batches: Sequence[list[T]], call: Callable[[list[T]], None]) -> tuple[list[T], str | None]:
        for batch in batches:
            call(batch)
        self._settle()
        return [], None

    def loss_sum(self, batch: Batch, techniques: Techniques) -> torch.Tensor:
        self._expect_hidden(self._shape(batch))
        self._receive_hidden()
        with autocast(self._device.type, techniques.dtype):
            if self._stage.is_last:
                return loss_sum(self._setup.model, batch, techniques.loss_type)
            self._hidden_out.send(self.hidden(batch.input_ids_BT, **arguments_of(batch)))
        return torch.zeros((), device=self._device)

    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        self._expect_hidden((*ids_BT.shape, self._width))
        self._receive_hidden()
        vocabulary = inner_model(self._setup.model).config.get_text_config().vocab_size
        logits_BTV = torch.empty(*ids_BT.shape, vocabulary)
        if self._stage.is_last:
            logits_BTV = self._setup.model(input_ids=ids_BT, use_cache=False).logits.float().cpu().contiguous()
        else:
            self._hidden_out.send(self.hidden(ids_BT, use_cache=False))
        dist.broadcast(logits_BTV, self._ranks[-1], group=self._group)
        self._settle()
        return logits_BTV

    def gradient_norm(self) -> torch.Tensor:
        """Norms of single tensors in the order of the whole model, then their norm: the bits of one process."""
        place = {name: number for number, name in enumerate(self._names)}
        own = {name: p.grad for name, p in self._setup.parameters.items() if p.grad is not None}
        norms_2N = torch.zeros(2, len(self._names), device=self._device)
        if own:
            at = [place[name] for name in own]
            norms_2N[0, at] = torch.stack([torch.linalg.vector_norm(gradient) for gradient in own.values()]).float()
            norms_2N[1, at] = 1.0
        summed = norms_2N.cpu()
        dist.all_reduce(summed, group=self._group)
        return torch.linalg.vector_norm(summed[0][summed[1] > 0].to(self._device))

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
        **_: Any,
    ) -> torch.Tensor:
        """Greedy: the last stage chooses a token, all learn it."""
        from transformers import DynamicCache

        cache, ids, mask = DynamicCache(), input_ids, attention_mask
        unfinished_B = torch.ones(len(ids), dtype=torch.long, device=self._device)
        new_ids, positions = ids, (mask.cumsum(-1) - 1).clamp_min(0)
        for _number in range(max_new_tokens):
            chosen_B = self._choose(new_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            new_ids = (chosen_B * unfinished_B + pad_token_id * (1 - unfinished_B))[:, None]
            ids, mask = torch.cat([ids, new_ids], 1), torch.cat([mask, torch.ones_like(new_ids)], 1)
            positions = positions[:, -1:] + 1
            ended_B = torch.isin(new_ids[:, 0], torch.tensor(list(eos_token_id or ()), device=self._device))
            for criterion in stopping_criteria:
                ended_B |= criterion(ids, None)
            unfinished_B &= ~ended_B
            if not unfinished_B.any():
                break
        self._settle()
        return ids

    def _choose(self, ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The next token of each row (B)."""
        self._expect_hidden((*ids_BT.shape, self._width))
        self._receive_hidden()
        chosen_B = torch.zeros(len(ids_BT), dtype=torch.long)
        if self._stage.is_last:
            logits = self._setup.model(input_ids=ids_BT, use_cache=True, logits_to_keep=1, **arguments).logits
            chosen_B = logits[:, -1].float().argmax(-1).cpu()
        else:
            self._hidden_out.send(self.hidden(ids_BT, use_cache=True, **arguments))
        dist.broadcast(chosen_B, self._ranks[-1], group=self._group)
        return chosen_B.to(self._device)

    def _shape(self, batch: Batch) -> tuple[int, int, int]:
        return (*batch.input_ids_BT.shape, self._width)  # type: ignore[return-value]

    def _expect_hidden(self, shape: Sequence[int]) -> None:
        if not self._stage.is_first:
            self._hidden_in.expect([shape])

    def _receive_hidden(self) -> None:
        """Have the next hidden state stand for the embedding."""
        self._enter(self._next_hidden())

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
        self.shortage: Exception | None = None

    def forward(self, number: int) -> None:
        passes = self._passes
        begin = self._wait_for(None if passes._stage.is_first else passes._hidden_in)
        arrived = passes._next_hidden()
        result = self._guard(lambda: self._compute(number, arrived))
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
            part = loss_sum(passes._setup.model, batch, step.techniques.loss_type) / step.num_supervised
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
            self._guard(lambda: self._go_back(result, gradient))
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
        """Send a micro-batch's hidden state or gradient; zeros where there is none."""
        flat = None if tensor is None else self._guard(lambda: form.pack(tensor, outbox.wire))
        if flat is None:
            nothing = torch.zeros(self._passes._shape(self._batches[number]), dtype=self._passes._dtype)
            flat = form.pack(nothing, outbox.wire)
        outbox.post(flat)

    def _guard(self, compute: Callable[[], T]) -> T | None:
        """What was computed; None once memory has run out."""
        if self.shortage is not None:
            return None
        try:
            return compute()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._kept.clear()
            self.shortage = MemoryError(first_line(error))  # holds no tensor of the failed pass
            return None
