"""A base model on which adapters are tried, one after the other, by their loss on labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.job.job_file import Job
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.model.kernels import fastest_on_cpu
from orchestrator.training.model.loading import Placing, load_model
from orchestrator.training.parallel import ProcessGroup
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.algebra import Factors
from strategies.adapter_bank.shares.tuning import TunableSum, TunedShares, tune
from strategies.adapter_bank.trial import Below, corrected
from strategies.step.supervised_logits import loss_sum
from strategies.train_setup import TrainSetup

_ROWS = 8  # of a batch
_HELD_BACK = 4  # one row in so many says when tuning ends


class AdapterTrial:
    """Holds the base in fp32 on the CPU, and for the data set tried last what its layers below all adapters say."""

    def __init__(self, job: Job, folder: Path, adapters: Sequence[Adapter]) -> None:
        """`adapters` are those that will be tried, alone or added up."""
        self.model = load_model(str(folder), job, Placing("float32", torch.device("cpu"), "sdpa"))
        self._techniques = fastest_on_cpu(self.model, _ROWS)
        self.model.requires_grad_(False)
        self._targets = {name for adapter in adapters for name in adapter.targets}
        self._below = Below(self.model, self._targets)
        self._data: Dataset | None = None

    def loss(self, data: Dataset, adapter: Adapter | Mapping[str, Factors] | None = None) -> float:
        """Mean loss of the supervised tokens, in nats a token, with an adapter's corrections or without."""
        if isinstance(adapter, Adapter):
            adapter = adapter.corrections()
        if data is not self._data:
            self._below.forget()
            self._data = data
        with corrected(self.model, adapter or {}) as model, self._below.keep_outputs(), torch.no_grad():
            optimizer = torch.optim.SGD([next(model.parameters())])  # evaluation asks for none, a set-up has one
            setup = TrainSetup(model, optimizer, dict(model.named_parameters()), lambda *_: None, "model")
            techniques = replace(self._techniques, max_length=int(data.lengths.max()))
            return evaluate_loss(setup, data, techniques, ProcessGroup())

    def tune(self, rows: Dataset, parts: Sequence[Mapping[str, Factors]], start: Sequence[float]) -> TunedShares:
        """Shares of each map for sums of corrections, tuned on most of the rows and ended by the others."""
        held_back = range(0, len(rows), _HELD_BACK)
        seen = [row for row in range(len(rows)) if row % _HELD_BACK]
        total = TunableSum(self.model, parts, start)
        with total.added() as model:
            steps = [self._mean_loss(model, rows, seen[at : at + _ROWS]) for at in range(0, len(seen), _ROWS)]
            judge = self._mean_loss(model, rows, list(held_back))

            def look() -> float:
                with torch.no_grad():
                    return judge().item()

            return tune(total, lambda step: steps[step % len(steps)](), look)

    def _mean_loss(self, model: torch.nn.Module, data: Dataset, rows: list[int]) -> Callable[[], torch.Tensor]:
        """The mean loss of some rows, each time anew; layers below all adapters run the first time only."""
        batch = collate(data, rows, self._techniques.packing, self._techniques.share_prefixes)
        below = Below(model, self._targets)

        def loss() -> torch.Tensor:
            with below.keep_outputs():
                return loss_sum(model, batch) / batch.targets_S.numel()

        return loss
