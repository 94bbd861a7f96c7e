"""The GPUs of this machine as their drivers' tools describe them; loads no heavy library."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from clusters.capability import DeviceCapability, Kind, Source
from clusters.safe.commands import run_within
from clusters.safe.reading import load_json, printable
from clusters.units import MIB

TIMEOUT_S = 15.0  # the first call after a boot initialises every card: seconds each
_LONGEST_NAME = 120
_BASIC = ("index", "uuid", "name", "memory.free", "memory.total", "power.limit", "driver_version")
_QUERIES = (  # older drivers know less
    (*_BASIC, "compute_cap", "pci.bus_id", "mig.mode.current"),
    (*_BASIC, "compute_cap"),
    _BASIC,
)
_NO_CARD = ("no devices were found", "amdgpu not found")  # a driver's tool where there is nothing for it
_FALLEN = ("unknown error", "gpu is lost", "gpu requires reset", "err!")  # in place of a value
_MIG = "MIG's parts are not supported: turn it off with `sudo nvidia-smi -mig 0`"
_log = logging.getLogger(__name__)
T = TypeVar("T")


def look_at_gpus() -> tuple[tuple[DeviceCapability, ...], tuple[str, ...]]:
    """The GPUs, those of a kind in the order of their PCI addresses, and a sentence for each tool that reported none.

    `memory_bytes` is what is free now: memory held by other programs is the difference to `memory_total_bytes`.
    """
    rows, problem = _nvidia_rows()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = _visible([(row["index"], row["uuid"], row) for row in rows], visible)
    problems = [problem] if problem else []
    if rows and not shown and "MIG-" in (visible or ""):
        problems.append(f"CUDA_VISIBLE_DEVICES={visible} names a part of a card, and {_MIG}")
    amd, problem = _amd_gpus()
    problems += [problem] if problem else []
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        problems.append("Apple's GPU (MPS) is not supported: this Mac trains on its CPU alone")
    return (*(nvidia_gpu(row) for row in shown), *amd), tuple(problems)


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
        driver_version=_known(row.get("driver_version")),
        pci_bus_id=_known(row.get("pci.bus_id")),
        problem=_problem(row),
    )


def _problem(row: Mapping[str, str]) -> str | None:
    """What the tool's own answer says against a card."""
    if row.get("mig.mode.current") == "Enabled":
        return f"it is divided, and {_MIG}"
    fallen = [row[name] for name in ("memory.total", "memory.free") if row[name].strip("[]").lower() in _FALLEN]
    if fallen:
        return f"nvidia-smi reads {fallen[0]}: the card fell off the bus; restart the machine"
    return None


def _gpu(
    kind: Kind, name: str, free_bytes: int | None, total_bytes: int | None, power_w: float | None, **identity: Any
) -> DeviceCapability:
    figures: dict[str, Any] = {"memory_bytes": free_bytes, "memory_total_bytes": total_bytes, "power_w": power_w}
    sources: dict[str, Source] = {name: "measured" for name, value in figures.items() if value is not None}
    if power_w is not None:
        sources["power_w"] = "datasheet"  # the limit the board is set to; under load it may draw less
    return DeviceCapability(kind, printable(name[:_LONGEST_NAME]), **figures, **identity, sources=sources)


def _nvidia_rows() -> tuple[list[dict[str, str]], str | None]:
    problem = None
    for fields in _QUERIES:
        text, problem = _answer("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        if text is None:  # asking again would hang again
            break
        if text:
            rows = csv.reader(io.StringIO(text), skipinitialspace=True)
            try:
                found = [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]
            except csv.Error as error:
                return (
                    [],
                    f"nvidia-smi's output is malformed ({printable(str(error))}): its GPUs are not used",
                )
            return sorted(found, key=lambda row: row.get("pci.bus_id", "")), None
    return [], problem


def _visible(cards: Sequence[tuple[str, str | None, T]], names: str | None) -> list[T]:
    """The cards (index, UUID, card) that a process is shown: by index or start of UUID, in the order named, up to the
    first unknown."""
    if names is None:
        return [card for _, _, card in cards]
    chosen = []
    for name in (name.strip() for name in names.split(",")):
        by_uuid = name[:4] == "GPU-"
        found = [card for index, uuid, card in cards if index == name or (by_uuid and (uuid or "").startswith(name))]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _amd_gpus() -> tuple[tuple[DeviceCapability, ...], str | None]:
    asked = ("--showproductname", "--showmeminfo", "vram", "--showmaxpower", "--showuniqueid", "--showbus", "--json")
    text, problem = _answer("rocm-smi", *asked)
    try:
        cards = load_json(text, "its answer") if text else {}
        found = [_amd_gpu(values) for key, values in cards.items() if key.startswith("card")]
    except (ValueError, AttributeError) as error:  # releases differ in what they print beside the JSON
        return (), f"rocm-smi's output is malformed ({printable(str(error))}): its GPUs are not used"
    found.sort(key=lambda gpu: gpu.pci_bus_id or "")
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):  # HIP counts what the runtime below it shows
        numbered = [(str(place), gpu.uuid, gpu) for place, gpu in enumerate(found)]
        found = _visible(numbered, os.environ.get(variable))
    return tuple(found), problem


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


def _answer(*command: str) -> tuple[str | None, str | None]:
    """What a driver's tool prints, and a sentence where it has nothing to say of cards that may be there.

    Empty where it fails, None where it is absent or hangs.
    """
    tool = command[0]
    if shutil.which(tool) is None:
        return None, None
    try:
        answer = run_within(command, TIMEOUT_S)
    except (subprocess.TimeoutExpired, OSError) as error:
        return None, f"{tool} gave no answer, its GPUs are not used: {printable(str(error))}"
    if answer.returncode == 0:
        return answer.stdout, None
    line = printable(_first_line(answer.stderr.splitlines() + answer.stdout.splitlines()))
    is_empty = any(words in line.lower() for words in _NO_CARD)
    _log.info("%s: %s", tool, line)
    return "", None if is_empty else f"{tool} failed, its GPUs are not used: {line[:200]}"


def _first_line(lines: Iterable[str]) -> str:
    return next((line for line in lines if line.strip()), "failed without a message")


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
