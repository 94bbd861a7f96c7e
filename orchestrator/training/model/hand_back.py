"""The end of a training: its best weights are written, verified and handed back before they are evaluated.

An evaluation may fail, or be killed, and the result is there all the same.  Afterwards the trained model is freed and
the exported one loaded and compared with it: a folder that differs is withdrawn.
"""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from clusters.safe.writing import new_folder
from orchestrator.errors import RunFailed
from orchestrator.job.job_file import Job
from orchestrator.job.model_files import name_for_others
from orchestrator.runs import checkpoints, digests, record
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training import checkpoint
from orchestrator.training.model import agreement, export
from orchestrator.training.model.agreement import Agreement, Portrait
from orchestrator.training.model.loading import load_exported
from orchestrator.training.state import Progress
from orchestrator.training.worker_context import WorkerContext
from strategies.step.optimizers import averages_of
from strategies.step.out_of_memory import is_out_of_memory, release_cache
from strategies.train_setup import TrainSetup, TrainState
from strategies.workload import Techniques


def best_weights(
    run: RunFolder, context: WorkerContext, progress: Progress, setup: TrainSetup
) -> checkpoints.ChosenStep:
    """Bring the weights of the lowest held-out loss into the model, of those that verify; the same on every worker."""
    load_best = context.plan.load_best_model_at_end
    losses = {int(step): loss for step, loss in progress.eval_losses.items()} if load_best else {}
    own = checkpoints.choose(run.checkpoints, losses, progress.step) if context.is_first else None
    choice = context.group.gather(own)[0]
    if choice.step != progress.step:
        best = checkpoint.read(run.checkpoints / f"step-{choice.step:08d}", context.note)
        if best is None:
            raise RunFailed(f"the checkpoint of step {choice.step} verifies on one machine and not on another")
        best.restore(setup, with_optimizer=averages_of(setup) is not None)  # an average is made of its state
    if choice.text and (choice.reason or choice.step != progress.step):
        context.note(choice.text)
    return choice


def free_optimizer(setup: TrainSetup) -> None:
    """Free gradients and the optimizer's state on the device: no step follows, and averages take the weights' place.

    An engine keeps its own, and an optimizer that streams keeps its on the host.
    """
    if setup.streaming:
        setup.streaming.settle()
    elif averages := averages_of(setup):
        averages.become_averages()
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
    final = run.path / setup.export_folder
    located, known = Path(run.data().model), record.read(run.path)
    base = export.BaseModel(located, name_for_others(job, located, final), known.model if known else {})
    for unfinished in run.path.glob(f"{final.name}.tmp-*"):  # of a process that was killed while it wrote
        shutil.rmtree(unfinished)
    with new_folder(final, replaces=True) as temporary:  # one of a process that ended before the evaluation
        export.write(temporary, setup, held.weights if held else None, tokenizer, base)
        return agreement.on_disk(portrait, temporary, f"the {final.name}")


def check(
    run: RunFolder, context: WorkerContext, setup: TrainSetup, techniques: Techniques, portrait: Portrait
) -> Agreement:
    """Load what was handed back and compare its logits with those of the trained model, which is freed first.

    Raises RunFailed where the two differ; then nothing is handed back.
    """
    folder, device = run.path / setup.export_folder, context.device
    is_rounded = bool(setup.engine) or setup.export_is_rounded
    what = f"the {folder.name}"
    setup.release()
    release_cache()
    load = partial(load_exported, context, folder, techniques)
    reason = agreement.no_room(portrait.bytes, device)
    try:
        found = None if reason else agreement.compare(portrait, folder, load, what, is_rounded)
    except RunFailed:
        run.take_back("result.json")
        shutil.rmtree(folder)
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found, reason = None, f"it does not fit on {device} beside what is there"
    return found or agreement.without_logits(portrait, folder, what, str(reason))


def describe_export(run: RunFolder, choice: checkpoints.ChosenStep) -> dict[str, Any]:
    """What result.json says of the exported files: whose weights they are, and their digests."""
    exported = run.exported()
    assert exported is not None  # it has just been written
    files = {name: dataclasses.asdict(digest) for name, digest in digests.of_folder(exported).items()}
    return {"folder": exported.name, **dataclasses.asdict(choice), "files": files}
