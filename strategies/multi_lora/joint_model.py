"""One base model for several jobs: a tree of modules for each over the same tensors, and one in which their rows meet.

Legend: T tokens of a row, S supervised ones, C positions that predict one, D documents.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strategies.model.architecture import decoder_layers
from strategies.multi_lora.linear import MapCorrection, OtherTokens, RandomStreams, RangedLinear, Ranges
from strategies.reuse.row import SharedRow
from strategies.reuse.tree import PrefixTree
from strategies.step.document_attention import packed_arguments
from strategies.step.supervised_logits import Batch, inner_model, loss_sums
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSetup
from strategies.workload import LossType

_PREFIX = "base_model.model."  # of PEFT's names
_PROBE = ((5, 3), (4,))  # lengths of the documents of two jobs


class BaseCopies:
    """A frozen base model of which every job gets modules of its own: the same tensors, so no memory."""

    def __init__(self, model: Any) -> None:
        self._model = model.requires_grad_(False)
        self._kept = {id(tensor): tensor for tensor in _tensors(model)}

    def copy(self) -> Any:
        """Another tree of modules: what is put on it, its precision of attention and its mode are its own."""
        return copy.deepcopy(self._model, dict(self._kept))

    @property
    def device(self) -> torch.device:
        return self._model.device


def _tensors(model: torch.nn.Module) -> Iterator[Any]:
    """Weights and buffers, and the objects of bitsandbytes that hold scales of quantised ones."""
    yield from itertools.chain(model.parameters(), model.buffers())
    for module in model.modules():
        for held in (getattr(module, "quant_state", None), getattr(module, "state", None)):
            if held is not None and not isinstance(held, torch.nn.Module):
                yield held
                yield from (value for value in vars(held).values() if isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class RowPart:
    """A job's part of a row: a packed micro-batch."""

    job: Hashable
    batch: Batch
    begin_layer: Callable[[int], None]  # seeds torch as the job's own pass does at a decoder layer


class JointModel:
    """The base with the corrections of all jobs that have joined: each acts on its own tokens of a row.

    Jobs come and go between rows.
    """

    def __init__(self, base: BaseCopies) -> None:
        self.model = base.copy()
        self.model.train()
        self._ranges, self._streams = Ranges(), RandomStreams(base.device)
        self._drawing: set[Hashable] = set()  # jobs with dropout
        self._parts: Sequence[RowPart] = ()
        self._checkpoints = False
        for number, layer in enumerate(decoder_layers(self.model)):
            layer.register_forward_pre_hook(lambda *_, number=number: self._begin_layer(number))

    def join(self, job: Hashable, setup: TrainSetup) -> None:
        """Take in a job's corrections.  Raises ValueError, and nothing is changed, where they are not all pairs.

        Raises ValueError too for a model whose maps see other tokens than those of the row.
        """
        layers = {name: module for name, module in setup.model.named_modules() if hasattr(module, "lora_A")}
        found = {name.removeprefix(_PREFIX): MapCorrection.of(layer) for name, layer in layers.items()}
        held = {id(p) for one in found.values() for m in (one.first, one.second) for p in m.parameters()}
        if others := [name for name, p in setup.parameters.items() if id(p) not in held]:
            raise ValueError(f"{len(others)} trained weights are no pair of A and B, e.g. {others[0]}")
        for name, correction in found.items():
            self._ranged(name).corrections[job] = correction
        if any(correction.draws for correction in found.values()):
            self._drawing.add(job)
        try:
            self._check(job, setup)
        except BaseException:
            self.leave(job)
            raise

    def leave(self, job: Hashable) -> None:
        """Forget a job's corrections."""
        for module in self.model.modules():
            if isinstance(module, RangedLinear):
                module.corrections.pop(job, None)
        self._drawing.discard(job)
        self._streams.forget(job)

    def recompute_activations(self) -> None:
        """From now on activations are computed again in backward passes."""
        if not self._checkpoints:
            checkpointing.enable(self.model)
            self._checkpoints = self._streams.repeats = True

    def losses(self, parts: Sequence[RowPart], loss_type: LossType) -> list[torch.Tensor]:
        """Summed loss of each part's supervised tokens, of one forward pass."""
        self._divide(parts)
        batch = end_to_end([part.batch for part in parts])
        return loss_sums(self.model, batch, [part.batch.targets_S.numel() for part in parts], loss_type)

    def _divide(self, parts: Sequence[RowPart]) -> None:
        self._parts = parts
        self._streams.begin_pass()
        self._ranges.divide([part.job for part in parts], [part.batch.input_ids_BT.numel() for part in parts])

    def _ranged(self, name: str) -> RangedLinear:
        """The map of this name, ready for corrections."""
        found = self.model.get_submodule(name)
        if not isinstance(found, RangedLinear):
            parent, _, own = name.rpartition(".")
            found = RangedLinear(found, self._ranges, self._streams)
            setattr(self.model.get_submodule(parent), own, found)
        return found

    def _begin_layer(self, number: int) -> None:
        """Each job's random numbers begin anew at every layer, as they do where it trains alone."""
        for part in self._parts:
            if part.job in self._drawing:
                part.begin_layer(number)
                self._streams.seeded(part.job)

    @torch.no_grad()
    def _check(self, job: Hashable, setup: TrainSetup) -> None:
        """Compare a row of two jobs with the job's own model, with corrections that count.

        Raises ValueError where they differ by more than rounding: a model whose maps see tokens in another order.
        """
        inner = inner_model(setup.model)
        moved: list[Any] = [correction.second.weight for _, correction in self._of(job)]  # B, which begins at zero
        kept, was_training = [weight.clone() for weight in moved], setup.model.training
        draw = torch.Generator().manual_seed(0)
        lengths = [length for part in _PROBE for length in part]
        ids_T = (torch.arange(sum(lengths)) * 7 + 3).remainder(inner.config.get_text_config().vocab_size)
        ids_1T = ids_T[None].to(inner.device)
        try:
            setup.model.eval()
            for weight in moved:
                weight.copy_(torch.randn(weight.shape, generator=draw) * weight.shape[-1] ** -0.5)
            self._parts, own_T, logits = (), slice(sum(_PROBE[0])), []
            for jobs in ([job, None], [None, None]):
                self._ranges.divide(jobs, [sum(part) for part in _PROBE])
                logits.append(self._logits(self.model, ids_1T, lengths)[own_T])
            joint, plain = logits
            own = self._logits(setup.model, ids_1T[:, own_T], _PROBE[0])
        except OtherTokens as error:
            raise ValueError(f"{error}: its jobs cannot share a row") from error
        finally:
            for weight, before in zip(moved, kept, strict=True):
                weight.copy_(before)
            setup.model.train(was_training)
        # Beside what the correction changes: one on other tokens is as far off as none.
        error = ((joint - own).float().norm() / (own - plain).float().norm()).item()
        if not error < (1e-3 if own.dtype == torch.float32 else 0.3):
            raise ValueError(f"a row of two jobs differs from each alone by {error:.2g} of what the correction changes")

    @staticmethod
    def _logits(model: Any, ids_1T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(T, vocabulary)."""
        return model(ids_1T, **packed_arguments(lengths, ids_1T.device), use_cache=False).logits[0]

    def _of(self, job: Hashable) -> list[tuple[str, MapCorrection]]:
        return [
            (name, module.corrections[job])
            for name, module in self.model.named_modules()
            if isinstance(module, RangedLinear) and job in module.corrections
        ]


def end_to_end(batches: Sequence[Batch]) -> Batch:
    """Packed rows as one, on the device where they lie; the host does not wait for it."""
    if len(batches) == 1:
        return batches[0]
    starts = [0, *itertools.accumulate(batch.input_ids_BT.shape[1] for batch in batches)]
    if any(batch.shared for batch in batches):
        return _trees_end_to_end(batches, starts)
    row = copy.copy(batches[0])
    row.document_lengths = tuple(length for batch in batches for length in batch.document_lengths or ())
    row.sample_ids = tuple(sample for batch in batches for sample in batch.sample_ids)
    for name, axis in (("input_ids_BT", 1), ("supervised_BT", 1), ("targets_S", 0), ("positions_BT", 1)):
        setattr(row, name, torch.cat([getattr(batch, name) for batch in batches], axis))
    columns = [batch.columns_C + start for batch, start in zip(batches, starts, strict=False)]
    row.columns_C = torch.cat(columns)
    ends = [batch.borders_D[1:] + start for batch, start in zip(batches, starts, strict=False)]  # type: ignore[index]
    row.borders_D = torch.cat([batches[0].borders_D[:1], *ends])  # type: ignore[index]
    return row


def _trees_end_to_end(batches: Sequence[Batch], starts: Sequence[int]) -> Batch:
    """The same of rows of which some hold beginnings that their documents share: no tree reaches into another's."""
    tree = PrefixTree([])
    for batch in batches:
        tree.append(batch.shared.tree if batch.shared else PrefixTree.of_apart(batch.document_lengths or ()))
    columns = [batch.shared.columns_S if batch.shared else batch.columns_C for batch in batches]
    row = SharedRow(
        torch.cat([batch.input_ids_BT for batch in batches], 1),
        torch.cat([batch.supervised_BT for batch in batches], 1),
        tree,
        torch.cat([own + start for own, start in zip(columns, starts, strict=False)]),
        torch.cat([batch.targets_S for batch in batches]),
    )
    return Batch.of_tree(row, tuple(sample for batch in batches for sample in batch.sample_ids))
