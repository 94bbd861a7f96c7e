"""Measured over predicted step times of finished runs -> better predictions for the same device and number format.

Every result.json holds both step times.  The ratio of a device is the geometric mean over its runs, drawn towards 1
while there are few: one run may have been disturbed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clusters.capability import ClusterCapability, DeviceCapability
from clusters.safe.reading import BadInput, load_json, read_bytes, record
from orchestrator.runs.json_files import StepTimes, finite

_PRIOR_RUNS = 0.5  # weight of "the formulas are right", in runs: off by 25 % in the first run, by 8 % in the second
_BELIEVABLE = (0.1, 10.0)  # beyond it something else went wrong


@dataclass(frozen=True)
class _Measured:
    """What is read of a result, of a run or of a trial."""

    time: StepTimes | None = None


def calibrated(cluster: ClusterCapability, runs: Path) -> ClusterCapability:
    """The same machines, each device with the ratios that the runs in a folder measured."""
    known = ratios(_results(runs))
    nodes = tuple(
        replace(node, devices=tuple(_calibrate(device, known) for device in node.devices)) for node in cluster.nodes
    )
    return replace(cluster, nodes=nodes)


def ratios(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """(device name or UUID, number format) -> measured over predicted step time, as the formulas alone predicted it."""
    logs: dict[tuple[str, str], list[float]] = {}
    for result in results:
        try:
            times = record(_Measured, result, "result").time
        except BadInput:  # damaged: not used
            continue
        if not times or not times.formula_step_s or not times.measured_step_s or not times.device or not times.dtype:
            continue
        ratio = times.measured_step_s / times.formula_step_s
        if _BELIEVABLE[0] <= ratio <= _BELIEVABLE[1]:
            for device in filter(None, (times.device, times.uuid)):
                logs.setdefault((device, times.dtype), []).append(math.log(ratio))
    return {key: math.exp(sum(values) / (len(values) + _PRIOR_RUNS)) for key, values in logs.items()}


def _calibrate(device: DeviceCapability, ratios: Mapping[tuple[str, str], float]) -> DeviceCapability:
    """With the ratios of this very device; of others of its name for number formats that it has not run.

    What a device has already is what a run measures beside the plan that it runs by (stages/slow.py).
    """
    own = {
        dtype: ratio for label in (device.name, device.uuid) for (name, dtype), ratio in ratios.items() if name == label
    }
    known = device.calibration
    both = {dtype: own.get(dtype, 1.0) * known.get(dtype, 1.0) for dtype in (*own, *known)}
    return replace(device, calibration=both) if both else device


def _results(runs: Path) -> Iterable[Mapping[str, Any]]:
    """What runs and the trials of searches measured."""
    for file in sorted([*runs.glob("*/result.json"), *runs.glob("*/trials.jsonl")]):
        with contextlib.suppress(BadInput):  # being written, or damaged: not used
            content = read_bytes(file)
            for text in content.split(b"\n") if file.suffix == ".jsonl" else [content]:
                with contextlib.suppress(BadInput):
                    yield finite(load_json(text, allow_nan=True))
