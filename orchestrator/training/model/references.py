"""Log-probabilities of all answers under the reference, computed with the weights that training starts from.

Where the reference is the base with the adapter off and each sample is seen once, nothing is kept: the reference's pass
is then a part of each step.  Else they are computed before the first step and lie in the run's folder, so that a
resumed run continues with the very numbers it began with, and a model all of whose weights train needs no second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from clusters.safe.writing import new_folder
from orchestrator.data.batches import collate, collate_mismatched
from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import split_by_share
from orchestrator.errors import NothingFits
from orchestrator.job import manifest
from orchestrator.planning.plan import Plan
from orchestrator.training.feed import micro_batches_of, mismatched_batches_of
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.worker_context import WorkerContext
from strategies.step.out_of_memory import run_in_halves
from strategies.techniques.precision import autocast
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

FOLDER = "references"  # of a run
_FILE = "logps.safetensors"


def attach_references(
    context: WorkerContext,
    setup: TrainSetup,
    techniques: Techniques,
    data: Dataset | None,
    held_out: Dataset | None,
    run: Path | None = None,
) -> None:
    """Give the rows what the objective needs to know of them before a weight moves; kept in the folder of a run.

    The model must be as training starts.  Of training rows only where the plan says so; what a resumed run finds in
    its folder whole is used again.  Collective.
    """
    if setup.objective is None or not setup.objective.needs_reference:
        return
    rows = {"train": data if context.plan.stores_reference else None, "eval": held_out}
    wanted = {f"{name}-{one.digest}": one for name, one in rows.items() if one is not None}
    known = context.group.gather(_read(run, context) if run and context.is_first else {})[0]
    found = {
        key: known[key] if key in known else compute_references(setup, one, techniques, context.group)
        for key, one in wanted.items()
    }
    for key, one in wanted.items():
        one.references = found[key]
    if run and context.is_first and found.keys() - known.keys():
        _write(run, found)


def assume_references(plan: Plan, data: Dataset) -> None:
    """Zeros where the plan stores a reference, for passes of which only time and memory are wanted."""
    if plan.stores_reference and data.documents:
        data.references = numpy.zeros((len(data), 2))


def _read(run: Path, context: WorkerContext) -> dict[str, numpy.ndarray]:
    folder = run / FOLDER
    if not folder.exists():
        return {}
    damage = manifest.damage(folder, (_FILE,))
    try:
        if damage is None:
            return load_file(folder / _FILE)
    except (OSError, SafetensorError) as error:
        damage = str(error)
    context.note(f"the reference's log-probabilities in {folder} are damaged ({damage}); they are computed again")
    return {}


def _write(run: Path, found: dict[str, numpy.ndarray]) -> None:
    with new_folder(run / FOLDER, replaces=True) as folder:
        save_file(found, folder / _FILE)
        manifest.write(folder)


@torch.no_grad()
def compute_references(setup: TrainSetup, data: Dataset, techniques: Techniques, group: ProcessGroup) -> numpy.ndarray:
    """log p of each document's answer by the model as it is now; every worker computes a part.  Collective.

    (N, 2): of pairs the chosen one's and the rejected one's; of labelled rows the own one's and, where the objective
    asks for it, that of the answer to another question.  Raises NothingFits, on every worker, where one sample does not
    fit on one of them.
    """
    assert setup.objective and data.documents
    objective, found = setup.objective, numpy.zeros((len(data), 2))
    mine = split_by_share(data.lengths.tolist(), [1.0 / group.num_replicas] * group.num_replicas)[group.replica]

    def compute(sample_ids: Sequence[int]) -> None:
        batch = collate(data, sample_ids, techniques.packing, techniques.share_prefixes).to(setup.device)
        with autocast(setup.device.type, techniques.dtype):
            logps_D = objective.answer_logps(setup.model, batch, techniques.loss_type)
        own = logps_D.reshape(len(sample_ids), -1).cpu().numpy()
        found[list(sample_ids), : own.shape[1]] = own

    def compute_mismatched(sample_ids: list[int]) -> None:
        batch = collate_mismatched(data, sample_ids, techniques.packing).to(setup.device)
        with autocast(setup.device.type, techniques.dtype):
            found[sample_ids, 1] = objective.answer_logps(setup.model, batch, techniques.loss_type).cpu().numpy()

    unfit, reason = run_in_halves(micro_batches_of(data, mine, techniques), compute)
    if objective.needs_divergence and not unfit:
        unfit, reason = run_in_halves(mismatched_batches_of(data, mine, techniques), compute_mismatched)
    parts = group.gather((mine, found[mine], reason if unfit else None))
    if reasons := [reason for _, _, reason in parts if reason]:
        raise NothingFits(f"not even one row at a time fits for the reference: {reasons[0]}")
    for members, values, _ in parts:
        found[members] = values
    return found
