"""Quantise on a GPU what will lie in the host's memory: bitsandbytes does it where a weight lies.

On a CPU that takes seventy billion weights an hour (17 million a second and thread, bitsandbytes 0.50, an EPYC without
AVX-512).  Each weight visits the device alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def quantise_on(device: torch.device) -> Iterator[None]:
    """Inside the block, weights in the host's memory are quantised on `device`; the results lie on the host again."""
    from bitsandbytes import functional

    names = ("quantize_4bit", "int8_vectorwise_quant")
    plain = {name: getattr(functional, name) for name in names}

    def there_and_back(quantise: Callable[..., Any]) -> Callable[..., Any]:
        def call(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            made = quantise(weight.to(device), *args, **kwargs)
            return tuple(_moved(part, weight.device) for part in made)

        return call

    for name in names:
        setattr(functional, name, there_and_back(plain[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(functional, name, plain[name])


def _moved(part: Any, device: torch.device) -> Any:
    """A tensor, a QuantState, which moves in place, or None, on `device`."""
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if part is not None:
        part.to(device)
    return part
