"""Liger's kernels: refused in words where they do not run; on a GPU the same numbers as transformers'.

What they change in a process is looked at wherever liger-kernel and Triton can be imported.
"""

import copy
import importlib
import importlib.util
import sys

import pytest
import torch

from clusters.capability import DeviceCapability, Library
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from strategies import METHODS
from strategies.compatibility import conflict
from strategies.shape import ModelShape
from strategies.techniques.refusals import LIGER_FAMILIES, refuse_liger
from strategies.workload import StagePart
from tests.strategies.test_contract import CPU, NODE, SAMPLES, base_model, settings, techniques, workload

CARD = DeviceCapability("cuda", "a card", 24 * 2**30, compute_capability=(8, 6))
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="liger-kernel and Triton are not installed",
)


@pytest.fixture
def shape(model_folder):
    return ModelShape.from_config(base_model(METHODS["lora"](), model_folder).config.to_dict())


def of_type(shape, model_type):
    found = copy.copy(shape)
    object.__setattr__(found, "model_type", model_type)
    return found


@pytest.mark.parametrize(
    ("device", "told"),
    [
        (CPU, "are for NVIDIA's GPUs, and test is none"),
        (DeviceCapability("rocm", "a Radeon", 24 * 2**30), "and a Radeon is none"),
        (DeviceCapability("cuda", "an old card", 2**33, compute_capability=(6, 1)), "Triton needs compute capability"),
        (
            DeviceCapability("cuda", "a card", 2**33, libraries={"liger_kernel": Library("absent")}),
            "liger-kernel is not installed: pip install -e '.[liger]'",
        ),
        (
            DeviceCapability("cuda", "a card", 2**33, libraries={"liger_kernel": Library("broken", "no nvcc")}),
            "liger-kernel is installed and does not run on a card: no nvcc",
        ),
    ],
)
def test_where_they_do_not_run_the_reason_is_told(device, told, shape):
    assert told in refuse_liger(device, shape)
    assert told in conflict(METHODS["lora"](), techniques(liger_kernel=True), device, shape)


def test_a_family_whose_layers_they_do_not_replace_is_refused(shape):
    assert refuse_liger(CARD, shape) is None
    assert "not tried for gpt2 models; they are for gemma" in refuse_liger(CARD, of_type(shape, "gpt2"))


@pytest.mark.parametrize(
    "changes",
    [{"torch_compile": True}, {"stage": StagePart(0, 2, 0, 1)}, {"offload": "weights", "gradient_checkpointing": True}],
)
def test_what_they_are_untested_with_is_refused(changes, shape):
    found = conflict(METHODS["lora"](), techniques(liger_kernel=True, packing=False, **changes), CARD, shape)

    assert found is not None and "Liger's kernels are untested with" in found


def test_the_plan_counts_what_they_do_not_keep(shape):
    plain, fused = (
        METHODS["full"]().estimate(workload(shape), CARD, NODE, techniques(liger_kernel=on)) for on in (False, True)
    )

    assert fused.memory.activations_bytes < plain.memory.activations_bytes


def test_a_job_for_cpus_is_told_at_once(job_text, tmp_path):
    (tmp_path / "job.yaml").write_text(job_text)

    with pytest.raises(JobError, match=r"train\.use_liger_kernel: Liger's kernels are for NVIDIA's GPUs"):
        prepare(read_job(tmp_path / "job.yaml", ["train.use_liger_kernel=true"]), lambda text: None)


def test_they_are_never_chosen_by_the_plan():
    from orchestrator.planning.candidates import Switches

    assert not Switches(64).liger_kernel


@needs_liger
def test_every_family_that_is_named_is_one_of_ligers():
    known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN

    assert set(LIGER_FAMILIES) <= known.keys()


@needs_liger
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are for NVIDIA's GPUs")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_and_gradients_are_those_of_transformers(method, model_folder):
    from strategies.step.step import forward_backward
    from strategies.techniques.liger import use_liger
    from strategies.techniques.precision import gradient_scaler

    kind, found = METHODS[method](), []
    for is_fused in (False, True):
        model = base_model(kind, model_folder).to("cuda")
        if is_fused:
            use_liger(model)
        setup = kind.setup(model, settings())
        setup.model.train()
        batch = SAMPLES[0].batch(False).to("cuda")
        loss = forward_backward(setup, batch, 9, techniques(), gradient_scaler("cuda", "float32"))
        found.append((loss.item(), [parameter.grad for parameter in setup.parameters.values()]))

    (loss, gradients), (fused_loss, fused_gradients) = found
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    for ours, theirs in zip(fused_gradients, gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9


@needs_liger
def test_models_that_are_loaded_afterwards_are_transformers_own(model_folder):
    from strategies.techniques.liger import use_liger

    model = base_model(METHODS["lora"](), model_folder)
    family = sys.modules[type(model).__module__]
    before = {name: value for name, value in vars(family).items() if name != "apply_rotary_pos_emb"}

    use_liger(model), use_liger(base_model(METHODS["lora"](), model_folder))

    assert "LigerRMSNorm" in {one._get_name() for one in model.modules()}
    assert all(vars(family)[name] is value for name, value in before.items())
    fresh = base_model(METHODS["lora"](), model_folder)
    assert all(one._get_name() != "LigerRMSNorm" for one in fresh.modules())
    ids = torch.arange(8)[None]
    assert fresh(ids).logits.isfinite().all()  # on a CPU, where no kernel runs
