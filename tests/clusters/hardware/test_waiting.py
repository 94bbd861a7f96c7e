"""Waiting for GPUs, without one."""

from clusters.hardware import waiting
from clusters.hardware.waiting import wait_for_gpus


def test_it_says_once_what_it_waits_for_and_takes_what_is_free(monkeypatch):
    monkeypatch.setattr(waiting, "_RETRY_S", 0.001)
    tries, said = iter([None, None, "card"]), []

    found = wait_for_gpus(lambda: next(tries), lambda: "GPUs", said.append, lambda: False)

    assert found == "card" and said == ["waiting for GPUs"]


def test_it_takes_what_is_free_at_once_and_ends_when_it_is_over():
    said = []

    assert wait_for_gpus(lambda: "card", lambda: "GPUs", said.append, lambda: True) == "card"
    assert not said
    assert wait_for_gpus(lambda: None, lambda: "GPUs", said.append, lambda: True) is None
    assert said == ["waiting for GPUs"]  # also where it ends at once: the user reads why
