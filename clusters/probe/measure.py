"""Measure this machine: about five seconds beside the import of torch.  `python -m clusters.probe.measure` prints JSON.

Light to import; the measuring itself loads torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware.datasheet import best_part_of_datasheet
from clusters.hardware.load import core_shares
from clusters.hardware.torch_gpus import index_of, judge, seen_by_torch
from clusters.probe.machine import look_at_this_node
from clusters.safe.cache import cache_folder

LIMIT_S = 180  # with the import of torch on a busy machine; what hangs longer is ended
_CPU_SHARE, _GPU_SHARE, _DISK_SHARE = 0.1, 0.05, 0.2  # of the seconds: for one figure of a device; for the disk
_LINK_SHARE = 0.02  # for a pair of GPUs, of which eight have 28
_FREE = 0.7  # of the cores' time: a virtual machine's host takes up to a quarter
_PLAUSIBLE = 0.4  # of its datasheet: an idle card on mains power reaches more
_CHUNK_BYTES, _FILE_BYTES = 32 * 2**20, 256 * 2**20
_log = logging.getLogger(__name__)


def measure_node(node: NodeCapability, seconds: float = 5.0, folder: Path | None = None) -> NodeCapability:
    """The node with every figure that could be measured here; `folder` names the disk.

    `seconds` bounds the timed loops: the warm-up of each figure and a device slower than expected come on top.
    """
    import torch

    from clusters.probe.gpu_links import measure_gpu_links
    from clusters.probe.measure_device import measure_speed, try_libraries

    shares, threads = core_shares(node.num_cores), torch.get_num_threads()
    torch.set_num_threads(node.num_cores)
    try:
        places = _places(node)
        devices = [
            device if index is None else measure_speed(device, index, seconds * _share(device))
            for device, index in places
        ]
        usable = [(device, index) for device, (_, index) in zip(devices, places, strict=True) if index is not None]
        links = measure_gpu_links([pair for pair in usable if pair[0].kind != "cpu"], seconds * _LINK_SHARE)
        pairs = zip(devices, places, strict=True)
        devices = [device if index is None else try_libraries(device, index) for device, (_, index) in pairs]
        devices = [replace(device, doubt=device.doubt or doubt_of(device, shares)) for device in devices]
    finally:
        torch.set_num_threads(threads)
    rates = disk_bytes_per_s(folder, seconds * _DISK_SHARE)
    sources = {**node.sources, **dict.fromkeys(rates, "measured")}
    return replace(node, devices=tuple(devices), gpu_links=links, sources=sources, **rates)


def disk_bytes_per_s(folder: Path | None, budget_s: float) -> dict[str, float]:
    """Bytes that reached the disk in a second: chunks of 32 MiB, each synced, until 256 MiB or the time is used up.

    And those that were read back, where the kernel gives up its copies.  By the names of `NodeCapability`'s fields;
    none where nothing could be measured.  The file has no name, so it is gone however this process ends.
    """
    try:
        folder = folder or cache_folder("probe")
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < 2 * _FILE_BYTES:
            _log.info("disk: not measured: %d bytes free in %s", free_bytes, folder)
            return {}
        chunk = os.urandom(_CHUNK_BYTES)  # nothing a file system could compress
        written = 0
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            while written < _FILE_BYTES and (not written or time.perf_counter() - start < budget_s):
                written += file.write(chunk)
                os.fsync(file.fileno())
            rates = {"disk_write_bytes_per_s": written / (time.perf_counter() - start)}
            return rates | _read_back(file, written, budget_s)
    except (OSError, RuntimeError) as error:
        _log.info("disk: not measured: %s", error)
        return {}


def _read_back(file: IO[bytes], num_bytes: int, budget_s: float) -> dict[str, float]:
    if not hasattr(os, "posix_fadvise"):
        return {}
    os.posix_fadvise(file.fileno(), 0, num_bytes, os.POSIX_FADV_DONTNEED)
    file.seek(0)
    found, start = 0, time.perf_counter()
    while chunk := file.read(_CHUNK_BYTES):
        found += len(chunk)
        if time.perf_counter() - start > budget_s:
            break
    return {"disk_read_bytes_per_s": found / (time.perf_counter() - start)}


def _share(device: DeviceCapability) -> float:
    return _CPU_SHARE if device.kind == "cpu" else _GPU_SHARE


def doubt_of(device: DeviceCapability, core_shares: Sequence[float]) -> str | None:
    """Why what was measured of a device may say more about the moment than about the device.

    `core_shares` is what each core gave to this process while it measured.
    """
    if device.kind == "cpu":
        gave = sum(core_shares)
        is_busy = gave < _FREE * len(core_shares)
        return f"it gave {gave:.1f} of its {len(core_shares)} cores: was it busy?" if is_busy else None
    found = best_part_of_datasheet(device)
    if found is None or found[1] >= _PLAUSIBLE:
        return None
    number_format, part = found
    return f"its products reached {part:.0%} of the datasheet ({number_format}): was it busy, hot or on battery?"


def _places(node: NodeCapability) -> list[tuple[DeviceCapability, int | None]]:
    """Each device, judged, with PyTorch's number of it; None where nothing can be measured."""
    seen = seen_by_torch()
    places: list[tuple[DeviceCapability, int | None]] = []
    for device in node.devices:
        alike = [other for other in node.devices if other.kind == device.kind]
        index = 0 if device.kind == "cpu" else index_of(device, alike, seen.gpus)
        device = judge(device, index, seen)
        places.append((device, index if device.problem is None else None))
        if device.problem is not None:
            _log.info("%s: not measured: %s", device.name, device.problem)
    return places


def main() -> None:
    """Look, measure, print the node as one line of JSON; the log goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m clusters.probe.measure", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure, about")
    seconds = parser.parse_args().seconds
    signal.alarm(LIMIT_S)  # also when the process that started this is gone
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(json.dumps(asdict(measure_node(look_at_this_node(), seconds))))


if __name__ == "__main__":
    main()
