"""Time formulas against numbers worked out by hand."""

import dataclasses

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware import datasheet
from strategies import METHODS
from strategies.contract import Techniques, Workload
from strategies.cost import time
from strategies.cost.time import Work
from strategies.shape import ModelShape

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
    [("RTX 3090", 0.9), ("RTX 4090", 0.9), ("A100 80GB", 0.62), ("T4", 0.62), ("RX 7900 XTX", 0.5)],
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


def test_a_product_of_few_rows_takes_as_long_as_reading_its_weights():
    device = gpu("A100 80GB")
    rate, bandwidth = 0.62 * 312e12, 0.8 * device.memory_bytes_per_s

    half = time._half_rate_tokens(device, dataclasses.replace(SWITCHES, dtype="bfloat16"), rate, bandwidth)

    assert half == pytest.approx(rate / bandwidth)  # about 119 tokens
    assert 2 * half * LINEAR / rate == pytest.approx(2 * LINEAR / bandwidth)


def test_zero_3_asks_for_each_weight_by_a_hook():
    alone = seconds(gpu(), tokens=16)
    sharded = seconds(gpu(), tokens=16, zero_stage=3, num_shards=1)

    assert sharded.overhead_s - alone.overhead_s == pytest.approx(2 * 2 * (7 + 2) * 0.4e-3)  # passes, layers, weights


def test_flash_attention_runs_at_a_higher_rate_than_eager():
    eager, flash = (seconds(gpu(), attn_implementation=name).compute_s for name in ("eager", "flash_attention_2"))

    assert flash < eager
