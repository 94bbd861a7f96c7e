"""Bytes of a training step, by part.  Pure arithmetic; tests hold every formula against the traced step.

Legend: T tokens of a micro-batch, S of them supervised, h hidden, f MLP width, q / k widths of all query / key-value
heads, a heads, V vocabulary, L layers; g bytes of an element in the forward pass, e of one of the residual stream.
Saved activations follow Korthikanti et al. (arXiv 2205.05198), adapted to what transformers' modules keep without
dropout when linear maps are frozen: a frozen map saves nothing, everything else saves its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from clusters.capability import DeviceCapability
from strategies.contract import MemoryEstimate
from strategies.cost import streaming
from strategies.cost.micro_batches import micro_batches_in_flight
from strategies.cost.reserved import with_framework
from strategies.optimizers import OPTIMIZERS
from strategies.pipeline.wire_size import message_bytes
from strategies.shape import ModelShape
from strategies.techniques.attention import copies_keys
from strategies.workload import BYTES_PER_ELEMENT, Techniques, Workload

CHUNK = 256  # positions of chunked_nll, as in techniques/supervised_logits.py
LIVE_PARAMETERS = 100_000_000  # that ZeRO-3 may hold gathered
BUCKET_ELEMENTS = 5_000_000  # gradients reduced together; DeepSpeed's own 5e8 would take 2 GB of a small card
SHORT = 128  # tokens, as in techniques/document_attention.py
_GRADIENTS_OF_F_PLAIN = 2.2
# Tensors of width f alive in an MLP's backward pass beside what it saved, by the kernels that compute it: transformers'
# modules, an operation each (traced); a compiler's, which makes the gradients of product, gate and up and no copies;
# kernels written by hand (Unsloth's, Liger's), which write gate's and up's gradients where gate and up were.
_GRADIENTS_OF_F = {"plain": 5.5, "compiled": 3.0, "fused": 1.0}
DEEPSPEED_BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size
DEEPSPEED_LIVE = 1_000_000_000  # and stage3_max_live_parameters
_NLL_BYTES = 12.0  # fp32 log-softmax, its gradient, the loss's gradient: alive together when the backward pass begins


@dataclass(frozen=True)
class Streamed:
    """An optimizer that takes gradients one by one and keeps its moments elsewhere."""

    state_bytes: float  # on the device, from step to step
    gradient_bytes: float  # on the device, from a backward pass to the update
    host_bytes: float


@dataclass(frozen=True)
class Footprint:
    """What a method puts on the device: all that memory needs to know about it."""

    weights_bytes: float  # every weight as it lies there: frozen, quantised, trained
    num_trainable: int
    num_outside: int = 0  # of those, what is no matrix of a layer; 0 where no optimizer asks
    trained_bytes: float = 4.0  # of a trained weight's element; its gradient has the same
    stream_bytes: float = 2.0  # e: what the embedding's output is kept in
    inputs_per_token: float = 0.0  # bytes of linear inputs that one layer keeps because something there trains
    output_is_kept: bool = False  # attention's output is among those inputs
    product_is_kept: bool = False  # so is what the MLP's last map reads
    norms_train: bool = False
    mlp_copies: int = 1  # of each token that pass between the MLP's maps
    keeps_dtype: bool = False  # in 16 bits nothing that passes a layer's maps is cast to fp32 and back
    cast_bytes: float = 0.0  # compute-precision copies of trained weights, kept from forward to backward
    dequantised_bytes: float = 0.0  # the largest weight while it is not quantised
    first_layer: int = 0  # below it nothing trains: nothing is kept
    embeddings_train: bool = False
    scattered_bytes: float = 0.0  # the whole gradient of an embedding of which only some rows train
    master_bytes: float = 0.0  # fp32 copies the optimizer keeps of half-precision weights, a parameter
    optimizer_bytes: float | None = None  # where it is not that of `optim`
    streamed: Streamed | None = None  # where gradients do not stay
    kept_bytes: float = 0.0  # what frozen lower layers made of all samples, in the host's memory
    disk_bytes: float = 0.0  # the same on the host's disk
    look_bytes: float = 0.0  # while the method looks at rows, before the optimizer has a state

    @property
    def frozen_bytes(self) -> float:
        """Of the weights, those that do not train."""
        return self.weights_bytes - self.trained_bytes * self.num_trainable


@dataclass(frozen=True)
class Stack:
    """What other trainers do differently: for comparison with published measurements.  The defaults are ours."""

    logits_bytes: float | None = None  # a logit, at every position; None = ours, at supervised positions
    head_bytes: float = 0.0  # a copy of the output matrix that lives while logits do: dequantised, or cast
    repeats_keys: bool = False  # grouped keys and values are copied to the width of the queries
    fuses_values: bool = False  # one map for queries, keys and values: the values are a view that keeps all three
    deepspeed_defaults: bool = False  # DeepSpeed's own sizes of buckets, not those of techniques/deepspeed_zero.py
    fsdp: bool = False  # what shards is PyTorch's FSDP: it gathers a layer and the next one, and has no buckets
    fused_kernels: bool = False  # RMSNorm and SwiGLU are one kernel each (Unsloth, Liger)

    def kernels(self, techniques: Techniques) -> str:
        """What computes norms and MLPs: `fused`, `compiled`, or transformers' `plain` operations."""
        if self.fused_kernels or techniques.liger_kernel:
            return "fused"
        return "compiled" if techniques.torch_compile else "plain"


def estimate(
    workload: Workload,
    device: DeviceCapability,
    techniques: Techniques,
    footprint: Footprint,
    stack: Stack | None = None,
) -> MemoryEstimate:
    """Memory of a step on one device, low and high included; of a stage, `workload` and `footprint` are the stage's.

    The peak is the larger of two moments: the end of the forward pass (everything saved, the logits) and the end of
    the backward pass (all gradients, the optimizer's temporaries).
    """
    stack = stack or Stack(repeats_keys=copies_keys(device, workload.shape, techniques))
    tokens = _tokens(workload, techniques)
    weights = footprint.weights_bytes / (techniques.num_shards if techniques.zero_stage >= 3 else 1)
    gradients = gradient_bytes(techniques, footprint)
    state = OPTIMIZERS[techniques.optim].bytes_of(footprint.num_trainable, footprint.num_outside)
    optimizer = (state + footprint.master_bytes * footprint.num_trainable) * techniques.state_part
    known = footprint.optimizer_bytes
    optimizer = max(optimizer if known is None else known, footprint.look_bytes)
    saved, hump = activation_bytes(workload, techniques, footprint, stack, tokens, device.kind == "cpu")
    logits = stack.head_bytes + logits_bytes(workload, techniques, stack, tokens)
    cast, saved = _in_flight(workload, techniques, footprint, tokens, saved)
    messages, host = message_buffers(workload, device, techniques, tokens)
    buffers = messages + buffer_bytes(workload.shape, techniques, footprint, stack)
    if (streamed := footprint.streamed) is not None:
        gradients, optimizer, host = streamed.gradient_bytes, streamed.state_bytes, host + streamed.host_bytes
    if techniques.offload == "activations":  # save_on_cpu: one layer at a time stays
        host, saved = saved, saved / workload.shape.num_layers
    if techniques.offloads_optimizer:
        # States, fp32 copies and gradients there; here what has not crossed yet: a bucket and the largest gradient.
        host, optimizer = optimizer + 4.0 * footprint.num_trainable * techniques.state_part, 0.0
        largest = BUCKET_ELEMENTS + workload.shape.vocab_size * workload.shape.hidden_size
        gradients = footprint.trained_bytes * min(footprint.num_trainable, largest)
    if techniques.offload == "parameters":
        host, weights = host + weights, 0.0  # what is here of them, buffer_bytes counts
    if techniques.streams_weights:
        frozen, is_cpu = streaming.split(workload.shape, techniques, footprint.frozen_bytes), device.kind == "cpu"
        host += 0.0 if is_cpu else frozen.host_bytes  # a CPU's stay in the model's files
        weights += frozen.device_bytes(1 if is_cpu else 2) - footprint.frozen_bytes
        logits = _sliced_logits_bytes(workload, techniques, frozen, tokens)
    accumulates = workload.share * workload.tokens_per_step > 1.05 * tokens
    accumulates |= techniques.uses_engine and techniques.zero_stage >= 3  # its gradients have a place of their own
    forward_end = cast + saved + max(logits, hump) + (gradients if accumulates else 0.0)
    backward_end = gradients + update_bytes(workload.shape, techniques, footprint)
    if backward_end > forward_end:
        saved, logits, hump, cast = 0.0, 0.0, 0.0, 0.0
        kept_gradients, buffers = gradients, buffers + backward_end - gradients
    else:
        kept_gradients = gradients if accumulates else 0.0
    tensors = MemoryEstimate(
        weights_bytes=weights,
        gradients_bytes=kept_gradients,
        optimizer_bytes=optimizer,
        activations_bytes=saved + max(0.0, hump - logits),
        logits_bytes=logits,
        buffers_bytes=buffers + cast + (footprint.kept_bytes if device.kind == "cpu" else 0.0),
        host_bytes=host + (footprint.kept_bytes if device.kind != "cpu" else 0.0),
    )
    return with_framework(tensors, device, techniques.num_shards)


def gradient_bytes(techniques: Techniques, footprint: Footprint) -> float:
    """Gradients of one device.

    DeepSpeed's stages 1 and 2 have every gradient before it is reduced and their own part again in fp32 (its docs: 4P +
    16P/N in all, which the published 8-GPU rows confirm); stage 3 keeps 18P/N in all, gradients in fp32.  Stage 1 in
    16 bits is another optimizer of its, which adds gradients up whole, in fp32 (buffer_bytes).
    """
    whole = footprint.trained_bytes * footprint.num_trainable
    own = 4.0 * footprint.num_trainable * techniques.state_part
    if not techniques.uses_engine or (techniques.zero_stage == 1 and footprint.trained_bytes < 4):
        return whole
    return own if techniques.zero_stage >= 3 else whole + own


def _tokens(workload: Workload, techniques: Techniques) -> float:
    """Tokens of the largest micro-batch: never more than a step has, never longer rows than the longest sample."""
    rows = techniques.per_device_train_batch_size
    if techniques.packing:
        whole = workload.fullest_step_tokens or workload.global_batch_size * workload.longest_sample
        return min(techniques.micro_batch_tokens, max(workload.share * whole, workload.longest_sample))
    return min(rows, workload.global_batch_size) * min(techniques.max_length, workload.longest_sample)


def saved_per_token(
    shape: ModelShape,
    techniques: Techniques,
    footprint: Footprint,
    stack: Stack,
    attended: float,
    on_cpu: bool = False,
) -> float:
    """What one layer keeps for its backward pass, per token; `attended` is how many tokens a token may look at."""
    g, e = BYTES_PER_ELEMENT[techniques.dtype], footprint.stream_bytes
    h, f = shape.hidden_size, shape.mlp_width
    q, k, heads = shape.query_size, shape.key_value_size, shape.num_heads
    family = shape.family
    is_eager = techniques.attn_implementation == "eager" or shape.softcap
    kernels = stack.kernels(techniques)
    if family.norm_bias:  # LayerNorm is one operation: it keeps its input, which parallel branches share
        norms = (1 if family.parallel else family.norms) * e * h
    elif kernels != "plain":  # RMSNorm in one kernel: its input; the normed vector is computed again
        norms = family.norms * e * h
    else:  # RMSNorm in steps: its input in fp32, and the normed vector where the scale trains
        scaled = e * h if footprint.norms_train else 0
        norms = family.norms * (4 * h + scaled)
    if family.qk_norm:
        norms += 4 * (q + k) + (g * (q + k) if footprint.norms_train else 0)
    kept = 2 * q if is_eager or stack.repeats_keys else 2 * k
    attention = g * (2 * q + kept) + 4 * heads
    keeps_dtype = g == 4 or footprint.keeps_dtype
    if is_eager or (keeps_dtype and footprint.output_is_kept and techniques.attn_implementation != "document"):
        attention -= g * q  # eager products do not keep their output; uncast, a fused kernel's is the next map's input
    if is_eager:
        softmax = g if shape.model_type == "gpt2" else 4
        cast = g if softmax != g or shape.attention_dropout else 0  # what meets the values: the cast, or what is left
        attention += heads * attended * (softmax + cast + shape.attention_dropout)  # of a mask a byte
        if shape.softcap:  # tanh keeps its output
            attention += heads * attended * g
    elif (len(family.attention) == 2 and family.positions is None) or stack.fuses_values:
        attention += g * (q + k)  # the values are a view of the fused map's output and keep all of it
    if on_cpu and shape.attention_dropout and not is_eager:  # no fused kernel drops: products in fp32, as eager ones
        attention += heads * attended * 12 + (4 - g) * (q + 2 * k)  # softmax, mask, what is left; queries, keys, values
    elif techniques.attn_implementation == "document" and on_cpu and attended <= SHORT and g < 4:
        attention += heads * attended * (4 + 2 * g) + g * (q + 2 * k)  # short documents share a product: scores, copies
    if shape.num_experts:
        mlp = (3 * f + shape.num_experts_per_token * 2 * h) * g
    elif shape.gated_mlp:  # gate, its activation, up; the activation is computed again where kernels are not plain
        mlp = (3 if kernels == "plain" else 2) * g * f
    elif shape.activation == "gelu_new":  # in plain operations: each keeps its result
        mlp = 4 * g * f
    else:
        mlp = g * f
        if shape.activation == "relu" and keeps_dtype and footprint.product_is_kept:
            mlp = 0  # what relu keeps is what the next map reads
    mlp *= footprint.mlp_copies
    masks = 2 * h if shape.dropout else 0  # one byte an element, twice a layer
    return norms + attention + mlp + masks + footprint.inputs_per_token


def activation_bytes(
    workload: Workload,
    techniques: Techniques,
    footprint: Footprint,
    stack: Stack,
    tokens: float,
    on_cpu: bool = False,
) -> tuple[float, float]:
    """(kept from forward to backward, alive beside it while one layer is recomputed or run backward)."""
    shape = workload.shape
    layers = shape.num_layers - footprint.first_layer
    attended = min(workload.attended_length if techniques.packing else workload.longest_sample, techniques.max_length)
    layer = tokens * saved_per_token(shape, techniques, footprint, stack, attended, on_cpu)
    g = BYTES_PER_ELEMENT[techniques.dtype]
    kernels = stack.kernels(techniques)
    widths = _GRADIENTS_OF_F[kernels]
    keeps_dtype = g == 4 or footprint.keeps_dtype
    if kernels == "plain" and keeps_dtype and not footprint.norms_train:  # frozen: no weight gradients, no casts
        widths = _GRADIENTS_OF_F_PLAIN
    transient = tokens * widths * g * shape.mlp_width * footprint.mlp_copies + footprint.dequantised_bytes
    if techniques.attn_implementation == "eager" or shape.softcap:  # the gradient of the scores, in fp32 and cast
        transient = max(transient, tokens * shape.num_heads * attended * (4 + g) + footprint.dequantised_bytes)
    if techniques.gradient_checkpointing:
        return tokens * footprint.stream_bytes * shape.hidden_size * layers, layer + transient
    return layer * layers, transient


def _in_flight(
    workload: Workload, techniques: Techniques, footprint: Footprint, tokens: float, saved: float
) -> tuple[float, float]:
    """(cast weights, what is kept) of all micro-batches whose backward pass is to come; `saved` is one's.

    A stage keeps the hidden state that it sent on, from which its backward pass begins.  What it received is the input
    of its first layer, which counts with the layer.
    """
    stage, flight = techniques.stage, micro_batches_in_flight(workload, techniques)
    sent = 0.0 if stage is None or stage.is_last else tokens * footprint.stream_bytes * workload.shape.hidden_size
    if techniques.gradient_checkpointing:
        return footprint.cast_bytes / workload.shape.num_layers, flight * (saved + sent)
    return flight * footprint.cast_bytes, flight * (saved + sent)


def message_buffers(
    workload: Workload, device: DeviceCapability, techniques: Techniques, tokens: float
) -> tuple[float, float]:
    """Bytes (on the device, on the host) of a stage's messages, which gloo sends from and to a CPU's memory.

    Receives posted in advance from each neighbour, `ahead + 2` deep, and one on its way to it.
    """
    stage = techniques.stage
    if stage is None:
        return 0.0, 0.0
    neighbours = (not stage.is_first) + (not stage.is_last)
    held = neighbours * (stage.ahead + 2 + 1) * message_bytes(tokens, workload.shape.hidden_size, stage.wire)
    return (held, 0.0) if device.kind == "cpu" else (0.0, held)


def logits_bytes(workload: Workload, techniques: Techniques, stack: Stack, tokens: float) -> float:
    """The output at the positions where a loss is computed, when the backward pass begins."""
    if stack.logits_bytes is not None:
        return stack.logits_bytes * workload.shape.vocab_size * tokens
    positions = tokens * workload.supervised_fraction
    if techniques.loss_type == "chunked_nll":
        positions = min(positions, CHUNK)
    return _NLL_BYTES * workload.shape.output_rows * positions


def _sliced_logits_bytes(
    workload: Workload, techniques: Techniques, frozen: streaming.FrozenParts, tokens: float
) -> float:
    """Of a chunked loss: logits of a slice of the output matrix, which all positions meet at its visit."""
    positions = tokens * workload.supervised_fraction
    if techniques.loss_type != "chunked_nll" or not frozen.output:
        return _NLL_BYTES * workload.shape.vocab_size * positions
    rows = workload.shape.vocab_size * frozen.slice_bytes / frozen.output
    return _NLL_BYTES * rows * min(positions, streaming.POSITIONS)


def buffer_bytes(shape: ModelShape, techniques: Techniques, footprint: Footprint, stack: Stack) -> float:
    """What sharding gathers and reduces in.

    Ours: stage 3 reduces in a bucket and holds up to LIVE_PARAMETERS gathered, one map at least, and what it fetches
    ahead twice, since parts of the workers are put together in a copy (measured, tests/benchmarks/zero.py).
    DeepSpeed's defaults: two buckets of 5e8 elements to reduce in, in full however little is trained (stage_1_and_2.py
    and stage3.py allocate them by their size; overlap_comm doubles them); stage 3 gathers up to 1e9 parameters.
    FSDP: a layer and the next one in the precision of computing.
    """
    g = BYTES_PER_ELEMENT[techniques.dtype]
    if not techniques.uses_engine:
        return 0.0
    if stack.fsdp:
        layer = sum(linear.inputs * linear.outputs for linear in shape.linears)
        whole_layer = min(1.0, footprint.weights_bytes / (g * shape.num_parameters)) * g * layer
        return max(2 * whole_layer, g * shape.vocab_size * shape.hidden_size) if techniques.zero_stage >= 3 else 0.0
    if stack.deepspeed_defaults:
        gathered = g * min(DEEPSPEED_LIVE, shape.num_parameters) if techniques.zero_stage >= 3 else 0.0
        return gathered + 2 * g * DEEPSPEED_BUCKET
    if techniques.zero_stage < 3 and techniques.offload != "parameters":
        return 4.0 * footprint.num_trainable if techniques.zero_stage == 1 and footprint.trained_bytes < 4 else 0.0
    bucket = 4.0 * min(BUCKET_ELEMENTS, footprint.num_trainable)
    whole = shape.num_parameters
    largest = max(shape.vocab_size * shape.hidden_size, *(linear.inputs * linear.outputs for linear in shape.linears))
    return bucket + g * (min(whole, max(LIVE_PARAMETERS, largest)) + min(whole, LIVE_PARAMETERS / 2))


def update_bytes(shape: ModelShape, techniques: Techniques, footprint: Footprint) -> float:
    """Temporaries at the end of the backward pass and in the optimizer's step."""
    if techniques.uses_engine or footprint.streamed:  # a part at a time, before the last gradients are there
        return 0.0
    foreach = OPTIMIZERS[techniques.optim].copies * footprint.trained_bytes * footprint.num_trainable
    tied = footprint.embeddings_train and shape.tied_embeddings
    # Both uses' gradients, and their sum.
    embedding = 2 * footprint.trained_bytes * shape.vocab_size * shape.hidden_size if tied else 0.0
    return max(foreach, embedding, footprint.scattered_bytes)
