"""A frozen linear map of a row of several jobs: computed once, and corrected for each job's tokens alone.

y = W x for the whole row, then y[a:b] + s B A x[a:b] for the tokens a..b of each job.  Nothing is padded: ranks, rates
of dropout and numbers of tokens differ as they like.

Legend: T tokens of the row, I inputs and O outputs of the map.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from strategies.multi_lora.corrections import AddCorrections, TokenRange
from strategies.techniques.precision import keeps_input_dtype


class OtherTokens(ValueError):
    """A map sees other tokens than those of the row: which belong to whom is not known there."""


@dataclass
class Ranges:
    """Which tokens of the row that is computed now belong to which job: consecutive, in order, without gaps."""

    jobs: tuple[Hashable, ...] = ()
    sizes: list[int] = field(default_factory=list)  # tokens of each

    def divide(self, jobs: Sequence[Hashable], sizes: Sequence[int]) -> None:
        """The next row has so many tokens of each of these jobs."""
        self.jobs, self.sizes = tuple(jobs), list(sizes)


class RandomStreams:
    """Random numbers of jobs that share a row: each draws from a stream of its own, as if it were alone.

    Where activations are computed again, each map draws in a backward pass what it drew in the forward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[Hashable, torch.Tensor] = {}
        self._drawn: dict[tuple[Hashable, int], torch.Tensor] = {}  # of this pass: (job, map) -> where its draw began
        self.repeats = False  # activations are computed again

    def begin_pass(self) -> None:
        self._drawn = {}

    def seeded(self, job: Hashable) -> None:
        """The job's stream begins where torch's stands now, just seeded."""
        self._states[job] = self._now()

    @contextlib.contextmanager
    def of(self, job: Hashable, place: int) -> Iterator[None]:
        """Inside the block torch draws from the job's stream; `place` is the map that does."""
        began = self._drawn.get((job, place), self._states[job])
        if self.repeats:
            self._drawn[job, place] = began
        self._set(began)
        yield
        self._states[job] = self._now()

    def forget(self, job: Hashable) -> None:
        self._states.pop(job, None)

    def _now(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


@dataclass(frozen=True)
class MapCorrection:
    """A job's correction of one map: the modules are those of its own PEFT layer, so gradients land there."""

    first: torch.nn.Linear  # A, to the rank
    second: torch.nn.Linear  # B, from the rank
    scaling: float
    dropout: torch.nn.Module
    keeps_dtype: bool  # under autocast its input is not cast to A's precision

    @classmethod
    def of(cls, layer: Any) -> MapCorrection:
        """That of a PEFT layer.  Raises ValueError for one that is more than a pair of matrices."""
        name = "default"
        others = {
            "another form than A and B (DoRA and the like)": bool(layer.lora_variant),
            "corrections of an embedding": bool(layer.lora_embedding_A),
            "biases of A and B": any(layer.lora_bias.values()),
            "corrections of a stacked tensor": hasattr(layer, "parameter_name"),
        }
        if found := [what for what, holds in others.items() if holds]:
            raise ValueError(f"{' and '.join(found)} cannot be computed in one row with other jobs")
        return cls(
            layer.lora_A[name],
            layer.lora_B[name],
            layer.scaling[name],
            layer.lora_dropout[name],
            type(layer).__module__.endswith(".bnb") or keeps_input_dtype(layer),
        )

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers in training."""
        return isinstance(self.dropout, torch.nn.Dropout) and self.dropout.p > 0

    @property
    def draws_now(self) -> bool:
        """Whether its model is in training too."""
        return self.draws and self.dropout.training

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + s B A x, in y's precision; as PEFT's layers compute it, operation by operation."""
        if not (self.keeps_dtype and torch.is_autocast_enabled(x.device.type)):
            x = x.to(self.first.weight.dtype)
        corrected = y + self.second(self.first(self.dropout(x))) * self.scaling
        return corrected.to(y.dtype)


def over_ranges(compute: Callable[..., torch.Tensor], sizes: Sequence[int], *rows: torch.Tensor) -> torch.Tensor:
    """Consecutive ranges of rows (..., T, I), each computed by itself with its number, end to end again."""
    parts = zip(*(one.split(list(sizes), -2) for one in rows), strict=True)
    return torch.cat([compute(number, *own) for number, own in enumerate(parts)], dim=-2)


class RangedLinear(torch.nn.Module):
    """A map of the base with the corrections of those jobs that have one; any attribute else is the map's."""

    def __init__(self, base: torch.nn.Module, ranges: Ranges, streams: RandomStreams) -> None:
        super().__init__()
        self.base = base
        self._ranges, self._streams = ranges, streams
        self.corrections: dict[Hashable, MapCorrection] = {}  # no submodules: they belong to the jobs' own models

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # model code may ask for a map's weight

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """(..., T, O) of (..., T, I).  Raises OtherTokens where T is not the row's."""
        y_TO = self.base(x_TI)
        jobs, sizes = self._ranges.jobs, self._ranges.sizes
        if not any(job in self.corrections for job in jobs):
            return y_TO
        if x_TI.shape[:-1].numel() != sum(sizes) or x_TI.shape[-2] != sum(sizes):
            raise OtherTokens(f"a map sees {tuple(x_TI.shape[:-1])} tokens of a row of {sum(sizes)}")
        if len(jobs) == 1:
            return self._corrected(jobs[0], y_TO, x_TI)
        if any(self.corrections[job].draws_now for job in jobs if job in self.corrections):
            return over_ranges(lambda place, y, x: self._corrected(jobs[place], y, x), sizes, y_TO, x_TI)
        return self._all_corrected(y_TO, x_TI)

    def _all_corrected(self, y_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """Those of all jobs at once, which draw no random numbers."""
        starts = itertools.accumulate(self._ranges.sizes, initial=0)
        parts, weights = [], []
        for job, start, size in zip(self._ranges.jobs, starts, self._ranges.sizes, strict=False):
            if (one := self.corrections.get(job)) is not None:
                parts.append(TokenRange(start, start + size, one.scaling))
                weights += [one.first.weight, one.second.weight]
        y_TO = y_TO.clone() if y_TO._is_view() else y_TO
        corrected: torch.Tensor = AddCorrections.apply(y_TO, x_TI, parts, *weights)  # type: ignore[assignment]
        return corrected

    def _corrected(self, job: Hashable, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        correction = self.corrections.get(job)
        if correction is None:
            return y
        if not correction.draws_now:
            return correction.add(y, x)
        with self._streams.of(job, id(self)):
            return correction.add(y, x)
