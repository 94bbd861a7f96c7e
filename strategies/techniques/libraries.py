"""Optional libraries that a technique needs: absent, broken or running on a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clusters.capability import DeviceCapability

# Library -> extra of pyproject.toml that brings it.
EXTRAS = {"bitsandbytes": "quant", "deepspeed": "zero", "schedulefree": "optim", "liger_kernel": "liger"}
# flash-attn has no extra: it is compiled from source for an hour, against the torch that is there.
INSTALL = {library: f"pip install -e '.[{extra}]'" for library, extra in EXTRAS.items()} | {
    "flash_attn": "pip install flash-attn --no-build-isolation"
}


def lacks(device: DeviceCapability, library: str) -> str | None:
    """Why an optional library cannot be used on a device; None where it runs, or nobody has tried."""
    found, name = device.libraries.get(library), library.replace("_", "-")
    if found is None or found.state == "runs":
        return None
    if found.state == "broken":
        return f"{name} is installed and does not run on {device.name}: {found.error}"
    return f"{name} is not installed: {INSTALL[library]}"


def absent_libraries(device: DeviceCapability) -> list[str]:
    """Libraries that were looked for on a device and are not installed."""
    return [
        library for library in INSTALL if library in device.libraries and device.libraries[library].state == "absent"
    ]


def with_installed(device: DeviceCapability, libraries: Iterable[str]) -> DeviceCapability:
    """The device as if these libraries were installed and nobody had tried them."""
    rest = {name: found for name, found in device.libraries.items() if name not in set(libraries)}
    return replace(device, libraries=rest)
