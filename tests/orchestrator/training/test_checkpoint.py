"""A valid checkpoint always exists and a damaged one is never used."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from orchestrator.job import manifest
from orchestrator.training import checkpoint
from strategies.step.state import gather
from strategies.train_setup import TrainSetup


@pytest.fixture
def setup():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_once(model, optimizer)
    return TrainSetup(model, optimizer, dict(model.named_parameters()), lambda path: None, "model")


def train_once(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(8.0).view(2, 4)).square().mean().backward()
    optimizer.step()


def never(text):
    raise AssertionError(f"unexpected warning: {text}")


def test_a_restored_setup_goes_on_bit_by_bit(setup, tmp_path):
    checkpoint.save(tmp_path, gather(setup), {"step": 1})
    for _ in range(3):
        train_once(setup.model, setup.optimizer)
    expected = [p.detach().clone() for p in setup.parameters.values()]

    checkpoint.newest(tmp_path, never).restore(setup)
    for _ in range(3):
        train_once(setup.model, setup.optimizer)

    assert all(torch.equal(a, b) for a, b in zip(expected, setup.parameters.values(), strict=True))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_found_and_the_one_before_is_used(setup, tmp_path, name, damage):
    checkpoint.save(tmp_path, gather(setup), {"step": 1})
    file = checkpoint.save(tmp_path, gather(setup), {"step": 2}) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-5])
    else:
        file.unlink()
    warnings = []

    found = checkpoint.newest(tmp_path, warnings.append)

    assert found.step == 1
    assert "step-00000002 is damaged" in warnings[0]


@pytest.mark.parametrize("place, call", [(checkpoint, "save_file"), (manifest, "_measure"), (manifest, "sync")])
def test_a_crash_while_saving_leaves_the_checkpoint_before(setup, tmp_path, monkeypatch, place, call):
    checkpoint.save(tmp_path, gather(setup), {"step": 1})

    def crash(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, call, crash)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, gather(setup), {"step": 2})
    monkeypatch.undo()

    assert checkpoint.newest(tmp_path, never).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


MOMENTS = ("mkdir", "save_file", "fsync", "rename", "rmtree")  # calls of a save and the pruning after it


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads, from Python 3.12 on
def test_killed_at_any_moment_of_saving_a_whole_checkpoint_remains(setup, tmp_path, moment, count):
    """A real SIGKILL before the call of that name is made for the so-and-so-many-th time."""
    held = gather(setup)
    checkpoint.save(tmp_path, held, {"step": 1})
    child = os.fork()
    if child == 0:
        owner = {"mkdir": Path, "save_file": checkpoint, "rmtree": checkpoint.shutil}.get(moment, os)
        real, left = getattr(owner, moment), [count]

        def deadly(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        setattr(owner, moment, deadly)
        try:
            for step in (2, 3, 4):
                checkpoint.save(tmp_path, held, {"step": step})
                checkpoint.prune(tmp_path, 2, None)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)

    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    found = checkpoint.newest(tmp_path, lambda text: None)
    assert found is not None and found.step in (1, 2, 3, 4)
    found.restore(setup)


def test_what_a_killed_process_left_is_ignored_and_swept(setup, tmp_path):
    checkpoint.save(tmp_path, gather(setup), {"step": 1})
    (tmp_path / "step-00000002.tmp-dead").mkdir()

    assert checkpoint.newest(tmp_path, never).step == 1
    checkpoint.prune(tmp_path, keep=2, best=None)

    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_newest_and_the_best_are_kept(setup, tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, gather(setup), {"step": step})

    checkpoint.prune(tmp_path, keep=2, best="step-00000001")

    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "4", "5"]


def test_the_manifest_names_every_file(setup, tmp_path):
    path = checkpoint.save(tmp_path, gather(setup), {"step": 1})

    files = json.loads((path / "manifest.json").read_text())["files"]

    assert set(files) == {file.name for file in path.iterdir()} - {"manifest.json"}


def test_weights_of_another_method_are_refused(setup, tmp_path):
    checkpoint.save(tmp_path, gather(setup), {"step": 1})
    setup.parameters.pop("bias")

    with pytest.raises(ValueError, match="other weights"):
        checkpoint.newest(tmp_path, never).restore(setup)
