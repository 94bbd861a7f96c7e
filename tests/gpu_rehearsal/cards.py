"""Machines with GPUs, as their drivers' tools describe them, and programs that answer like those tools.

A machine is what nvidia-smi prints for each card (or how it fails), and what rocm-smi prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NVIDIA_SMI = """\
#!{python} -ES
import sys
cards, failure = {cards!r}, {failure!r}
if failure:
    print(failure)
    sys.exit(15)
fields = next(word for word in sys.argv if word.startswith("--query-gpu=")).split("=")[1].split(",")
for place, card in enumerate(cards):
    known = {{"index": place, "uuid": f"GPU-{{place:08x}}", "pci.bus_id": f"00000000:{{place + 1:02X}}:00.0",
             "mig.mode.current": "[N/A]", "driver_version": "580.95.05", **card}}
    print(", ".join(str(known[name]) for name in fields))
"""
ROCM_SMI = "#!/bin/sh\ncat <<'END'\n{answer}\nEND\n"


def card(name: str, total: object, free: object, watts: object, capability: str, **more: str) -> dict[str, Any]:
    """A line of nvidia-smi: MiB and watts as it prints them."""
    known = {"name": name, "memory.total": total, "memory.free": free, "power.limit": watts, "compute_cap": capability}
    return known | {key.replace("__", "."): value for key, value in more.items()}


def radeon(series: str, gib: float, used_mib: int, watts: str, bus: str) -> dict[str, str]:
    """A card of rocm-smi --json."""
    return {
        "Card Series": series,
        "VRAM Total Memory (B)": str(int(gib * 2**30)),
        "VRAM Total Used Memory (B)": str(used_mib * 2**20),
        "Max Graphics Package Power (W)": watts,
        "PCI Bus": bus,
        "Unique ID": "0x" + bus.encode().hex()[:16],
    }


@dataclass(frozen=True)
class Machine:
    """What is in it; `seen` are the names that torch gives to the GPUs it sees, None = all of them."""

    nvidia: tuple[Mapping[str, Any], ...] = ()
    amd: tuple[Mapping[str, str], ...] = ()
    failure: str = ""  # of nvidia-smi
    unified_gib: float | None = None  # memory that only CUDA tells
    unseen: tuple[str, ...] = field(default=())

    def install(self, folder: Path) -> None:
        """Put the tools that answer for this machine into a folder of PATH."""
        for tool in ("nvidia-smi", "rocm-smi"):
            (folder / tool).unlink(missing_ok=True)
        if self.nvidia or self.failure:
            cards = [dict(each) for each in self.nvidia]
            _program(folder / "nvidia-smi", NVIDIA_SMI.format(python=sys.executable, cards=cards, failure=self.failure))
        if self.amd:
            answer = {f"card{place}": each for place, each in enumerate(self.amd)} | {"system": {"Driver version": "6"}}
            _program(folder / "rocm-smi", ROCM_SMI.format(answer=json.dumps(answer)))


def _program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


RTX_3060 = card("NVIDIA GeForce RTX 3060", 12288, 11700, "170.00", "8.6")
RTX_3090 = card("NVIDIA GeForce RTX 3090", 24576, 24200, "350.00", "8.6")
A100 = card("NVIDIA A100-SXM4-80GB", 81920, 80900, "400.00", "8.0")
RX_7900_XTX = radeon("Radeon RX 7900 XTX", 23.98, 300, "327.0", "0000:03:00.0")
RYZEN_GRAPHICS = radeon("AMD Radeon Graphics", 0.5, 100, "65.0", "0000:0f:00.0")

MACHINES = {
    "gtx 1080": Machine((card("NVIDIA GeForce GTX 1080", 8192, 7800, "180.00", "6.1"),)),
    "v100": Machine((card("Tesla V100-SXM2-16GB", 16384, 16000, "300.00", "7.0"),)),
    "rtx 2060": Machine((card("NVIDIA GeForce RTX 2060", 6144, 5500, "160.00", "7.5"),)),
    "rtx 2080 ti": Machine((card("NVIDIA GeForce RTX 2080 Ti", 11264, 10900, "250.00", "7.5"),)),
    "t4": Machine((card("Tesla T4", 15360, 14910, "70.00", "7.5"),)),
    "rtx 3050 laptop": Machine((card("NVIDIA GeForce RTX 3050 Laptop GPU", 4096, 3600, "[N/A]", "8.6"),)),
    "rtx 3060": Machine((RTX_3060,)),
    "rtx 3060, old driver": Machine((RTX_3060 | {"driver_version": "550.144.03"},)),
    "rtx 3060, very old driver": Machine((RTX_3060 | {"driver_version": "470.256.02"},)),
    "rtx 3070": Machine((card("NVIDIA GeForce RTX 3070", 8192, 7900, "220.00", "8.6"),)),
    "rtx 3090": Machine((RTX_3090,)),
    "rtx 3090 that fell off the bus": Machine(
        (RTX_3090 | dict.fromkeys(("memory.total", "memory.free", "power.limit"), "[Unknown Error]"),)
    ),
    "two rtx 3090, one with a display": Machine((RTX_3090 | {"memory.free": 14000}, RTX_3090)),
    "rtx 3060 and rtx 3090": Machine((RTX_3060, RTX_3090)),
    "rtx 3090 and gtx 1080": Machine((card("NVIDIA GeForce GTX 1080", 8192, 7800, "180.00", "6.1"), RTX_3090)),
    "rtx 3090 that torch does not see": Machine((RTX_3090,), unseen=("NVIDIA GeForce RTX 3090",)),
    "rtx 4060 ti 16 gb": Machine((card("NVIDIA GeForce RTX 4060 Ti", 16380, 15900, "165.00", "8.9"),)),
    "rtx 4070 in wsl": Machine((card("NVIDIA GeForce RTX 4070", 12282, 10900, "[N/A]", "8.9"),)),
    "rtx 4090": Machine((card("NVIDIA GeForce RTX 4090", 24564, 23900, "450.00", "8.9"),)),
    "l4": Machine((card("NVIDIA L4", 23034, 22500, "72.00", "8.9"),)),
    "rtx 5070 ti, driver 570": Machine(
        (card("NVIDIA GeForce RTX 5070 Ti", 16303, 15800, "300.00", "12.0", driver_version="570.86.10"),)
    ),
    "rtx 5090": Machine((card("NVIDIA GeForce RTX 5090", 32607, 31800, "575.00", "12.0"),)),
    "gb10, memory of the host": Machine((card("NVIDIA GB10", "[N/A]", "[N/A]", "[N/A]", "12.1"),), unified_gib=119.6),
    "a card of unknown memory": Machine((card("NVIDIA Wonder", "[N/A]", "[N/A]", "[N/A]", "12.1"),)),
    "a card that no table knows": Machine((card("NVIDIA GeForce RTX 9999", 49152, 48000, "400.00", "13.0"),)),
    "a100": Machine((A100,)),
    "a100, divided": Machine((A100 | {"mig.mode.current": "Enabled"},)),
    "h100": Machine((card("NVIDIA H100 80GB HBM3", 81559, 80500, "700.00", "9.0"),)),
    "rx 6800 xt": Machine(amd=(radeon("Radeon RX 6800 XT", 15.98, 300, "255.0", "0000:03:00.0"),)),
    "rx 7900 xtx": Machine(amd=(RX_7900_XTX,)),
    "rx 7900 xtx and the processor's own": Machine(amd=(RYZEN_GRAPHICS, RX_7900_XTX), unseen=("AMD Radeon Graphics",)),
    "mi300x": Machine(amd=(radeon("AMD Instinct MI300X", 191.98, 300, "750.0", "0000:05:00.0"),)),
    "driver updated and not restarted": Machine(failure="Failed to initialize NVML: Driver/library version mismatch"),
    "one of several cards lost": Machine(
        failure="Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.  Reboot the system to recover"
    ),
    "driver without a card": Machine(failure="No devices were found"),
}
