"""Which card is which, and whether this PyTorch has kernels for it."""

from __future__ import annotations

import importlib

import torch

from clusters.capability import DeviceCapability
from clusters.hardware.gpus import look_at_gpus
from clusters.hardware.torch_build import covers
from clusters.hardware.torch_gpus import index_of, seen_by_torch
from clusters.safe.reading import first_line
from tests.first_contact_parts.bench import Bench
from tests.first_contact_parts.checks import Check, judged, not_run

_LIBRARIES = ("bitsandbytes", "flash_attn", "deepspeed", "triton", "pynvml")


def facts(bench: Bench) -> list[Check]:
    """Versions, each card of the machine, kernels for this one, optional libraries."""
    found = [_versions(), *(_card(bench, gpu) for gpu in (*bench.node.gpus, *bench.node.unusable))]
    found += [Check("driver", "failed", problem) for problem in bench.node.problems]
    found += [_kernels(bench)] if bench.is_gpu else [not_run("kernels", f"{bench.device} is no GPU")]
    return [*found, *(_library(name) for name in _LIBRARIES)]


def _versions() -> Check:
    drivers = ", ".join(look_at_gpus()[1]) or "none found"
    built = torch.version.cuda or torch.version.hip or "CPUs only"
    return Check("versions", "measured", f"torch {torch.__version__} built for {built}; driver {drivers}")


def _card(bench: Bench, gpu: DeviceCapability) -> Check:
    """What the driver's tool lists, and under which number PyTorch has it."""
    name = f"{gpu.name} {gpu.pci_bus_id or ''}".strip()
    if gpu.problem is not None:
        return Check(name, "failed", gpu.problem)
    index = index_of(gpu, bench.node.gpus, seen_by_torch().gpus)
    place = bench.node.gpus.index(gpu)
    text = f"{gpu.uuid or 'no UUID'}; place {place} by PCI address, cuda:{index} to PyTorch"
    return judged(name, index == place, text)


def _kernels(bench: Bench) -> Check:
    capability, known = torch.cuda.get_device_capability(bench.device), torch.cuda.get_arch_list()
    text = f"compute capability {capability[0]}.{capability[1]}; torch has {' '.join(known)}"
    return judged("kernels", torch.version.hip is not None or covers(known, capability), text)


def _library(name: str) -> Check:
    try:
        version = getattr(importlib.import_module(name), "__version__", "of an unknown version")
    except ImportError as error:
        return not_run(name, f"not installed: {first_line(error)}")
    except Exception as error:  # whatever a library makes of a driver: it is there and does not load
        return Check(name, "failed", f"installed, and does not load: {type(error).__name__}: {str(error)[:120]}")
    return Check(name, "measured", str(version))
