"""Which methods and techniques may be combined, and on what.  Each rule says why not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from clusters.capability import DeviceCapability
from strategies.contract import Method
from strategies.optimizers import OPTIMIZERS
from strategies.shape import ModelShape
from strategies.techniques import refusals
from strategies.techniques.attention import refuse_kernel
from strategies.techniques.libraries import lacks
from strategies.workload import Techniques

_UNDER_DEEPSPEED = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "sgd", "adafactor")


def conflict(
    method: Method, techniques: Techniques, device: DeviceCapability, shape: ModelShape, num_devices: int = 1
) -> str | None:
    """Why this combination cannot be used on this device; None where it can."""
    reasons = itertools.chain(
        [method.refuses(techniques, shape)],
        _score_conflicts(method, techniques) if shape.num_scores else (),
        _streaming_conflicts(method, techniques),
        _stage_conflicts(method, techniques, shape) if techniques.stage else (),
        _between_conflicts(method, techniques) if method.acts_between else (),
        _extra_loss_conflicts(method, techniques) if method.adds_loss else (),
        _averaging_conflicts(method, techniques) if OPTIMIZERS[techniques.optim].averages else (),
        _device_conflicts(method.is_quantised, techniques, device, shape),
        [method.why_one_worker()] if num_devices > 1 else (),
        _sharding_conflicts(method.is_quantised, techniques, num_devices),
        _step_conflicts(techniques, device, shape),
        _sharing_conflicts(method, techniques, device, shape) if techniques.share_prefixes else (),
        _keeping_conflicts(method, techniques, shape),
        _merge_conflicts(method, techniques) if techniques.averages_products else (),
    )
    return next(filter(None, reasons), None)


def _score_conflicts(method: Method, t: Techniques) -> Iterator[str]:
    """What a model with a score in place of its output matrix cannot be combined with."""
    if not method.trains_score:
        yield f"{method.name} does not train a score: set method.type to lora, qlora or full"
    if t.loss_type == "chunked_nll":
        yield "a score has no logits that could be computed in chunks: set train.loss_type: auto"
    if t.streams_weights:
        yield "a model with a score is untested with weights on the host: set strategy.offload: none"
    if t.stage:
        yield "a model with a score is not cut into stages: set strategy.mode: auto"


def _device_conflicts(
    is_quantised: bool, t: Techniques, device: DeviceCapability, shape: ModelShape
) -> Iterator[str | None]:
    """What the device, its libraries or the model's layers rule out."""
    facts = OPTIMIZERS[t.optim]
    if refusal := refuse_kernel(t.attn_implementation, device, shape):
        yield f"{t.attn_implementation} attention: {refusal}"
    if t.attn_implementation == "document" and not t.packing:
        yield "document attention is for packed rows: set data.packing: true"
    if t.attn_implementation == "flash_attention_2" and t.dtype == "float32":
        yield "flash-attn 2 computes in 16 bits only: set model.dtype to bfloat16 or float16"
    if t.dtype == "bfloat16":
        yield refusals.refuse_bf16(device, shape)
    if is_quantised or facts.library == "bitsandbytes":
        yield refusals.refuse_bitsandbytes(device, shape)
    elif facts.library:
        yield lacks(device, facts.library)
    if t.liger_kernel:
        yield refusals.refuse_liger(device, shape)
    if facts.is_paged and device.kind != "cuda":
        yield f"{t.optim} keeps its state in memory that NVIDIA's driver moves: set train.optim without paged_"
    if t.offload != "none" and not t.streams_weights:
        yield refusals.refuse_offload(device, shape)
    if t.streams_weights and device.kind == "cpu" and is_quantised:
        yield "on a CPU weights are read from the model's files as they lie there: 4 and 8 bits are made in memory"
    if t.uses_engine:
        yield lacks(device, "deepspeed")
    if is_quantised and shape.num_experts:
        yield "experts are stacked tensors, which bitsandbytes does not quantise"


def _sharding_conflicts(is_quantised: bool, t: Techniques, num_devices: int) -> Iterator[str]:
    """What ZeRO and offload cannot be combined with."""
    if t.zero_stage and num_devices < 2:
        yield "ZeRO divides work among devices, and there is only one"
    facts = OPTIMIZERS[t.optim]
    if t.zero_stage and facts.sees == "matrix":
        name = t.optim.capitalize()
        yield f"{name} needs whole matrices, which ZeRO splits: set train.optim to adamw_torch_fused"
    if t.uses_engine and t.dtype == "float16":
        yield "DeepSpeed's stages are untested in fp16: set model.dtype to bfloat16 or strategy.mode to zero1"
    if t.uses_engine and t.torch_compile:
        yield "DeepSpeed's hooks break torch.compile's graph: set train.torch_compile: false"
    if t.uses_engine and t.zero_stage >= 3 and t.loss_type == "chunked_nll":
        yield "ZeRO-3 holds the output matrix inside the forward pass only: set train.loss_type: nll"
    if t.offloads_optimizer and num_devices > 1 and t.zero_stage < 2:
        yield "offload over several devices needs ZeRO-2 or 3"
    if t.zero_stage >= 3 and is_quantised:
        yield "DeepSpeed's ZeRO-3 does not shard bitsandbytes' 4- and 8-bit weights"
    if t.offload == "parameters" and is_quantised:
        yield "bitsandbytes' weights cannot be fetched layer by layer"
    if t.uses_engine and is_quantised:
        yield "quantised weights are untested under DeepSpeed: set strategy.mode to zero1"
    if t.zero_stage and t.has_eight_bit_optimizer:
        yield "8-bit states do not divide into ZeRO's equal parts: their blocks would be cut"
    elif t.zero_stage and facts.library == "bitsandbytes":
        yield f"{t.optim} is untested with ZeRO: set train.optim to adamw_torch_fused, or strategy.mode to ddp"
    if t.offloads_optimizer and t.has_eight_bit_optimizer:
        yield "an offloaded optimizer runs on the CPU in fp32"
    elif t.uses_engine and t.optim not in _UNDER_DEEPSPEED:
        yield f"{t.optim} is untested under DeepSpeed: set train.optim to adamw_torch_fused"
    if t.offload == "parameters" and t.zero_stage not in (0, 3):
        yield "parameter offload needs ZeRO-3 or a single device"


def _streaming_conflicts(method: Method, t: Techniques) -> Iterator[str]:
    """What weights that stay on the host cannot be combined with."""
    if not t.streams_weights:
        return
    if not method.keeps_base_frozen:
        yield f"only frozen weights can stay on the host, and {method.name} trains the base's: set strategy.offload"
    if not t.gradient_checkpointing:
        yield "a layer's weights leave before its backward pass computes it again: set train.gradient_checkpointing"
    if t.torch_compile:
        yield "weights that come and go break torch.compile's graph: set train.torch_compile: false"
    if t.uses_engine:
        yield "DeepSpeed divides weights on the devices: set strategy.mode to ddp or zero1"


def _stage_conflicts(method: Method, t: Techniques, shape: ModelShape) -> Iterator[str]:
    """What a model in stages cannot be combined with."""
    if shape.family.uncut:
        yield f"{shape.model_type} models are not cut into stages: {shape.family.uncut}: set strategy.mode: auto"
    if method.streams:
        yield f"{method.name} updates weights beside the computation, over all layers: set strategy.mode: auto"
    if shape.tied_embeddings and method.trains_outside_layers(shape):
        yield (
            "embedding and output matrix are one tensor of this model, and it trains: the first stage and the last"
            " would each have a copy. Train neither of them (method.modules_to_save, trainable_token_indices), use an"
            " adapter of the layers, or set strategy.mode: auto"
        )
    if t.offload not in ("none", "weights"):
        yield f"stages do not offload their {t.offload}: set strategy.offload to none or weights"
    if t.zero_stage or t.uses_engine:
        yield (
            "a stage has its own weights and optimizer, and nothing is left for ZeRO or DeepSpeed to divide: set"
            " strategy.mode to pipeline without them, or to a mode without stages"
        )
    if t.torch_compile:
        yield "torch.compile is untested on a part of a model: set train.torch_compile: false"


def _between_conflicts(method: Method, t: Techniques) -> Iterator[str]:
    """What a method that acts between steps cannot be combined with: it sees whole gradients and moments, everywhere.

    Which a worker may change alike on all of them, and a checkpoint must hold what it keeps in buffers.
    """
    what = f"{method.name} acts between gradients and update"
    if t.uses_engine:
        yield f"{what}, which DeepSpeed makes in one: set strategy.mode to ddp and strategy.offload to none"
    if t.zero_stage:
        yield f"{what} and on moments, of which ZeRO leaves each worker a part: set strategy.mode to ddp"
    if t.stage:
        yield f"{what} of all layers, of which a stage has some: set strategy.mode to auto or ddp"
    if method.streams:
        yield f"{what}, and its optimizer takes gradients one by one as they come: there is no such moment"


def _extra_loss_conflicts(method: Method, t: Techniques) -> Iterator[str]:
    """What a method with a loss beside the tokens' cannot be combined with: it is of all layers of a batch."""
    what = f"{method.name} adds a loss beside the tokens' to each micro-batch"
    if t.uses_engine:
        yield f"{what}, which is untested under DeepSpeed: set strategy.mode to ddp and strategy.offload to none"
    if t.stage:
        yield f"{what} from all layers, of which a stage has some: set strategy.mode to auto or ddp"


def _averaging_conflicts(method: Method, t: Techniques) -> Iterator[str]:
    """What an optimizer cannot be combined with that trains other weights than it evaluates and hands back."""
    what = f"{t.optim} evaluates an average of the weights"
    if t.uses_engine or t.zero_stage or t.offloads_optimizer:
        yield f"{what}, which ZeRO and DeepSpeed divide: set strategy.mode to ddp and strategy.offload to none"
    if t.stage:
        yield f"{what}, and is untested on stages: set strategy.mode to auto or ddp"
    if method.acts_between or method.weighs_samples or method.streams:
        yield f"{what}, which {method.name} changes between steps without it: set train.optim: auto"
    if t.averages_products:
        yield f"{what}, and strategy.local_steps averages others: set one of the two aside"


def _step_conflicts(t: Techniques, device: DeviceCapability, shape: ModelShape) -> Iterator[str | None]:
    """What one step on one device cannot combine."""
    if t.offload == "activations" and t.gradient_checkpointing:
        yield "offloading activations and computing them again save the same bytes: choose one"
    if t.liger_kernel and (t.uses_engine or t.stage or t.streams_weights or t.torch_compile):
        yield (
            "Liger's kernels are untested with DeepSpeed, stages, streamed weights and torch.compile: set"
            " train.use_liger_kernel: false"
        )
    if t.torch_compile and t.attn_implementation == "document":
        yield "torch.compile would recompile for every set of document lengths: set data.packing: false"
    if t.torch_compile:
        yield refusals.refuse_compiler(device, shape)
    if t.loss_type == "chunked_nll" and (refusal := refusals.refuse_chunked_loss(device, shape)):
        yield f"chunked loss: {refusal}"


def _sharing_conflicts(method: Method, t: Techniques, device: DeviceCapability, shape: ModelShape) -> Iterator[str]:
    """What beginnings that are computed once cannot be combined with."""
    what = "data.share_prefixes"
    if refusal := refusals.refuse_sharing(device, shape):
        yield f"{what}: {refusal}: set it to false"
    if method.has_dropout:
        yield f"{what}: a shared token would have one dropout mask for several rows: set dropout to 0 or this to false"
    if t.stage:
        yield f"{what} is untested on stages, whose micro-batches are laid out by lengths alone: set it to false"
    if t.torch_compile:
        yield f"{what}: torch.compile would recompile for every tree: set one of the two to false"
    if not t.packing or t.attn_implementation != "document":
        yield f"{what} is for packed rows and document attention: set data.packing: true, attn_implementation: document"


def _keeping_conflicts(method: Method, t: Techniques, shape: ModelShape) -> Iterator[str]:
    """What kept results of frozen lower layers cannot be combined with."""
    if not t.cache_frozen_activations:
        return
    what = "train.cache_frozen_activations"
    if not method.keeps_base_frozen or method.layers_are_alike:
        yield f"{what}: {method.name} trains from the first layer on here (layers_to_transform names others)"
    if not t.packing:
        yield f"{what} is for packed rows: set data.packing: true"
    if method.acts_between or method.streams:
        yield f"{what}: {method.name} changes weights in its own time: set it to false"
    if shape.dropout or shape.attention_dropout:
        yield f"{what}: the model has dropout, so that no pass is like another: set it to false"
    if t.stage or t.uses_engine or t.streams_weights or t.torch_compile:
        yield f"{what} is untested with stages, DeepSpeed, streamed weights and torch.compile: set it to false"


def _merge_conflicts(method: Method, t: Techniques) -> Iterator[str]:
    """What workers that average products of adapters cannot be combined with."""
    what = "strategy.local_steps_merge: product"
    if why := method.why_no_pairs():
        yield f"{what} averages corrections B A of LoRA, and {why}: set it to factors"
    if t.uses_engine or t.zero_stage or t.stage:
        yield f"{what} needs every worker with all of the adapter: set strategy.mode to ddp, strategy.offload to none"
    if t.local_merge == "reset" and (t.torch_compile or t.streams_weights):
        yield (
            "strategy.local_steps_reset is untested with torch.compile and streamed weights: set train.torch_compile:"
            " false and strategy.offload: none"
        )


def refuses_local_steps(method: Method) -> str | None:
    """Why workers that train apart cannot use a method; None where they can."""
    if method.streams:
        return "local steps average weights, which this method updates asynchronously: set strategy.local_steps: null"
    if method.acts_between:
        return (
            f"{method.name} acts between steps on weights that are equal everywhere, which local steps let drift apart:"
            " set strategy.local_steps: null"
        )
    return None
