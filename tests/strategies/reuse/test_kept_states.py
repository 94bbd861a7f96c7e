"""What is kept comes back bit by bit from memory and from the disk, or not at all; nothing of it is left behind."""

import errno
import os

import pytest
import torch

from strategies.reuse import kept_states
from strategies.reuse.kept_states import StatesInMemory, StatesOnDisk


@pytest.fixture(params=["memory", "disk"])
def states(request, tmp_path):
    return StatesInMemory() if request.param == "memory" else StatesOnDisk(tmp_path, pytest.fail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_comes_back_bit_by_bit(states, dtype):
    made = {number: torch.randn(number + 1, 8).to(dtype) for number in (3, 0, 7)}
    for number, states_LH in made.items():
        states.put(number, states_LH)

    states.expect([0, 3, 9])

    for number, states_LH in made.items():
        assert number in states
        assert torch.equal(states.get(number), states_LH)
    assert 9 not in states and states.get(9) is None
    assert states.num_bytes == sum(each.nbytes for each in made.values())


def test_what_is_kept_does_not_change_with_the_tensor_that_it_was(states):
    row = torch.ones(4, 8)
    states.put(1, row[1:3])
    row.zero_()

    assert torch.equal(states.get(1), torch.ones(2, 8))


def test_what_was_cleared_is_gone_and_its_place_used_again(states):
    states.put(1, torch.ones(4, 8))
    states.clear()
    assert 1 not in states and states.num_bytes == 0

    states.put(1, torch.zeros(4, 8))

    assert torch.equal(states.get(1), torch.zeros(4, 8))


def test_bytes_that_are_not_those_that_were_written_are_not_handed_out(tmp_path):
    notes = []
    states = StatesOnDisk(tmp_path, notes.append)
    for number in range(3):
        states.put(number, torch.full((4, 8), float(number)))
    os.pwrite(states._descriptor, b"\xff", 4 * 8 * 4 + 5)
    os.ftruncate(states._descriptor, 2 * 4 * 8 * 4 + 7)

    found = [states.get(number) for number in range(3)]

    assert torch.equal(found[0], torch.zeros(4, 8)) and found[1:] == [None, None]
    assert 0 in states and 1 not in states and 2 not in states
    assert [text.split(";")[1] for text in notes] == [" it is computed again"] * 2


def test_a_disk_that_is_full_keeps_what_it_has(tmp_path, monkeypatch):
    notes = []
    states = StatesOnDisk(tmp_path, notes.append)
    states.put(1, torch.ones(4, 8))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        states.put(2, torch.ones(4, 8))
    states.put(3, torch.ones(4, 8))

    assert 1 in states and 2 not in states and 3 not in states
    assert torch.equal(states.get(1), torch.ones(4, 8))
    assert len(notes) == 1 and "of 1 samples" in notes[0] and "No space left" in notes[0]


def test_a_part_of_the_disk_is_left_to_others(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(kept_states, "_LEFT_BYTES", 2**60)
    states = StatesOnDisk(tmp_path, notes.append)

    states.put(1, torch.ones(4, 8))

    assert 1 not in states and "almost full" in notes[0]


def test_nothing_is_left_in_the_folder(tmp_path):
    states = StatesOnDisk(tmp_path / "new", pytest.fail)
    states.put(1, torch.ones(4, 8))

    assert list((tmp_path / "new").iterdir()) == []
