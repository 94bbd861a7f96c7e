"""Seconds of a training step, by what is waited for.  Pure arithmetic over a device's measured figures.

Legend: T tokens of a micro-batch, h hidden, f MLP width, q / k widths of query / key-value heads, L layers.
A matrix product costs 2 FLOPs a weight and token; a frozen weight is used forward and for the input's gradient, a
trained one once more (Kaplan et al., arXiv 2001.08361; RunLoRA, arXiv 2312.03415 for adapters).
"""

from __future__ import annotations

import math

from clusters.capability import DeviceCapability, NodeCapability
from strategies.contract import TimeEstimate
from strategies.cost import kernels, streaming
from strategies.cost.memory import SHORT
from strategies.cost.micro_batches import num_micro_batches, padded_length, padding, tokens_per_micro_batch
from strategies.cost.work import Work
from strategies.optimizers import OPTIMIZERS
from strategies.shape import ModelShape
from strategies.workload import BYTES_PER_ELEMENT, Techniques, Workload

# Typical figures that stand in for unknown ones; an estimate that used one says so (`is_guess`).
_CPU_FLOPS_PER_CORE = 40e9
_CPU_BYTES_PER_S = 20e9
_GPU_BYTES_PER_S = 300e9
_CPU_KERNEL_S = 6e-6
_BUS_BYTES_PER_S = 10e9
_DISK_BYTES_PER_S = 0.5e9
_BF16_WITHOUT_UNITS = 0.25  # of the fp32 rate: converted to fp32 and back

# A published peak is not reached: large products get this much of it, beside what they read and write (kernels.py).
# Fitted on 143 published step times (tests/benchmarks/time_errors.py); cuBLAS alone reaches about as much.
_OF_DATASHEET = 0.78
# GeForce cards run above the boost clock of their data sheets, and their tensor units are only twice as fast as their
# others.  Between 0.9 and more than 1 on rows of two trainers on one card: kept below the peak.
_OF_DATASHEET_GEFORCE = 0.95
_OF_DATASHEET_ROCM = 0.4  # matrix code for ROCm stays further from it: rows of one card, 0.3 to 0.5
# A board of few watts cannot hold its boost clock under products (T4: arXiv 1903.07486 studies it).  16-bit FLOP/s a
# watt that a full-size board of the generation holds, by its data sheet, and compute capability: V100 SXM (125 TFLOP/s,
# 300 W), RTX A6000 (155, 300 W), RTX 4090 (330 with fp16 sums, 450 W).  It limits the T4, A10, L4 and L40S.
_FLOPS_PER_JOULE = {(7, 0): 0.42e12, (7, 5): 0.42e12, (8, 6): 0.52e12, (8, 9): 0.73e12}
_GPU_OP_S = 15e-6  # an operation started through Python and autograd; shows where it takes longer than the work
_CPU_CACHED = 0.5  # element-wise traffic that the caches do not catch
_FETCH_S = 0.32e-3  # a sharded weight asked for by a hook of ZeRO-3 (Qwen-1.8B on one A100: 0.26 s whatever the length)
_BUS_OF_DATASHEET = 0.8
_PAGES = 0.7  # of a node's memory, what pages of files may take beside a training that streams them
# A CPU training beside its probe (32 runs on each of two days, LOG.md "Time on a CPU"): products are narrower than the
# probe's and their weights are packed anew in each call, more so in 16 bits; each operation passes through Python,
# autograd and, in 16 bits, autocast.  The days differ by 1.3 with the same probe (0.72 and 0.98, 0.52 and 0.64): other
# work on the host takes caches and bandwidth, which the probe hardly needs.  Half-way; calibration.py learns the rest.
_CPU_PRODUCTS = {"float32": 0.84}
_CPU_PRODUCTS_16_BITS = 0.58
_CPU_OP_S = {"float32": 22e-6}
_CPU_OP_16_BITS_S = 33e-6
_MEMORY_OF_DATASHEET = 0.8
# Rows of several experts leave its caches, each sum and copy a new tensor: 27 us a copy of a token and layer of 1536 in
# fp32 and half of it in bf16, some 16 GB/s, where other element-wise work counts as if it reached 80 (LOG.md).
_CPU_ROUTED = 9
_CPU_HALF_RATE_TOKENS = 24.0  # rows at which a product runs at half its rate
_CPU_ATTENTION = {"eager": 0.25}  # of the products' rate


def flops_per_token(workload: Workload, techniques: Techniques, work: Work) -> tuple[float, float]:
    """(matrix products, attention) of forward, backward and recomputation together, a processed token."""
    shape = workload.shape
    share = (shape.num_layers - work.first_layer) / shape.num_layers
    again = share if techniques.gradient_checkpointing else 0.0
    forward = work.forward_share(shape.num_layers)
    linear = 2.0 * shape.num_product_weights
    products = linear * (forward + share + again + (share if work.trains_weights else 0.0))
    products += 2.0 * work.full_parameters
    products += 2.0 * work.adapter_parameters * (3 + (1 if techniques.gradient_checkpointing else 0))
    logits = 2.0 * shape.output_rows * shape.hidden_size * workload.supervised_fraction
    products += logits * (2 + work.trains_output + (techniques.loss_type == "chunked_nll") + work.reference_passes)
    visible = 1.0 if shape.family.encoder or _masks_rows(techniques) else 0.5
    attention = 4.0 * visible * _attended(workload, techniques) * shape.query_size * shape.num_layers
    return products, attention * (forward + 2.5 * share + again)


def _masks_rows(techniques: Techniques) -> bool:
    """Whether the kernel computes what a mask then hides."""
    return techniques.attn_implementation in ("eager", "sdpa")


def _attended(workload: Workload, techniques: Techniques) -> float:
    """Tokens of the row or document that an average token stands in."""
    if not techniques.packing:
        return padded_length(workload, techniques)
    if workload.shape.family.encoder or _masks_rows(techniques):  # one mask over the whole packed row
        return min(techniques.max_length, workload.share * workload.tokens_per_step)
    return workload.attended_length


def estimate(
    workload: Workload, device: DeviceCapability, node: NodeCapability, techniques: Techniques, work: Work
) -> TimeEstimate:
    """One step on one device, its share of the samples; waiting for other devices is added by `with_sync`."""
    shape = workload.shape
    tokens = workload.share * workload.tokens_per_step * padding(workload, techniques)
    micro_tokens, num_micro = tokens_per_micro_batch(workload, techniques), num_micro_batches(workload, techniques)
    products, attention = flops_per_token(workload, techniques, work)
    rate, guessed_rate = product_rate(device, node, techniques.dtype)
    bandwidth, guessed_bandwidth = memory_rate(device)
    moved = elementwise_bytes_per_token(shape, techniques, work) * tokens
    if device.kind == "cpu":
        attention_rate = rate * _CPU_ATTENTION.get(techniques.attn_implementation, 0.5)
        slowed = 1 + _CPU_HALF_RATE_TOKENS / kernels.product_rows(shape, micro_tokens)
        compute = tokens * (products * slowed / rate + attention / attention_rate)
    else:
        attended = _attended(workload, techniques)
        attention_rate = kernels.attention_rate(device, techniques, rate, attended)
        compute = tokens * (products / rate + attention / attention_rate)
        compute += num_micro * kernels.product_bytes(workload, techniques, work, micro_tokens) / bandwidth
        moved += tokens * kernels.score_bytes(shape, techniques, attended)
        moved += tokens * kernels.other_bytes(workload, techniques)
    moved += num_micro * work.cast_parameters * (4.0 + BYTES_PER_ELEMENT[techniques.dtype])
    moved += _routed_bytes(shape, device, techniques, work, tokens)
    moved *= _CPU_CACHED if device.kind == "cpu" else kernels.memory_share(device)
    passes = 2 + techniques.gradient_checkpointing + work.reference_passes
    expanded = work.dequantise_bytes_per_parameter
    if kernels.has_large_cache(device):
        expanded = max(0.0, expanded - 2 * BYTES_PER_ELEMENT[techniques.dtype])
    expanded *= num_micro * passes * work.dequantised_parameters
    moved += expanded * (_CPU_CACHED if device.kind == "cpu" else 1.0)
    op_s = operation_s(device, techniques)
    documents = max(1.0, micro_tokens / workload.mean_length) if techniques.attn_implementation == "document" else 1.0
    if device.kind == "cpu" and techniques.dtype != "float32" and workload.attended_length <= SHORT:
        documents = min(documents, 4.0)  # short ones share one product
    operations = num_operations(shape, techniques, work, documents)
    overhead = num_micro * op_s * (operations + passes * kernels.expert_operations(device, shape, micro_tokens))
    if techniques.zero_stage >= 3:
        overhead += num_micro * passes * shape.num_layers * (len(shape.linears) + shape.family.norms) * _FETCH_S
    if techniques.torch_compile:  # fused element-wise work, fewer launches (LOG.md: CPU 1.4x; torchtune: 1.27x)
        moved, overhead = 0.5 * moved, 0.4 * overhead
    update, transfer = _update(device, node, techniques, work, bandwidth)
    transfer += num_micro * _fetch_weights_s(shape, device, techniques, work)
    if techniques.streams_weights:
        computing_s = (compute + moved / bandwidth) / num_micro
        transfer += num_micro * _await_layers_s(shape, device, node, techniques, work, computing_s)
    transfer += _fetch_activations_s(shape, device, techniques, tokens, compute)
    transfer += _fetch_kept_s(device, node, techniques, work, tokens) if work.kept_bytes_per_token else 0.0
    update += 12 * work.num_tensors * op_s * (0.2 if device.kind != "cpu" else 1.0)
    if device.kind != "cpu":  # kernels are queued ahead: what shows is only what the GPU waits for
        overhead = max(0.0, overhead - compute - moved / bandwidth)
    learnt = device.calibration.get(techniques.dtype, 1.0)
    return TimeEstimate(
        compute_s=learnt * compute,
        memory_s=learnt * moved / bandwidth,
        overhead_s=learnt * overhead,
        update_s=learnt * update,
        transfer_s=learnt * transfer,
        is_guess=guessed_rate or guessed_bandwidth or (techniques.streams_weights and device.kind == "cpu"),
    )


def _routed_bytes(
    shape: ModelShape, device: DeviceCapability, techniques: Techniques, work: Work, tokens: float
) -> float:
    """What a CPU moves beyond the formula where tokens are sorted by expert and put back."""
    if device.kind != "cpu":
        return 0.0
    return (_CPU_ROUTED - 1) * 2 * BYTES_PER_ELEMENT[techniques.dtype] * work.routed * shape.num_layers * tokens


def operation_s(device: DeviceCapability, techniques: Techniques) -> float:
    """Seconds that starting one operation takes in training."""
    if device.kind == "cpu":
        return (device.op_overhead_s or _CPU_KERNEL_S) + _CPU_OP_S.get(techniques.dtype, _CPU_OP_16_BITS_S)
    return max(device.op_overhead_s or 0.0, _GPU_OP_S)


def product_rate(device: DeviceCapability, node: NodeCapability, dtype: str) -> tuple[float, bool]:
    """FLOP/s that training's matrix products reach, and whether a typical figure stood in for an unknown one."""
    known = device.flops_per_s.get(dtype)
    if known:
        is_datasheet = device.sources.get(f"flops_per_s.{dtype}") != "measured"
        if device.kind == "cpu":
            return known * _CPU_PRODUCTS.get(dtype, _CPU_PRODUCTS_16_BITS), False
        return known * (_of_datasheet(device, known) if is_datasheet else 1.0), False
    fp32 = device.flops_per_s.get("float32")
    if device.kind == "cpu":
        rate = fp32 or _CPU_FLOPS_PER_CORE * node.num_cores * device.core_share
        half = 1.0 if dtype == "float32" else 2.0 if device.has_bf16_units and dtype == "bfloat16" else None
        return rate * (half or _BF16_WITHOUT_UNITS) * _CPU_PRODUCTS.get(dtype, _CPU_PRODUCTS_16_BITS), True
    has_units = device.has_bf16_units if dtype == "bfloat16" else (device.compute_capability or (0, 0)) >= (7, 0)
    fp32 = fp32 or 5e12
    return fp32 * _of_datasheet(device, fp32) * (1.0 if dtype == "float32" else 2.0 if has_units else 0.9), True


def _of_datasheet(device: DeviceCapability, peak: float) -> float:
    """The part of a published peak that training's products reach."""
    if device.kind == "rocm":
        return _OF_DATASHEET_ROCM
    fp32 = device.flops_per_s.get("float32") or 0.0
    if peak < 2.5 * fp32:
        return _OF_DATASHEET_GEFORCE
    fed = _FLOPS_PER_JOULE.get(device.compute_capability or (0, 0), math.inf) * (device.power_w or math.inf)
    return min(_OF_DATASHEET, fed / peak)


def memory_rate(device: DeviceCapability) -> tuple[float, bool]:
    """Bytes a second of element-wise work, and whether a typical figure stood in."""
    if device.memory_bytes_per_s:
        is_datasheet = device.sources.get("memory_bytes_per_s") != "measured"
        return device.memory_bytes_per_s * (_MEMORY_OF_DATASHEET if is_datasheet else 1.0), False
    return (_CPU_BYTES_PER_S * device.memory_share if device.kind == "cpu" else _GPU_BYTES_PER_S), True


def elementwise_bytes_per_token(shape: ModelShape, techniques: Techniques, work: Work) -> float:
    """Bytes read and written by everything that is not a matrix product, forward and backward, all layers.

    Counted on transformers' modules: an RMSNorm in fp32 steps passes 40 h bytes forward and twice that backward, a
    gated MLP 14 g f, rotary positions and head transposes 24 g (q + k), residual sums 12 g h, an adapter its fp32
    casts and the sum with the frozen map's output.
    """
    g = BYTES_PER_ELEMENT[techniques.dtype]
    h, f = shape.hidden_size, shape.mlp_width
    norms = shape.family.norms * (9 * g * h if shape.family.norm_bias else 120 * h)
    mlp = (14 if shape.gated_mlp else 8) * g * f * work.mlp_copies
    attention = 24 * g * (shape.query_size + shape.key_value_size)
    a_number = (8 if g == 4 else 14) if work.adapter_bytes is None else work.adapter_bytes
    adapters = a_number * work.adapter_inputs + (4 * g + 2) * work.dropped_inputs
    layer = norms + mlp + attention + 12 * g * h + adapters + 2 * g * work.routed
    backward_share = (shape.num_layers - work.first_layer) / shape.num_layers
    again = 0.4 if techniques.gradient_checkpointing else 0.0
    forward = work.forward_share(shape.num_layers)
    return shape.num_layers * layer * (0.35 * forward + (0.65 + again) * backward_share)


def num_operations(shape: ModelShape, techniques: Techniques, work: Work, documents: float) -> float:
    """Kernels started for one micro-batch, forward and backward."""
    forward = (30 if shape.family.norm_bias else 48) + work.adapter_operations * work.num_adapters
    forward += 9 * documents if techniques.attn_implementation == "document" else 6
    backward_share = (shape.num_layers - work.first_layer) / shape.num_layers
    again = 1 if techniques.gradient_checkpointing else 0
    passed = work.forward_share(shape.num_layers)
    expanding = work.dequantise_operations * (passed + (1 + again) * backward_share)
    return 60 + shape.num_layers * (forward * (passed + (1.3 + again) * backward_share) + expanding)


def _update(
    device: DeviceCapability, node: NodeCapability, techniques: Techniques, work: Work, bandwidth: float
) -> tuple[float, float]:
    """Seconds of the optimizer, and on the bus.  AdamW reads 16 bytes a weight and writes 12, clipping reads 8."""
    mine = work.num_trainable * techniques.state_part
    moved = mine * (36.0 if not techniques.has_eight_bit_optimizer else 40.0)  # unpacked to fp32 and packed again
    if not techniques.offloads_optimizer:
        orthogonal = work.orthogonal_products if OPTIMIZERS[techniques.optim].orthogonalises else 0.0
        rate, _ = product_rate(device, node, "bfloat16")
        return moved / bandwidth + orthogonal / rate, 0.0
    bus = bus_rate(device)
    g = BYTES_PER_ELEMENT[techniques.dtype]
    return mine / host_update_rate(node), 2 * g * mine / bus  # gradients down, weights up


def host_update_rate(node: NodeCapability) -> float:
    """Weights a second that AdamW updates in host memory."""
    return ((node.cpu.memory_bytes_per_s if node.cpu else None) or _CPU_BYTES_PER_S) / 36.0


def _fetch_weights_s(shape: ModelShape, device: DeviceCapability, techniques: Techniques, work: Work) -> float:
    """Seconds that the weights of a micro-batch need from the host: quantised ones cross as they lie there.

    Not hidden: published runs are this slow.
    """
    if techniques.offload != "parameters":
        return 0.0
    return (2 + techniques.gradient_checkpointing) * _frozen_bytes(shape, techniques, work) / bus_rate(device)


def _frozen_bytes(shape: ModelShape, techniques: Techniques, work: Work) -> float:
    """The base's weights as they lie on the host."""
    g = BYTES_PER_ELEMENT[techniques.dtype]
    quantised = work.dequantised_parameters
    expanded = 2 * g  # written and read again as the product needs them; the rest of what an expansion moves lies there
    return g * (shape.num_parameters - quantised) + quantised * (work.dequantise_bytes_per_parameter - expanded)


def streamed_bytes(shape: ModelShape, techniques: Techniques, work: Work) -> float:
    """Frozen weights that a micro-batch sends over the bus; none where they lie on the device."""
    if not techniques.streams_weights:
        return 0.0
    frozen = streaming.split(shape, techniques, _frozen_bytes(shape, techniques, work))
    return frozen.sent_bytes(work.first_layer, shape.num_layers)


def _fetch_activations_s(
    shape: ModelShape, device: DeviceCapability, techniques: Techniques, tokens: float, compute: float
) -> float:
    """Seconds that activations cross the bus beyond what computing hides."""
    if techniques.offload != "activations":
        return 0.0
    kept = BYTES_PER_ELEMENT[techniques.dtype] * shape.hidden_size * shape.num_layers * tokens
    if not techniques.gradient_checkpointing:
        kept *= 12
    return max(0.0, 2 * kept / bus_rate(device) - compute)


def _fetch_kept_s(
    device: DeviceCapability, node: NodeCapability, techniques: Techniques, work: Work, tokens: float
) -> float:
    """Seconds that results of frozen layers take to and from a disk and a GPU, as if nothing else were done."""
    moved, seconds = tokens * work.kept_bytes_per_token, 0.0
    if techniques.cache_frozen_activations == "disk":
        first = work.lower_passes
        seconds += moved * (first / (node.disk_write_bytes_per_s or _DISK_BYTES_PER_S))
        seconds += moved * (1 - first) / (disk_read_rate(node) or _DISK_BYTES_PER_S)
    return seconds + (moved / bus_rate(device) if device.kind != "cpu" else 0.0)


def disk_read_rate(node: NodeCapability) -> float | None:
    """Bytes a second that a node's disk reads; where that was not measured, about as many as it writes."""
    return node.disk_read_bytes_per_s or node.disk_write_bytes_per_s


def bus_rate(device: DeviceCapability) -> float:
    """Bytes a second between host and device, the slower direction."""
    known = [rate for rate in (device.host_to_device_bytes_per_s, device.device_to_host_bytes_per_s) if rate]
    if not known:
        return _BUS_BYTES_PER_S
    is_datasheet = device.sources.get("host_to_device_bytes_per_s") != "measured"
    return min(known) * (_BUS_OF_DATASHEET if is_datasheet else 1.0)


def _await_layers_s(
    shape: ModelShape,
    device: DeviceCapability,
    node: NodeCapability,
    techniques: Techniques,
    work: Work,
    computing_s: float,
) -> float:
    """Seconds that a micro-batch waits for streamed layers: on a GPU beyond the computing of those before them."""
    sent = streamed_bytes(shape, techniques, work)
    if device.kind == "cpu":  # read from a file, copied by the cores that compute
        return sent / file_rate(device, node, _frozen_bytes(shape, techniques, work))
    return max(0.0, sent / bus_rate(device) - computing_s)


def file_rate(device: DeviceCapability, node: NodeCapability, num_bytes: float) -> float:
    """Bytes a second of weights that are read from files: from the page cache where they fit beside the training.

    Else from the disk, which reads about as fast as it writes.
    """
    if num_bytes < _PAGES * (node.memory_bytes or 0):
        return memory_rate(device)[0] / 3  # a copy reads and writes, and the write reads its line first
    return node.disk_write_bytes_per_s or _DISK_BYTES_PER_S
