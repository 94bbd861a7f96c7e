"""One forward and one backward pass for micro-batches of all jobs that wait for theirs.

A job's loop calls its `Passes` as if it were alone.  Each pass takes the next micro-batch of every waiting job, those
with the most left first, as long as they stay within the limit of tokens.  The loss of each is divided by the
supervised tokens of its own step; the sum of all is differentiated at once, and no gradient of one reaches another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from clusters.safe.reading import first_line
from strategies.multi_lora.joint_model import JointModel, RowPart
from strategies.multi_lora.turns import Turn
from strategies.step.out_of_memory import release_cache
from strategies.step.passes import SequentialPasses
from strategies.step.step import forward_backward
from strategies.step.supervised_logits import Batch
from strategies.techniques.precision import autocast
from strategies.train_setup import StepPasses, TrainSetup


@dataclass(eq=False)
class Backlog:
    """What is left of a job's step."""

    job: JointPasses
    micro_batches: Sequence[list[int]]
    step: StepPasses
    number: int = 0  # micro-batches done
    loss: torch.Tensor = field(init=False)
    error: Exception | None = None
    last_tokens: int = 0  # of the micro-batch that was done last
    _batch: tuple[int, Batch] | None = None

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """As before its first micro-batch."""
        self.number, self.loss = 0, torch.zeros((), device=self.job.setup.device)
        self.job.setup.optimizer.zero_grad(set_to_none=True)

    @property
    def left(self) -> int:
        """Micro-batches."""
        return len(self.micro_batches) - self.number

    @property
    def batch(self) -> Batch:
        """The next micro-batch, made once."""
        if self._batch is None or self._batch[0] != self.number:
            self._batch = self.number, self.step.take(self.micro_batches[self.number])
        return self._batch[1]

    @property
    def num_tokens(self) -> int:
        """Of the next micro-batch."""
        return self.batch.input_ids_BT.numel()

    def begin(self) -> None:
        """Before the next micro-batch's forward pass."""
        self.step.begin(self.batch)
        if self.left == 1:
            self.step.before_last()

    def done(self, part: torch.Tensor) -> None:
        """The next micro-batch's part of the loss has been differentiated."""
        self.loss += part.detach()
        self.last_tokens = self.num_tokens
        self.number += 1
        self._batch = None


@dataclass(eq=False)
class JointPasses(SequentialPasses):
    """A job's `Passes`: its micro-batches wait for those of others; all else runs on its own model."""

    row: JointRow
    turn: Turn
    job: Hashable
    is_joined: bool = True  # False: its corrections cannot share a row, and its passes run by themselves
    waited_s: float = 0.0  # inside `run`
    computed_s: float = 0.0  # of that, in passes, by its tokens of each

    def run(self, micro_batches: Sequence[list[int]], step: StepPasses) -> torch.Tensor:
        if not micro_batches:
            return super().run(micro_batches, step)
        began, backlog = time.perf_counter(), Backlog(self, micro_batches, step)
        self.row.backlogs.append(backlog)
        self.turn.wait()
        self.waited_s += time.perf_counter() - began
        if backlog.error is not None:
            raise backlog.error
        return backlog.loss

    @property
    def others_s(self) -> float:
        """Seconds in which other jobs were computed while it waited."""
        return self.waited_s - self.computed_s

    def times(self) -> None:
        """None: it waits for no other worker."""

    def leave(self) -> None:
        """No more micro-batches of this job follow."""
        self.row.model.leave(self.job)


class JointRow:
    """The row in which micro-batches of several jobs meet."""

    def __init__(self, model: JointModel, note: Callable[[str], None]) -> None:
        self.model, self._note = model, note
        self.backlogs: list[Backlog] = []  # of the jobs that wait, in the order in which they began to
        self._limit: int | None = None  # tokens of a pass; None = of the largest micro-batch that a job may have

    def join(self, job: Hashable, setup: TrainSetup, turn: Turn) -> tuple[JointPasses, str | None]:
        """A job's passes from now on, and why they run by themselves where they do."""
        try:
            self.model.join(job, setup)
        except ValueError as error:
            return JointPasses(setup, self, turn, job, is_joined=False), str(error)
        return JointPasses(setup, self, turn, job), None

    def run_pass(self) -> None:
        """One pass; jobs whose step's last micro-batch was in it are ready.  An error is raised in the job's own call.

        Where several jobs shared the pass, their steps begin again with fewer jobs a pass: exact, since whatever
        gradients the broken pass has left are forgotten.
        """
        began, error = time.perf_counter(), None
        self._make_batches()
        chosen = self._choose()
        try:
            self._compute(chosen)
        except Exception as found:  # whose it is shows when each is alone
            error = found.with_traceback(None)  # which holds the tensors of the pass
        if error is not None:
            self._after_error(chosen, error)
        self._divide_time(chosen, time.perf_counter() - began)
        for one in [one for one in self.backlogs if one.left == 0 or one.error is not None]:
            self.backlogs.remove(one)
            one.job.turn.ready()

    def _make_batches(self) -> None:
        """The next micro-batch of each job; where it cannot be made that is the job's own error."""
        for one in self.backlogs:
            try:
                _ = one.batch
            except Exception as error:
                one.error = error.with_traceback(None)

    def _choose(self) -> list[Backlog]:
        """The next micro-batches of a pass, in the order in which the jobs joined: equal runs have equal rows.

        Empty where no job has one.
        """
        waiting = sorted((one for one in self.backlogs if one.error is None), key=lambda one: -one.left)
        if not waiting or not waiting[0].job.is_joined:
            return waiting[:1]
        together = [one for one in waiting if one.job.is_joined]
        limit = self._limit or max(one.step.techniques.micro_batch_tokens for one in together)
        chosen, num_tokens = [together[0]], together[0].num_tokens
        for one in together[1:]:
            if num_tokens + one.num_tokens <= limit:
                chosen.append(one)
                num_tokens += one.num_tokens
        return sorted(chosen, key=lambda one: self.backlogs.index(one))

    def _compute(self, chosen: Sequence[Backlog]) -> None:
        if not chosen:
            return
        first = chosen[0]
        for one in chosen:
            one.begin()
        if not first.job.is_joined:
            step, setup = first.step, first.job.setup
            first.done(forward_backward(setup, first.batch, step.num_counted, step.techniques, step.scaler))
            return
        if any(one.step.techniques.gradient_checkpointing for one in chosen):
            self.model.recompute_activations()
        techniques, device = first.step.techniques, first.batch.input_ids_BT.device
        parts = [RowPart(one.job.job, one.batch, one.step.begin_layer) for one in chosen]
        with autocast(device.type, techniques.dtype):
            sums = self.model.losses(parts, techniques.loss_type)
            losses = [loss / one.step.num_counted for loss, one in zip(sums, chosen, strict=True)]
        scaled = [one.step.scaler.scale(loss) for loss, one in zip(losses, chosen, strict=True)]
        whole = scaled[0]
        for loss in scaled[1:]:
            whole = whole + loss
        whole.backward()
        for one, loss in zip(chosen, losses, strict=True):
            one.done(loss)

    def _after_error(self, chosen: Sequence[Backlog], error: Exception) -> None:
        """The only job of a pass gets its error; of several, all begin their steps again with fewer in a pass."""
        if len(chosen) == 1:
            chosen[0].error = error
            return
        self._limit = max(1, sum(one.num_tokens for one in chosen) // 2)
        for one in chosen:
            one.restart()
        release_cache()
        self._note(
            f"a pass of {len(chosen)} jobs failed ({first_line(error)}): from now on at most {self._limit} tokens"
        )

    @staticmethod
    def _divide_time(chosen: Sequence[Backlog], seconds: float) -> None:
        """Attribute a pass's seconds to its jobs by their tokens.  On a GPU: those of the host."""
        tokens = [one.last_tokens for one in chosen]
        for one, own in zip(chosen, tokens, strict=True):
            one.job.computed_s += seconds * own / max(1, sum(tokens))
