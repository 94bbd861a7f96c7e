"""An optimizer that streams (LSP-Offload) through the loop: layout, workers, preflight and restarts change nothing."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.runs.events import StepReport
from orchestrator.training import checkpoint
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from orchestrator.training.workers import preflight
from strategies.lsp_offload.method import LspOffload
from strategies.step import document_attention
from strategies.step.state import gather
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.processes import run_ranks

ONE_BY_ONE = Techniques("float32", "sdpa", False, False, 1, 64)
PACKED = Techniques("float32", "document", True, False, 8, 64)
METHOD = LspOffload(subspace_size=24, nonzeros_per_row=4, check_every=2, fit_steps=8, calibration_rows=4)
FAR = dataclasses.replace(METHOD, cpu_side="big-box")


class Copied:
    """An object that nothing is shared with, as one in another process."""

    def __init__(self, there):
        self.there, self.calls = there, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return copy.deepcopy(getattr(self.there, name)(*copy.deepcopy(arguments)))

        return call


def another_machine(node, kind, *arguments):
    return Copied(kind(*arguments))


def prepared(model_folder, techniques=ONE_BY_ONE, method=METHOD):
    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=getattr(torch, techniques.dtype), attn_implementation=techniques.attn_implementation
    )
    settings = TrainSettings(1e-2, 0.1, "adamw_torch", 0.9, 0.999, 1e-8, techniques, 3, another_machine)
    setup = method.setup(model, settings)
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    return setup


def run(setup, data_folder, steps, techniques=ONE_BY_ONE, group=None, progress=None, save=None, **schedule):
    """The recorded events of each kind."""
    data, events = Dataset.load(data_folder), {}
    hooks = Hooks(
        lambda event: events.setdefault(event.kind, []).append(event), save or (lambda now: "x"), lambda: None
    )
    order = Order(len(data), 8, seed=5, num_train_epochs=2, max_steps=steps)
    when = dataclasses.replace(Schedule(lambda step: 1.0, 1.0, 0, 100, None, None), **schedule)
    train(Training(setup, data, None, order, when, techniques, group or ProcessGroup(), progress or Progress(), hooks))
    if setup.streaming:
        setup.streaming.settle()
    return events


def losses(events):
    return [step.loss for step in events["step"]]


def weights(setup):
    return torch.cat([parameter.detach().float().flatten() for parameter in setup.parameters.values()])


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize(
    "techniques",
    [
        dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=3),
        PACKED,
        dataclasses.replace(PACKED, per_device_train_batch_size=1, gradient_checkpointing=True),
    ],
    ids=["3 + 3 + 2", "packed", "packed and checkpointed"],
)
def test_every_layout_gives_the_losses_of_one_sample_at_a_time(model_folder, data_folder, techniques, max_grad_norm):
    """What is learnt depends on the passes it is learnt in, so here the projectors stay as they are drawn."""
    method = dataclasses.replace(METHOD, projection="random")
    plain = run(prepared(model_folder, method=method), data_folder, 3, max_grad_norm=max_grad_norm)

    events = run(prepared(model_folder, techniques, method), data_folder, 3, techniques, max_grad_norm=max_grad_norm)

    assert losses(events) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(plain)[-1] < losses(plain)[0]


def test_what_was_learnt_and_what_crossed_the_bus_is_recorded(model_folder, data_folder):
    setup = prepared(model_folder)
    events = run(setup, data_folder, 3)
    setup.streaming.settle()

    # Per layer: q, o (64 x 64), gate, up, down (64 x 128) as images of 24 x 24, and k, v (32 x 64) too.
    images_bytes = 2 * 7 * 24 * 24 * 4
    assert setup.optimizer.transport.down_bytes == 3 * images_bytes
    told = [step.bus_down_bytes for step in events["step"]]  # the last images of a step may cross in the next
    assert all(sum(told[:step]) <= step * images_bytes for step in (1, 2, 3)) and sum(told) > 0
    assert [told.step for told in events["learnt"]] == [0, 2]
    first = events["learnt"][0].extra
    assert first["num_projected"] == first["learnt"] == 14 and 0 < first["bias"] <= first["worst_bias"] < 1.5
    assert set(events["step"][1].lane_s) == {"down", "update", "up"}


@pytest.mark.parametrize("method", [METHOD, FAR], ids=["this machine's CPU", "another machine's CPU"])
def test_a_resumed_run_is_bit_equal(model_folder, data_folder, tmp_path, method):
    kept = {}

    def save(now):
        kept[now.step] = dataclasses.replace(now)
        return "x"

    whole = prepared(model_folder, method=method)
    expected = losses(run(whole, data_folder, 5, save=save, save_steps=3))
    half = prepared(model_folder, method=method)
    run(half, data_folder, 3)
    checkpoint.save(tmp_path, gather(half), kept[3].as_dict())

    again = prepared(model_folder, method=method)
    found = checkpoint.newest(tmp_path, pytest.fail)
    found.restore(again)
    events = run(again, data_folder, 5, progress=Progress(**found.state))

    assert losses(events) == expected[3:]
    assert torch.equal(weights(again), weights(whole))


def test_another_machine_s_cpu_makes_the_same_steps_and_keeps_the_moments(model_folder, data_folder):
    here, there = prepared(model_folder), prepared(model_folder, method=FAR)
    expected = losses(run(here, data_folder, 4))

    assert losses(run(there, data_folder, 4)) == expected and torch.equal(weights(there), weights(here))
    held = there.optimizer.state.values()
    assert all("exp_avg" not in state for state in held)
    assert set(there.optimizer._cpu_side.calls) == {"update"}  # evaluations and fits moved nothing
    there.streaming.collect()
    for parameter, state in here.optimizer.state.items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            theirs = there.optimizer.state[there.parameters[_name(here, parameter)]]
            assert torch.equal(state[name], theirs[name])


def test_a_node_of_a_cluster_is_refused_where_there_is_none(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    settings = TrainSettings(1e-2, 0.1, "adamw_torch", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3)

    with pytest.raises(ValueError, match="cpu_side big-box is a node of a cluster"):
        FAR.setup(model, settings)


def _name(setup, parameter):
    return next(name for name, own in setup.parameters.items() if own is parameter)


def test_preflight_leaves_nothing_behind(model_folder, data_folder, tmp_path):
    flown, plain = prepared(model_folder), prepared(model_folder)
    data = Dataset.load(data_folder)
    preflight.check(flown, data, data, ONE_BY_ONE, 8, tmp_path / "preflight")

    assert losses(run(flown, data_folder, 3)) == losses(run(plain, data_folder, 3))
    assert torch.equal(weights(flown), weights(plain))


def test_both_schedules_make_the_same_steps(model_folder, data_folder):
    results = []
    for schedule in ("layerwise", "sequential"):
        setup = prepared(model_folder, method=dataclasses.replace(METHOD, schedule=schedule))
        results.append((losses(run(setup, data_folder, 4)), weights(setup)))

    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_whole_gradients_make_full_training_of_the_same_weights(model_folder, data_folder):
    """projection: none is AdamW, elsewhere."""
    setup = prepared(model_folder, method=dataclasses.replace(METHOD, projection="none"))
    events = run(setup, data_folder, 4)
    plain = prepared(model_folder)
    plain.streaming.close()
    plain.streaming = plain.learner = None
    optimizer = torch.optim.AdamW(list(plain.parameters.values()), lr=1e-2, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["base_lr"] = 1e-2
    plain.optimizer = optimizer
    found = []
    hooks = Hooks(
        lambda event: found.append(event.loss) if isinstance(event, StepReport) else None, lambda n: "x", lambda: None
    )
    order = Order(24, 8, seed=5, num_train_epochs=2, max_steps=4)
    when = Schedule(lambda step: 1.0, 1.0, 0, 100, None, None)
    train(Training(plain, Dataset.load(data_folder), None, order, when, ONE_BY_ONE, ProcessGroup(), Progress(), hooks))

    assert losses(events) == pytest.approx(found, rel=1e-5)
    torch.testing.assert_close(weights(setup), weights(plain), rtol=1e-4, atol=1e-5)


def test_other_weights_train_on_the_device_where_asked(model_folder, data_folder):
    setup = prepared(model_folder, method=dataclasses.replace(METHOD, other_weights="train"))
    before = {name: p.detach().clone() for name, p in setup.model.named_parameters()}

    run(setup, data_folder, 2)

    assert all(not torch.equal(before[name], p) for name, p in setup.model.named_parameters())
    assert set(before) == set(setup.parameters)


def test_weights_in_bf16_train(model_folder, data_folder):
    techniques = dataclasses.replace(ONE_BY_ONE, dtype="bfloat16")
    setup = prepared(model_folder, techniques)

    found = losses(run(setup, data_folder, 4, techniques))

    assert found[-1] < found[0] and all(map(math.isfinite, found))
    assert {parameter.dtype for parameter in setup.parameters.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("size", "match"), [(64, r"at most 64\); half of that, 32"), (300, "projection: none")])
def test_an_image_as_large_as_every_weight_is_refused(model_folder, size, match):
    with pytest.raises(ValueError, match=match):
        prepared(model_folder, method=LspOffload(subspace_size=size))


def test_weights_shorter_than_an_image_are_sent_whole_and_a_note_says_so(model_folder):
    setup = prepared(model_folder, method=LspOffload(subspace_size=32))

    assert any("are sent whole: k_proj, v_proj" in note for note in setup.notes)
    assert any("stay frozen" in note for note in setup.notes)


def worker(rank, size, port, model_folder, data_folder, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    setup = prepared(model_folder)
    events = run(setup, data_folder, 3, group=ProcessGroup(rank, 2))
    sent = [step.step_bytes_sent for step in events["step"]]
    torch.save((losses(events), weights(setup), sent), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one_and_send_images(model_folder, data_folder, tmp_path):
    alone = losses(run(prepared(model_folder), data_folder, 3))

    run_ranks(worker, 2, str(model_folder), data_folder, str(tmp_path))

    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0][0] == results[1][0] == pytest.approx(alone, rel=1e-4)
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2][0] < 1.1 * 2 * 7 * 24 * 24 * 4
