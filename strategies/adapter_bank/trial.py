"""A model with an adapter's corrections in its weights, and back again, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from strategies.adapter_bank.algebra import Factors


@contextmanager
def corrected(model: Any, corrections: Mapping[str, Factors]) -> Iterator[Any]:
    """The model with W + B A in place of W; afterwards every weight is what it was."""
    kept = {name: model.get_submodule(name).weight.detach().clone() for name in corrections}
    try:
        with torch.no_grad():
            for name, factors in corrections.items():
                weight, delta = model.get_submodule(name).weight, factors.delta()
                weight += (delta if weight.shape == delta.shape else delta.T).to(weight)  # GPT-2's maps lie transposed
        yield model
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)
