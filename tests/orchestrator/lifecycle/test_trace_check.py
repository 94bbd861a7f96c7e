"""`plan --trace` on what people train: every recipe, chosen layers, modules trained in full."""

import pytest

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.job.job_file import read_job
from orchestrator.job.schema import recipes
from orchestrator.lifecycle.prepare import plan_without_data
from orchestrator.lifecycle.trace_check import trace_plan

CPU = DeviceCapability("cpu", "c", 64 * 2**30, {"float32": 1e12})
HERE = ClusterCapability((NodeCapability("here", 8, 64 * 2**30, (CPU,)),))


def traced(name: str, *settings: str) -> float:
    """How far the formula is from the trace."""
    job = read_job(recipes()[name][0], settings)
    ready = plan_without_data(job, HERE, lambda text: None)
    return trace_plan(job, ready.plan, ready.work)["apart"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_is_traced_and_the_formula_is_near(name):
    assert abs(traced(name)) <= 0.20  # lengths are counted from bytes here, and rows of a batch are not alike


@pytest.mark.parametrize(
    "choice",
    [
        "method.layers_to_transform=[3, 28]",
        "method.modules_to_save=[lm_head]",
        "method.modules_to_save=[embed_tokens]",
        "method.lora_target_modules=all",
    ],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
def test_what_the_quick_start_could_train_instead_is_traced_and_the_formula_is_near(choice):
    assert abs(traced("quickstart", "method.type=lora", choice)) <= 0.20
