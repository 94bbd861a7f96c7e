"""Checks that the exported model is the trained one: the logits of both on one batch, number by number.

The trained model leaves a `Portrait`: its logits on one batch and a digest of every trained weight.  It may then be
freed, so the check needs no more memory than training did; the model that is loaded again is compared with it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from clusters.hardware.limits import PROC, read, usable_memory_bytes
from clusters.safe.reading import first_line
from clusters.units import format_bytes
from orchestrator.errors import RunFailed
from orchestrator.runs.proofs.proof import ROUNDING, Proof, judged, not_run
from orchestrator.training.evaluate import evaluating
from orchestrator.training.memory import resident_bytes
from strategies.step import document_attention
from strategies.step.out_of_memory import is_out_of_memory
from strategies.step.supervised_logits import inner_model
from strategies.techniques.precision import autocast
from strategies.train_setup import Passes

_ROWS, _TOKENS = 2, 32  # of the batch that is compared
# Largest difference of two logits over the largest logit.  The same weights in the same precision differ by the order
# of sums at most; weights that were rounded to another precision differ by that rounding.
_SAME = {"float32": 1e-4, "bfloat16": 2**-6, "float16": 2**-9}
_ROUNDED = {"float32": 1e-3, "bfloat16": 2**-4, "float16": 2**-7}
_AGAIN = "Lower train.learning_rate or set model.dtype: float32, and submit it again"


@dataclass(frozen=True)
class Portrait:
    """A model's logits on one batch, and digests of its trained weights."""

    ids_BT: torch.Tensor
    logits_BTV: torch.Tensor
    dtype: str
    attention: str  # kernel that both must use
    weights: Mapping[str, str]  # trained weight -> digest of its numbers in fp32
    bytes: int  # of the whole model
    broken: str | None = None  # the first trained weight that is NaN or infinite


@dataclass(frozen=True)
class Agreement:
    """How far two models were apart; `reason` says why their logits were not compared."""

    text: str
    dtype: str
    largest_difference: float | None = None
    largest_logit: float | None = None
    tolerance: float | None = None
    num_weights: int = 0
    reason: str | None = None
    losses: tuple[float, float] | None = None  # of both on the batch, in nats a token

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_proof(self, what: str) -> Proof:
        """That what was written is what was trained, by their losses."""
        if self.losses is None:
            return not_run("handed_back", self.reason or self.text)
        trained, found = self.losses
        difference = abs(found - trained) / max(abs(trained), 1e-2)
        compared = f"loss of one batch: the trained model, and {what} read from disk"
        why = f"the same weights in {self.dtype}; kernels may sum in another order"
        return judged("handed_back", compared, difference, ROUNDING[self.dtype], why)


class Disagreement(RunFailed):
    """Two models whose logits are further apart than the precision explains."""

    def __init__(self, text: str, found: Agreement) -> None:
        self.found = found
        super().__init__(text)

    def __reduce__(self) -> tuple[type, tuple[str, Agreement]]:  # crosses process borders with its fields
        return type(self), (str(self), self.found)


def probe(data: Any, vocab_size: int) -> torch.Tensor:
    """The batch that is compared: the first tokens of two samples; random ones where there is no data."""
    rows = [torch.as_tensor(data.tokens(row)[0][:_TOKENS].copy()) for row in range(min(_ROWS, len(data or ())))]
    if rows:
        width = min(len(row) for row in rows)
        return torch.stack([row[:width] for row in rows]).long() % vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (_ROWS, _TOKENS), generator=generator)


@torch.no_grad()
def logits_of(
    model: Any, ids_BT: torch.Tensor, attention: str, dtype: Any, passes: Passes | None = None
) -> torch.Tensor:
    """The logits of a model that computes in `dtype`, in fp32 on the CPU; nothing of the model is changed.

    `passes` compute them where workers share the model.
    """
    with evaluating(model, attention), torch.compiler.set_stance("force_eager"), autocast(model.device.type, dtype):
        ids_BT = ids_BT.to(model.device)
        logits_BTV = passes.logits(ids_BT) if passes else model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV.float().cpu()


def portrait_of(
    model: Any,
    parameters: Mapping[str, torch.Tensor],
    ids_BT: torch.Tensor,
    dtype: Any,
    passes: Passes | None = None,
) -> Portrait:
    """Of a trained model that computes in `dtype`; `parameters` are its trained weights as they will be written."""
    trained_with = inner_model(model).config._attn_implementation
    attention = "sdpa" if trained_with == document_attention.NAME else trained_with  # rows without document borders
    return Portrait(
        ids_BT,
        logits_of(model, ids_BT, attention, dtype, passes),
        dtype,
        attention,
        {name: digest(weight) for name, weight in parameters.items()},
        # DeepSpeed's stage 3 leaves empty parameters that remember their size.
        sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in [*model.parameters(), *model.buffers()]),
        next((name for name, weight in parameters.items() if not weight.isfinite().all()), None),
    )


def digest(weight: torch.Tensor) -> str:
    """Of a weight's numbers in fp32, in which bf16 and fp16 are exact."""
    whole = weight.detach().float().cpu().reshape(-1).contiguous()
    return hashlib.sha256(whole.view(torch.uint8).numpy().data if whole.numel() else b"").hexdigest()


def compare(
    portrait: Portrait, folder: Path, load: Callable[[str], Any], what: str, is_rounded: bool = False
) -> Agreement:
    """Compare what was written to `folder`, and the model that `load(attention)` makes of it, with a portrait.

    A weight may be loaded in less precision than it was trained and written in; then the tolerance is that of rounding.
    Raises RunFailed naming the first trained weight that is no number or another, or the largest difference of the
    logits; an out-of-memory error where the model does not fit.
    `is_rounded`: the trained model computed with weights of more or less precision than those that are handed back.
    """
    if portrait.broken is not None:
        raise RunFailed(f"the training left weights that are no numbers, the first is {portrait.broken}. {_AGAIN}")
    if portrait.dtype != "float16" and not portrait.logits_BTV.isfinite().all():
        raise RunFailed(f"the trained model computes logits that are no numbers. {_AGAIN}")
    try:
        model = load(portrait.attention)
    except Exception as error:  # transformers, PEFT and safetensors raise anything
        if is_out_of_memory(error):
            raise  # says nothing of what was written
        raise RunFailed(f"{what} cannot be loaded again: {first_line(error)}") from error
    loaded = missing(portrait, model.named_parameters())
    if absent := set(loaded) & set(missing(portrait, _by_own_names(portrait, folder))):
        raise RunFailed(
            f"{what} holds other weights than were trained: {len(absent)} differ, the first is {min(absent)}"
        )
    found = logits_of(model, portrait.ids_BT, portrait.attention, portrait.dtype)
    if not portrait.logits_BTV.isfinite().all():  # fp16 overflows where training scales
        reason = f"some are not finite in {portrait.dtype}"
        text = f"{what} holds the {len(portrait.weights)} weights that were trained; logits not compared: {reason}"
        return Agreement(text, portrait.dtype, num_weights=len(portrait.weights), reason=reason)
    rounded = is_rounded or bool(loaded)
    result = judge(portrait.logits_BTV, found, portrait.dtype, what, rounded, len(portrait.weights))
    if portrait.logits_BTV.dim() < 3:  # scores of documents predict no tokens
        return result
    return replace(result, losses=(_loss(portrait.logits_BTV, portrait.ids_BT), _loss(found, portrait.ids_BT)))


def _loss(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> float:
    """Mean cross entropy of each token by the logits before it."""
    predicted, wanted = logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(predicted, wanted.to(predicted.device)).item()


def missing(portrait: Portrait, found: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """The trained weights that are not among `found`, bit by bit."""
    left = dict(portrait.weights)
    for name, weight in found:
        if name in left and digest(weight) == left[name]:
            del left[name]
    return list(left)


def _by_own_names(portrait: Portrait, folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of a folder's files that are trained weights, by the weights' names."""
    own = {_name_in_file(name): name for name in portrait.weights}
    return ((own[name], tensor) for name, tensor in tensors_in(folder) if name in own)


def judge(
    trained_BTV: torch.Tensor, found_BTV: torch.Tensor, dtype: str, what: str, rounded: bool, num_weights: int = 0
) -> Agreement:
    """Compare two models' logits; `rounded` where one of them has weights of less precision.

    Raises Disagreement beyond the tolerance of the precision.
    """
    largest = trained_BTV.abs().max().item()
    tolerance = (_ROUNDED if rounded else _SAME)[dtype]
    if trained_BTV.shape != found_BTV.shape:
        raise RunFailed(f"{what} gives logits of shape {tuple(found_BTV.shape)}, not {tuple(trained_BTV.shape)}")
    difference = (trained_BTV - found_BTV).abs().max().item()
    text = f"largest difference of a logit {difference:.3g}, of logits up to {largest:.3g}"
    allowed = f"{tolerance * largest:.3g} is allowed in {dtype}"
    numbers = (dtype, difference, largest, tolerance * largest, num_weights)
    if not difference <= tolerance * largest:
        wrong = f"{what} does not give the logits of what was trained: {text}; {allowed}"
        raise Disagreement(wrong, Agreement(wrong, *numbers))
    return Agreement(f"{what} gives the logits of what was trained ({text}; {allowed})", *numbers)


def on_disk(portrait: Portrait, folder: Path, what: str) -> Agreement:
    """How many trained weights are in the files bit by bit; what the others are, loading the model again shows.

    Raises RunFailed for files that cannot be read.
    """
    try:
        held = len(portrait.weights) - len(missing(portrait, _by_own_names(portrait, folder)))
    except (SafetensorError, OSError, ValueError) as error:
        raise RunFailed(f"{what} cannot be loaded again: {first_line(error)}") from error
    return _by_weights(portrait, what, held, "it is loaded again after the last evaluation")


def without_logits(portrait: Portrait, folder: Path, what: str, reason: str) -> Agreement:
    """Where the model cannot be loaded once more: its trained weights, tensor by tensor, against the files.

    Raises RunFailed for the first that is another.
    """
    found = [(name, digest(value) == portrait.weights[name]) for name, value in _by_own_names(portrait, folder)]
    if wrong := [name for name, same in found if not same]:
        raise RunFailed(f"{what} holds other weights than were trained: {len(wrong)} differ, the first is {wrong[0]}")
    return _by_weights(portrait, what, len(found), reason)


def _by_weights(portrait: Portrait, what: str, held: int, reason: str) -> Agreement:
    of = f"{held} of the {len(portrait.weights)} weights"
    text = f"{what} holds {of} as they were trained; logits not compared: {reason}"
    return Agreement(text, portrait.dtype, num_weights=held, reason=reason)


def _name_in_file(name: str) -> str:
    """A weight's name as PEFT writes it: without the adapter's own."""
    short = name.replace(".modules_to_save.default", "").replace(".default", "")
    return short.removesuffix(".weight") if "lora_magnitude_vector" in short else short


def tensors_in(folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's safetensors files, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                yield name, tensors.get_tensor(name)


def no_room(needed_bytes: int, device: torch.device) -> str | None:
    """Why a model of so many bytes does not fit beside what is loaded; None where it does."""
    free = free_bytes(device)
    if free is None or needed_bytes <= free:
        return None
    return f"it needs {format_bytes(needed_bytes)}, and {format_bytes(free)} are free on {device}"


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"^MemAvailable:\s+(\d+) kB", read(PROC / "meminfo"), re.MULTILINE)
    limit = usable_memory_bytes()
    known = [int(available[1]) * 1024] if available else []
    known += [limit - resident_bytes(device)] if limit else []
    return min(known, default=None)
