"""A case's model, samples and batches on fake tensors of its card; the product makes them, under fake_device.FAKE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from orchestrator.data import batches
from orchestrator.data.counts import Statistics
from orchestrator.data.dataset import Dataset
from strategies.contract import Method
from strategies.measure import trace
from strategies.step.supervised_logits import Batch
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques
from tests.gpu_rehearsal import cases, fake_device
from tests.gpu_rehearsal.cases import Case

SAMPLES = {9: 4, 8: 4, 7: 3, 5: 2}  # tokens -> how many at the end are supervised; two micro-batches, the first heavier


def settings_of(techniques: Techniques) -> TrainSettings:
    return TrainSettings(1e-4, 0.01, techniques.optim, 0.9, 0.999, 1e-8, techniques, seed=1)


def model_on(device: str, method: Method, settings: TrainSettings, num_layers: int = 1, is_tied: bool = False) -> Any:
    """The untouched model."""
    config = cases.CONFIG | {"num_hidden_layers": num_layers, "tie_word_embeddings": is_tied}
    model = trace.plain_model(config, num_layers, method, settings, "meta")
    trace.fill(model, trace.filler(device))
    return model


def set_up(case: Case) -> TrainSetup:
    """A case's model as its method trains it."""
    method, settings = cases.METHODS[case.method], settings_of(case.techniques())
    model = model_on(case.device, method, settings)
    with torch.device(case.device):
        setup = method.setup(model, settings)
    if settings.techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    setup.model.train()
    return setup


def samples() -> Dataset:
    """SAMPLES, tokenised."""
    counts = list(SAMPLES.items())
    table = pyarrow.table(
        {
            "input_ids": pyarrow.array([list(range(length)) for length, _ in counts], pyarrow.list_(pyarrow.int32())),
            "supervised": [[place >= length - learnt for place in range(length)] for length, learnt in counts],
            "num_supervised": pyarrow.array([learnt for _, learnt in counts], pyarrow.int32()),
            "fingerprint": list(range(len(counts))),
        }
    )
    return Dataset(table, Statistics(), "samples")


def collate(data: Dataset, sample_ids: Sequence[int], packing: bool, share_prefixes: bool = False) -> Batch:
    """The product's batch, made of real numbers since where its losses are is read off them; then fake, on the host."""
    with unset_fake_temporarily():
        batch = batches.collate(data, sample_ids, packing, share_prefixes)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, fake_device.FAKE.from_tensor(value))
    return batch


def batch_of(case: Case) -> Batch:
    """The case's first micro-batch, on the host."""
    return collate(samples(), (0, 1), case.techniques().packing)
