"""The end of a training: its best weights are written, verified and handed back before they are measured.

An evaluation may fail, or be killed, and the result is there all the same.  Afterwards the trained model is let go of,
and the model that is loaded again is held against it: a folder that differs is taken back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.errors import RunFailed
from orchestrator.job.job_file import Job
from orchestrator.planning.plan import Plan
from orchestrator.runs import checkpoints, digests
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training import checkpoint
from orchestrator.training.loop import Progress
from orchestrator.training.model import agreement, export
from orchestrator.training.model.agreement import Agreement, Portrait
from orchestrator.training.model.loading import load_exported
from orchestrator.training.out_of_memory import is_out_of_memory, release_cache
from orchestrator.training.parallel import Group
from strategies.contract import Techniques, TrainSetup, TrainState

T = TypeVar("T")
_OF_TRAINING = ("train_seconds", "time", "energy", "memory", "before")  # in result.json


def best_weights(
    run: RunFolder, plan: Plan, progress: Progress, setup: TrainSetup, group: Group, record: Any
) -> checkpoints.Choice:
    """Bring the weights of the lowest held-out loss into the model, of those that verify; the same on every worker."""
    losses = {int(step): loss for step, loss in progress.eval_losses.items()} if plan.load_best_model_at_end else {}
    mine = checkpoints.choose(run.checkpoints, losses, progress.step) if group.rank == 0 else None
    choice = group.gather(mine)[0]
    if choice.step != progress.step:
        best = checkpoint.read(run.checkpoints / f"step-{choice.step:08d}", lambda text: record("note", text=text))
        if best is None:
            raise RunFailed(f"the checkpoint of step {choice.step} verifies on one machine and not on another")
        best.restore(setup, with_optimizer=False)
    if choice.text and (choice.reason or choice.step != progress.step):
        record("note", text=choice.text)
    return choice


def free_optimizer(setup: TrainSetup) -> None:
    """Let go of gradients and of the optimizer's state on the device: no step follows.

    An engine keeps its own, and an optimizer that streams keeps its on the host.
    """
    if setup.streaming:
        setup.streaming.settle()
    elif not setup.engine:
        setup.optimizer.state.clear()
    for parameter in setup.parameters.values():
        parameter.grad = None
    release_cache()


def write(
    run: RunFolder,
    job: Job,
    setup: TrainSetup,
    tokenizer: Any,
    held: TrainState | None,
    portrait: Portrait,
) -> Agreement:
    """Export beside the final place, then rename; how many trained weights are on the disk as they were trained."""
    temporary, final = run.path / f"{setup.export_name}.tmp", run.path / setup.export_name
    shutil.rmtree(temporary, ignore_errors=True)
    export.write(temporary, setup, held.weights if held else None, tokenizer, job, Path(run.data()["model"]))
    found = agreement.on_disk(portrait, temporary, f"the {final.name}")
    if final.exists():  # of a sitting that ended before it was measured
        shutil.rmtree(final)
    temporary.rename(final)
    return found


def check(
    run: RunFolder,
    job: Job,
    plan: Plan,
    setup: TrainSetup,
    techniques: Techniques,
    portrait: Portrait,
    device: torch.device,
) -> Agreement:
    """Load what was handed back and compare its logits with the trained model's, which is let go of.

    Raises RunFailed where the two differ; then nothing is handed back.
    """
    folder, is_engine = run.path / setup.export_name, bool(setup.engine)
    what, location = f"the {folder.name}", run.data()["model"]
    setup.release()
    release_cache()
    load = partial(load_exported, folder, location, job, plan, techniques, device)
    reason = agreement.no_room(portrait.bytes, device)
    try:
        found = None if reason else agreement.compare(portrait, folder, load, what, is_engine)
    except RunFailed:
        run.take_back("result.json")
        shutil.rmtree(folder)
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found, reason = None, f"it does not fit on {device} beside what is there"
    return found or agreement.without_logits(portrait, folder, what, str(reason))


def handed_back(run: RunFolder, choice: checkpoints.Choice) -> dict[str, Any]:
    """What result.json says of the exported files: whose weights they are, and their digests."""
    exported = run.exported()
    assert exported is not None  # it has just been written
    files = {name: dataclasses.asdict(digest) for name, digest in digests.of_folder(exported).items()}
    return {"folder": exported.name, **dataclasses.asdict(choice), "files": files}


def keep_result(run: RunFolder, result: dict[str, Any], trained_now: bool) -> None:
    """Write result.json; where nothing was trained in this sitting, what training took stands in the earlier one."""
    if not trained_now and (earlier := run.result()):
        result |= {key: earlier[key] for key in _OF_TRAINING if key in earlier}
    run.keep("result.json", json.dumps(result, indent=1))


def result_of(plan: Plan, progress: Progress, train_s: float, data: Dataset) -> dict[str, Any]:
    """What is known before the result is measured."""
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "train_seconds": round(train_s, 2),
        "stopped_early": progress.stopped == "early",
        "best_checkpoint": progress.best_checkpoint,
        "before": progress.before,
        "after": None,
        "data_digest": data.digest,
        "plan_hash": plan.hash,
    }


def steady(steps: Sequence[T]) -> Sequence[T]:
    """Without the first steps, which compile kernels and fill caches."""
    return steps[min(3, len(steps) // 2) :]


def step_times(plan: Plan, seconds: Sequence[float]) -> dict[str, Any]:
    """Predicted beside the median of the measured steps."""
    return {
        "predicted_step_s": plan.step_s,
        "formula_step_s": plan.step_s / plan.calibration,  # before what earlier runs taught
        "measured_step_s": statistics.median(steady(seconds)) if seconds else None,
        "device": plan.nodes[0].device,
        "uuid": plan.nodes[0].uuid,
        "dtype": plan.techniques.dtype,
    }


def counted_energy(told: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Energy of this sitting's training over all workers; None unless every one of them could count it."""
    known = [one for one in told if one is not None]
    if len(known) < len(told):
        return None
    return {"wh": sum(one["wh"] for one in known), "source": " and ".join(sorted({one["source"] for one in known}))}


def versions() -> dict[str, str]:
    """What a run's numbers depend on beside its job."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("finetune-orchestrator", "torch", "transformers", "peft", "ray", "deepspeed", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
