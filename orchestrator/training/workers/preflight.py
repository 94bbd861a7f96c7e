"""Tries first what would fail hours into a run: the longest batch, an evaluation step, a checkpoint.

Nothing it does is left behind: no weight moves (the learning rate is 0), the optimizer's state is dropped, the
checkpoint is deleted.  A run with it and one without give the same numbers, bit by bit.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from clusters.safe.reading import first_line
from clusters.units import format_bytes, format_s
from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import micro_batches, padded_tokens
from orchestrator.data.prepare import datasets
from orchestrator.errors import NothingFits, RunFailed
from orchestrator.job.job_file import Job
from orchestrator.planning.plan import NodePlan, Plan
from orchestrator.training import checkpoint
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.feed import micro_batches_of
from orchestrator.training.memory import peak_bytes
from orchestrator.training.model.devices import planned_device
from orchestrator.training.model.references import assume_references
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.worker_context import HeaviestLoad, WorkerContext, tensors_kind
from orchestrator.training.workers.setup import prepare_model
from strategies.step import thread_waits
from strategies.step.out_of_memory import catch_out_of_memory, is_out_of_memory
from strategies.step.passes import passes_of
from strategies.step.state import forget, gather
from strategies.step.step import Update, update
from strategies.step.supervised_logits import Batch
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import StepPasses, TrainSetup
from strategies.workload import Techniques

T = TypeVar("T")


def check(
    setup: TrainSetup,
    data: Dataset,
    held_out: Dataset | None,
    techniques: Techniques,
    num_samples: int,
    folder: Path,
) -> dict[str, Any]:
    """Run all three; returns seconds and peak memory.  Raises NothingFits and RunFailed.

    `num_samples` is what this worker does of a step.
    """
    device, started = setup.device, time.perf_counter()
    try:
        tokens = longest_batch(setup, data, techniques, num_samples)
        step_s = time.perf_counter() - started
        _evaluation_step(setup, held_out, techniques)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise NothingFits(
            f"preflight: the longest batch does not fit on {device}: {first_line(error)} Lower"
            " train.per_device_train_batch_size or data.max_length, or set train.gradient_checkpointing: true"
        ) from error
    saved_bytes = _checkpoint_and_back(setup, folder)
    seconds, peak = time.perf_counter() - started, peak_bytes(device)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    held = f", of {format_bytes(reserved)} reserved" if reserved else ""
    return {
        "seconds": round(seconds, 2),
        "longest_batch_s": round(step_s, 2),
        "longest_batch_tokens": tokens,
        "peak_bytes": peak,
        "reserved_bytes": reserved,  # with what the allocator keeps between blocks; unknown on a CPU
        "checkpoint_bytes": saved_bytes,
        "text": f"the longest batch ({tokens} tokens, {format_s(step_s)}), an evaluation step and a checkpoint of"
        f" {format_bytes(saved_bytes)} went through in {format_s(seconds)}; peak {format_bytes(peak)}{held}",
    }


def load_of(
    setup: TrainSetup,
    data: Dataset,
    held_out: Dataset | None,
    techniques: Techniques,
    num_samples: int,
    folder: Path,
) -> HeaviestLoad:
    """What `check` would try with the same arguments; `folder` is one of the run's."""
    batches = heaviest(setup, data, techniques, num_samples)
    return HeaviestLoad(
        (tensors_kind(setup, techniques), folder.parent.parent),
        max(batch.input_ids_BT.numel() for batch in batches),
        max(batch.targets_S.numel() for batch in batches),
        int(held_out.lengths.max()) if held_out is not None else 0,
    )


def num_samples_of(plan: Plan, part: NodePlan) -> int:
    """Samples of a step that fall to one worker, by its planned share."""
    return max(1, math.ceil(part.share * plan.global_batch_size - 1e-9))


def longest_batch(setup: TrainSetup, data: Dataset, techniques: Techniques, num_samples: int) -> int:
    """Train on the heaviest micro-batches of a step as its second step would; no weight moves.  Tokens of the first."""
    batches = heaviest(setup, data, techniques, num_samples)
    make_state(setup, data, techniques)
    for batch in repeat_to_two(batches) if setup.sharding else batches:
        step_in_place(setup, batch, techniques, num_passes(data, techniques, num_samples))
    forget(setup)
    return batches[0].input_ids_BT.numel()


def heaviest(setup: TrainSetup, data: Dataset, techniques: Techniques, num_samples: int) -> list[Batch]:
    """The micro-batch with most tokens, padding counted, and the one with most supervised positions, if it is another.

    Of those that `num_samples` samples make which are the longest, or learn most: no step of this worker has heavier.
    """
    layout = techniques.per_device_train_batch_size, techniques.max_length, techniques.packing
    lengths = data.lengths if techniques.packing else data.padded_lengths
    chosen = heaviest_samples(lengths.tolist(), data.num_supervised.tolist(), num_samples, *layout)
    if techniques.share_prefixes:
        return _heaviest_trees(data, techniques, num_samples, setup.device)
    return [collate(data, members, techniques.packing).to(setup.device) for members in chosen]


def _heaviest_trees(data: Dataset, techniques: Techniques, num_samples: int, device: torch.device) -> list[Batch]:
    """Of the longest samples, and of those that learn most: the tree with most tokens, and with most positions.

    Others may have less in common: no step's tree is longer than a micro-batch may be, and a step of fewer tokens than
    these samples' trees is one of shorter samples.
    """
    batches: list[Batch] = []
    for values in (data.lengths, data.num_supervised):
        largest = sorted(range(len(data)), key=lambda i, values=values: (-values[i], -data.lengths[i]))[:num_samples]
        groups = micro_batches_of(data, largest, techniques)
        batches += [collate(data, group, True, True).to(device) for group in groups]
    longest = max(batches, key=lambda batch: batch.input_ids_BT.numel())
    most = max(batches, key=lambda batch: batch.targets_S.numel())
    return [longest] if longest is most else [longest, most]


def repeat_to_two(batches: Sequence[T]) -> list[T]:
    """Two of the one or two heaviest batches: workers that divide an optimizer update together, as often as the others.

    Unequal shares have unequal heaviest batches, on one worker the same one twice and on another two.
    """
    return [*batches, *batches][:2]


def heaviest_samples(
    lengths: Sequence[int], supervised: Sequence[int], num_samples: int, rows: int, max_length: int, packing: bool
) -> list[list[int]]:
    """Indices of the samples of the one or two heaviest micro-batches; see `heaviest`."""

    def padded(members: Sequence[int]) -> int:
        return padded_tokens(lengths, [members], False) if not packing else sum(lengths[i] for i in members)

    def learnt(members: Sequence[int]) -> int:
        return sum(supervised[i] for i in members)

    chosen: list[list[int]] = []
    for values, weight in ((lengths, padded), (supervised, learnt)):
        largest = sorted(range(len(values)), key=lambda i, values=values: (-values[i], -lengths[i]))[:num_samples]
        groups = micro_batches([lengths[i] for i in largest], rows, max_length, packing)
        chosen.append(max(([largest[i] for i in group] for group in groups), key=weight))
    return chosen[:1] if sorted(chosen[0]) == sorted(chosen[1]) else chosen


def num_passes(data: Dataset, techniques: Techniques, num_samples: int) -> int:
    """2 where gradients add up: a later micro-batch finds those of the one before; else 1."""
    longest = sorted(range(len(data)), key=lambda one: -data.lengths[one])[:num_samples]
    return min(2, len(micro_batches_of(data, longest, techniques)))


def make_state(setup: TrainSetup, data: Dataset, techniques: Techniques) -> None:
    """The optimizer's state as every step but the first finds it: a step at rate 0 on the shortest sample."""
    shortest = int(data.lengths.argmin())
    step_in_place(setup, collate(data, [shortest], techniques.packing).to(setup.device), techniques)


def step_in_place(setup: TrainSetup, batch: Batch, techniques: Techniques, passes: int = 1) -> None:
    """A step at learning rate 0: the optimizer's state is all that changes.

    Raises MemoryError, on all workers that share the model, where it does not fit on one of them.
    """
    # Without a loss scale, which would begin with gradients that overflow and so with an update that is skipped.
    scaler = gradient_scaler(batch.input_ids_BT.device.type, "float32")
    setup.model.train()
    step = StepPasses(
        passes * max(1, batch.targets_S.numel()),
        techniques,
        scaler,
        take=lambda _: batch,
        begin=lambda _: None,
        filler=[0],
    )
    through = passes_of(setup)
    with catch_out_of_memory() as shortage:
        through.run([[0]] * passes, step)
    through.end_together(shortage.reason)
    with catch_out_of_memory() as shortage:
        update(setup, scaler, Update(lr_factor=0.0, max_grad_norm=1.0))
    if shortage.reason is not None:
        through.leave_update()
    through.end_together(shortage.reason)


def _evaluation_step(setup: TrainSetup, held_out: Dataset | None, techniques: Techniques) -> None:
    if held_out is not None:
        longest = int(held_out.lengths.argmax())
        evaluate_loss(setup, held_out.select([longest]), techniques, ProcessGroup())


def _checkpoint_and_back(setup: TrainSetup, folder: Path) -> int:
    """Write a checkpoint, verify it, delete it; its bytes."""
    place = folder / "checkpoint"
    try:
        held = gather(setup)
        if held is None:  # another worker writes it
            return 0
        path = checkpoint.save(place, held, {"step": 0})
        damage = checkpoint.verify(path)
        if damage:
            raise RunFailed(
                f"preflight: a checkpoint in {folder} is damaged when it is read again ({damage}); use another disk"
            )
        return sum(file.stat().st_size for file in path.iterdir())
    except OSError as error:
        raise RunFailed(
            f"preflight: a checkpoint cannot be written to {folder}: {error.strerror}. Free some space or set"
            " checkpoint.output_dir"
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: it is the user's
            folder.rmdir()


def preflight(job: Job, ready: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """`plan --preflight`: the same in this process, on this machine, without a run folder."""
    plan = ready.plan
    say("preflight: loading the model ...")
    device = planned_device(plan.nodes[0])
    thread_waits.use_threads(plan.threads_per_worker)
    data, held_out = datasets(ready.data_files)
    part = plan.nodes[0]
    setup, techniques = prepare_model(WorkerContext(job, plan, part, ready.data_files.model, device), len(data))
    assume_references(plan, data)
    if held_out is not None:
        assume_references(plan, held_out)
    with tempfile.TemporaryDirectory(dir=_existing(Path(job.spec.checkpoint.output_dir).expanduser())) as folder:
        return check(setup, data, held_out, techniques, num_samples_of(plan, part), Path(folder) / "preflight")


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists: on the disk that will hold the checkpoints."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
