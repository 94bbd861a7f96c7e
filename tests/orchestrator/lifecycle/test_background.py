"""A call in a thread, watched by the main thread."""

import threading

import pytest

from orchestrator.errors import RunFailed
from orchestrator.lifecycle.background import run_in_background


def test_what_the_call_raised_is_returned():
    def fail():
        raise ValueError("wrong")

    error = run_in_background(fail, lambda: None, lambda: None)

    assert isinstance(error, ValueError)


def test_it_is_polled_until_it_ends():
    end, polls = threading.Event(), []

    def poll():
        polls.append(len(polls))
        if len(polls) == 2:
            end.set()

    assert run_in_background(lambda: end.wait(10) and None, poll, lambda: None) is None
    assert len(polls) >= 2


def test_an_interrupt_is_passed_on_and_the_call_goes_on_until_another_raises():
    end, interrupts = threading.Event(), []

    def poll():
        raise KeyboardInterrupt

    def interrupt():
        interrupts.append(1)
        if len(interrupts) == 2:
            end.set()
            raise RunFailed("killed")

    with pytest.raises(RunFailed, match="killed"):
        run_in_background(lambda: end.wait(10) and None, poll, interrupt)
    assert len(interrupts) == 2
