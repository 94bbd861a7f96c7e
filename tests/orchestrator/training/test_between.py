"""What a method does between steps, once in each on every worker: before clipping, and after the update."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from orchestrator.errors import JobError, NothingFits
from orchestrator.training import checkpoint
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Progress, Training
from strategies import METHODS
from strategies.compatibility import conflict, refuses_local_steps
from strategies.shape import ModelShape
from strategies.step.state import gather
from strategies.workload import StagePart
from tests.orchestrator.training.test_loop import ONE_BY_ONE, train_away
from tests.orchestrator.training.test_loss_scale import trained as trained_in_fp16
from tests.orchestrator.training.test_streaming import losses, prepared, run, weights
from tests.processes import run_ranks
from tests.strategies.example_method import NormTuning
from tests.strategies.test_contract import CPU

LORA = METHODS["lora"](lora_r=4)


class Nothing:
    """Does nothing."""

    def gradients_ready(self, step):
        pass

    def step_done(self, step):
        return None


class Diary:
    """Notes each call with the norm of gradients or weights; after an update it halves a trained buffer."""

    def __init__(self, setup):
        self._setup, self.calls, self.norms = setup, [], []
        setup.between, setup.buffers = self, {**setup.buffers, "diary": torch.ones(1)}

    def gradients_ready(self, step):
        self.calls.append(("ready", step))
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self._setup.parameters.values()]).item())

    def step_done(self, step):
        assert all(p.grad is None for p in self._setup.parameters.values())
        self.calls.append(("done", step))
        self._setup.buffers["diary"].mul_(0.5)
        return {"text": f"halved in step {step}", "left": self._setup.buffers["diary"].item()}


def calls_of(steps):
    return [(what, step) for step in steps for what in ("ready", "done")]


def noted(model_folder, method=LORA, techniques=ONE_BY_ONE):
    setup = prepared(model_folder, techniques, method)
    return setup, Diary(setup)


def test_doing_nothing_between_steps_changes_no_bit(model_folder, data_folder):
    plain = prepared(model_folder, method=LORA)
    expected = run(plain, data_folder, 4)
    setup = prepared(model_folder, method=LORA)
    setup.between = Nothing()

    events = run(setup, data_folder, 4)

    assert losses(events) == losses(expected)
    assert [step.grad_norm for step in events["step"]] == [step.grad_norm for step in expected["step"]]
    assert torch.equal(weights(setup), weights(plain)) and events.keys() == expected.keys()


def test_each_step_is_seen_once_before_clipping_and_after_the_update_and_recorded(model_folder, data_folder):
    setup, diary = noted(model_folder)

    events = run(setup, data_folder, 3, max_grad_norm=1e-4)

    assert diary.calls == calls_of(range(3))
    assert (
        diary.norms == pytest.approx([step.grad_norm for step in events["step"]], rel=1e-6) and min(diary.norms) > 1e-3
    )
    assert [(one.step, one.text, one.extra) for one in events["between"]] == [
        (step + 1, f"halved in step {step}", {"left": 0.5 ** (step + 1)}) for step in range(3)
    ]


def test_what_it_changes_is_trained_with(model_folder, data_folder):
    """Gradients that it sets to zero move nothing."""

    class Still(Nothing):
        def gradients_ready(self, step):
            for parameter in setup.parameters.values():
                parameter.grad.zero_()

    setup = prepared(model_folder, method=LORA)
    setup.optimizer.param_groups[0]["weight_decay"] = setup.optimizer.param_groups[1]["weight_decay"] = 0.0
    before, setup.between = weights(setup), Still()

    events = run(setup, data_folder, 2)

    assert torch.equal(weights(setup), before)
    assert [step.grad_norm for step in events["step"]] == [0.0, 0.0]


def test_a_resumed_run_goes_on_with_the_next_step(model_folder, data_folder, tmp_path):
    kept = {}
    whole, diary = noted(model_folder)
    expected = run(
        whole, data_folder, 4, save=lambda now: kept.setdefault(now.step, dataclasses.replace(now)), save_steps=2
    )
    half, _ = noted(model_folder)
    run(half, data_folder, 2)
    checkpoint.save(tmp_path, gather(half), kept[2].as_dict())

    again, later = noted(model_folder)
    train_away(again)
    found = checkpoint.newest(tmp_path, pytest.fail)
    found.restore(again)
    events = run(again, data_folder, 4, progress=Progress(**found.state))

    assert diary.calls == calls_of(range(4)) and later.calls == calls_of((2, 3))
    assert losses(events) == losses(expected)[2:] and torch.equal(weights(again), weights(whole))
    assert [one.extra for one in events["between"]] == [{"left": 0.125}, {"left": 0.0625}]


def test_a_step_that_is_repeated_in_less_memory_is_seen_once(model_folder, data_folder):
    """The allocator is the door: it refuses micro-batches of more than two rows."""
    wide = dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=8)
    setup, diary = noted(model_folder, techniques=wide)

    def refuse(module, arguments, keywords):
        if arguments[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    setup.model.register_forward_pre_hook(refuse, with_kwargs=True)

    events = run(setup, data_folder, 3, wide)

    assert len([one for one in events["note"] if "the step is repeated" in one.text]) == 2
    assert diary.calls == calls_of(range(3))


def test_a_step_that_overflows_in_fp16_is_seen_once_without_its_scale(model_folder, data_folder):
    diaries = []

    steps, others, _ = trained_in_fp16(model_folder, data_folder, 2.0**40, lambda setup: diaries.append(Diary(setup)))

    (diary,) = diaries
    assert any("repeated" in getattr(event, "text", "") for event in others)
    assert diary.calls == calls_of(range(len(steps)))
    assert diary.norms == pytest.approx([step.grad_norm for step in steps], rel=1e-6)


class Agreed(Diary):
    """Adds up over the workers what it saw: every one must come here as often as the others."""

    def step_done(self, step):
        super().step_done(step)
        summed = torch.tensor([self.norms[-1]], dtype=torch.float64)
        dist.all_reduce(summed)
        return {"text": "agreed", "sum": summed.item()}


def worker(rank, size, port, model_folder, data_folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    setup = prepared(model_folder, method=LORA)
    diary = Agreed(setup)
    events = run(setup, data_folder, 3, group=ProcessGroup(rank, size))
    torch.save((diary.calls, diary.norms, [one.extra["sum"] for one in events["between"]]), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_every_worker_sees_the_summed_gradients_and_may_talk_to_the_others(model_folder, data_folder, tmp_path):
    setup, alone = noted(model_folder)
    run(setup, data_folder, 3)

    run_ranks(worker, 2, str(model_folder), data_folder, str(tmp_path))

    (calls, norms, sums), other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert (calls, norms, sums) == other and calls == calls_of(range(3))
    assert norms == pytest.approx(alone.norms, rel=1e-5) and sums == [2 * norm for norm in norms]


def short_worker(rank, size, port, model_folder, data_folder, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    setup = prepared(model_folder, method=LORA)
    setup.between = Nothing()

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        setup.optimizer.register_step_pre_hook(refuse)
    try:
        run(setup, data_folder, 1, group=ProcessGroup(rank, size))
    except NothingFits as error:
        (out / str(rank)).write_text(str(error))
    dist.destroy_process_group()


def test_an_update_that_does_not_fit_on_one_worker_is_not_taken_from_another(model_folder, data_folder, tmp_path):
    run_ranks(short_worker, 2, str(model_folder), data_folder, tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == ["1"]
    assert "CUDA out of memory; the method acts between steps on all workers at once" in (tmp_path / "1").read_text()


class Restless(NormTuning):
    """A method that acts between steps."""

    acts_between = True


SHAPE = ModelShape(64, 2, 4, 2, 16, 128, 500, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_stage": 2, "num_shards": 2}, "which DeepSpeed makes in one: set strategy.mode to ddp"),
        ({"offload": "optimizer"}, "set strategy.mode to ddp and strategy.offload to none"),
        ({"zero_stage": 1, "num_shards": 2, "state_share": 0.5}, "ZeRO leaves each worker a part"),
        ({"stage": StagePart(0, 2, 0, 1)}, "of all layers, of which a stage has some"),
    ],
)
def test_what_has_no_moment_between_steps_is_refused_when_it_is_planned(changes, words):
    techniques = dataclasses.replace(ONE_BY_ONE, **changes)

    assert words in conflict(Restless(), techniques, CPU, SHAPE, 2)
    assert words not in str(conflict(NormTuning(), techniques, CPU, SHAPE, 2))
    assert conflict(Restless(), ONE_BY_ONE, CPU, SHAPE, 2) is None


def test_local_steps_are_refused_when_they_are_planned_and_before_the_first(model_folder):
    assert "which local steps let drift apart" in refuses_local_steps(Restless())
    assert refuses_local_steps(NormTuning()) is None
    setup, _ = noted(model_folder)

    with pytest.raises(JobError, match="an optimizer that streams and local steps have no such moment"):
        Training(setup, *[None] * 4, ONE_BY_ONE, ProcessGroup(), Progress(), None, local_batch_size=4)  # type: ignore
