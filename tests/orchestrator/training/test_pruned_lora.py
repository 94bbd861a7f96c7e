"""Pruned LoRA through the loop: masks along the schedule, resuming amid them, and which step may be handed back."""

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.dataset import Dataset
from orchestrator.training import checkpoint
from orchestrator.training.state import Progress
from strategies.compatibility import refuses_local_steps
from strategies.pruning.method import PrunedLora
from strategies.shape import ModelShape
from strategies.step.state import gather
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.orchestrator.training.test_loop import ONE_BY_ONE
from tests.orchestrator.training.test_product_steps import losses, run
from tests.processes import run_ranks

STEPS = 12
PRUNED = PrunedLora(ratio=0.5, multiple_of=1, prune_from=0.1, prune_until=0.7, mask_every=2)  # steps 1 to 8
CHECKPOINTED = Techniques("float32", "document", True, True, 8, 64)


def prepared(model_folder, method=PRUNED, techniques=ONE_BY_ONE):
    from strategies.step import document_attention

    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation=techniques.attn_implementation
    )
    settings = TrainSettings(1e-2, 0.1, "adamw_torch", 0.9, 0.999, 1e-8, techniques, 3, num_steps=STEPS)
    return method.setup(model, settings)


def trained(setup, data_folder, steps=STEPS, techniques=ONE_BY_ONE, **how):
    return run(setup, data_folder, techniques, steps, local=None, size=8, **how)


def removed(setup, kind="channels"):
    return (setup.buffers[f"pruning.{kind}.kept"] == 0).sum(dim=1).tolist()


def test_masks_close_along_the_schedule_and_end_exactly_at_the_ratio(model_folder, data_folder):
    setup, counts = prepared(model_folder), []
    step_done = setup.between.step_done

    def noted(step):
        said = step_done(step)
        counts.append(removed(setup))
        return said

    setup.between.step_done = noted
    events = trained(setup, data_folder)

    parts = [1 - (1 - (done - 1) / 7) ** 3 for done in (3, 5, 7)]
    assert [one.step for one in events["between"]] == [3, 5, 7, 8]
    expected = [round(64 * part) for part in parts]
    assert [counts[done - 1] for done in (2, 3, 5, 7, 8, 12)] == [[count] * 2 for count in (0, *expected, 64, 64)]
    last = events["between"][-1]
    smaller = PRUNED.smaller(ModelShape.from_config(setup.model.config.to_dict())).num_parameters
    assert last.text == (
        f"64 of 128 channels of each MLP are masked: {smaller:,} parameters are left. From here on masks stay, the rest"
        " recovers, and held-out losses choose what is handed back"
    )
    assert last.extra["parameters_left"] == smaller and setup.settled_after == 8


def test_what_was_masked_stays_masked_and_never_learns_to_matter(model_folder, data_folder):
    setup, seen = prepared(model_folder), []
    step_done = setup.between.step_done

    def noted(step):
        said = step_done(step)
        seen.append(setup.buffers["pruning.channels.kept"].clone())
        return said

    setup.between.step_done = noted
    trained(setup, data_folder)

    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(seen))
    assert all(torch.equal(one, seen[7]) for one in seen[8:])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": "mlp+attention"},
        {"score": "gate", "groups": "mlp+attention"},
        {"score": "magnitude"},
        {"score": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [4, 10])  # while masks close, and while it recovers
def test_a_resumed_run_continues_amid_the_masks_bit_by_bit(model_folder, data_folder, tmp_path, changes, after):
    method, notes = dataclasses.replace(PRUNED, **changes), {}
    whole = prepared(model_folder, method)
    expected = trained(
        whole, data_folder, save=lambda now: notes.setdefault(now.step, copy.copy(now)), save_steps=after
    )
    half = prepared(model_folder, method)
    trained(half, data_folder, after)
    checkpoint.save(tmp_path, gather(half), notes[after].as_dict())

    again = prepared(model_folder, method)
    found = checkpoint.newest(tmp_path, pytest.fail)
    found.restore(again)
    events = trained(again, data_folder, progress=Progress.from_dict(found.state))

    assert losses(events) == losses(expected)[after:]
    assert removed(again) == [64, 64]
    for name, weight in gather(whole).weights.items():
        assert torch.equal(weight, gather(again).weights[name]), name


def test_activations_that_are_computed_again_and_packed_rows_see_the_same_masks(model_folder, data_folder):
    first, second = prepared(model_folder), prepared(model_folder, techniques=CHECKPOINTED)
    from strategies.techniques import checkpointing

    checkpointing.enable(second.model)

    plain, again = trained(first, data_folder), trained(second, data_folder, techniques=CHECKPOINTED)

    assert losses(again) == pytest.approx(losses(plain), rel=1e-3)


def test_losses_from_before_the_masks_stay_choose_no_checkpoint_and_stop_nothing(model_folder, data_folder):
    """The whole model's is lower, and it is not what was asked for."""
    from orchestrator.training.loop import train
    from orchestrator.training.parallel import ProcessGroup
    from orchestrator.training.state import Hooks, Training
    from tests.orchestrator.training.test_loop import SCHEDULE, Order

    setup, data, events, progress = prepared(model_folder), Dataset.load(data_folder), [], Progress()
    schedule = dataclasses.replace(SCHEDULE, eval_steps=2, early_stopping_patience=1, max_grad_norm=0.0)
    hooks = Hooks(events.append, lambda now: "x", lambda: None)
    order = Order(24, 8, seed=5, num_train_epochs=9, max_steps=STEPS)

    train(Training(setup, data, data, order, schedule, ONE_BY_ONE, ProcessGroup(), progress, hooks))

    measured = [one.step for one in events if one.kind == "eval"]
    assert measured[:4] == [2, 4, 6, 8] and progress.step >= 8
    assert progress.eval_losses and min(map(int, progress.eval_losses)) == 8
    assert progress.best_loss == min(progress.eval_losses.values())


def train_in_parts(rank, size, port, model_folder, data_folder, out):
    import torch.distributed as dist

    from orchestrator.training.parallel import ProcessGroup

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    setup = prepared(model_folder)
    if rank:  # numbers that differ by far more than an unlike device's, so that other groups are the smallest
        for name, weight in setup.model.named_parameters():
            if "base_layer" in name:
                weight.data.mul_(1 + torch.rand_like(weight))
    trained(setup, Path(data_folder), group=ProcessGroup(rank=rank, size=size, wire=torch.device("cpu")))
    torch.save(gather(setup).weights, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_all_workers_mask_what_the_first_one_masks(model_folder, data_folder, tmp_path):
    run_ranks(train_in_parts, 2, str(model_folder), str(data_folder), str(tmp_path))

    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["pruning.channels.kept"], second["pruning.channels.kept"])
    assert (first["pruning.channels.kept"] == 0).sum(dim=1).tolist() == [64, 64]


def test_local_steps_are_refused():
    assert "which local steps let drift apart" in str(refuses_local_steps(PrunedLora()))
