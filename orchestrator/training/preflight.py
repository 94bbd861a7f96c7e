"""What would fail hours into a run, done first: the longest batch, an evaluation step, a checkpoint there and back.

Nothing it does is left behind: no weight moves (the learning rate is 0), the optimizer's state is dropped, the
checkpoint is deleted.  A run with it and one without give the same numbers, bit by bit.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clusters.units import format_bytes, format_s
from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import micro_batches
from orchestrator.data.prepare import datasets
from orchestrator.errors import NothingFits, RunFailed
from orchestrator.jobfile import Job
from orchestrator.training import checkpoint
from orchestrator.training.loop import evaluate_loss, peak_bytes
from orchestrator.training.parallel import Group
from strategies.contract import Techniques, TrainSetup
from strategies.state import forget, gather
from strategies.step import Update, forward_backward, update
from strategies.techniques.precision import gradient_scaler
from strategies.techniques.supervised_logits import Batch


def check(
    setup: TrainSetup,
    data: Dataset,
    held_out: Dataset | None,
    techniques: Techniques,
    global_batch_size: int,
    folder: Path,
) -> dict[str, Any]:
    """Run the three; returns seconds of each and the peak.  Raises NothingFits and RunFailed."""
    device = next(iter(setup.parameters.values())).device
    began = time.perf_counter()
    try:
        tokens = longest_batch(setup, data, techniques, global_batch_size)
        step_s = time.perf_counter() - began
        _evaluation_step(setup, held_out, techniques)
    except torch.OutOfMemoryError as error:
        raise NothingFits(
            f"preflight: the longest batch does not fit on {device}: {str(error).splitlines()[0]} Lower"
            " train.per_device_train_batch_size or data.max_length, or set train.gradient_checkpointing: true"
        ) from error
    saved_bytes = _checkpoint_and_back(setup, folder)
    seconds, peak = time.perf_counter() - began, peak_bytes(device)
    return {
        "seconds": round(seconds, 2),
        "longest_batch_s": round(step_s, 2),
        "longest_batch_tokens": tokens,
        "peak_bytes": peak,
        "checkpoint_bytes": saved_bytes,
        "text": f"the longest batch ({tokens} tokens, {format_s(step_s)}), an evaluation step and a checkpoint of"
        f" {format_bytes(saved_bytes)} went through in {format_s(seconds)}; peak {format_bytes(peak)}",
    }


def longest_batch(setup: TrainSetup, data: Dataset, techniques: Techniques, global_batch_size: int) -> int:
    """Train on the fullest micro-batch that the longest samples of one step make; no weight moves.  Its tokens."""
    batch = fullest(setup, data, techniques, global_batch_size)
    step_in_place(setup, batch, techniques)
    forget(setup)
    return batch.input_ids_BT.numel()


def fullest(setup: TrainSetup, data: Dataset, techniques: Techniques, global_batch_size: int) -> Batch:
    """The micro-batch with the most tokens among those that the longest samples of one step make."""
    device = next(iter(setup.parameters.values())).device
    longest = sorted(range(len(data)), key=lambda i: -int(data.lengths[i]))[:global_batch_size]
    lengths = [int(data.lengths[i]) for i in longest]
    rows, max_length, packing = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    groups = micro_batches(lengths, rows, max_length, packing)
    chosen = max(groups, key=lambda group: sum(lengths[i] for i in group))
    return collate(data, [longest[i] for i in chosen], packing).to(device)


def step_in_place(setup: TrainSetup, batch: Batch, techniques: Techniques) -> None:
    """A step at learning rate 0: the optimizer's state is all that changes."""
    scaler = gradient_scaler(batch.input_ids_BT.device.type, techniques.dtype)
    setup.model.train()
    forward_backward(setup, batch, max(1, batch.targets_S.numel()), techniques, scaler)
    update(setup, scaler, Update(lr_factor=0.0, max_grad_norm=1.0))


def _evaluation_step(setup: TrainSetup, held_out: Dataset | None, techniques: Techniques) -> None:
    if held_out is not None:
        longest = int(held_out.lengths.argmax())
        evaluate_loss(setup, held_out.select([longest]), techniques, Group())


def _checkpoint_and_back(setup: TrainSetup, folder: Path) -> int:
    """Write a checkpoint, verify it, delete it; its bytes."""
    place = folder / "checkpoint"
    try:
        held = gather(setup)
        if held is None:  # another worker's business
            return 0
        path = checkpoint.save(place, held, {"step": 0})
        damage = checkpoint.verify(path)
        if damage:
            raise RunFailed(f"preflight: a checkpoint in {folder} comes back damaged ({damage}); use another disk")
        return sum(file.stat().st_size for file in path.iterdir())
    except OSError as error:
        raise RunFailed(
            f"preflight: a checkpoint cannot be written to {folder}: {error.strerror}. Free some space or set"
            " checkpoint.output_dir"
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: it is somebody's
            folder.rmdir()


def preflight(job: Job, ready: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """`plan --preflight`: the same in this process, on this machine, without a run folder."""
    from orchestrator.training import worker

    plan = ready.plan
    say("preflight: loading the model ...")
    device = torch.device(plan.device)
    torch.set_num_threads(plan.threads_per_worker)
    data, held_out = datasets(ready.data_files)
    part, location = plan.nodes[0], ready.data_files["model"]
    setup, techniques = worker.prepare(job, plan, part, location, device, lambda *_, **__: None)
    with tempfile.TemporaryDirectory(dir=_existing(Path(job.spec.checkpoint.output_dir).expanduser())) as folder:
        return check(setup, data, held_out, techniques, plan.global_batch_size, Path(folder) / "preflight")


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists: on the disk that will hold the checkpoints."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
