"""Memory formulas against numbers worked out by hand, and against the traced step."""

import dataclasses

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from strategies import METHODS
from strategies.cost import memory
from strategies.cost.memory import Footprint, Stack
from strategies.measure import trace
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques, Workload
from tests.axes import half_now

GIB = 2**30
CPU = DeviceCapability("cpu", "test", 64 * GIB)
GPU = DeviceCapability("cuda", "test", 24 * GIB, compute_capability=(8, 6))
NODE = NodeCapability("here", 4, 64 * GIB, (CPU,))
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
SHAPE = ModelShape.from_config(LLAMA)
LLAMA_7B = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
)


def techniques(**changes):
    return dataclasses.replace(Techniques("bfloat16", "sdpa", False, False, 1, 1000), **changes)


def workload(shape=SHAPE, rows=1, length=1000, supervised=None):
    tokens = rows * length
    return Workload(shape, rows, tokens, supervised or tokens, length, rows, 1, rows)


def test_a_llama_layer_keeps_what_a_person_counts():
    """h 256, q 256, k 128, f 640, bf16: norms 2*4h, attention 2*(2q+2k) + 4*heads, gate, act and up 3*2f."""
    kept = memory.saved_per_token(SHAPE, techniques(), Footprint(0, 0), Stack(), 1000)

    assert kept == 2 * 4 * 256 + 2 * (2 * 256 + 2 * 128) + 16 + 3 * 2 * 640


def test_checkpointing_keeps_one_vector_a_layer_and_one_layer_besides():
    plain, hump = memory.activation_bytes(workload(), techniques(), Footprint(0, 0), Stack(), 1000)
    kept, once = memory.activation_bytes(
        workload(), techniques(gradient_checkpointing=True), Footprint(0, 0), Stack(), 1000
    )

    assert kept == 1000 * 2 * 256 * 6
    assert once == plain / 6 + hump


def test_logits_cost_twelve_bytes_where_a_loss_is_and_chunks_cap_them():
    half = workload(supervised=500)

    assert memory.logits_bytes(half, techniques(), Stack(), 1000) == 12 * 2048 * 500
    assert memory.logits_bytes(half, techniques(loss_type="chunked_nll"), Stack(), 1000) == 12 * 2048 * 256
    assert memory.logits_bytes(half, techniques(), Stack(logits_bytes=16), 1000) == 16 * 2048 * 1000


@pytest.mark.parametrize(
    ("method", "gib"),
    [("full", 16 * 6.738e9 / GIB), ("lora", (2 * 6.738e9 + 16 * 39.98e6) / GIB)],
)
def test_states_of_a_7b_model_are_sixteen_bytes_a_trained_parameter(method, gib):
    plan = METHODS[method]().estimate(workload(LLAMA_7B), GPU, NODE, techniques(gradient_checkpointing=True))
    found = plan.memory

    states = found.weights_bytes + found.optimizer_bytes + 4 * plan.num_trainable_parameters
    assert states / GIB == pytest.approx(gib, rel=0.002)


def test_nf4_takes_half_a_byte_and_its_scales():
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    sixteen = METHODS["lora"]().estimate(workload(LLAMA_7B), GPU, NODE, techniques()).memory.weights_bytes

    four = METHODS["qlora"]().estimate(workload(LLAMA_7B), GPU, NODE, techniques()).memory.weights_bytes

    assert sixteen - four == pytest.approx(linear * (2 - 0.5 - 1 / 64 - 4 / (64 * 256)))


@pytest.mark.parametrize(("stage", "bytes_per_parameter"), [(0, 16), (1, 4 + 12 / 8), (2, 4 + 16 / 8), (3, 18 / 8)])
def test_zero_divides_states_as_deepspeed_says(stage, bytes_per_parameter):
    """Mixed precision: 2 weight, 2 gradient, 12 optimizer; a million parameters, N = 8 (DeepSpeed's memory docs)."""
    millions = 1_000_000
    footprint = Footprint(2.0 * millions, millions, trained_bytes=2, master_bytes=12)
    split = techniques(zero_stage=stage, num_shards=8, optim="sgd")
    found = memory.estimate(workload(rows=2), GPU, split, footprint)

    held = found.weights_bytes + memory.gradient_bytes(split, footprint) + found.optimizer_bytes
    assert held == pytest.approx(bytes_per_parameter * millions)


def test_offload_moves_bytes_to_the_host():
    """16 bytes a weight on the host: two moments, the fp32 copy and the gradient (Ren et al., arXiv 2101.06840)."""
    here = METHODS["full"]().estimate(workload(LLAMA_7B), GPU, NODE, techniques()).memory
    moved = METHODS["full"]().estimate(workload(LLAMA_7B), GPU, NODE, techniques(offload="optimizer")).memory
    all_moved = METHODS["full"]().estimate(workload(LLAMA_7B), GPU, NODE, techniques(offload="parameters")).memory

    assert moved.optimizer_bytes == 0
    assert moved.host_bytes == 16 * LLAMA_7B.num_parameters
    assert all_moved.host_bytes == moved.host_bytes + moved.weights_bytes
    assert all_moved.weights_bytes == 0
    assert all_moved.total_bytes < moved.total_bytes < here.total_bytes


def test_eight_bit_states_take_two_bytes():
    full = METHODS["full"]().estimate(workload(), GPU, NODE, techniques()).memory.optimizer_bytes
    eight = METHODS["full"]().estimate(workload(), GPU, NODE, techniques(optim="adamw_bnb_8bit")).memory.optimizer_bytes

    assert full == 8 * SHAPE.num_parameters
    assert eight == pytest.approx(2 * SHAPE.num_parameters, rel=0.02)


def test_parts_add_up_and_lie_between_low_and_high():
    found = METHODS["lora"]().estimate(workload(LLAMA_7B), GPU, NODE, techniques()).memory

    assert sum(found.parts.values()) == found.total_bytes
    assert found.low_bytes < found.total_bytes < found.high_bytes


def test_layers_below_the_first_trained_one_keep_nothing():
    all_layers = METHODS["lora"]().estimate(workload(), CPU, NODE, techniques()).memory.activations_bytes
    upper = METHODS["lora"](layers_to_transform=[3, 4, 5])
    half = upper.estimate(workload(), CPU, NODE, techniques()).memory.activations_bytes

    assert half < 0.65 * all_layers


AXES = (("lora", "full"), ("float32", "bfloat16"), (False, True), ("nll", "chunked_nll"))


@pytest.mark.parametrize(("method", "dtype", "checkpointing", "loss"), half_now(*AXES))
def test_formulas_agree_with_the_traced_step(method, dtype, checkpointing, loss):
    """On 300-token documents the formula is within 5 % of running the real model code on fake tensors."""
    lengths = trace.even(4, 300, 0.5)
    switched = Techniques(dtype, "document", True, checkpointing, 1, 1200, loss_type=loss)
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, switched, 1)
    work = Workload(SHAPE, 4, 1200, 600, 300, 4, 1, 4)

    traced = trace.trace(LLAMA, METHODS[method](), settings, lengths)

    predicted = METHODS[method]().estimate(work, CPU, NODE, switched).memory.tensors_bytes
    assert predicted == pytest.approx(traced.peak_bytes, rel=0.08)


FAMILIES = {
    "gpt2": {"n_embd": 256, "n_layer": 5, "n_head": 4, "n_inner": 640, "vocab_size": 2048, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt2 dropping scores": {"n_embd": 256, "n_layer": 5, "n_head": 4, "n_inner": 640, "vocab_size": 2048,
                             "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {**LLAMA, "num_attention_heads": 4, "hidden_act": "gelu"},
    "qwen3": {**LLAMA, "head_dim": 64},
    "phi3": {**LLAMA, "num_key_value_heads": 4, "pad_token_id": 0},
    "gemma3_text": {**LLAMA, "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh"},
    "opt": {**LLAMA, "ffn_dim": 640, "word_embed_proj_dim": 256, "dropout": 0.0, "activation_function": "relu"},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_agrees_with_its_traced_step(name):
    family, *_ = name.split()
    config = {**FAMILIES[name], "model_type": family}
    if "activation_function" in config:
        config.pop("hidden_act", None)
    if family in ("gpt_neox", "opt"):
        config.pop("num_key_value_heads")
    switched = Techniques("bfloat16", "document", True, False, 1, 1200)
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, switched, 1)
    shape = ModelShape.from_config(config)
    work = Workload(shape, 4, 1200, 600, 300, 4, 1, 4)

    traced = trace.trace(config, METHODS["lora"](), settings, trace.even(4, 300, 0.5))

    predicted = METHODS["lora"]().estimate(work, CPU, NODE, switched).memory.tensors_bytes
    assert predicted == pytest.approx(traced.peak_bytes, rel=0.05)
