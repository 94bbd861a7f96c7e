"""Optional libraries that a technique needs: absent, broken or running on a device."""

from __future__ import annotations

from clusters.capability import DeviceCapability

# Library -> extra of pyproject.toml that brings it.  flash-attn has none: it is compiled from source for an hour, and
# torch's own kernels do its work.
EXTRAS = {"bitsandbytes": "quant", "deepspeed": "zero"}


def lacks(device: DeviceCapability, library: str) -> str | None:
    """Why an optional library cannot be used on a device; None where it runs, or nobody has tried."""
    found, name = device.libraries.get(library), library.replace("_", "-")
    if found is None or found.state == "runs":
        return None
    if found.state == "broken":
        return f"{name} is installed and does not run on {device.name}: {found.error}"
    extra = EXTRAS.get(library)
    return f"{name} is not installed" + (f": pip install -e '.[{extra}]'" if extra else "")
