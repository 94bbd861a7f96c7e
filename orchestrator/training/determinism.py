"""The same bits in every run of a plan, also where one was interrupted.

On a CPU that holds as it is: every sum has its order.  On CUDA some kernels add in the order in which threads arrive
(the backward passes of attention and of embeddings, cuBLAS with several streams), so a run and its repetition differ in
last bits, and so do a run and its resumed twin.  `train.deterministic` chooses kernels that do not; they are slower,
and an operation that has none ends the run with its name.  https://docs.pytorch.org/docs/stable/notes/randomness.html

The weights, that is, and the losses on the way.  A last evaluation whose process was killed is repeated with fewer rows
at a time where training measured no loss, and products of other shapes round differently on a CPU too: that held-out
loss is equal up to rounding, and a note says so (workers/quality.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from orchestrator.errors import JobError

# What cuBLAS and transformers' flash attention read; set for as long as the block lasts.
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


@contextlib.contextmanager
def deterministic(is_on: bool) -> Iterator[None]:
    """Inside the block, where switched on, kernels add in a fixed order.

    Raises JobError for an operation that has none.
    """
    if not is_on:
        yield
        return
    if torch.are_deterministic_algorithms_enabled():  # by several runs of one process: the outer block switches it off
        with _as_job_error():
            yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        with _as_job_error():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _as_job_error() -> Iterator[None]:
    """Name an operation that has no deterministic kernel as the job's."""
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        reason = str(error).split(",")[0]
        raise JobError(
            f"train.deterministic: {reason}. Set it to false, or choose another model.attn_implementation"
        ) from error


def resume_note(devices: Sequence[str], is_deterministic: bool, has_fixed_shares: bool) -> str:
    """How near a resumed run is to one that was never interrupted, by the kinds of its workers' devices.

    Shares that follow the workers' pace divide rows by what was measured, so sums have other parts each time.
    """
    if all(device == "cpu" for device in devices) and (len(devices) == 1 or has_fixed_shares):
        return "bit-equal to a run that never stopped"
    if len(devices) == 1:
        one = "bit-equal to a run that never stopped"
        return one if is_deterministic else "equal up to rounding; train.deterministic: true makes it bit-equal"
    way = "; strategy.shares: planned makes it bit-equal" if set(devices) == {"cpu"} else ""
    return f"equal up to rounding{way}"
