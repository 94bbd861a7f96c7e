"""The GPUs of this machine as their drivers' tools describe them; loads no heavy library."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

from clusters.capability import DeviceCapability, Kind, Source
from clusters.commands import run_within
from clusters.safe_input import load_json, printable
from clusters.units import MIB

TIMEOUT_S = 15.0  # the first call after a boot initialises every card: seconds each
_LONGEST_NAME = 120
_BASIC = ("index", "uuid", "name", "memory.free", "memory.total", "power.limit", "driver_version")
_QUERIES = ((*_BASIC, "compute_cap", "pci.bus_id"), (*_BASIC, "compute_cap"), _BASIC)  # older drivers know less
_log = logging.getLogger(__name__)


def look_at_gpus() -> tuple[tuple[DeviceCapability, ...], tuple[str, ...]]:
    """The GPUs, those of a kind in the order of their PCI addresses, and the versions of their drivers.

    `memory_bytes` is what is free now: memory held by other programs is the difference to `memory_total_bytes`.
    """
    rows = _visible(_nvidia_rows(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    drivers = sorted({row["driver_version"] for row in rows})
    return (*(nvidia_gpu(row) for row in rows), *_amd_gpus()), tuple(drivers)


def nvidia_gpu(row: Mapping[str, str]) -> DeviceCapability:
    """One line of nvidia-smi; what it writes as `[N/A]` is None."""
    free_mib, total_mib = _number(row["memory.free"]), _number(row["memory.total"])
    major, _, minor = row.get("compute_cap", "").partition(".")
    return _gpu(
        "cuda",
        row["name"],
        None if free_mib is None else int(free_mib) * MIB,
        None if total_mib is None else int(total_mib) * MIB,
        _number(row["power.limit"]),
        compute_capability=(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None,
        uuid=_known(row.get("uuid")),
        pci_bus_id=_known(row.get("pci.bus_id")),
    )


def _gpu(
    kind: Kind, name: str, free_bytes: int | None, total_bytes: int | None, power_w: float | None, **identity: Any
) -> DeviceCapability:
    figures: dict[str, Any] = {"memory_bytes": free_bytes, "memory_total_bytes": total_bytes, "power_w": power_w}
    sources: dict[str, Source] = {name: "measured" for name, value in figures.items() if value is not None}
    if power_w is not None:
        sources["power_w"] = "datasheet"  # the limit the board is set to; under load it may draw less
    return DeviceCapability(kind, printable(name[:_LONGEST_NAME]), **figures, **identity, sources=sources)


def _nvidia_rows() -> list[dict[str, str]]:
    for fields in _QUERIES:
        text = _answer("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        if text is None:  # asking again would hang again
            break
        if text:
            rows = csv.reader(io.StringIO(text), skipinitialspace=True)
            try:
                found = [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]
                return sorted(found, key=lambda row: row.get("pci.bus_id", ""))
            except csv.Error as error:
                _log.warning("nvidia-smi was not understood (%s): its GPUs are left out", error)
                break
    return []


def _visible(rows: list[dict[str, str]], names: str | None) -> list[dict[str, str]]:
    """The GPUs that CUDA shows this process: by index or start of UUID, in the order named, up to the first unknown."""
    if names is None:
        return rows
    chosen = []
    for name in (name.strip() for name in names.split(",")):
        found = [row for row in rows if row["index"] == name or (name[:4] == "GPU-" and row["uuid"].startswith(name))]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _amd_gpus() -> tuple[DeviceCapability, ...]:
    asked = ("--showproductname", "--showmeminfo", "vram", "--showmaxpower", "--showuniqueid", "--showbus", "--json")
    text = _answer("rocm-smi", *asked)
    try:
        cards = load_json(text, "its answer") if text else {}
        found = [_amd_gpu(values) for key, values in cards.items() if key.startswith("card")]
        return tuple(sorted(found, key=lambda gpu: gpu.pci_bus_id or ""))
    except (ValueError, AttributeError) as error:  # releases differ in what they print beside the JSON
        _log.warning("rocm-smi was not understood (%s): its GPUs are left out", error)
        return ()


def _amd_gpu(values: Mapping[str, Any]) -> DeviceCapability:
    known = {key.lower(): str(value) for key, value in values.items()}  # `Card series` became `Card Series`
    total, used = _number(known.get("vram total memory (b)")), _number(known.get("vram total used memory (b)"))
    unique = known.get("unique id", "")
    return _gpu(
        "rocm",
        known.get("card series") or known.get("card model") or "AMD GPU",
        None if total is None or used is None else int(total - used),
        None if total is None else int(total),
        _number(known.get("max graphics package power (w)")),
        uuid=f"GPU-{unique[2:]}" if unique.startswith("0x") else None,  # as ROCR_VISIBLE_DEVICES takes it
        pci_bus_id=_known(known.get("pci bus")),
    )


def _answer(*command: str) -> str | None:
    """What a driver's tool prints; empty where it fails (a driver without a card), None where it is absent or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = run_within(command, TIMEOUT_S)
    except (subprocess.TimeoutExpired, OSError) as error:
        _log.warning("%s gave no answer, its GPUs are left out: %s", command[0], error)
        return None
    if answer.returncode:
        _log.info("%s: %s", command[0], _first_line(answer.stderr.splitlines() + answer.stdout.splitlines()))
    return "" if answer.returncode else answer.stdout


def _first_line(lines: Iterable[str]) -> str:
    return next((line for line in lines if line.strip()), "failed without a word")


def _known(text: str | None) -> str | None:
    """None for what the tool writes in place of a value: empty, or in brackets as `[N/A]`."""
    return printable(text[:_LONGEST_NAME]) if text and not text.startswith("[") else None


def _number(text: str | None) -> float | None:
    """None for what is no amount."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
