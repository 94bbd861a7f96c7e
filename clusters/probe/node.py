"""The capability of this machine, measured once and remembered: what a plan is made from.  Light: torch runs elsewhere.

look -> hardware hash -> ~/.cache/finetune-orchestrator/probe/HASH-2.json, else `python -m clusters.probe.measure`
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware.torch_build import installed_build, why_unusable
from clusters.probe.machine import look_at_this_node
from clusters.probe.measure import LIMIT_S
from clusters.safe.cache import cache_folder
from clusters.safe.commands import run_within
from clusters.safe.locking import hold
from clusters.safe.reading import load_json, read_json, record
from clusters.safe.writing import write_whole

# What a look tells, and better than an old file.
_SEEN = ("memory_bytes", "memory_total_bytes", "power_w", "uuid", "pci_bus_id", "driver_version")
_WAY = 2  # of measuring: figures that were measured in another way mean something else, and are measured again
_SAME = 0.8  # times this close are one speed
_AGAIN_S = 600  # a CPU in doubt is measured again after this time: while it is busy, each measuring is in doubt
_log = logging.getLogger(__name__)


def probe_node(refresh: bool = False, seconds: float = 5.0) -> NodeCapability:
    """This machine: what is seen now (free memory, limits), joined with figures measured now or before on it.

    Where nothing can be measured - torch is not installed, the measuring crashed or took longer than LIMIT_S - the
    figures are None and the log (WARNING) says why.
    """
    return _judge_gpus(_probe(refresh, seconds))


def _probe(refresh: bool, seconds: float) -> NodeCapability:
    asked_at = time.time()
    node = look_at_this_node()
    try:
        file = figures_file(node.hardware_hash)
    except RuntimeError as error:
        _log.warning("figures are not cached: %s", error)
        return _measure(node, None, seconds)
    before = _read(file, node)
    if before and not refresh and not _is_due(file, before, asked_at):
        return before
    with _one_at_a_time(file):  # two nodes of a cluster may be one machine; measured together, each would seem slow
        known = _read(file, node, since=asked_at)
        return known or _measure(node, file, seconds, before)


def _is_due(file: Path, known: NodeCapability, now: float) -> bool:
    """Whether something is in doubt: a GPU, which somebody may have freed, or a CPU, for a while."""
    kinds = {device.kind for device in known.devices if device.doubt}
    return bool(kinds - {"cpu"}) or (bool(kinds) and not 0 <= now - file.stat().st_mtime < _AGAIN_S)


def figures_file(hardware_hash: str | None) -> Path:
    """Where the figures of such hardware are remembered.  Raises RuntimeError where there is no home."""
    return cache_folder("probe") / f"{hardware_hash}-{_WAY}.json"


def _judge_gpus(node: NodeCapability) -> NodeCapability:
    """GPUs that must not be planned with say so, also where nothing could be measured."""
    build = installed_build()

    def judge(device: DeviceCapability) -> DeviceCapability:
        if device.kind == "cpu" or device.problem is not None:
            return device
        problem = why_unusable(device, build) if build and not device.is_measured else None
        if problem is None and device.memory_bytes is None:
            problem = "its memory is unknown: neither its driver's tool nor torch reports it"
        return replace(device, problem=problem)

    return replace(node, devices=tuple(judge(device) for device in node.devices))


def _measure(
    node: NodeCapability, file: Path | None, seconds: float, before: NodeCapability | None = None
) -> NodeCapability:
    if importlib.util.find_spec("torch") is None:
        _log.warning("torch is not installed (pip install 'finetune-orchestrator[train]'): nothing was measured")
        return node
    command = [sys.executable, "-m", "clusters.probe.measure", "--seconds", str(seconds)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as Ray sets it
    try:
        answer = run_within(command, LIMIT_S, environment, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired:
        _log.warning("measuring took longer than %d s: nothing was measured", LIMIT_S)
        return node
    lines = answer.stderr.strip().splitlines()
    for line in lines:
        _log.info("%s", line)
    try:
        known = _join(node, load_json(answer.stdout.strip().splitlines()[-1], "the figures"))
    except (ValueError, IndexError):
        _log.warning("measuring ended with exit status %d: %s", answer.returncode, lines[-1] if lines else "no message")
        return node
    known = _settle_doubts(known, before) if before else known
    if file:
        _write(file, known)
    return known


def _settle_doubts(node: NodeCapability, before: NodeCapability) -> NodeCapability:
    """A device that is twice as slow as the other time is not in doubt again: it is so."""

    def is_as_before(now: DeviceCapability, then: DeviceCapability) -> bool:
        rates = [(rate, then.flops_per_s.get(name)) for name, rate in now.flops_per_s.items() if rate]
        return bool(rates) and all(old and _SAME < rate / old < 1 / _SAME for rate, old in rates)

    pairs = zip(node.devices, before.devices, strict=True)
    settled = (
        replace(now, doubt=None) if now.doubt and then.doubt and is_as_before(now, then) else now for now, then in pairs
    )
    return replace(node, devices=tuple(settled))


def _join(node: NodeCapability, measured: object) -> NodeCapability:
    """What is seen now, with the figures of a measured node.  Raises ValueError where they are not of this machine."""
    old = record(NodeCapability, measured, "the figures")
    pairs = list(zip(node.devices, old.devices, strict=True))
    devices = tuple(_join_device(now, then) for now, then in pairs)
    if wrong := [name for device in old.devices for name, figure in _figures(device) if figure <= 0]:
        raise ValueError(f"{wrong[0]} is not an amount")
    if any((now.kind, now.name) != (then.kind, then.name) for now, then in pairs):
        raise ValueError("other devices")
    sources = {**old.sources, **node.sources}
    links = old.gpu_links
    rates = {name: getattr(old, name) for name in ("disk_write_bytes_per_s", "disk_read_bytes_per_s")}
    return replace(node, devices=devices, gpu_links=links, sources=sources, **rates)


def _figures(device: DeviceCapability) -> Iterator[tuple[str, float]]:
    """What was measured of a device."""
    rates = {f"flops_per_s.{name}": value for name, value in device.flops_per_s.items()}
    for name in ("memory_bytes_per_s", "op_overhead_s", "host_to_device_bytes_per_s", "device_to_host_bytes_per_s"):
        rates[name] = getattr(device, name)
    yield from ((name, value) for name, value in rates.items() if value is not None)


def _join_device(now: DeviceCapability, then: DeviceCapability) -> DeviceCapability:
    sources = {**then.sources, **now.sources}
    seen = {name: getattr(now, name) for name in _SEEN if getattr(now, name) is not None}
    return replace(then, **seen, problem=now.problem or then.problem, sources=sources)


def _read(file: Path, node: NodeCapability, since: float = 0.0) -> NodeCapability | None:
    """Remembered figures; None where there are none as young as asked, or the file is damaged."""
    try:
        if file.stat().st_mtime < since:
            return None
        return _join(node, read_json(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s is measured again: %s", file, error)
        return None


def _write(file: Path, node: NodeCapability) -> None:
    try:
        write_whole(file, json.dumps(asdict(node), indent=1))
    except OSError as error:
        _log.warning("figures are not cached: %s", error)


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Wait for others who measure the same hardware; where files cannot be locked, continue without."""
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(hold(file.with_suffix(".lock"))):
                raise OSError("this file system has none")
        except OSError as error:
            _log.info("measuring without a lock: %s", error)
        yield
