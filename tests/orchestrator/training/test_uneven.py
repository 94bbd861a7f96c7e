"""Workers of unequal speed, each with its own techniques, are one computation: any split gives the same gradients."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.runs.events import Note, StepReport
from orchestrator.training.loop import train
from orchestrator.training.memory import fallback
from orchestrator.training.parallel import GradientSum, ProcessGroup, _buckets
from orchestrator.training.shares import Shares
from orchestrator.training.state import Hooks, Progress, Training
from strategies import METHODS
from strategies.step import document_attention
from strategies.step.out_of_memory import is_out_of_memory
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.orchestrator.training.test_loop import ONE_BY_ONE, SCHEDULE, close, run
from tests.processes import run_ranks

PACKED = Techniques("float32", "document", True, False, 4, 64)
CHECKPOINTED = Techniques("float32", "sdpa", False, True, 2, 64)


def joined(rank, size, port, **wire):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    return ProcessGroup(rank, size, **wire)


def member(rank, size, port, model_folder, data_folder, out, shares):
    techniques = (PACKED, ONE_BY_ONE, CHECKPOINTED)[rank]
    group = joined(rank, size, port, bucket_bytes=20_000)
    losses, gradients, _ = run(model_folder, data_folder, techniques, group, shares=Shares(list(shares)))
    torch.save((losses, gradients), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [(0.6, 0.3, 0.1), (0.02, 0.0, 0.98)])
def test_any_split_over_unlike_workers_gives_the_gradients_of_one(
    reference, model_folder, data_folder, tmp_path, shares
):
    run_ranks(member, 3, str(model_folder), data_folder, str(tmp_path), shares)

    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for result in results:
        close(result, reference)
        for mine, theirs in zip(result[1], reference[1], strict=True):
            assert (mine - theirs).norm() / theirs.norm() < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[2][1], strict=True))


def overlapping(rank, size, port, out):
    group = joined(rank, size, port, bucket_bytes=400)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(6)))
    unused = torch.nn.Parameter(torch.ones(7))
    parameters = [unused, *model.parameters()]
    summed = GradientSum(group, parameters)
    left_early = []
    for number in range(1, 4):  # micro-batches; the last worker has none
        if rank == size - 1:
            break
        if number == 3:
            summed.arm()
        model(torch.full((2, 10), float(rank + number))).square().sum().backward()
        left_early.append(len(summed._sent))
    summed.finish()
    torch.save(([p.grad for p in parameters], left_early, summed.bytes_sent), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_leave_during_the_last_backward_pass_and_a_worker_without_work_takes_part(tmp_path):
    run_ranks(overlapping, 3, str(tmp_path))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(6)))
    for rank in range(2):
        for number in range(1, 4):
            model(torch.full((2, 10), float(rank + number))).square().sum().backward()

    for rank in range(3):
        gradients, left_early, sent = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for mine, whole in zip(gradients[1:], model.parameters(), strict=True):
            assert torch.allclose(mine, whole.grad, rtol=1e-5)
        assert torch.equal(gradients[0], torch.zeros(7))
        assert sent == 4 * (6 * 110 + 7)
        if rank < 2:
            assert left_early[:2] == [0, 0]
            assert left_early[2] >= 5


def test_buckets_keep_their_size_and_their_order():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (50, 50, 50, 500, 10)]

    assert [[p.numel() for p in bucket] for bucket in _buckets(parameters, 400)] == [[50, 50], [50], [500], [10]]


def half_sums(rank, size, port, out):
    group = joined(rank, size, port, sync_dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    torch.manual_seed(rank)
    parameter.grad = torch.randn(1000)
    summed = GradientSum(group, [parameter])
    summed.finish()
    torch.save((parameter.grad, summed.bytes_sent), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_half_the_bytes_cost_half_the_digits(tmp_path):
    run_ranks(half_sums, 2, str(tmp_path))
    torch.manual_seed(0)
    first = torch.randn(1000)
    torch.manual_seed(1)
    whole = first + torch.randn(1000)

    gradient, sent = torch.load(tmp_path / "0.pt", weights_only=True)
    assert sent == 2000
    assert gradient.dtype == torch.float32
    assert 0 < ((gradient - whole).norm() / whole.norm()).item() < 0.01


def test_ways_that_take_less_memory_are_tried_one_after_the_other():
    tried, now = [], dataclasses.replace(PACKED, max_length=512)
    while now := fallback(now, longest=100):
        tried.append((now.per_device_train_batch_size, now.max_length, now.gradient_checkpointing))

    assert tried == [(2, 512, False), (1, 512, False), (1, 256, False), (1, 128, False), (1, 100, False),
                     (1, 100, True)]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("std::bad_alloc"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_a_step_that_runs_out_of_memory_is_repeated_with_less_and_the_same_result(model_folder, data_folder, reference):
    """The allocator is the door: it refuses micro-batches of more than two rows."""
    from transformers import AutoModelForCausalLM

    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    wide = dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=8)
    setup = METHODS["lora"]().setup(model, TrainSettings(1e-2, 0.0, "sgd", 0.9, 0.999, 1e-8, wide, 3))

    def refuse(module, arguments, keywords):
        if arguments[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    setup.model.register_forward_pre_hook(refuse, with_kwargs=True)
    events = []
    hooks = Hooks(events.append, lambda now: "x", lambda: None)
    order = Order(24, 8, seed=5, num_train_epochs=1, max_steps=3)

    train(Training(setup, Dataset.load(data_folder), None, order, SCHEDULE, wide, ProcessGroup(), Progress(), hooks))

    losses = [event.loss for event in events if isinstance(event, StepReport)]
    notes = [event.text for event in events if isinstance(event, Note)]
    assert [note[:45] for note in notes] == ["out of memory; the step is repeated with micr"] * 2
    expected = reference[0] if isinstance(reference[0], list) else list(reference[0].values())
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(losses, expected, strict=True))


def test_when_not_even_one_sample_fits_it_says_so(model_folder, data_folder):
    from transformers import AutoModelForCausalLM

    from orchestrator.errors import NothingFits

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    setup = METHODS["lora"]().setup(model, TrainSettings(1e-2, 0.0, "sgd", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3))
    checkpointing.enable(setup.model)

    def refuse(*_):
        raise MemoryError("no room")

    setup.model.register_forward_pre_hook(refuse)
    hooks = Hooks(lambda event: None, lambda now: "x", lambda: None)
    one = dataclasses.replace(ONE_BY_ONE, gradient_checkpointing=True)

    with pytest.raises(NothingFits, match="not even one sample"):
        train(
            Training(
                setup,
                Dataset.load(data_folder),
                None,
                Order(24, 8, 5, 1, 3),
                SCHEDULE,
                one,
                ProcessGroup(),
                Progress(),
                hooks,
            )
        )
