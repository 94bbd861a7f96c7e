"""What a short training writes: loaded again its loss is the same, and merged its logits are."""

from __future__ import annotations

import shutil
from typing import Any

from orchestrator.runs.condition import export_of, exported_whole
from orchestrator.runs.proofs.proof import ROUNDING, Proof, judged, not_run
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.model import agreement, export, hand_back
from orchestrator.training.model.agreement import Disagreement
from orchestrator.training.model.loading import load_exported
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.proofs.trials import Trials
from orchestrator.training.workers.finished import merge_exported
from orchestrator.training.workers.setup import Inputs, loss_of
from strategies.step.out_of_memory import release_cache
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques


def prove_saved(run: RunFolder, trials: Trials, inputs: Inputs, techniques: Techniques) -> Proof:
    """Write what was trained as a run does, free it, load it as `evaluate` does: the loss of the same rows."""
    setup, context = inputs.setup, trials.context
    expected = evaluate_loss(setup, trials.data, techniques, ProcessGroup())
    hand_back.free_optimizer(setup)
    probe = agreement.probe(inputs.data, len(inputs.tokenizer))
    portrait = agreement.portrait_of(setup.model, setup.parameters, probe, techniques.dtype)
    hand_back.write(run, context.job, setup, inputs.tokenizer, None, portrait)
    folder = run.path / setup.export_folder
    setup.release()
    release_cache()
    model = load_exported(context, folder, techniques, techniques.attn_implementation)
    nothing: Any = None
    weights = dict(model.named_parameters())
    loaded = TrainSetup(model, nothing, weights, nothing, nothing, objective=loss_of(context.plan))
    found = evaluate_loss(loaded, trials.data, techniques, ProcessGroup())
    compared = f"loss of {len(trials.data)} rows: the trained model, and its {folder.name} read from disk"
    why = f"the same weights in {techniques.dtype}; kernels may sum in another order"
    return judged("saved", compared, abs(found - expected) / max(abs(expected), 1e-2), ROUNDING[techniques.dtype], why)


def prove_merged(run: RunFolder, trials: Trials, finished: RunFolder | None) -> Proof:
    """Merge an adapter as `merge` does, of a finished run where there is one: the logits of both."""
    context, source = trials.context, finished or run
    exported = exported_whole(source) if finished else source.exported()
    if exported is None or not export.is_adapter(exported):
        return not_run("merged", "a whole model is handed back: there is no adapter to merge")
    if why := export_of(source).unmerged:
        return not_run("merged", why)
    whose = f"the adapter of {finished.run_id}" if finished else f"an adapter of {trials.sample.num_steps} steps"
    compared = f"logits, relative: base and {whose}, and both as one model"
    place = run.path / "merged"
    try:
        found = merge_exported(source, context.job, exported, place)
    except Disagreement as error:
        found = error.found
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if found.reason or found.largest_difference is None:
        return not_run("merged", found.reason or found.text)
    largest = found.largest_logit or 1.0
    why = f"weights that are written in {found.dtype} are rounded once"
    return judged("merged", compared, found.largest_difference / largest, (found.tolerance or 0.0) / largest, why)
