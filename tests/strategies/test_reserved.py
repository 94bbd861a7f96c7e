"""What lies beside tensors, and what kernels and other trainers add to them, worked out by hand."""

from dataclasses import replace

import pytest

from clusters.capability import CONTEXT_BYTES, DeviceCapability, NodeCapability
from clusters.units import GIB
from strategies.contract import MemoryEstimate
from strategies.cost import memory, time
from strategies.cost.memory import Footprint, Stack
from strategies.cost.reserved import GAPS, HIGH, LOW, NCCL_BYTES, with_framework
from strategies.cost.work import Work
from strategies.shape import ModelShape
from strategies.workload import Techniques, Workload

GPU = DeviceCapability("cuda", "test", 24 * GIB, {"bfloat16": 1e14}, compute_capability=(8, 6))
NODE = NodeCapability("here", 4, 64 * GIB, (GPU,))
SHAPE = ModelShape(256, 6, 4, 2, 64, 640, 2048, True)
PLAIN = Techniques("bfloat16", "flash_attention_2", False, True, 1, 1000)
TENSORS = MemoryEstimate(weights_bytes=100, gradients_bytes=0, optimizer_bytes=0, activations_bytes=30, logits_bytes=20)


def workload(shape=SHAPE):
    return Workload(shape, 1, 1000, 1000, 1000, 1, 1, 1)


def test_gaps_are_small_beside_what_stays_and_whole_beside_what_changes():
    assert GAPS.total(TENSORS) == pytest.approx(0.03 * 100 + 0.05 * 50)
    assert GAPS.total(TENSORS, changing_bytes=20) == pytest.approx(GAPS.total(TENSORS) + 20)


def test_a_gpu_holds_a_context_and_between_several_nccl_too():
    alone, two = with_framework(TENSORS, GPU), with_framework(TENSORS, GPU, num_shards=2)

    assert alone.framework_bytes == pytest.approx(CONTEXT_BYTES + GAPS.total(TENSORS))
    assert two.framework_bytes - alone.framework_bytes == NCCL_BYTES
    assert (alone.low_bytes, alone.high_bytes) == (LOW * alone.total_bytes, HIGH * alone.total_bytes)


@pytest.mark.parametrize(
    ("stack", "compiled", "norms", "widths", "transient"),
    [(Stack(), False, 8, 3, 5.5), (Stack(), True, 4, 2, 3.0), (Stack(fused_kernels=True), False, 4, 2, 1.0)],
)
def test_a_recomputed_layer_takes_what_its_kernels_keep(stack, compiled, norms, widths, transient):
    """h 256, q 256, k 128, f 640: norms, attention 2*(2q+2k) + 4*heads, MLP; then the gradients of width f."""
    switched = replace(PLAIN, torch_compile=compiled)

    _, hump = memory.activation_bytes(workload(), switched, Footprint(0, 0), stack, 1000)

    layer = norms * 256 + 2 * (2 * 256 + 2 * 128) + 16 + widths * 2 * 640
    assert hump == pytest.approx(1000 * (layer + transient * 2 * 640))


def test_dropped_scores_keep_a_mask_and_a_copy():
    eager, gpt2 = replace(PLAIN, attn_implementation="eager"), replace(SHAPE, model_type="gpt2")

    def kept(shape):
        return memory.saved_per_token(shape, eager, Footprint(0, 0), Stack(), attended=500)

    assert kept(replace(SHAPE, attention_dropout=True)) - kept(SHAPE) == 4 * 500  # the cast is the copy; the mask
    assert kept(replace(gpt2, attention_dropout=True)) - kept(gpt2) == 4 * 500 * (2 + 1)


def test_attention_dropout_is_read_from_the_config():
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100}

    assert ModelShape.from_config(config | {"attn_pdrop": 0.1}).attention_dropout
    assert not ModelShape.from_config(config | {"attn_pdrop": 0.0}).attention_dropout


@pytest.mark.parametrize("trained", [1_000, 10**9])
def test_deepspeed_has_its_two_buckets_in_full_however_little_is_trained(trained):
    switched, stack = replace(PLAIN, zero_stage=2), Stack(deepspeed_defaults=True)

    found = memory.buffer_bytes(SHAPE, switched, Footprint(0, trained), stack)

    assert found == 2 * 2 * 500_000_000


def test_quantised_weights_cross_the_bus_as_they_lie():
    """Half a byte in place of two: the linear weights of a step cross four times as fast."""
    moved = replace(PLAIN, offload="parameters", zero_stage=3, num_shards=1)
    linear = SHAPE.num_layers * sum(each.inputs * each.outputs for each in SHAPE.linears)
    four_bits = Work(False, dequantised_parameters=linear, dequantise_bytes_per_parameter=0.5 + 2 * 2)

    def seconds(work):
        return time.estimate(workload(), GPU, NODE, moved, work).transfer_s

    saved = seconds(Work(False)) - seconds(four_bits)
    assert saved == pytest.approx(3 * 1.5 * linear / time.bus_rate(GPU))
