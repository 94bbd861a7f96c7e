"""What a model on this machine really supports of the planned attention, packing and loss."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch

from orchestrator.errors import JobError
from orchestrator.jobfile import Job
from strategies.contract import Techniques
from strategies.techniques import document_attention
from strategies.techniques.precision import autocast
from strategies.techniques.supervised_logits import can_chunk

# packing_error of a model that does not leak stays below
_ROUNDING = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}


def without_leaks(model: Any, job: Job, techniques: Techniques, device: torch.device, record: Any) -> Techniques:
    """Check that packed documents stay apart, as they will be trained; fall back to what does keep them apart."""
    asked = job.spec.model.attn_implementation
    checked = model if model.device.type == device.type else document_attention.first_layers(model, device)
    for name in dict.fromkeys([techniques.attn_implementation, *(("sdpa", "eager") if asked == "auto" else ())]):
        checked.set_attn_implementation(name)
        checked.eval()
        with contextlib.suppress(ValueError, TypeError, RuntimeError), autocast(device.type, techniques.dtype):
            if document_attention.packing_error(checked) < _ROUNDING[techniques.dtype]:
                model.set_attn_implementation(name)
                if name != techniques.attn_implementation:
                    record(
                        "note",
                        text=f"this model does not run with {techniques.attn_implementation} attention; using {name}",
                    )
                return dataclasses.replace(techniques, attn_implementation=name)
    if job.spec.data.packing is True:
        raise JobError("data.packing: this model lets packed documents see each other; set data.packing: false")
    record("note", text="this model lets packed documents see each other; rows are padded instead")
    model.set_attn_implementation("sdpa" if asked in ("auto", "document") else asked)
    rows = max(1, techniques.micro_batch_tokens // techniques.max_length)
    return dataclasses.replace(techniques, packing=False, per_device_train_batch_size=rows, attn_implementation="sdpa")


def with_loss_that_runs(model: Any, job: Job, techniques: Techniques, record: Any) -> Techniques:
    """Without the chunked loss where the model's logits are more than a matrix product.  Raises JobError if asked."""
    if techniques.loss_type != "chunked_nll" or can_chunk(model):
        return techniques
    if job.spec.train.loss_type == "chunked_nll":
        raise JobError("train.loss_type: this model does more to its logits than a matrix product; set it to nll")
    record("note", text="this model does more to its logits than a matrix product; all are computed at once")
    return dataclasses.replace(techniques, loss_type="nll")
