"""A step on fake tensors takes the bytes that a step on real ones allocates."""

import itertools

import pytest
import torch

from clusters.capability import DeviceCapability, NodeCapability
from strategies import METHODS
from strategies.measure import trace
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques, Workload
from tests.axes import half_now
from tests.benchmarks.predictions import FAMILIES

CONFIG = FAMILIES["llama"]


def settings(dtype, checkpointing, packing=True):
    attention = "document" if packing else "sdpa"
    switched = Techniques(dtype, attention, packing, checkpointing, 4, 256)
    return TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, switched, 1)


def allocated_peak(method, asked, lengths, config=CONFIG):
    """Peak bytes that PyTorch's CPU allocator handed out in a second step, by its own profiler; weights included."""
    from torch.profiler import ProfilerActivity, profile

    from strategies.step.step import Update, forward_backward, update
    from strategies.techniques.precision import gradient_scaler

    setup = trace.build(config, ModelShape.from_config(config).num_layers, method, asked, "cpu")
    batch = lengths.batch(asked.techniques.packing)
    scaler = gradient_scaler("cpu", asked.techniques.dtype)

    def step():
        forward_backward(setup, batch, sum(lengths.supervised), asked.techniques, scaler)
        update(setup, scaler, Update(1.0, 1.0))

    setup.model.train()
    step()
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in trace.tensors_of(setup)}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    total = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return held + peak


AXES = (("lora", "full"), ("float32", "bfloat16"), (False, True))


@pytest.mark.parametrize(("method", "dtype", "checkpointing"), half_now(*AXES))
def test_traced_peak_is_what_the_allocator_hands_out(method, dtype, checkpointing):
    asked, lengths = settings(dtype, checkpointing), trace.even(4, 200, 0.5)

    traced = trace.trace(CONFIG, METHODS[method](), asked, lengths)

    assert traced.peak_bytes == pytest.approx(allocated_peak(METHODS[method](), asked, lengths), rel=0.05)


def test_two_and_four_layers_tell_what_six_take():
    asked, lengths = settings("float32", False), trace.even(4, 200, 0.5)

    line = trace.trace(CONFIG, METHODS["lora"](), asked, lengths)
    whole = trace._trace_layers(CONFIG, 6, METHODS["lora"](), asked, lengths)

    assert line.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.002)
    assert line.weights_bytes == whole.weights_bytes


CHOSEN = {
    "some layers": {"layers_to_transform": [1, 4]},
    "the last layer": {"layers_to_transform": [5]},
    "the output matrix": {"modules_to_save": ["lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "both and some maps": {"modules_to_save": ["lm_head", "embed_tokens"], "lora_target_modules": ["q_proj"]},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("some layers", "bfloat16"),
        ("the embedding", "bfloat16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(CHOSEN, ("float32", "bfloat16"))),
    ],
)
def test_what_is_adapted_and_what_is_trained_in_full_is_planned_as_it_is_traced(name, dtype):
    method, asked, lengths = METHODS["lora"](**CHOSEN[name]), settings(dtype, False), trace.even(4, 200, 0.5)
    config = {**CONFIG, "tie_word_embeddings": False}
    shape = ModelShape.from_config(config)

    traced = trace.trace(config, method, asked, lengths)

    work = Workload(shape, 4, 800, 400, 200, 4, 1, 4, mean_square_length=200.0**2)
    planned = method.estimate(
        work, DeviceCapability("cpu", "c", 2**34), NodeCapability("n", 1, 2**34, ()), asked.techniques
    )
    setup = trace.build(config, 6, method, asked, "meta")
    assert planned.num_trainable_parameters == sum(p.numel() for p in setup.parameters.values())
    assert planned.memory.weights_bytes == pytest.approx(traced.weights_bytes, rel=0.01)
    assert planned.memory.tensors_bytes == pytest.approx(traced.peak_bytes, rel=0.15)


def test_padded_rows_can_be_traced_too():
    asked = settings("float32", False, packing=False)

    traced = trace.trace(CONFIG, METHODS["lora"](), asked, trace.Lengths((200, 120, 64), (50, 50, 50)))

    assert traced.peak_bytes > traced.weights_bytes


def test_a_7b_model_is_traced_without_its_weights():
    config = {**CONFIG, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}  # fmt: skip
    asked = settings("bfloat16", True)

    traced = trace.trace(config, METHODS["lora"](), asked, trace.even(1, 1024, 0.5))

    assert traced.peak_bytes / 2**30 == pytest.approx(13.5, abs=1.0)


def test_live_storages_forgets_what_is_freed():
    live = trace.LiveStorages()
    with live:
        kept = torch.zeros(1000)
        gone = kept + 1
        view = gone[:10]
        del gone

        assert live.live_bytes == 8000  # the view keeps all of it

        del view
        assert live.live_bytes == 4000
        assert live.take_peak() == 8000
        assert live.take_peak() == 4000


def test_a_trace_leaves_nothing_fake_behind():
    asked, lengths = settings("bfloat16", False), trace.Lengths((40, 30, 20), (10, 10, 10))
    trace.trace(CONFIG, METHODS["lora"](), asked, lengths)

    setup = trace.build(CONFIG, 2, METHODS["lora"](), asked, "cpu")
    real = trace.run(lambda: setup, lengths.batch(True), 30, asked)

    assert real.peak_bytes > 0
    trace.trace(CONFIG, METHODS["lora"](), asked, lengths)
