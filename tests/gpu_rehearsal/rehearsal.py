"""Under the stubs (fake_cuda.run): every case's set-up, preflight, step, checkpoint and resume, a line of JSON each."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from orchestrator.data.order import Order
from orchestrator.runs.events import Event, Note, StepReport
from orchestrator.training import evaluate, feed
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from orchestrator.training.workers import preflight
from strategies.step.state import forget, gather, restore
from strategies.techniques.precision import autocast, gradient_scaler
from strategies.train_setup import TrainSetup, TrainState
from strategies.workload import Techniques
from tests.gpu_rehearsal import cases, fake_device, inputs, pieces
from tests.gpu_rehearsal.cases import Case
from tests.gpu_rehearsal.fake_device import Watch

ORDER = Order(num_samples=len(inputs.SAMPLES), global_batch_size=len(inputs.SAMPLES), seed=1, num_train_epochs=2)
SCHEDULE = Schedule(
    lambda step: 1.0, max_grad_norm=1.0, seed=1, save_steps=1, eval_steps=2, early_stopping_patience=None
)


class Run:
    """The product's loop over two steps, stopped after the first; `steps` says what each asked of the card."""

    def __init__(self, setup: TrainSetup, techniques: Techniques, watch: Watch) -> None:
        self.steps: list[dict[str, Any]] = []
        self.held: TrainState | None = None
        self._setup, self._techniques, self._watch, self._data = setup, techniques, watch, inputs.samples()

    def go_on(self, progress: Progress) -> Progress:
        self._watch.begin()
        hooks = Hooks(self._record, self._save, lambda: None if self.steps else "asked")
        held_out = self._data.select([3])
        return train(
            Training(
                self._setup, self._data, held_out, ORDER, SCHEDULE, self._techniques, ProcessGroup(), progress, hooks
            )
        )

    def _record(self, event: Event) -> None:
        assert not isinstance(event, Note), event  # nothing is repeated or left out here
        if isinstance(event, StepReport):
            self.steps.append(self._watch.seen())

    def _save(self, progress: Progress) -> str:
        self.held = gather(self._setup)
        return "checkpoint"


def rehearse(case: Case) -> dict[str, Any]:
    """Preflight, a step, a checkpoint there and back, the second step and an evaluation."""
    techniques, data = case.techniques(), inputs.samples()
    gc.collect()  # what an earlier case left would count as this one's
    with fake_device.FAKE, Watch() as watch:
        setup = inputs.set_up(case)
        watch.know(setup.model.parameters())
        watch.begin()
        preflight.longest_batch(setup, data, techniques, len(data))
        foreseen = watch.seen()["peak"]
        run = Run(setup, techniques, watch)
        progress = run.go_on(Progress())
        fresh, held = _places(setup), run.held
        assert held is not None
        forget(setup)
        restore(setup, held)
        restored = _places(setup)
        run.go_on(replace(progress, stopped=None))
        return {
            "trained": sorted({str(parameter.dtype) for parameter in setup.parameters.values()}),
            "on": _devices(setup.parameters.values()),
            "gathered on": _devices([*held.weights.values(), *(v for s in held.moments.values() for v in s.values())]),
            "fresh": fresh,
            "restored": restored,
            "foreseen": foreseen,
            "steps": run.steps,
        }


def _places(setup: TrainSetup) -> list[dict[str, str]]:
    return fake_device.places(setup.optimizer.state[parameter] for parameter in setup.parameters.values())


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
        found = {"error": "".join(traceback.format_exception(error, limit=-6))}
    print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    gc.freeze()  # libraries are no garbage, and each case looks for some
    fake_device.pretend()
    for module in (evaluate, feed, preflight):
        module.collate = inputs.collate  # type: ignore[attr-defined]
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for part in (mixed_precision, *pieces.PIECES):
        if only in part.__name__:
            told(part.__name__, part)
    for case in cases.CASES:
        if only in str(case):
            told(str(case), lambda case=case: rehearse(case))
