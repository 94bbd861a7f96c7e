"""Faults at random, one after the other, while one job trains over them: it ends with the reference's losses.

Twenty for workers that hold everything, ten for a model in stages (test_pipeline_faults.py).
"""

import os
import random
import signal
import time

import pytest

from tests.cluster.emulator import unavailable
from tests.cluster.test_faults import compare, events, finished, lab, reference, training_pid  # noqa: F401
from tests.processes import PATIENCE_S

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(unavailable() is not None, reason=unavailable() or ""),
    pytest.mark.timeout(3600),  # a fault costs a restart, some 45 s of two busy cores
]
SEED, STEPS = 20, 120
PATIENCE_OF_ALL_S = 2400
KINDS = ("worker", "power", "blip", "cable", "hang", "slow", "driver")


def test_twenty_random_faults(lab, reference):  # noqa: F811
    weather(lab, reference, ("fast", "slow"), 20, mode="auto")


def weather(lab, reference, names, count, mode, rel=1e-5):  # noqa: F811
    """Faults on these machines, until there have been so many; each run that ends is compared with the reference."""
    chance = random.Random(SEED)
    process, run = lab.submit(mode=mode)
    began, faults, first = time.monotonic(), [], time.time()
    while len(faults) < count and time.monotonic() - began < PATIENCE_OF_ALL_S:
        if not progressing(run, process):
            process = resumed(lab, run, process)
            continue
        if max(run.steps(), default=0) > STEPS - 15:  # keep it alive until all faults have come: begin anew
            finished(process, run)
            compare(run, reference, exact=False, most_again=10**6, rel=rel)
            process, run = lab.submit(mode=mode)
            continue
        kind = chance.choice(KINDS)
        faults.append(kind)
        process = inflict(lab, run, process, kind, chance.choice(names), chance)
        time.sleep(chance.uniform(1, 4))
    while not progressing(run, process) and run.state() != "finished":
        process = resumed(lab, run, process)
    finished(process, run)

    assert len(faults) == count
    compare(run, reference, exact=False, most_again=10**6, rel=rel)
    trained = [event.step for event in events(run, "step")]
    took = time.time() - first
    print(
        {"faults": faults, "seconds": round(took), "steps run again in the last run": len(trained) - len(set(trained))}
    )


def progressing(run, process):
    """Whether steps are being made; False when the driver has ended."""
    until, seen = time.monotonic() + PATIENCE_S, len(events(run, "step"))
    while len(events(run, "step")) < seen + 3:
        if process.poll() is not None:
            return run.state() == "finished"
        assert time.monotonic() < until, run.events()[0][-6:]
        time.sleep(0.1)
    return True


def resumed(lab, run, process):  # noqa: F811
    process.communicate()
    again, _ = lab.submit("resume", run.run_id)
    return again


def inflict(lab, run, process, kind, name, chance):  # noqa: F811
    print(f"{kind} on {name} at step {max(run.steps(), default=0)}", flush=True)
    if kind == "worker":
        try:
            os.kill(training_pid(lab, run, name), signal.SIGKILL)
        except (LookupError, StopIteration, FileNotFoundError):  # between two groups, or not training
            return process
    elif kind == "power":
        lab.power_off(name)
        time.sleep(chance.uniform(1, 8))
        lab.cluster.boot(name)
        lab.start(name)
    elif kind in ("blip", "cable"):
        lab.cluster.set_link(name, up=False)
        time.sleep(3 if kind == "blip" else 20)
        lab.cluster.set_link(name, up=True)
    elif kind == "hang":
        lab.cluster.freeze(name)
        time.sleep(chance.uniform(2, 6))
        lab.cluster.thaw(name)
    elif kind == "slow":
        lab.cluster.slow_down(name, 0.2)
        time.sleep(4)
        lab.cluster.slow_down(name, 0)
    else:
        lab.signal_driver(signal.SIGKILL)
        return resumed(lab, run, process)
    return process
