"""Random numbers of each decoder layer follow from the micro-batch and the layer, not from what was drawn before.

So dropout is the same whichever process computes a layer: in one piece or in stages, computed once or again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch

from strategies.model.architecture import decoder_layers


class LayerRandomness:
    """Seeds torch at every decoder layer, where any part of the model draws random numbers at all."""

    def __init__(self, model: Any) -> None:
        self._text = ""
        if draws_random_numbers(model):
            for number, layer in enumerate(decoder_layers(model)):
                layer.register_forward_pre_hook(lambda *_, number=number: self.begin_layer(number))

    def begin(self, text: str) -> None:
        """Begin a forward pass; `text` names its micro-batch."""
        self._text = text
        self._seed(text)

    def begin_layer(self, number: int) -> None:
        """Begin a decoder layer of that pass."""
        self._seed(f"{self._text}/{number}")

    def _seed(self, text: str) -> None:
        """As `torch.manual_seed`, which takes 2 ms: it notes a stack for each kind of device that is not there."""
        seed = zlib.crc32(text.encode())
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)


def draws_random_numbers(model: Any) -> bool:
    """Whether a training pass of the model differs from one to the next."""
    return have_dropout(model.modules())


def have_dropout(modules: Iterable[Any]) -> bool:
    """Whether some of these modules drop activations or scores of attention at random."""
    rates = ("attention_dropout", "dropout", "dropout_rate", "attn_pdrop")
    return any(
        (isinstance(module, torch.nn.Dropout) and module.p > 0)
        or any(isinstance(rate := getattr(module, name, None), float) and rate > 0 for name in rates)
        for module in modules
    )
