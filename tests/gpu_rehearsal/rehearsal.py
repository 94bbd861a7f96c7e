"""Under the stubs (fake_cuda.run): the product's set-up, step, checkpoint and restore of every case, a line each."""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Iterable
from typing import Any

import torch

from strategies.contract import Techniques, TrainSettings, TrainSetup
from strategies.cost import trace
from strategies.state import forget, gather, restore
from strategies.step import Update, forward_backward, update
from strategies.techniques import checkpointing
from strategies.techniques.precision import autocast, gradient_scaler
from strategies.techniques.supervised_logits import Batch, loss_sum
from tests.gpu_rehearsal import cases, fake_device, pieces
from tests.gpu_rehearsal.cases import Case

LENGTHS = trace.Lengths((7, 5, 9), (3, 2, 4))
_REAL = {packing: LENGTHS.batch(packing) for packing in (True, False)}  # where the losses are is read off its content


def settings_of(techniques: Techniques) -> TrainSettings:
    return TrainSettings(1e-4, 0.01, techniques.optim, 0.9, 0.999, 1e-8, techniques, seed=1)


def set_up(case: Case) -> TrainSetup:
    """A case's model on its card; under fake_device.FAKE."""
    method, settings = cases.METHODS[case.method], settings_of(case.techniques())
    model = trace.plain_model(cases.CONFIG, cases.CONFIG["num_hidden_layers"], method, settings, "meta")
    trace.fill(model, trace.filler(case.device))
    with torch.device(case.device):
        setup = method.setup(model, settings)
    if settings.techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    setup.model.train()
    return setup


def batch_of(case: Case) -> Batch:
    """A micro-batch as the loop makes it, on the host."""
    batch = copy.copy(_REAL[case.techniques().packing])
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, fake_device.FAKE.from_tensor(value))
    return batch


def rehearse(case: Case) -> dict[str, Any]:
    """Two steps of two micro-batches, an evaluation's loss, a checkpoint there and back, one more step."""
    techniques, num_supervised = case.techniques(), sum(LENGTHS.supervised)
    with fake_device.FAKE:
        on_host, setup = batch_of(case), set_up(case)
        batch = on_host.to(torch.device(case.device))
        scaler = gradient_scaler("cuda", techniques.dtype)

        def step() -> torch.Tensor:
            for _ in range(2):
                part = forward_backward(setup, batch, num_supervised, techniques, scaler)
            update(setup, scaler, Update(1.0, 1.0))
            return part

        with fake_device.Watch(setup.model.parameters()) as watch:
            step()
            watch.waits.clear()
            fake_device.ASKED.clear()
            loss = step()
            waits, asked = list(watch.waits), sorted(fake_device.ASKED)
            with torch.no_grad(), autocast("cuda", techniques.dtype):
                evaluated = loss_sum(setup.model, batch, techniques.loss_type)
            fresh = fake_device.places(setup.optimizer.state[p] for p in setup.parameters.values())
            held = gather(setup)
            assert held is not None
            forget(setup)
            restore(setup, held)
            restored = fake_device.places(setup.optimizer.state[p] for p in setup.parameters.values())
            step()
        return {
            "trained": sorted({str(parameter.dtype) for parameter in setup.parameters.values()}),
            "on": _devices([batch.input_ids_BT, loss, evaluated, *setup.parameters.values()]),
            "gathered on": _devices([*held.weights.values(), *(v for s in held.moments.values() for v in s.values())]),
            "fresh": fresh,
            "restored": restored,
            "waits": waits,
            "attention": asked,
            "sent": watch.sent,
            "sent weights": watch.sent_weights,
        }


def _devices(tensors: Iterable[torch.Tensor]) -> list[str]:
    return sorted({str(tensor.device) for tensor in tensors})


def mixed_precision() -> dict[str, Any]:
    """Whether autocast and loss scaling do anything here."""
    with fake_device.FAKE:
        weight, row = (torch.ones(4, 4, device="cuda:0") for _ in range(2))
        with autocast("cuda", "float16"):
            product = torch.nn.functional.linear(row, weight)
        scaler = gradient_scaler("cuda", "float16")
        scaled = scaler.scale(torch.ones((), device="cuda:0"))
        return {"product": str(product.dtype), "scaler": scaler.is_enabled(), "scale": str(scaled.device)}


def told(name: str, run: Any) -> None:
    try:
        found = run()
    except Exception as error:
        place = traceback.format_exception(error, limit=-4)
        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}", "trace": "".join(place)}
    print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    fake_device.pretend()
    told("mixed precision", mixed_precision)
    told("buckets", lambda: pieces.buckets(set_up, batch_of))
    told("batches", lambda: pieces.batches(batch_of))
    told("divided optimizer", lambda: pieces.divided_optimizer(set_up, batch_of))
    told("streaming optimizer", pieces.streaming_optimizer)
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for case in cases.CASES:
        if only in str(case):
            told(str(case), lambda case=case: rehearse(case))
