"""A process takes no more of a card than its plan has, its context included."""

import os

import pytest
import torch

from clusters.units import GIB
from strategies.step.device_memory import _SETTINGS, grow_segments, limit, share_of


@pytest.mark.parametrize(
    ("usable", "total", "share"),
    [
        (None, 24 * GIB, None),  # nobody knew: no end is made up
        (24.7 * GIB, 24 * GIB, 1.0),
        (6.5 * GIB, 24 * GIB, 0.25),  # a display and others hold the rest
        (0.5 * GIB, 24 * GIB, 0.0),
    ],
)
def test_the_share_leaves_room_for_the_context(usable, total, share):
    assert share_of(usable, total) == (None if share is None else pytest.approx(share))


def test_a_cpu_has_no_end():
    assert limit(torch.device("cpu"), 1.0) is None


def test_an_allocator_that_works_already_is_left_alone_and_that_is_said(monkeypatch, caplog):
    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    grow_segments()

    assert "CUDA is initialised already" in caplog.text and not {*_SETTINGS} & {*os.environ}
