"""Stands by: reads the tensors of a stage of the base model, so that a worker started here finds them in memory."""

from __future__ import annotations

import time
from pathlib import Path

from clusters.units import format_bytes, format_s
from strategies.pipeline.cut import CannotCut, touch_tensors
from strategies.workload import StagePart


def read_stage(model_folder: str, stage: StagePart) -> str:
    """Read a stage's tensors; the result, as the end of a sentence that begins with the node's name.

    Nothing is read where the model's folder is not on this node's disk: its bytes would have to come from another one.
    """
    folder, began = Path(model_folder), time.perf_counter()
    if not folder.is_dir():
        return f"does not stand by: the model's folder {folder} is not on its disk"
    try:
        num_bytes = touch_tensors(folder, stage)
    except CannotCut as error:
        return f"does not stand by: {error}"
    return f"stands by with {stage}: {format_bytes(num_bytes)} read in {format_s(time.perf_counter() - began)}"
