"""What happens on one stage is decided by all: a gradient out of fp16's range, and memory that runs out."""

import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.errors import NothingFits
from orchestrator.runs.events import Note, StepReport
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from orchestrator.training.workers.failures import is_lost_worker
from strategies.methods.lora import Lora
from strategies.pipeline.cut import load_stage
from strategies.pipeline.stages import WholeExport, make_stage
from strategies.step import document_attention
from strategies.step.state import gather
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSettings
from strategies.workload import StagePart, Techniques
from tests.orchestrator.training.test_pipeline import LAYERS, deep_model
from tests.processes import run_ranks
from tests.strategies.pipeline.test_stages import load

__all__ = ["deep_model"]
STEPS, ROWS, MIDDLE = 3, 4, 1
EDGES = (0, 1, 3, LAYERS)
STRUCK = "layers.2."  # a layer of the middle stage
PLAIN = Techniques("float32", "sdpa", False, False, ROWS, 64)
FP16 = dataclasses.replace(PLAIN, dtype="float16", per_device_train_batch_size=2)
ALONE = dataclasses.replace(PLAIN, per_device_train_batch_size=1)
METHOD = Lora(lora_r=4)
WIDE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def set_up(folder, techniques, optim, pipelines):
    document_attention.register()
    settings = TrainSettings(1e-2, 0.0, optim, 0.9, 0.999, 1e-8, techniques, 3)
    if techniques.stage is None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, techniques.dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        setup = METHOD.setup(model, settings)
    else:
        model = load_stage(folder, techniques.stage, partial(load, METHOD, techniques))
        setup = make_stage(METHOD.setup(model, settings), settings, pipelines, WholeExport(folder, METHOD, settings))
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    return setup


@dataclasses.dataclass
class Outcome:
    """What a worker saw of a training."""

    steps: list[StepReport]
    notes: list[str]
    weights: dict[str, torch.Tensor] | None
    end: str = "finished"


def group_of(rank, pipelines):
    """The place of a worker, where `pipelines` are the ranks of each one's stages."""
    size = sum(map(len, pipelines))
    of = [replica for replica, ranks in enumerate(pipelines) for _ in ranks]
    return ProcessGroup(rank, size, replica_of=tuple(of)) if size > 1 else ProcessGroup()


def trained(folder, data_folder, techniques, strike, scale=1.0, optim="sgd", rank=0, pipelines=((0,),)):
    setup = set_up(folder, techniques, optim, pipelines)
    events, data = [], Dataset.load(data_folder)
    strike(setup)
    held = {"scale": scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
    training = Training(
        setup,
        data,
        None,
        Order(len(data), 8, seed=5, num_train_epochs=1, max_steps=STEPS),
        Schedule(lambda step: 1.0, 1.0, 0, 100, None, None),
        techniques,
        group_of(rank, pipelines),
        Progress(loss_scale=held if techniques.dtype == "float16" else {}),
        Hooks(events.append, lambda now: None, lambda: None),
    )
    end = "finished"
    try:
        train(training)
    except NothingFits as error:
        end = f"does not fit: {error}"
    except RuntimeError as error:
        end = "lost another" if is_lost_worker(error) else repr(error)
    state = gather(setup) if end == "finished" else None
    steps = [event for event in events if isinstance(event, StepReport)]
    return Outcome(steps, [e.text for e in events if isinstance(e, Note)], state.weights if state else None, end)


def member(rank, size, port, folder, data_folder, techniques, strike, how, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    stage = StagePart(rank, size, EDGES[rank], EDGES[rank + 1])
    of_rank = techniques[rank] if isinstance(techniques, tuple) else techniques
    here = strike if rank == MIDDLE else nothing
    own = dataclasses.replace(of_rank, stage=stage)
    torch.save(trained(folder, data_folder, own, here, **how, rank=rank, pipelines=[range(size)]), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def in_stages(folder, data_folder, techniques, strike, out, **how):
    run_ranks(member, len(EDGES) - 1, folder, data_folder, techniques, strike, how, out)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(len(EDGES) - 1)]


def nothing(setup):
    """Everything goes well."""


def weight_of(setup):
    return next(parameter for name, parameter in setup.parameters.items() if STRUCK in name)


def overflow_in_the_second_step(setup):
    """A gradient leaves fp16's range in the sixth backward pass: of the second step, with four a step."""
    passes = itertools.count(1)
    weight_of(setup).register_hook(lambda gradient: gradient * (math.inf if next(passes) == 6 else 1.0))


@pytest.mark.parametrize(
    ("strike", "scale", "scales"),
    [(overflow_in_the_second_step, 2.0**8, [2.0**8, 2.0**7, 2.0**7]), (nothing, 2.0**40, None)],
    ids=["one gradient of one stage", "hidden states' gradients of all"],
)
def test_all_stages_skip_a_step_whose_gradient_overflows_on_one(
    strike, scale, scales, deep_model, data_folder, tmp_path
):
    expected = trained(deep_model, data_folder, FP16, strike, scale, "adamw_torch")

    found = in_stages(deep_model, data_folder, FP16, strike, tmp_path, scale=scale, optim="adamw_torch")

    assert [event.loss_scale for event in expected.steps] == (scales or [expected.steps[0].loss_scale] * STEPS)
    assert expected.steps[-1].loss_scale < scale and any("repeated" in note for note in expected.notes)
    for one in found:
        assert one.notes == expected.notes
        assert [event.loss_scale for event in one.steps] == [event.loss_scale for event in expected.steps]
        assert [event.grad_norm for event in one.steps] == [event.grad_norm for event in expected.steps]
    assert [event.loss for event in found[0].steps] == [event.loss for event in expected.steps]
    assert found[0].weights.keys() == expected.weights.keys()
    assert all(torch.equal(found[0].weights[name], weight) for name, weight in expected.weights.items())


def refuse_rows(setup, most, refusals=1):
    """The allocator refuses what more than `most` rows need in a layer of this stage, so many times."""
    left = iter(range(refusals))

    def refuse(module, inputs):
        if inputs[0].shape[0] > most and next(left, None) is not None:
            raise WIDE

    mlp = next(module for name, module in setup.model.named_modules() if f"{STRUCK}mlp" in f"{name}.")
    mlp.register_forward_pre_hook(refuse)


def in_backward_pass(setup, number):
    """The allocator refuses in the `number`-th backward pass of this stage, once."""
    passes = itertools.count(1)

    def refuse(gradient):
        if next(passes) == number:
            raise WIDE

    weight_of(setup).register_hook(refuse)


def assert_same(found, expected):
    assert [one.end for one in found] == ["finished"] * len(found)
    for one in found:
        assert [event.loss for event in one.steps] == pytest.approx([e.loss for e in expected.steps], rel=1e-6)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found[0].weights[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "strike",
    [
        partial(refuse_rows, most=2, refusals=10**9),
        partial(refuse_rows, most=0),
        partial(in_backward_pass, number=1),
        partial(in_backward_pass, number=4),
    ],
    ids=["forward, always", "forward, once", "first backward pass", "last backward pass of the second step"],
)
def test_memory_that_runs_out_on_one_stage_repeats_the_step_on_all_in_less(strike, deep_model, data_folder, tmp_path):
    expected = trained(deep_model, data_folder, PLAIN, nothing)

    found = in_stages(deep_model, data_folder, PLAIN, strike, tmp_path)

    assert_same(found, expected)
    for rank, one in enumerate(found):
        why = str(WIDE) if rank == MIDDLE else "on another stage of the pipeline"
        assert one.notes == [
            f"out of memory; the step is repeated with micro-batches of {ROWS // 2} x 64 tokens ({why})"
        ]


def test_a_stage_with_another_way_takes_it_alone_and_those_without_one_go_on(deep_model, data_folder, tmp_path):
    expected = trained(deep_model, data_folder, ALONE, nothing)
    checkpointed = dataclasses.replace(ALONE, gradient_checkpointing=True)

    found = in_stages(
        deep_model, data_folder, (checkpointed, ALONE, ALONE), partial(in_backward_pass, number=3), tmp_path
    )

    assert_same(found, expected)
    assert "activations computed again" in found[MIDDLE].notes[0]
    others = [found[0].notes, found[2].notes]
    assert others == [["out of memory on another stage, which finds another way; the step is repeated"]] * 2


def test_a_stage_that_nothing_helps_ends_the_run_and_the_others_do_not_wait(deep_model, data_folder, tmp_path):
    strike = partial(refuse_rows, most=0, refusals=10**9)

    found = in_stages(deep_model, data_folder, PLAIN, strike, tmp_path)

    assert found[MIDDLE].end.startswith("does not fit: not even one sample at a time fits: CUDA out of memory")
    assert {found[0].end, found[2].end} == {"lost another"}
