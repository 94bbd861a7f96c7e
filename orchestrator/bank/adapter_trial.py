"""A base model on which adapters are tried, one after the other, by their loss on labelled rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.job.job_file import Job
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.model.loading import Placing, load_model
from orchestrator.training.parallel import ProcessGroup
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.algebra import Factors
from strategies.adapter_bank.trial import Below, corrected
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

_ROWS = 8  # of a batch


class AdapterTrial:
    """Holds the base in fp32 on the CPU, and for the data set tried last what its layers below all adapters say."""

    def __init__(self, job: Job, folder: Path, max_length: int, adapters: Sequence[Adapter]) -> None:
        """`adapters` are those that will be tried, alone or added up."""
        self.model = load_model(str(folder), job, Placing("float32", torch.device("cpu"), "sdpa"))
        self._techniques = Techniques("float32", "sdpa", False, False, _ROWS, max_length)
        self._below = Below(self.model, {name for adapter in adapters for name in adapter.targets})
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
            return evaluate_loss(setup, data, self._techniques, ProcessGroup())
