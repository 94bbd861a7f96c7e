"""Processes of tests: all are started here, waited for with patience, and ended with everything that they started.

conftest.py ends what a test leaves behind; a process also ends when the one that started it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.cli import Done

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 800  # a limit that catches what hangs: a busy machine is no failure
_LOADED = ["torch", "transformers", "peft", "orchestrator.training.workers.worker", "strategies", "tests.frozen"]
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None)
_MARK = "STARTED_BY_TEST"
running: list[subprocess.Popen[str]] = []
marks: dict[int, str] = {}  # by process number


def start(
    *arguments: object, cwd: os.PathLike[str] | str, output: Path | None = None, **environment: str | None
) -> subprocess.Popen[str]:
    """`python -m orchestrator ARGUMENTS`; None takes a variable out of its environment."""
    return start_python("-m", "orchestrator", *arguments, cwd=cwd, output=output, **environment)


def start_python(
    *arguments: object, cwd: os.PathLike[str] | str, output: Path | None = None, **environment: str | None
) -> subprocess.Popen[str]:
    """A Python process that hears Ctrl-C, also when these tests run in the background of a shell, which ignores it.

    `output` is a file for both of its channels: a server would wait for a reader of its pipes.
    """
    mark = uuid.uuid4().hex
    variables = {**os.environ, "PYTHONPATH": str(ROOT), _MARK: mark, **environment}
    with output.open("wb") if output else contextlib.nullcontext(subprocess.PIPE) as channel:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={name: value for name, value in variables.items() if value is not None},
            stdout=channel,
            stderr=channel,
            text=True,
            preexec_fn=_prepare,
        )
    running.append(process)
    marks[process.pid] = mark
    return process


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        _LIBC.prctl(_DIES_WITH_PARENT, signal.SIGTERM)


def orchestrator(
    *arguments: object, cwd: os.PathLike[str] | str, check: int | None = None, **environment: str | None
) -> Done:
    """How `python -m orchestrator ARGUMENTS` ended; `check` is the exit code that it must have."""
    done = outcome(start(*arguments, cwd=cwd, **environment))
    assert check in (None, done.returncode), done.output
    return done


def outcome(process: subprocess.Popen[str]) -> Done:
    """How a process ended by itself, and what it had printed."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"{process.args} hangs:\n{_printed(process)}") from None
    return Done(process.returncode, out or "", err or "")


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """What `condition` gives once that is true; fails where the process ends before it is."""
    until = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if process and process.poll() is not None:
            raise AssertionError(f"it ended too early:\n{_printed(process)}")
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)
    return found


def _printed(process: subprocess.Popen[str]) -> str:
    return "".join(filter(None, process.communicate()))


def listens(port: int) -> bool:
    """Whether somebody answers on a port of the loopback."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def kill(process: subprocess.Popen[str]) -> int:
    """kill -9 for a process and all that it started, as a power cut would; how many there were."""
    everyone = _family(process)
    for one in everyone:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(everyone, timeout=60)
    process.kill()
    process.wait()
    return len(everyone)


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and its descendants, those too whose parents have died: the environment is handed down."""
    found, mark = [], marks.get(process.pid)
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += [one] if mark and one.environ().get(_MARK) == mark else []
    return found


def end(process: subprocess.Popen[str]) -> None:
    """Ask a process to end, so that a node takes its daemons along; kill what is left a minute later."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            process.communicate(timeout=60)
    kill(process)
    for stream in filter(None, (process.stdout, process.stderr)):
        stream.close()


def end_all(known: int = 0) -> None:
    """End what was started, the first `known` excepted, and what it left."""
    while len(running) > known:
        end(running.pop())


def run_ranks(work: Callable[..., None], size: int, *arguments: object) -> None:
    """Run `work(rank, size, port, *arguments)` in processes forked from one that has imported the libraries.

    That one has no threads, as nothing was computed in it: OpenMP's would not survive a fork.
    """
    import torch

    multiprocessing.set_forkserver_preload(_LOADED)
    torch.multiprocessing.start_processes(work, (size, free_port(), *arguments), nprocs=size, start_method="forkserver")


def free_port() -> int:
    """A port of the loopback that nobody listens on.

    Below those that the kernel gives to outgoing connections: one of Ray's may take such a port before it is used.
    """
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(20000, 30000))) as server,
        ):
            return server.getsockname()[1]
