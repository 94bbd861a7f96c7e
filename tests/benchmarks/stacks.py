"""What a published row's trainer puts on a GPU and makes it compute, handed to the planner's own formulas.

Other trainers differ from ours in what they keep (fp32 copies of logits, inputs of frozen layers) and in what they run
(eager attention, optimizers of many kernels): published.py says it for each, here it becomes a footprint and a work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from clusters.capability import CONTEXT_BYTES, DeviceCapability, NodeCapability
from clusters.hardware import datasheet
from strategies.contract import MemoryEstimate, TimeEstimate
from strategies.cost import memory, reserved, time
from strategies.cost.memory import Footprint, Stack
from strategies.cost.network import Network
from strategies.cost.reserved import GAPS, Gaps
from strategies.cost.work import Work
from strategies.shape import ModelShape
from strategies.workload import Techniques, Workload
from tests.benchmarks.published import Published, config

_WEIGHT_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_WEIGHT_BYTES |= {"gptq-int4": 0.5 + 2.5 / 128, "gptq-int8": 1.0 + 2.5 / 128}
_FOREACH = "adamw_torch"  # a copy of the weights while it steps
_SEPARATE_KERNELS = {"ms-swift", "litgpt"}  # their full training uses it; states stand in the footprint
_ADAM = {"adamw": 2, "paged_adamw": 0, "adamw_8bit": 1, "paged_adamw_8bit": 0, "sgd": 0}  # states of the weight's width
_GPU = DeviceCapability("cuda", "published", None)
# litgpt quantises from fp16 and computes in bf16: bitsandbytes expands to one and casts to the other.
_DEQUANTISED_COPIES = 2


@dataclass(frozen=True)
class Peak:
    """What a row's tool sees of a GPU's memory, before the gaps of the allocator are counted."""

    tensors: MemoryEstimate
    changing_bytes: float  # of tensors that change in size from batch to batch
    beside_bytes: float  # context and NCCL, where the tool sees them
    has_gaps: bool
    most_bytes: float  # of the card: before it fails, the allocator gives back what it holds unused

    def expected_bytes(self, gaps: Gaps = GAPS) -> float:
        """The figure that the tool should report."""
        exact = self.tensors.tensors_bytes
        unused = gaps.total(self.tensors, self.changing_bytes) if self.has_gaps else 0.0
        return max(exact, min(exact + self.beside_bytes + unused, self.most_bytes))


@cache
def predict_peak(row: Published) -> Peak:
    """The peak of one GPU of a row."""
    tensors = _tensors(row)
    gathered = tensors.buffers_bytes if row.zero_stage >= 3 else 0.0
    beside = CONTEXT_BYTES + (reserved.NCCL_BYTES if row.num_gpus > 1 else 0.0)
    card = datasheet.find(row.gpu)
    return Peak(
        tensors,
        gathered + (tensors.logits_bytes if _lengths_change(row) else 0.0),
        beside if row.measured_as == "nvidia-smi" else 0.0,
        row.measured_as != "allocated",
        card.usable_bytes if card else math.inf,
    )


def _lengths_change(row: Published) -> bool:
    """Whether batches of different lengths pass through the allocator while it keeps what it has.

    ms-swift evaluates on unpacked samples between the steps; the PEFT benchmark empties the cache every 10 steps.
    """
    return row.stack == "ms-swift" or not (row.length_is_exact or "cache-emptied" in row.extras)


def _tensors(row: Published) -> MemoryEstimate:
    """What the row's tensors take."""
    shape = ModelShape.from_config(config(row.model))
    if row.stack == "litgpt" and shape.activation == "gelu_new":  # one kernel there
        shape = replace(shape, activation="gelu")
    g = {"float32": 4, "float16": 2, "bfloat16": 2}[row.compute_dtype]
    tokens = row.micro_batch * row.length
    workload = Workload(shape, row.micro_batch, tokens, tokens, row.length, row.micro_batch, 1, row.micro_batch)
    estimate = memory.estimate(workload, _GPU, _techniques(row), _footprint(row, shape, g), _stack(row, shape, g))
    return replace(estimate, framework_bytes=0.0)


def _stack(row: Published, shape: ModelShape, g: int) -> Stack:
    """What the row's trainer does differently from ours."""
    logits, head_bytes = row.logits_bytes_per_entry, 0.0
    if row.stack == "ms-swift":  # accelerate hands the outputs on as fp32 copies, which have gradients too
        logits += 8
    if "kbit-fp32" in row.extras:  # autocast's 16-bit copy of the fp32 head, kept for the backward pass
        head_bytes = g * shape.vocab_size * shape.hidden_size
    if "head-quantized" in row.extras:
        head_bytes = _DEQUANTISED_COPIES * g * shape.vocab_size * shape.hidden_size
    return Stack(
        logits_bytes=logits,
        head_bytes=head_bytes,
        repeats_keys=row.attention == "sdpa",
        fuses_values=row.stack == "litgpt" and shape.key_value_size == shape.query_size,
        deepspeed_defaults=row.stack != "lsp",
        fsdp="fsdp" in row.extras,
        fused_kernels=row.stack == "unsloth",
    )


def _techniques(row: Published) -> Techniques:
    return Techniques(
        dtype=row.compute_dtype,
        attn_implementation={"flash": "flash_attention_2"}.get(row.attention, row.attention),
        packing=False,
        gradient_checkpointing=row.gradient_checkpointing,
        per_device_train_batch_size=row.micro_batch,
        max_length=row.length,
        optim=_FOREACH if row.method == "full" and row.stack in _SEPARATE_KERNELS else "sgd",
        zero_stage=0 if row.stack == "litgpt" else row.zero_stage,
        num_shards=row.num_gpus if row.zero_stage and row.stack != "litgpt" else 1,
        offload=_offload(row),
        torch_compile=row.torch_compile,
    )


def _offload(row: Published) -> str:
    if not row.offload:
        return "none"
    if "activations" in row.offload or "activation-offload" in row.extras:
        return "activations"
    return "parameters" if any("param" in what for what in row.offload) else "optimizer"


def _footprint(row: Published, shape: ModelShape, g: int) -> Footprint:
    """What the row's stack puts on a GPU."""
    targets = _targets(row, shape)
    linear = shape.num_layers * sum(m.inputs * m.outputs for m in shape.linears)
    rest = shape.num_parameters - linear
    if "untied-head" in row.extras and shape.tied_embeddings:
        rest += shape.vocab_size * shape.hidden_size
    # Frozen and trained weights in one FSDP unit: what is gathered once stays beside the shard.
    mixed_units = row.stack == "litgpt" and "fsdp" in row.extras
    whole = 1 + 1 / row.num_gpus if mixed_units and row.method != "full" else 1 / row.num_gpus if mixed_units else 1
    frozen_bytes = _WEIGHT_BYTES.get(row.quantization or "", g)
    rest_bytes = 4 if "kbit-fp32" in row.extras else g
    if row.method == "full":
        mixed = row.trained_dtype == "fp32-master"
        width = 2 if row.trained_dtype in ("bf16", "fp32-master") else 4
        state = 8 if mixed else _ADAM.get(row.optimizer, 2) * (1 if "8bit" in row.optimizer else width)
        in_backward = "optimizer-in-backward" in row.extras
        return Footprint(
            weights_bytes=width * shape.num_parameters * whole,
            num_trainable=shape.num_parameters,
            trained_bytes=0.02 if in_backward else width + (g if row.num_gpus > 1 and not row.zero_stage else 0),
            stream_bytes=width,
            inputs_per_token=g * (sum(m.inputs for m in shape.linears) if width != g else _distinct(shape.linears)),
            output_is_kept=True,
            product_is_kept=True,
            norms_train=True,
            embeddings_train=True,
            cast_bytes=g * linear if width != g else 0.0,
            master_bytes=state + (4 if mixed else 0) - (8 if row.stack in _SEPARATE_KERNELS else 0),
        )
    rank = row.lora_r or 8
    trained = shape.num_layers * sum(rank * (m.inputs + m.outputs) for m in targets)
    width = 2 if row.trained_dtype == "bf16" else 4
    without_autocast = row.stack in ("peft-bench",) and width == 4 and g == 2
    copies = 4 * sum(m.inputs for m in targets) if without_autocast else g * sum(m.inputs for m in targets)
    inputs = g * _distinct(targets) if width == g else copies
    if "lora-dropout" in row.extras:  # each target drops its own input: the dropped copy, and a mask
        inputs = (g if not without_autocast else 4) * sum(m.inputs for m in targets) + sum(m.inputs for m in targets)
    if "bnb-inputs" in row.extras:
        inputs += g * _distinct(shape.linears)
    if "bnb-inputs-twice" in row.extras:
        inputs += g * _distinct(shape.linears)
    head_bytes = 0.0
    if "head-quantized" in row.extras:
        head_bytes = shape.vocab_size * shape.hidden_size * (frozen_bytes - g)
    return Footprint(
        weights_bytes=(frozen_bytes * linear + rest_bytes * rest + head_bytes) * whole + width * trained,
        num_trainable=trained,
        trained_bytes=width,
        stream_bytes=4 if "kbit-fp32" in row.extras else g,
        inputs_per_token=inputs + g * rank * len(targets),
        output_is_kept=any(m.reads == "attended" for m in targets),
        product_is_kept=any(m.reads == "product" for m in targets),
        dequantised_bytes=_dequantised(row) * g * max(m.inputs * m.outputs for m in shape.linears),
        master_bytes=_ADAM.get(row.optimizer, 2) * (1 if "8bit" in row.optimizer else width),
    )


def _dequantised(row: Published) -> int:
    """16-bit copies of a weight while it is not quantised."""
    if row.quantization is None:
        return 0
    return _DEQUANTISED_COPIES if row.stack == "litgpt" else 1


def _distinct(linears) -> int:
    return ModelShape.distinct_inputs(linears)


_ROLES = {"q": 0, "k": 1, "v": 2, "o": 3}


def _targets(row: Published, shape: ModelShape):
    if row.targets in ("", "all-linear"):
        return shape.linears
    names = row.targets.split(",")
    if "fused" in names:
        inward = [m for m in shape.linears if m.reads == "normed"]
        return tuple(inward[:1]) if len(inward) == 1 else tuple(inward)
    by_letter = {"q": "q", "k": "k", "v": "v", "o": "o", "gate": "gate", "up": "up", "down": "down"}
    chosen = []
    for m in shape.linears:
        start = m.name.split("_")[0]
        fused = m.reads == "normed" and len([x for x in shape.linears if x.reads == "normed"]) == 1
        if (
            start in (by_letter.get(n) for n in names)
            or (fused and {"q", "k", "v"} & set(names))
            or (m.reads == "attended" and "o" in names and m not in chosen)
        ):
            chosen.append(m)
    return tuple(chosen) or shape.linears[:1]


# Bytes a weight that an update moves: AdamW as separate 16-bit kernels (29 ps a weight on an A100), fused, or in fp32.
_UPDATE_BYTES = {"foreach": 46.0, "fused": 14.0, "float32": 36.0}
_PLANNED_UPDATE_BYTES = 36.0  # what the formula counts for each weight
_ACCUMULATION = {"qwen": 8}  # micro-batches a step, where it is known
# All-reduce inside a machine as nccl-tests report it, by GPU: NVLink 3 and 4, halved on boards for China, else PCIe.
_LINK_BYTES_PER_S = {"A100": 230e9, "A800": 150e9, "H100": 360e9, "H200": 360e9, "H800": 150e9, "MI300X": 300e9}
_LINK_BYTES_PER_S |= {"V100": 12e9, "RTX": 10e9, "MI210": 60e9}
_BETWEEN_MACHINES_BYTES_PER_S = 160e9  # eight GPUs with a 200 Gbit adapter each; more than eight GPUs span machines


def processed_length(row: Published) -> float:
    """Tokens a sample that its trainer computes, padding included."""
    if row.stack == "nthu" or row.length_is_exact or row.mean_length == row.length:  # padded to the maximum
        return row.length
    padding = 1.05 if row.stack == "peft-bench" else 1.3  # PEFT's benchmark sorts twenty batches by length
    return padding * (row.mean_length or 0)


def predict_time(row: Published) -> float:
    """The row's figure: seconds of one micro-batch with its share of the update, or tokens a second of all GPUs."""
    shape = ModelShape.from_config(config(row.model))
    card = datasheet.find("A100 80GB" if row.gpu.startswith("A800") else row.gpu)
    if card is None:
        raise LookupError(f"{row.gpu} is not in the datasheet")
    device = datasheet.device(card)
    processed = processed_length(row)
    accumulation = _ACCUMULATION.get(row.stack, 1)
    rows = row.micro_batch * accumulation
    tokens = round(rows * processed)
    workload = Workload(shape, rows, tokens, tokens, round(processed), rows, 1, rows)
    techniques = _techniques(row)
    step = time.estimate(
        workload, device, NodeCapability("published", 32, None, devices=(device,)), techniques, _work(row, shape)
    )
    waited = _sync(row, shape, accumulation, step)
    micro = (step.step_s + waited) / accumulation
    if row.metric == "step_s":
        return micro
    return row.num_gpus * row.micro_batch * (row.mean_length or row.length) / micro


def _work(row: Published, shape: ModelShape) -> Work:
    """What the row's trainer computes."""
    linear = shape.num_layers * sum(m.inputs * m.outputs for m in shape.linears)
    if row.method == "full":
        kernels = "fused" if row.stack == "torchtune" else "foreach"
        kernels = "float32" if row.trained_dtype == "fp32-master" else kernels
        return Work(
            trains_weights=True,
            trains_output=True,
            num_trainable=round(shape.num_parameters * _UPDATE_BYTES[kernels] / _PLANNED_UPDATE_BYTES),
            num_tensors=9 * shape.num_layers,
        )
    targets = _targets(row, shape)
    trained = shape.num_layers * sum((row.lora_r or 8) * (m.inputs + m.outputs) for m in targets)
    return Work(
        trains_weights=False,
        trains_output="trained-embeddings" in row.extras,
        adapter_parameters=trained,
        dropped_inputs=sum(m.inputs for m in targets) if "lora-dropout" in row.extras else 0,
        adapter_inputs=sum(m.inputs + m.outputs for m in targets),
        num_adapters=len(targets),
        num_trainable=trained + (shape.num_embedding_parameters if "trained-embeddings" in row.extras else 0),
        num_tensors=2 * shape.num_layers * len(targets),
        dequantised_parameters=linear if row.quantization else 0,
        dequantise_bytes_per_parameter=_dequantise_bytes(row),
        dequantise_operations=_dequantise_operations(row, shape),
    )


def _dequantise_bytes(row: Published) -> float:
    if row.quantization is None:
        return 0.0
    # GPTQ's expansion in PyTorch: 69 ms a pass over the 6.5e9 weights of Llama-2-7B on an A100 (COST_MODEL G2).
    return 17.0 if row.quantization.startswith("gptq") else _WEIGHT_BYTES[row.quantization] + 4.0


def _dequantise_operations(row: Published, shape: ModelShape) -> int:
    if row.quantization is None:
        return 0
    return (8 if row.quantization.startswith("gptq") else 1) * len(shape.linears)


def _sync(row: Published, shape: ModelShape, accumulation: int, step: TimeEstimate) -> float:
    """Seconds that a step waits for the links between the row's GPUs."""
    link = next((rate for name, rate in _LINK_BYTES_PER_S.items() if row.gpu.startswith(name)), 10e9)
    if row.num_gpus > 8:
        link = min(link, _BETWEEN_MACHINES_BYTES_PER_S)
    work = _work(row, shape)
    trained = shape.num_parameters if row.method == "full" else work.num_trainable
    network = Network(row.num_gpus, link, 20e-6)
    if row.num_gpus < 2:
        return 0.0
    if row.zero_stage < 2:
        micro_s = step.step_s / accumulation
        return network.exposed_s(2.0 * trained, micro_s, network.bucket_bytes(2.0 * trained)) - network.step_s
    if row.zero_stage == 2:
        # Whole buckets are all-reduced since 2023 (use_multi_rank_bucket_allreduce), reduced to their owners before.
        reduced = network.gather_s if row.stack == "deepspeed" else network.all_reduce_s
        return reduced(2.0 * trained) + network.gather_s(2.0 * trained)
    passes = 2 + row.gradient_checkpointing
    moved = passes * _WEIGHT_BYTES.get(row.quantization or "", 2.0) * shape.num_parameters + 2.0 * trained
    hiding = (step.compute_s + step.memory_s) / accumulation
    return accumulation * network.gather_wait_s(moved, hiding)
