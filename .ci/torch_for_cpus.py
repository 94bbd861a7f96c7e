"""Install PyTorch's build for CPUs where no GPU is found: several GB less than the default one on Linux.

`uv` knows where that build lies.  Where it cannot be reached, pip's own index may have one (a version that ends in
`+cpu`); where it has none, nothing is done, and pip later installs the default build.

    python .ci/torch_for_cpus.py [REQUIREMENT]
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
_DRIVERS = ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, either one's in WSL2


def has_gpu() -> bool:
    """Whether the driver of a GPU, or its tool, is there."""
    return any(Path(driver).exists() for driver in _DRIVERS) or bool(shutil.which("nvidia-smi"))


def wanted() -> str:
    """The requirement as the project states it."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    lines = project["project"]["optional-dependencies"]["train"]
    return next(line for line in lines if re.match(r"torch\b", line))


def by_uv(requirement: str) -> bool:
    """Install it with uv, which is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run([*PIP, "install", "--quiet", "--target", folder, "uv"], stderr=subprocess.DEVNULL).returncode:
            return False
        uv = [f"{folder}/bin/uv", "pip", "install", "--quiet", "--python", sys.executable, "--torch-backend=cpu"]
        environment = os.environ | {"UV_HTTP_TIMEOUT": "30"}
        return subprocess.run([*uv, requirement], env=environment, stderr=subprocess.DEVNULL).returncode == 0


def by_pip(requirement: str) -> bool:
    """Install the newest version in pip's index that ends in `+cpu` and fits."""
    listed = subprocess.run([*PIP, "index", "versions", "torch"], capture_output=True, text=True).stdout
    for version in re.findall(r"[\d.]+\+cpu", listed):
        install = [*PIP, "install", "--quiet", f"torch=={version}", requirement]
        if subprocess.run(install, stderr=subprocess.DEVNULL).returncode == 0:
            return True
    return False


def main() -> None:
    """Install it, or say why the default build comes."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or importlib.util.find_spec("torch"):
        return
    if has_gpu():
        print("A GPU is here: PyTorch's build for it.")
        return
    requirement = sys.argv[1] if sys.argv[1:] else wanted()
    if not (by_uv(requirement) or by_pip(requirement)):
        print("PyTorch's build for CPUs cannot be reached: the default one is installed, several GB more.")


if __name__ == "__main__":
    main()
