"""What a pruning step is predicted to take, against the traced step."""

import pytest

from strategies.measure import trace
from strategies.pruning.method import PrunedLora
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques, Workload
from tests.axes import half_now
from tests.strategies.test_memory import CPU, LLAMA, NODE, SHAPE

OPTIONS = ({}, {"groups": "mlp+attention"}, {"score": "gate"}, {"score": "layer"})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "checkpointing"), half_now(("float32", "bfloat16"), (False, True)))
def test_formulas_agree_with_the_traced_step(options, dtype, checkpointing):
    lengths, method = trace.even(4, 300, 0.5), PrunedLora(**options)
    switched = Techniques(dtype, "document", True, checkpointing, 1, 1200)
    settings = TrainSettings(1e-4, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, switched, 1)
    work = Workload(SHAPE, 4, 1200, 600, 300, 4, 1, 4)

    traced = trace.trace(LLAMA, method, settings, lengths)

    predicted = method.estimate(work, CPU, NODE, switched).memory.tensors_bytes
    assert predicted == pytest.approx(traced.peak_bytes, rel=0.05)
