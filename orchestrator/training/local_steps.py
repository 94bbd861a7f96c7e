"""Local steps: workers train alone for several steps, then average what they changed (DiLoCo, arXiv 2311.08105).

One sum for many steps, for networks on which a sum a step is too dear.  It is another computation than the synchronous
one, with its own convergence, so a job has to ask for it (strategy.local_steps).  Of adapters either A and B are
averaged, or their products (strategy.local_steps_merge).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from orchestrator.errors import JobError
from orchestrator.training.parallel import ProcessGroup
from strategies.adapter_bank import algebra
from strategies.adapter_bank.algebra import Factors
from strategies.methods.kept_pairs import start_again
from strategies.train_setup import AdapterPair, TrainSetup

_OUTER_RATE, _OUTER_MOMENTUM = 0.7, 0.9  # Nesterov's, as the paper found best
_MOMENTUM = "outer_momentum"


class LocalSteps:
    """The weights that all workers had in common last, and the outer optimizer that moves them.

    What a worker changed travels where gradients do, so it is summed, bucketed and counted like them.  The outer
    momentum lies among the inner optimizer's states, so a checkpoint holds it with them.
    """

    sums_changes: ClassVar[bool] = True  # in place of gradients

    def __init__(self, setup: TrainSetup, batch_size: int) -> None:
        self._batch_size = batch_size  # samples of a local step
        self.bytes_sent = 0  # beside those sums
        self._parameters = list(setup.parameters.values())
        self._state = setup.optimizer.state
        self._common = [parameter.detach().clone() for parameter in self._parameters]

    def split(self, own: Sequence[int]) -> list[Sequence[int]]:
        """The samples of each local step: a worker with a larger share makes more steps of the same size."""
        return [own[start : start + self._batch_size] for start in range(0, len(own), self._batch_size)]

    @torch.no_grad()
    def changes_to_gradients(self, weight: float) -> None:
        """Write what this worker changed into the gradients; the weights of all workers sum to 1."""
        for parameter, common in zip(self._parameters, self._common, strict=True):
            parameter.grad = weight * (common - parameter)

    @torch.no_grad()
    def outer_step(self, step: int) -> float:
        """Move the common weights by the summed changes and continue from them; returns the changes' norm."""
        squares = 0.0
        for parameter, common in zip(self._parameters, self._common, strict=True):
            change = parameter.grad
            assert change is not None
            squares += float(change.square().sum())
            momentum = self._state[parameter].setdefault(_MOMENTUM, torch.zeros_like(parameter))
            momentum.mul_(_OUTER_MOMENTUM).add_(change)
            common.sub_(_OUTER_RATE * (change + _OUTER_MOMENTUM * momentum))
            parameter.copy_(common)
            parameter.grad = None
        return squares**0.5

    def take_report(self) -> dict[str, Any] | None:
        """What the last outer step did, for the run's record, with a sentence `text`."""
        return None

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the common weights: the step is repeated."""
        for parameter, common in zip(self._parameters, self._common, strict=True):
            parameter.copy_(common)
            parameter.grad = None


class ProductSteps(LocalSteps):
    """Local steps after which workers have the mean of their corrections B A, not of A and of B (LTE, 2402.16828).

        B A <- sum_h w_h B_h A_h, cut to the rank of one pair

    The paper adds the means to the weights and keeps a pair a worker; cut to one pair, all workers have the same
    adapter, which is what a checkpoint and an export hold.  No outer optimizer: with one worker it is plain training,
    bit by bit, and a single SGD step from B = 0 is the synchronous one.  With `restarts` the mean goes to the
    corrections that the setup keeps, whole while there is room, and a new pair begins.  Sent: each worker's pairs to
    all others.
    """

    sums_changes: ClassVar[bool] = False

    def __init__(self, setup: TrainSetup, batch_size: int, group: ProcessGroup, restarts: str | None = None) -> None:
        super().__init__(setup, batch_size)
        if not setup.pairs or (restarts and not setup.kept):
            raise JobError("products are averaged of pairs of A and B, and the method trains something else")
        self._setup, self._group, self._restarts = setup, group, restarts  # the key that new pairs are drawn by
        self._weight, self._report = 1.0, None
        self._begin = {pair.name: _factors(pair) for pair in setup.pairs}  # all workers' common corrections

    def changes_to_gradients(self, weight: float) -> None:
        """Note this worker's weight in the mean; those of all workers sum to 1."""
        self._weight = weight

    @torch.no_grad()
    def outer_step(self, step: int) -> float:
        """Replace all pairs by their mean; returns the norm of what the round changed.  Collective."""
        started, (weights, parts_N) = time.perf_counter(), self._gather()
        left = changed = 0.0
        means = {name: algebra.add([parts[name] for parts in parts_N], weights) for name in self._begin}
        for pair in self._setup.pairs:
            mean = means[pair.name]
            changed += algebra.square(algebra.add([mean, self._begin[pair.name]], [1.0, -1.0])) * pair.scale**2
            if not self._restarts and len(weights) > 1:
                left += self._replace(pair, mean, [parts[pair.name] for parts in parts_N], weights) * pair.scale**2
        if self._restarts:
            left = self._restart(means, f"{self._restarts}/{step}")
        error = (left / changed) ** 0.5 if changed else 0.0
        self._begin = {pair.name: _factors(pair) for pair in self._setup.pairs}
        for parameter, common in zip(self._parameters, self._common, strict=True):
            common.copy_(parameter)
        if len(weights) > 1 or self._restarts:
            self._report = {
                "text": f"averaged corrections of {len(weights)} workers; {error:.2%} of what they changed is beyond"
                " the adapter's rank",
                "truncation_error": error,
                "seconds": round(time.perf_counter() - started, 4),
            }
        return changed**0.5

    def take_report(self) -> dict[str, Any] | None:
        found, self._report = self._report, None
        return found

    def _gather(self) -> tuple[list[float], list[dict[str, Factors]]]:
        """The weight and the corrections of every worker, by rank, as they arrived everywhere."""
        own = torch.cat([*(parameter.detach().reshape(-1).float().cpu() for parameter in self._parameters)])
        weights = self._group.sum(self._group.at_own_rank(self._weight))
        arrived = self._group.gather_flat(own)
        self.bytes_sent += (len(arrived) - 1) * arrived[0].numel() * arrived[0].element_size()
        total, places = sum(weights), {id(parameter): at for at, parameter in enumerate(self._parameters)}
        sizes = [parameter.numel() for parameter in self._parameters]
        found = []
        for flat in arrived:
            tensors = flat.float().cpu().split(sizes)
            found.append({
                pair.name: Factors(
                    tensors[places[id(pair.a_RI)]].view_as(pair.a_RI), tensors[places[id(pair.b_OR)]].view_as(pair.b_OR)
                )
                for pair in self._setup.pairs
            })  # fmt: skip
        return [weight / total for weight in weights], found

    @staticmethod
    def _replace(pair: AdapterPair, mean: Factors, parts: Sequence[Factors], weights: Sequence[float]) -> float:
        """Let a pair be the nearest of its rank to a mean, its A like the mean A; the square of what is cut off."""
        cut, left, whole = algebra.truncate(mean, pair.a_RI.shape[0])
        like = sum((weight * part.a_RI for part, weight in zip(parts, weights, strict=True)), torch.zeros(()))
        cut = algebra.near(cut, like) if whole else Factors(like, torch.zeros(pair.b_OR.shape))
        pair.a_RI.copy_(cut.a_RI)
        pair.b_OR.copy_(cut.b_OR)
        return left

    def _restart(self, means: dict[str, Factors], key: str) -> float:
        """Keep the means and begin new pairs; the square of what the kept ones have no room for."""
        assert self._setup.kept
        scales = {pair.name: pair.scale for pair in self._setup.pairs}
        parts = {name: Factors(mean.a_RI, scales[name] * mean.b_OR) for name, mean in means.items()}
        left, _ = self._setup.kept.add(parts)
        start_again(self._setup.pairs, self._setup.optimizer, key)
        return left


def _factors(pair: AdapterPair) -> Factors:
    return Factors(pair.a_RI.detach().float().cpu().clone(), pair.b_OR.detach().float().cpu().clone())
