"""Which GPUs the installed PyTorch can use: a pure judgement of facts, and the reading of a build without loading it.

A wheel of PyTorch is built for one CUDA or ROCm version, which asks for a driver, and holds kernels for some compute
capabilities.  Sources: drivers by CUDA version,
https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/#cuda-toolkit-major-component-versions (a minor version runs on
the driver of its major one); capabilities of published wheels, PYTORCH_RELEASES_CODE_CC in torch/cuda/__init__.py.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clusters.capability import DeviceCapability

_DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}  # major version of CUDA -> oldest branch of the driver that runs it
_WHEELS = (  # published builds, the newest first
    ("13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")),
    ("12.9", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")),
    ("12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")),
)
_PAGE = "https://pytorch.org/get-started/locally/"
_ROCM = f"install the ROCm build of torch ({_PAGE})"


@dataclass(frozen=True)
class TorchBuild:
    """What a PyTorch was built for."""

    version: str
    cuda: str | None = None
    hip: str | None = None
    arches: tuple[str, ...] = ()  # sm_86 (kernels), compute_90 (PTX, for that and newer), gfx1100; empty = not known


def installed_build() -> TorchBuild | None:
    """The build that `import torch` would load, read from its files; None where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:  # a build from source that has none: it says itself what it is, in the measuring
        return None
    named = dict(re.findall(r"^(\w+)[^=\n]*= *'([^']+)'", text, re.MULTILINE))
    return TorchBuild(named.get("__version__", "of unknown version"), named.get("cuda"), named.get("hip"))


def why_unusable(device: DeviceCapability, build: TorchBuild) -> str | None:
    """One sentence on why a build cannot compute on a GPU and what to install; None where nothing speaks against it."""
    if device.kind == "cpu":
        return None
    if device.kind == "rocm":
        return None if build.hip else f"torch {build.version} is not built for ROCm: {_ROCM}"
    if build.cuda is None:
        made_for = f"for ROCm {build.hip}" if build.hip else "for CPUs"
        return f"torch {build.version} is built {made_for}: {_remedy(device, build)}"
    driver, needed = _branch(device.driver_version), _needed_driver(build.cuda)
    if driver is not None and driver < needed:
        return (
            f"driver {device.driver_version} is too old for CUDA {build.cuda} of torch {build.version}, which needs"
            f" {needed} or newer: {_remedy(device, build)}"
        )
    if device.compute_capability and build.arches and not covers(build.arches, device.compute_capability):
        has = ", ".join(arch for arch in build.arches if arch.startswith("sm_"))
        return (
            f"torch {build.version} has no kernels for compute capability {_dotted(device.compute_capability)}"
            f" (only {has}): {_remedy(device, build)}"
        )
    return None


def covers(arches: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for one of the architectures run on a compute capability.

    Machine code runs on later minor versions of its major one; PTX is translated for everything newer.
    """
    for arch in arches:
        kind, _, digits = arch.partition("_")
        number = re.match(r"\d+", digits)
        if number is None:
            continue
        built = divmod(int(number.group()), 10)
        is_exact = digits.endswith("a")  # sm_90a: for that version alone
        if kind == "sm" and (built == capability if is_exact else built[0] == capability[0] and built <= capability):
            return True
        if kind == "compute" and not is_exact and built <= capability:
            return True
    return False


def _remedy(device: DeviceCapability, build: TorchBuild) -> str:
    """The newest published build that card and driver can use, and otherwise a newer driver."""
    driver, capability = _branch(device.driver_version), device.compute_capability
    fitting = [cuda for cuda, arches in _WHEELS if capability is None or covers(arches, capability)]
    if not fitting:
        return f"no published build has kernels for compute capability {_dotted(capability or (0, 0))}"
    runnable = [cuda for cuda in fitting if driver is None or driver >= _needed_driver(cuda)]
    newer = f"update the driver to {_needed_driver(fitting[0])} or newer"
    if not runnable:
        return newer
    install = f"install torch {build.version.partition('+')[0]} for CUDA {runnable[0]} ({_PAGE})"
    is_old = build.cuda is not None and driver is not None and driver < _needed_driver(build.cuda)
    return f"{newer}, or {install}" if is_old and build.cuda in fitting else install


def _needed_driver(cuda: str) -> int:
    major = int(cuda.partition(".")[0])
    return _DRIVER_OF_CUDA.get(major, max(_DRIVER_OF_CUDA.values()))


def _branch(driver: str | None) -> int | None:
    """580 of 580.95.05."""
    number = re.match(r"\d+", driver or "")
    return int(number.group()) if number else None


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
