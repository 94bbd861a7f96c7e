"""Time formulas against numbers worked out by hand."""

import dataclasses

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware import datasheet
from strategies import METHODS
from strategies.cost import kernels, time
from strategies.cost.work import Work
from strategies.shape import ModelShape
from strategies.workload import Techniques, Workload

SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 160,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    }
)
LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 160)
MEASURED = {"flops_per_s.float32": "measured", "flops_per_s.bfloat16": "measured", "memory_bytes_per_s": "measured"}
CPU = DeviceCapability(
    "cpu",
    "test",
    8 * 2**30,
    flops_per_s={"float32": 1e11, "bfloat16": 3e11},
    memory_bytes_per_s=2e10,
    op_overhead_s=1e-5,
    sources=MEASURED,
)
NODE = NodeCapability("here", 4, 8 * 2**30, (CPU,))
SWITCHES = Techniques("float32", "document", True, False, 1, 1000)
BF16 = dataclasses.replace(SWITCHES, dtype="bfloat16")


def workload(samples=10, length=100, supervised=0.5):
    tokens = samples * length
    return Workload(SHAPE, samples, tokens, int(tokens * supervised), length, samples, 1, samples)


def flops(method):
    return method.estimate(workload(), CPU, NODE, SWITCHES).flops_per_token


def test_a_frozen_weight_costs_four_flops_and_a_trained_one_six():
    products, attention = time.flops_per_token(workload(), SWITCHES, Work(trains_weights=False))
    trained, _ = time.flops_per_token(workload(), SWITCHES, Work(trains_weights=True))

    logits = 2 * 512 * 64 * 0.5
    assert products == 4 * LINEAR + 2 * logits
    assert trained == 6 * LINEAR + 2 * logits
    assert attention == 4 * 0.5 * 100 * 64 * 2 * 3.5  # causal, length 100, backward 2.5 of forward


def test_checkpointing_adds_one_forward_pass():
    plain, _ = time.flops_per_token(workload(), SWITCHES, Work(trains_weights=False))
    again = dataclasses.replace(SWITCHES, gradient_checkpointing=True)
    twice, _ = time.flops_per_token(workload(), again, Work(trains_weights=False))

    assert twice - plain == 2 * LINEAR


def test_upper_layers_alone_need_no_backward_pass_below():
    whole, half = Work(trains_weights=False), Work(trains_weights=False, first_layer=1)

    assert (
        time.flops_per_token(workload(), SWITCHES, whole)[0] - time.flops_per_token(workload(), SWITCHES, half)[0]
        == LINEAR
    )


def test_full_training_computes_more_than_lora():
    lora, full = flops(METHODS["lora"](lora_r=2)), flops(METHODS["full"]())

    assert lora < full < 1.6 * lora


def test_a_faster_format_shortens_what_is_computed():
    slow = METHODS["lora"]().estimate(workload(), CPU, NODE, SWITCHES).time
    fast = METHODS["lora"]().estimate(workload(), CPU, NODE, dataclasses.replace(SWITCHES, dtype="bfloat16")).time

    reached = 0.58 / 0.84  # of what the probe measured, bf16 over fp32
    assert slow.compute_s == pytest.approx(3 * reached * fast.compute_s)
    assert not slow.is_guess


def test_what_is_unknown_is_a_guess_and_says_so():
    unknown = DeviceCapability("cpu", "unknown", None)

    found = METHODS["lora"]().estimate(workload(), unknown, NODE, SWITCHES).time

    assert found.is_guess
    assert found.step_s > 0


def test_short_micro_batches_pay_for_every_start():
    def overhead(length):
        switched = dataclasses.replace(SWITCHES, max_length=length)
        return METHODS["lora"]().estimate(workload(), CPU, NODE, switched).time.overhead_s

    assert overhead(100) > 3 * overhead(1000)


def test_padding_is_paid_for():
    padded = dataclasses.replace(workload(), padded_ratio={1: 1.0, 10: 1.5})
    switched = dataclasses.replace(SWITCHES, packing=False, attn_implementation="sdpa", per_device_train_batch_size=10)

    full = METHODS["lora"]().estimate(padded, CPU, NODE, switched).time.memory_s
    tight = METHODS["lora"]().estimate(workload(), CPU, NODE, switched).time.memory_s

    assert full == pytest.approx(1.5 * tight)


def test_what_earlier_runs_taught_multiplies_every_part():
    taught = dataclasses.replace(CPU, calibration={"float32": 1.4})

    plain = METHODS["lora"]().estimate(workload(), CPU, NODE, SWITCHES).time.step_s
    assert METHODS["lora"]().estimate(workload(), taught, NODE, SWITCHES).time.step_s == pytest.approx(1.4 * plain)


def test_dequantising_takes_time_that_does_not_depend_on_the_batch():
    def extra(samples):
        four = METHODS["qlora"]().estimate(workload(samples), CPU, NODE, SWITCHES).time.memory_s
        return four - METHODS["lora"]().estimate(workload(samples), CPU, NODE, SWITCHES).time.memory_s

    assert extra(5) == pytest.approx(extra(10))
    assert extra(10) > 0


def gpu(name="RTX 3090", **changed):
    return dataclasses.replace(datasheet.device(datasheet.find(name)), **changed)


def seconds(device, tokens=4096, **switches):
    techniques = dataclasses.replace(SWITCHES, dtype="bfloat16", **{"packing": True, "max_length": tokens} | switches)
    work = workload(samples=1, length=tokens)
    return time.estimate(work, device, NODE, techniques, Work(trains_weights=False))


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("RTX 3090", 0.95),
        ("RTX 4090", 0.95),
        ("A100 80GB", 0.78),
        ("T4", 0.42 * 70 / 65),
        ("L4", 0.73 * 72 / 121.2),
        ("RX 7900 XTX", 0.4),
    ],
)
def test_a_published_peak_counts_for_what_training_reaches_of_it(name, reached):
    device = gpu(name)
    dtype = "float16"

    rate, guessed = time.product_rate(device, NODE, dtype)

    assert rate == pytest.approx(reached * device.flops_per_s[dtype])
    assert not guessed


def test_a_gpu_waits_for_its_queue_only_when_the_work_is_short():
    short, long = seconds(gpu(), tokens=16), seconds(gpu(), tokens=2_000_000)

    assert short.overhead_s > 10 * short.compute_s
    assert long.overhead_s == 0


def test_a_product_of_few_rows_takes_twice_as_long_as_its_arithmetic():
    device = gpu("A100 80GB")
    rate, bandwidth = 0.78 * 312e12, 0.8 * device.memory_bytes_per_s
    half = rate / bandwidth  # about 150 tokens

    read, moved = (kernels.product_bytes(workload(), BF16, Work(trains_weights=False), rows) for rows in (0, half))

    output = 512 * 64
    sides = 2 * (4 * 2 * 64 + 3 * (64 + 160)) + (512 + 64) / 2  # inputs and outputs: both layers, half of the logits
    assert read == 2 * 2 * (LINEAR + output)  # two bytes, two passes
    assert moved - read == pytest.approx(2 * 2 * half * sides)
    assert 2 * half * LINEAR / rate == pytest.approx(2 * LINEAR / bandwidth)  # arithmetic as long as reading


def test_narrow_layers_reach_less_of_the_peak():
    """In seconds a FLOP: 1,024 wide and 4,096 wide on an H100, 989 TFLOP/s and 3.35 TB/s."""
    costs = {}
    for width in (1024, 4096):
        shape = dataclasses.replace(SHAPE, hidden_size=width, intermediate_size=4 * width, head_dim=128)
        shape = dataclasses.replace(shape, num_heads=width // 128, num_kv_heads=width // 128)
        work = dataclasses.replace(workload(samples=1, length=8192), shape=shape)
        found = time.estimate(work, gpu("H100 SXM"), NODE, BF16, Work(trains_weights=True))
        costs[width] = found.compute_s / sum(time.flops_per_token(work, BF16, Work(trains_weights=True)))

    assert 1.25 < costs[1024] / costs[4096] < 1.8


@pytest.mark.parametrize(("card", "tflops"), [("A100 80GB", (180, 210)), ("H100 SXM", (290, 340))])
def test_flash_attention_reaches_what_its_papers_publish_on_long_rows(card, tflops):
    device = gpu(card)
    rate, _ = time.product_rate(device, NODE, "bfloat16")
    flash = dataclasses.replace(BF16, attn_implementation="flash_attention_2")

    long, short = (kernels.attention_rate(device, flash, rate, length) / 1e12 for length in (16384, 512))

    assert tflops[0] < long < tflops[1]
    assert short == pytest.approx(long / 2, rel=0.05)


@pytest.mark.parametrize("card", ["A100 80GB", "H100 SXM", "RTX 4090"])
def test_no_other_kernel_is_faster_than_flash_attention(card):
    rates = {
        name: kernels.attention_rate(gpu(card), dataclasses.replace(BF16, attn_implementation=name), 1e14, 4096)
        for name in ("flash_attention_2", "document", "sdpa", "eager")
    }

    assert max(rates.values()) == rates["flash_attention_2"]


def test_experts_read_the_weights_of_all_that_tokens_are_sent_to():
    moe = dataclasses.replace(SHAPE, num_experts=8, num_experts_per_token=2, expert_size=32)
    one = 3 * 64 * 32  # an expert; all lines of the router are read for any token

    alone, many = (kernels._read_weights(moe, tokens) for tokens in (1, 100))

    assert many - alone == 2 * (8 - 2) * one  # all eight instead of two, in two layers


def test_experts_of_their_own_products_start_more_kernels_than_grouped_ones():
    moe = dataclasses.replace(SHAPE, num_experts=8, num_experts_per_token=2, expert_size=32)

    grouped = kernels.expert_operations(gpu("A100 80GB"), moe, 1000)
    single = kernels.expert_operations(gpu("T4"), moe, 1000)

    assert grouped == 2 * 20
    assert single == 2 * (20 + 3 * 8)
    assert kernels.expert_operations(gpu("T4"), SHAPE, 1000) == 0


def test_zero_3_asks_for_each_weight_by_a_hook():
    alone = seconds(gpu(), tokens=16)
    sharded = seconds(gpu(), tokens=16, zero_stage=3, num_shards=1)

    assert sharded.overhead_s - alone.overhead_s == pytest.approx(2 * 2 * (7 + 2) * 0.32e-3)  # passes, layers, weights


def test_flash_attention_runs_at_a_higher_rate_than_eager():
    eager, flash = (seconds(gpu(), attn_implementation=name).compute_s for name in ("eager", "flash_attention_2"))

    assert flash < eager
