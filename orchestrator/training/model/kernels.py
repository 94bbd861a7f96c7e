"""Which of the planned attention, packing and loss a model really supports on this machine."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from clusters.capability import DeviceCapability
from clusters.safe.cache import cache_folder
from clusters.safe.reading import first_line
from orchestrator.errors import JobError
from orchestrator.runs.proofs.proof import PASSED, judged
from orchestrator.training.worker_context import WorkerContext
from strategies.model.heads import masked_kernel
from strategies.pipeline.layer_randomness import draws_random_numbers, have_dropout
from strategies.reuse.kept_states import KeptStates, StatesInMemory, StatesOnDisk
from strategies.reuse.lower_layers import DocumentParts, LowerLayers
from strategies.shape import ModelShape
from strategies.step import document_attention
from strategies.step.out_of_memory import is_out_of_memory
from strategies.step.side_stream import SideStream
from strategies.step.supervised_logits import can_chunk
from strategies.techniques.attention import refuse_kernel
from strategies.techniques.precision import autocast
from strategies.train_setup import TrainSetup
from strategies.workload import Techniques

# packing_error of a model that does not leak stays below
_ROUNDING = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}

_TILE_ROWS = 32  # of AMX: two tiles of 16; SmolLM2-135M's steps of 190 and 400 tokens take 0.92 of their time


def without_leaks(model: Any, techniques: Techniques, context: WorkerContext) -> Techniques:
    """Techniques with an attention that keeps packed documents apart on this model, or without packing.

    Raises JobError where the job wants packing and no attention does; an out-of-memory error passes unchanged.
    """
    device, wanted = context.device, context.job.spec.model.attn_implementation
    checked = model if model.device.type == device.type else document_attention.first_layers(model, device)
    faults: dict[str, str] = {}
    for name in dict.fromkeys([techniques.attn_implementation, *(("sdpa", "eager") if wanted == "auto" else ())]):
        fault = _fault_of(checked, name, context, techniques)
        if fault is None:
            model.set_attn_implementation(name)
            for other, why in faults.items():
                context.note(f"{other} attention: {why}; using {name}")
            kept = dataclasses.replace(techniques, attn_implementation=name)
            return _with_trees_that_hold(checked, kept, context) if kept.share_prefixes else kept
        faults[name] = fault
    reasons = "; ".join(f"{name} attention: {fault}" for name, fault in faults.items())
    if context.job.spec.data.packing is True:
        raise JobError(f"data.packing: {reasons}. Set data.packing: false")
    context.note(f"{reasons}; rows are padded instead")
    model.set_attn_implementation("sdpa" if wanted in ("auto", "document") else wanted)
    rows = max(1, techniques.micro_batch_tokens // techniques.max_length)
    return dataclasses.replace(
        techniques,
        packing=False,
        per_device_train_batch_size=rows,
        attn_implementation="sdpa",
        share_prefixes=False,
    )


def fastest_on_cpu(model: Any, rows: int) -> Techniques:
    """How `rows` samples at a time go through an fp32 model on the CPU: end to end, their common beginnings once.

    Padded where this model computes something else then.  Sets the model's attention.
    """
    padded = Techniques("float32", masked_kernel(model), False, False, rows, 1)
    shape, cpu = ModelShape.from_config(model.config.to_dict()), DeviceCapability("cpu", "cpu", None)
    model.eval()
    try:
        if refuse_kernel(document_attention.NAME, cpu, shape):
            return padded
        model.set_attn_implementation(document_attention.NAME)
        if document_attention.packing_error(model) < _ROUNDING["float32"]:
            packed = dataclasses.replace(padded, attn_implementation=document_attention.NAME, packing=True)
            shares = _fault_of_trees(model, packed, model.device) is None
            return dataclasses.replace(packed, share_prefixes=shares)
    except (ValueError, TypeError, RuntimeError) as refusal:
        if is_out_of_memory(refusal):
            raise
    model.set_attn_implementation(padded.attn_implementation)
    return padded


def _fault_of(model: Any, name: str, context: WorkerContext, techniques: Techniques) -> str | None:
    """Why an attention cannot be used for packed rows of this model; None where it can.

    What was measured is recorded.
    """
    try:
        model.set_attn_implementation(name)
        model.eval()
        with autocast(context.device.type, techniques.dtype):
            error = document_attention.packing_error(model)
    except (ValueError, TypeError, RuntimeError) as refusal:
        if is_out_of_memory(refusal):
            raise
        return f"this model does not run with it ({first_line(refusal)})"
    proof = judged(
        "documents",
        f"logits over their spread: three short documents in one row with {name} attention, and apart",
        error,
        _ROUNDING[techniques.dtype],
        f"another order of sums in {techniques.dtype}",
    )
    context.record(proof)
    return None if proof.outcome == PASSED else "packed documents see each other"


def _with_trees_that_hold(model: Any, techniques: Techniques, context: WorkerContext) -> Techniques:
    """Techniques that compute common beginnings once only where this model then computes what it does row by row.

    Raises JobError where the job wants it and the model does not.
    """
    fault = _fault_of_trees(model, techniques, context.device)
    if fault is None:
        return techniques
    if context.job.spec.data.share_prefixes is True:
        raise JobError(f"data.share_prefixes: {fault}; set it to auto or false")
    context.note(f"common beginnings are computed row by row: {fault}")
    return dataclasses.replace(techniques, share_prefixes=False)


def _fault_of_trees(model: Any, techniques: Techniques, device: torch.device) -> str | None:
    if techniques.attn_implementation != document_attention.NAME:
        return f"{techniques.attn_implementation} attention does not know them"
    if draws_random_numbers(model):
        return "the model drops activations at random, a shared one for several rows at once"
    with autocast(device.type, techniques.dtype):
        error = document_attention.sharing_error(model)
    return None if error < _ROUNDING[techniques.dtype] else "the model sees more of a row than its own beginning"


def with_known_layers(setup: TrainSetup, techniques: Techniques, context: WorkerContext) -> Techniques:
    """Techniques that keep what frozen lower layers make of a sample only where this model can do without them then.

    Raises JobError where the job wants it and the model cannot.
    """
    if not techniques.cache_frozen_activations:
        return techniques
    lower: LowerLayers | None = None
    try:
        if context.seat:
            raise ValueError("a pass is of several runs, whose samples are not known at the same time")
        stream = None if context.device.type == "cpu" else SideStream(context.device)
        lower = LowerLayers(setup.model, _states_of(techniques, context), stream)
        fault = _fault_of_skipping(setup.model, lower, techniques, context.device)
    except (ValueError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        fault = first_line(error)
    if lower and fault is None:
        setup.lower = lower
        text = f"what the {lower.num_layers} lowest layers make of a sample is kept from its first pass"
        context.note(f"{text}, on the disk" if techniques.cache_frozen_activations == "disk" else text)
        return techniques
    if context.job.spec.train.cache_frozen_activations in (True, "disk"):
        raise JobError(f"train.cache_frozen_activations: {fault}; set it to auto or false")
    context.note(f"all samples pass the frozen layers in every epoch: {fault}")
    return dataclasses.replace(techniques, cache_frozen_activations=False)


def _states_of(techniques: Techniques, context: WorkerContext) -> KeptStates:
    """Where they lie.  Raises OSError and RuntimeError where this machine has no folder for them."""
    if techniques.cache_frozen_activations == "disk":
        return StatesOnDisk(cache_folder("activations"), context.note)
    return StatesInMemory()


def _fault_of_skipping(model: Any, lower: LowerLayers, techniques: Techniques, device: torch.device) -> str | None:
    if not techniques.packing:
        return "rows are padded here"
    if have_dropout(lower.modules_below()):
        return "below the first layer that trains activations are dropped at random"
    with autocast(device.type, techniques.dtype):
        error = _skipping_error(model, lower)
    return None if error < _ROUNDING[techniques.dtype] else "its upper layers see more than what the lower ones hand on"


@torch.no_grad()
def _skipping_error(model: Any, lower: LowerLayers) -> float:
    """How much a row differs whose lower layers' results are known; as `packing_error`."""
    lengths, numbers = (5, 4, 3), (-1, -2, -3)
    arguments = document_attention.packed_arguments(lengths, model.device)
    ids_1T = (torch.arange(sum(lengths), device=model.device) * 7 + 3).remainder(model.config.vocab_size)[None]
    found = []
    model.eval()
    for _ in range(2):
        with lower.serve(numbers, DocumentParts(lengths)):
            found.append(model(ids_1T, **arguments, use_cache=False).logits[0])
    lower.forget()
    return document_attention.difference(*found)


def row_multiple(setup: TrainSetup, techniques: Techniques) -> int:
    """Tokens of which rows should hold a multiple: the tiles of a CPU with AMX.

    1 where a method counts or draws by all tokens of a row, for which tokens of no sample would matter.
    """
    fits = setup.device.type == "cpu" and techniques.dtype == "bfloat16" and techniques.packing and _has_amx()
    by_all_tokens = (setup.streaming, setup.learner, setup.objective, setup.noise, setup.extra_loss)
    if not fits or setup.engine or setup.passes or any(by_all_tokens) or draws_random_numbers(setup.model):
        return 1
    return _TILE_ROWS


def _has_amx() -> bool:
    """Whether this CPU multiplies bf16 in tiles; older builds of torch do not say."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def with_loss_that_runs(model: Any, techniques: Techniques, context: WorkerContext) -> Techniques:
    """Techniques without the chunked loss where the model's logits are more than a matrix product.

    Raises JobError where the job wants it.
    """
    if techniques.loss_type != "chunked_nll" or can_chunk(model):
        return techniques
    if context.job.spec.train.loss_type == "chunked_nll":
        raise JobError("train.loss_type: this model does more to its logits than a matrix product; set it to nll")
    context.note("this model does more to its logits than a matrix product; all are computed at once")
    return dataclasses.replace(techniques, loss_type="nll")
