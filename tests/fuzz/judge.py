"""Run a command line in this process as the program would, and say what is wrong with how it ended."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli import as_program
from tests.fuzz.case import Case, lay_out
from tests.fuzz.values import ESCAPES

COMPUTE_S, WAIT_S = 10, 10  # of the processor, and of the clock where it computes nothing
WAITING_S = 0.1  # of the processor in WAIT_S: less is waiting, more is a busy machine
MEMORY_BYTES = 2**30  # beyond what the process holds before
GOOD_CODES = (0, 2, 3, 4, 5)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """Raised by the alarm; no `except Exception` catches it."""


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    code: int
    stdout: str
    stderr: str
    fault: str | None  # a traceback, a hang, too much memory
    seconds: float
    written: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def call(arguments: tuple[str, ...]) -> Ended:
    """The program's main with these arguments; its files are those of the current folder."""
    import orchestrator.cli.app as cli

    code, fault, begun = 0, None, time.monotonic()
    with as_program(arguments) as streams:
        try:
            with _limits():
                cli.main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except Hang:
            code, fault = 1, f"hang beyond {COMPUTE_S} s at {_place(sys.exc_info()[2])}"
        except MemoryError:
            code, fault = 1, f"memory beyond 1 GiB at {_place(sys.exc_info()[2])}"
        except BaseException as error:
            code, fault = 1, f"traceback: {type(error).__name__} at {_place(error.__traceback__)}: {str(error)[:120]!r}"
    return Ended(code, *streams.texts(), fault, time.monotonic() - begun)


def judge(case: Case, folder: Path) -> tuple[Ended, str | None]:
    """Lay a case out in an empty folder, call it there, and name what is wrong; None where nothing is."""
    lay_out(case, folder)
    before, there = Path.cwd(), _listing(folder)
    os.chdir(folder)
    try:
        with _Watch(folder) as watch, _no_training():
            ended = call(case.arguments)
    finally:
        os.chdir(before)
    fault = ended.fault or _fault_of(ended)
    if fault is None and watch.outside:
        fault = f"wrote outside: {watch.outside[0]}"
    if fault is None and ended.code and not case.writes and (left := _listing(folder) - there):
        fault = f"left behind: {min(left)}"
    return ended, fault


@contextlib.contextmanager
def _no_training() -> Iterator[None]:
    """An input that is good enough to be trained ends where Ray would start, or the packaged model be converted."""
    from orchestrator.errors import ClusterError
    from orchestrator.job import model_files
    from orchestrator.lifecycle import run

    def refuse(*_: Any) -> None:
        raise ClusterError("nothing is trained for an input")

    kept = run._train_on_ray, model_files._convert
    run._train_on_ray = model_files._convert = refuse
    try:
        yield
    finally:
        run._train_on_ray, model_files._convert = kept


def _fault_of(ended: Ended) -> str | None:
    if ended.code not in GOOD_CODES:
        return f"exit code {ended.code}"
    if "Traceback (most recent call last)" in ended.output:
        return "traceback printed"
    if ended.code and not ended.output.strip():
        return f"exit code {ended.code} without a word"
    for mark in ESCAPES:
        if mark in ended.output:
            return f"control character {mark!r} printed"
    return None


def _listing(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if not {".cache", ".orchestrator"} & set(path.parts)
    }


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """An alarm after COMPUTE_S of the processor or WAIT_S of the clock, and a ceiling for memory."""

    computed_s = time.process_time()

    def alarm(number: int, _: Any) -> None:
        nonlocal computed_s
        was, computed_s = computed_s, time.process_time()
        if number == signal.SIGPROF or computed_s - was < WAITING_S:  # else others use the machine
            raise Hang

    status = Path("/proc/self/status")
    held = re.search(r"VmData:\s+(\d+)", status.read_text()) if status.exists() else None
    old = resource.getrlimit(resource.RLIMIT_DATA)
    kept = {name: signal.signal(name, alarm) for name in (signal.SIGALRM, signal.SIGPROF)}
    try:
        if held:
            resource.setrlimit(resource.RLIMIT_DATA, (int(held[1]) * 1024 + MEMORY_BYTES, old[1]))
        signal.setitimer(signal.ITIMER_PROF, COMPUTE_S, 1)
        signal.setitimer(signal.ITIMER_REAL, WAIT_S, WAIT_S)  # again: one that is swallowed is not the last
        yield
    finally:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for name, handler in kept.items():
            signal.signal(name, handler)
        resource.setrlimit(resource.RLIMIT_DATA, old)


def _place(trace: Any) -> str:
    """The innermost line of our own code, and where below it the error was raised."""
    frames = traceback.extract_tb(trace)
    ours = [frame for frame in frames if re.search(r"/(orchestrator|strategies|clusters)/[^/]*", frame.filename)
            and "site-packages" not in frame.filename]  # fmt: skip
    shown = ours[-1] if ours else frames[-1]
    return f"{'/'.join(Path(shown.filename).parts[-2:])}:{shown.lineno}"


class _Watch:
    """Notes what Python opens for writing, makes, renames or removes outside a folder (an audit hook stays)."""

    current: _Watch | None = None

    def __init__(self, folder: Path) -> None:
        caches = [os.environ.get(name, "/nowhere") for name in ("XDG_CACHE_HOME", "HOME", "TMPDIR")]
        self.allowed = (str(folder), *caches, "/dev/null", "/dev/tty", "/proc/self")
        self.outside: list[str] = []

    def __enter__(self) -> _Watch:
        if not getattr(_Watch, "hooked", False):
            sys.addaudithook(_Watch.hook)
            _Watch.hooked = True  # type: ignore[attr-defined]
        _Watch.current = self
        return self

    def __exit__(self, *_: Any) -> None:
        _Watch.current = None

    @staticmethod
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        watch = _Watch.current
        if watch is None or event not in _EVENTS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        target = arguments[1] if event in ("os.rename", "os.symlink", "os.link") else arguments[0]
        if not isinstance(target, str | bytes | os.PathLike):
            return
        try:
            path = os.path.realpath(os.fsdecode(target))
        except (ValueError, OSError):
            return
        if not path.startswith(watch.allowed) and "/__pycache__" not in path:
            watch.outside.append(f"{event} {path[:200]}")


_EVENTS = frozenset(
    ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
)


def empty(folder: Path) -> None:
    """Remove what is in a folder, whatever it is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
