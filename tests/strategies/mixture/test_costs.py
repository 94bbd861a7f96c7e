"""What experts cost by the plan, against the traced step and numbers worked out by hand."""

import pytest

from strategies.measure import trace
from strategies.methods.lora import Lora
from strategies.mixture.method import MixLora
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques, Workload
from tests.strategies.test_memory import CPU, LLAMA, NODE, SHAPE, techniques, workload

METHODS = {
    "four experts": MixLora(num_experts=4, adapt_attention=False),
    "eight experts": MixLora(),
    "four of eight": MixLora(top_k=4),
}


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("bfloat16", True), ("bfloat16", False)])
def test_memory_agrees_with_the_traced_step(name, dtype, checkpointing):
    switched = Techniques(dtype, "document", True, checkpointing, 1, 1200)
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, switched, 1)
    work = Workload(SHAPE, 4, 1200, 600, 300, 4, 1, 4)

    traced = trace.trace(LLAMA, METHODS[name], settings, trace.even(4, 300, 0.5))

    predicted = METHODS[name].estimate(work, CPU, NODE, switched).memory.tensors_bytes
    assert predicted == pytest.approx(traced.peak_bytes, rel=0.07)


def test_trained_numbers_are_pairs_routers_and_attention():
    """h 256, f 640, q 256, k 128, 6 layers; 8 experts of 3 * 8 (h + f) + h each; of attention 8 (4 h + 2 q + 2 k)."""
    plan = MixLora().estimate(workload(), CPU, NODE, techniques())

    assert plan.num_trainable_parameters == 6 * (8 * (3 * 8 * (256 + 640) + 256) + 8 * (4 * 256 + 2 * 256 + 2 * 128))


def test_a_token_pays_for_the_experts_it_passes_not_for_all():
    def seconds(method):
        return method.estimate(workload(), CPU, NODE, techniques(dtype="float32")).time

    two, more, wide = seconds(MixLora()), seconds(MixLora(num_experts=64)), seconds(MixLora(top_k=8))

    assert more.memory_s == two.memory_s and more.compute_s < 1.2 * two.compute_s < 1.2 * wide.compute_s
    assert wide.memory_s > 2 * two.memory_s > 2 * seconds(Lora(lora_r=8)).memory_s
    assert more.overhead_s > two.overhead_s
