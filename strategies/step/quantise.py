"""Quantised weights: made on a GPU though they lie in the host's memory, and kept in the layout that trains.

bitsandbytes quantises a weight on the device that holds it.  On a CPU that takes seventy billion weights an hour (17
million a second and thread, bitsandbytes 0.50, an EPYC without AVX-512).  One weight at a time is on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def quantise_on(device: torch.device) -> Iterator[None]:
    """Inside the block, weights in the host's memory are quantised on `device`; the results are on the host."""
    from bitsandbytes import functional

    names = ("quantize_4bit", "int8_vectorwise_quant")
    plain = {name: getattr(functional, name) for name in names}

    def on_device(quantise: Callable[..., Any]) -> Callable[..., Any]:
        def call(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            made = quantise(weight.to(device), *args, **kwargs)
            return tuple(_move(part, weight.device) for part in made)

        return call

    for name in names:
        setattr(functional, name, on_device(plain[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(functional, name, plain[name])


def _move(part: Any, device: torch.device) -> Any:
    """Move a tensor, or in place a QuantState, to `device`; None stays."""
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if part is not None:
        part.to(device)
    return part


def keep_layout(model: Any) -> None:
    """Let bitsandbytes evaluate 4-bit maps as it trains them.

    On CPUs with bf16 units an evaluation packs the weights anew, and they stay packed: the product with packed weights
    has no backward pass, so that training after it gives the maps below no gradients (0.50.2, `Linear4bit.forward`;
    torch only warns).  Maps whose outputs are no multiple of 32 end the process.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
