"""Micro-batches, packing, accumulation and workers change the speed and nothing else."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.errors import Diverged, RunFailed
from orchestrator.runs.events import Evaluation, StepReport
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from orchestrator.training.workers import preflight
from strategies import METHODS
from strategies.reuse.lower_layers import LowerLayers
from strategies.step import document_attention
from strategies.step.state import gather
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.processes import run_ranks

ONE_BY_ONE = Techniques("float32", "sdpa", False, False, 1, 64)
SCHEDULE = Schedule(lambda step: 1.0, 1.0, 0, 100, None, None)


def run(
    model_folder,
    data_folder,
    techniques,
    group=None,
    steps=3,
    method="lora",
    optim="sgd",
    save=None,
    before=None,
    shares=None,
    events=None,
    options=None,
    **schedule,
):
    """Train a few steps; returns (losses, the gradient of each step as one vector, setup)."""
    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation=techniques.attn_implementation
    )
    settings = TrainSettings(1e-2, 0.0, optim, 0.9, 0.999, 1e-8, techniques, 3)
    setup = METHODS[method](**(options or {})).setup(model, settings)
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    data, losses, gradients = Dataset.load(data_folder), {}, []
    if before:
        before(setup, data)
    setup.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in setup.parameters.values()]))
    )

    def record(event):
        if isinstance(event, StepReport):
            losses[event.step] = event.loss
        if events is not None:
            events.append(event)

    hooks = Hooks(record, save or (lambda now: "none"), lambda: None)
    order = Order(len(data), 8, seed=5, num_train_epochs=1, max_steps=steps)
    plan = dataclasses.replace(SCHEDULE, **schedule)
    train(Training(setup, data, None, order, plan, techniques, group or ProcessGroup(), Progress(), hooks, shares))
    return list(losses.values()), gradients, setup


def close(first, second):
    """Losses and gradients of every step agree to 1e-5, relative."""
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert len(first[1]) == len(second[1]) > 0
    for ours, theirs in zip(first[1], second[1], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    "techniques",
    [
        dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=8),
        dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=3),
        Techniques("float32", "document", True, False, 8, 64),
        Techniques("float32", "document", True, False, 1, 64),
        Techniques("float32", "document", True, True, 1, 64),
        Techniques("float32", "document", True, False, 8, 64, share_prefixes=True),
        Techniques("float32", "document", True, True, 1, 64, share_prefixes=True),
    ],
    ids=[
        "8 x 1",
        "3 + 3 + 2",
        "packed in one row",
        "packed in rows of 64",
        "packed and checkpointed",
        "beginnings shared by all rows",
        "beginnings shared in rows of 64",
    ],
)
def test_every_layout_gives_the_losses_and_gradients_of_one_sample_at_a_time(
    reference, model_folder, data_folder, techniques
):
    close(run(model_folder, data_folder, techniques), reference)


def test_tokens_that_are_not_computed_are_reported_beside_those_of_the_samples(model_folder, chat_data_folder):
    """Conversations with one system prompt."""
    shared, events = Techniques("float32", "document", True, False, 8, 64, share_prefixes=True), []
    separate = run(model_folder, chat_data_folder, dataclasses.replace(shared, share_prefixes=False), method="full")

    together = run(model_folder, chat_data_folder, shared, method="full", events=events)

    close(together, separate)
    lengths = Dataset.load(chat_data_folder).lengths
    order = Order(len(lengths), 8, seed=5, num_train_epochs=1, max_steps=3)
    steps = [event for event in events if isinstance(event, StepReport)]
    assert [event.tokens for event in steps] == [int(lengths[order.sample_ids(step)].sum()) for step in range(3)]
    assert all(event.computed_tokens < 0.7 * event.tokens for event in steps)


@pytest.mark.parametrize(
    ("shares", "recomputes"),
    [(False, False), (True, False), (True, True)],
    ids=["end to end", "as a tree", "as a tree, checkpointed"],
)
def test_rows_that_are_seen_again_skip_frozen_lower_layers_and_lose_nothing(
    model_folder, chat_data_folder, shares, recomputes
):
    packed, events = Techniques("float32", "document", True, recomputes, 8, 64, share_prefixes=shares), []
    upper, three_epochs = {"layers_to_transform": [1]}, 9

    def keep(setup, data):
        setup.lower = LowerLayers(setup.model)

    known = run(model_folder, chat_data_folder, packed, steps=three_epochs, before=keep, options=upper, events=events)

    close(known, run(model_folder, chat_data_folder, packed, steps=three_epochs, options=upper))
    steps = [event for event in events if isinstance(event, StepReport)]
    computed = [event.computed_tokens or event.tokens for event in steps]
    assert [event.known_tokens for event in steps] == [0, 0, 0, *computed[3:]]


def test_full_training_is_as_independent_of_layout(model_folder, data_folder):
    packed = Techniques("float32", "document", True, False, 8, 64)

    close(
        run(model_folder, data_folder, packed, method="full", steps=2),
        run(model_folder, data_folder, ONE_BY_ONE, method="full", steps=2),
    )


def worker(rank, size, port, model_folder, data_folder, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    losses, gradients, _ = run(model_folder, data_folder, ONE_BY_ONE, ProcessGroup(rank, 2))
    torch.save((losses, gradients), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one(reference, model_folder, data_folder, tmp_path):

    run_ranks(worker, 2, str(model_folder), data_folder, str(tmp_path))

    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    close(results[0], reference)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_resumed_run_is_bit_equal(model_folder, data_folder, tmp_path):
    from orchestrator.training import checkpoint

    packed = Techniques("float32", "document", True, False, 1, 64)
    kept = {}

    def save(now):
        kept[now.step] = dataclasses.replace(now)
        return "x"

    whole = run(model_folder, data_folder, packed, steps=4, optim="adamw_torch_fused", save=save, save_steps=2)
    half = run(model_folder, data_folder, packed, steps=2, optim="adamw_torch_fused")
    checkpoint.save(tmp_path, gather(half[2]), kept[2].as_dict())
    found = checkpoint.newest(tmp_path, pytest.fail)
    progress = Progress(**found.state)
    train_away(half[2])
    found.restore(half[2])
    losses = []
    order = Order(24, 8, seed=5, num_train_epochs=1, max_steps=4)
    hooks = Hooks(
        lambda event: losses.append(event.loss) if isinstance(event, StepReport) else None,
        lambda now: "x",
        lambda: None,
    )
    train(Training(half[2], Dataset.load(data_folder), None, order, SCHEDULE, packed, ProcessGroup(), progress, hooks))

    assert losses == whole[0][2:]
    for name, parameter in whole[2].parameters.items():
        assert torch.equal(half[2].parameters[name], parameter)


def train_away(setup):
    """Spoil weights and moments, so that a restore that forgets one shows."""
    with torch.no_grad():
        for parameter in setup.parameters.values():
            parameter.add_(1.0)
    setup.optimizer.state.clear()


def test_dropout_of_a_resumed_run_is_the_same(model_folder, data_folder):
    """Random numbers follow from the step and its samples, not from what ran before."""
    from strategies.methods.lora import Lora

    losses = []
    for consumed in (0, 1000):
        document_attention.register()
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        settings = TrainSettings(1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3)
        setup = Lora(lora_dropout=0.5, init_lora_weights="gaussian").setup(model, settings)
        with torch.no_grad():
            for parameter in setup.parameters.values():
                parameter.add_(0.05)
        torch.rand(consumed)
        seen = []
        hooks = Hooks(lambda event, seen=seen: seen.append(getattr(event, "loss", None)), lambda now: "x", lambda: None)
        order = Order(24, 8, seed=5, num_train_epochs=1, max_steps=1)
        train(
            Training(
                setup, Dataset.load(data_folder), None, order, SCHEDULE, ONE_BY_ONE, ProcessGroup(), Progress(), hooks
            )
        )
        losses.append(seen[0])
    assert losses[0] == losses[1]


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_the_samples(model_folder, data_folder):
    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    settings = TrainSettings(1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3)
    setup = METHODS["lora"]().setup(model, settings)
    with torch.no_grad():
        next(iter(setup.parameters.values())).fill_(float("nan"))
    order = Order(24, 8, seed=5, num_train_epochs=1, max_steps=3)
    hooks = Hooks(lambda event: None, lambda now: "x", lambda: None)

    with pytest.raises(Diverged) as caught:
        train(
            Training(
                setup, Dataset.load(data_folder), None, order, SCHEDULE, ONE_BY_ONE, ProcessGroup(), Progress(), hooks
            )
        )

    assert caught.value.step == 0
    assert sorted(caught.value.sample_ids) == sorted(order.sample_ids(0))


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_a_number_stops_before_anything_is_saved(model_folder, data_folder, max_grad_norm):
    saved, passes = [], []

    def spoil(setup, data):
        def infinite_in_the_third(gradient):
            passes.append(1)
            return gradient * (float("inf") if len(passes) == 3 else 1.0)

        next(iter(setup.parameters.values())).register_hook(infinite_in_the_third)

    with pytest.raises(Diverged, match="a gradient of step 3 is not a number, though its loss is") as caught:
        run(
            model_folder,
            data_folder,
            dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=8),
            before=spoil,
            save=lambda now: saved.append(now.step) or "x",
            save_steps=1,
            max_grad_norm=max_grad_norm,
        )

    assert (saved, caught.value.step) == ([1, 2], 2)
    assert sorted(caught.value.sample_ids) == sorted(Order(24, 8, seed=5, num_train_epochs=1).sample_ids(2))


def test_asking_to_stop_saves_and_ends_after_the_step(model_folder, data_folder):
    saved = []
    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    settings = TrainSettings(1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3)
    setup = METHODS["lora"]().setup(model, settings)
    order = Order(24, 8, seed=5, num_train_epochs=1, max_steps=3)
    hooks = Hooks(lambda event: None, lambda now: saved.append(now.step) or "x", lambda: "asked")

    progress = train(
        Training(setup, Dataset.load(data_folder), None, order, SCHEDULE, ONE_BY_ONE, ProcessGroup(), Progress(), hooks)
    )

    assert (progress.step, progress.stopped, saved) == (1, "asked", [1])


def test_early_stopping_and_the_best_checkpoint_follow_the_held_out_loss(model_folder, data_folder):
    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    settings = TrainSettings(3.0, 0.0, "sgd", 0.9, 0.999, 1e-8, ONE_BY_ONE, 3)  # a rate that only does harm
    setup = METHODS["full"]().setup(model, settings)
    data = Dataset.load(data_folder)
    events = []
    hooks = Hooks(events.append, lambda now: "x", lambda: None)
    order = Order(24, 8, seed=5, num_train_epochs=10)
    schedule = dataclasses.replace(SCHEDULE, eval_steps=1, early_stopping_patience=2, max_grad_norm=0.0)

    progress = train(
        Training(setup, data, data.select(range(6)), order, schedule, ONE_BY_ONE, ProcessGroup(), Progress(), hooks)
    )

    losses = [event.eval_loss for event in events if isinstance(event, Evaluation)]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert progress.stopped == "early"
    assert progress.step == best + 3 < order.num_steps
    assert progress.best_checkpoint == f"step-{best + 1:08d}"


def test_held_out_loss_is_the_same_padded_and_packed(model_folder, data_folder):
    data = Dataset.load(data_folder)
    *_, padded = run(model_folder, data_folder, ONE_BY_ONE, steps=1)
    packed = Techniques("float32", "document", True, False, 4, 64)
    *_, setup = run(model_folder, data_folder, packed, steps=1)

    assert evaluate_loss(setup, data, packed, ProcessGroup()) == pytest.approx(
        evaluate_loss(padded, data, ONE_BY_ONE, ProcessGroup()), rel=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precisions_train_too(model_folder, data_folder, reference, dtype):
    losses, _, setup = run(model_folder, data_folder, dataclasses.replace(ONE_BY_ONE, dtype=dtype))

    assert losses == pytest.approx(reference[0], rel=0.02)
    assert {p.dtype for p in setup.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_preflight_leaves_nothing_behind(optim, model_folder, data_folder, tmp_path):
    checked = {}

    def fly(setup, data):
        checked.update(preflight.check(setup, data, data, ONE_BY_ONE, 8, tmp_path / "preflight"))

    flown = run(model_folder, data_folder, ONE_BY_ONE, optim=optim, before=fly)
    plain = run(model_folder, data_folder, ONE_BY_ONE, optim=optim)

    assert flown[0] == plain[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(flown[1], plain[1], strict=True))
    assert checked["longest_batch_tokens"] == int(Dataset.load(data_folder).lengths.max())
    assert checked["checkpoint_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_preflight_names_a_folder_that_cannot_be_written(model_folder, data_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")

    def fly(setup, data):
        preflight.check(setup, data, None, ONE_BY_ONE, 8, tmp_path / "file")

    with pytest.raises(RunFailed, match="a checkpoint cannot be written to"):
        run(model_folder, data_folder, ONE_BY_ONE, before=fly)


def test_the_chunked_loss_is_the_loss(model_folder, data_folder, reference):
    chunked = dataclasses.replace(ONE_BY_ONE, loss_type="chunked_nll")

    close(run(model_folder, data_folder, chunked), reference)


def test_an_8_bit_optimizer_trains_and_resumes_bit_by_bit(model_folder, data_folder, tmp_path):
    """Its weights share one table of the code, which safetensors refuses to write twice."""
    from orchestrator.training import checkpoint

    how = {"optim": "adamw_bnb_8bit", "method": "full"}
    whole = run(model_folder, data_folder, ONE_BY_ONE, steps=4, **how)
    *_, half = run(model_folder, data_folder, ONE_BY_ONE, steps=2, **how)

    checkpoint.save(tmp_path, gather(half), {"step": 2})
    found = checkpoint.newest(tmp_path, pytest.fail)
    train_away(half)
    found.restore(half)
    losses = []
    hooks = Hooks(lambda event: losses.append(getattr(event, "loss", None)), lambda now: "x", lambda: None)
    order, progress = Order(24, 8, seed=5, num_train_epochs=1, max_steps=4), Progress(step=2)
    train(Training(half, Dataset.load(data_folder), None, order, SCHEDULE, ONE_BY_ONE, ProcessGroup(), progress, hooks))

    assert any(value.dtype == torch.uint8 for own in gather(half).moments.values() for value in own.values())
    assert whole[0][-1] < whole[0][0] and [loss for loss in losses if loss] == whole[0][2:]
