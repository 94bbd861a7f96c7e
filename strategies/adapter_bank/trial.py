"""A model with an adapter's corrections in its weights, and back again, bit by bit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from strategies.adapter_bank.algebra import Factors

_IN_STACK = re.compile(r"(.+?)\.(\d+)\.")


@contextmanager
def corrected(model: Any, corrections: Mapping[str, Factors]) -> Iterator[Any]:
    """The model with W + B A in place of W; afterwards every weight is what it was."""
    kept = {name: model.get_submodule(name).weight.detach().clone() for name in corrections}
    try:
        with torch.no_grad():
            for name, factors in corrections.items():
                module, delta = model.get_submodule(name), factors.delta()
                is_transposed = type(module).__name__ == "Conv1D"  # GPT-2's maps
                module.weight += (delta.T if is_transposed else delta).to(module.weight)
        yield model
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)


class Below:
    """The layers below the first that some adapters correct: their outputs are the same under each, so they run once.

    A pass over a data set inside `keep_outputs` keeps their outputs for each batch (rows x length x hidden size
    numbers); later passes, of the same batches in the same order, begin there.
    """

    def __init__(self, model: Any, targets: Iterable[str]) -> None:
        """`targets` are names of maps; one outside the stack of layers makes everything run each time."""
        places = [_IN_STACK.match(name) for name in targets]
        stacks = {place[1] for place in places if place}
        first = min((int(place[2]) for place in places if place), default=0)
        known = None not in places and len(stacks) == 1
        self._layers = list(model.get_submodule(stacks.pop()))[:first] if known else []
        self._outputs: list[Any] | None = None

    def forget(self) -> None:
        """Before another data set."""
        self._outputs = None

    @contextmanager
    def keep_outputs(self) -> Iterator[None]:
        if not self._layers:
            yield
        elif self._outputs is None:
            outputs: list[Any] = []
            hook = self._layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
            try:
                yield
                self._outputs = outputs
            finally:
                hook.remove()
        else:
            batches, now = iter(self._outputs), [None]

            def begin(*_: Any, **__: Any) -> Any:
                now[0] = next(batches)
                return now[0]

            try:
                for layer in self._layers:
                    layer.forward = lambda *_, **__: now[0]
                self._layers[0].forward = begin
                yield
            finally:
                for layer in self._layers:
                    layer.__dict__.pop("forward", None)
