"""The command line within this process: all that the program does once Python and its libraries are loaded."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)


@dataclass(frozen=True)
class Done:
    """As subprocess tells of a process that has ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Streams:
    """What a call has printed so far."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO(), io.BytesIO()
        modes = "strict", "backslashreplace"  # as Python opens them
        self.out, self.err = (
            io.TextIOWrapper(kept, "utf-8", mode, write_through=True)
            for kept, mode in zip(self._bytes, modes, strict=True)
        )

    def texts(self) -> tuple[str, str]:
        out, err = (kept.getvalue().decode("utf-8", "replace") for kept in self._bytes)
        return out, err


@contextlib.contextmanager
def as_program(arguments: tuple[str, ...]) -> Iterator[Streams]:
    """Inside the block arguments and streams are the call's; signal handlers are put back after it."""
    import orchestrator.cli.app as cli

    if isinstance(cli.app, typer.Typer):
        cli.app = typer.main.get_command(cli.app)  # as each call of the program builds it, once for all
    streams = Streams()
    kept = sys.argv, sys.stdout, sys.stderr
    handlers = {name: signal.getsignal(name) for name in _SIGNALS}
    sys.argv, sys.stdout, sys.stderr = ["orchestrator", *arguments], streams.out, streams.err
    try:
        yield streams
    finally:
        sys.argv, sys.stdout, sys.stderr = kept
        for name, handler in handlers.items():
            signal.signal(name, handler)


def called(*arguments: object, cwd: os.PathLike[str] | str, check: int | None = None, **environment: str) -> Done:
    """How a call in the folder `cwd` ended; `check` is the exit code that it must have.

    For verbs that start no cluster: Ray and a worker want a process of their own.
    """
    import orchestrator.cli.app as cli

    before, variables, level = Path.cwd(), dict(os.environ), logging.getLogger().level
    os.environ |= environment
    os.chdir(cwd)
    try:
        with as_program(tuple(map(str, arguments))) as streams, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)
        logging.getLogger().setLevel(level)
    done = Done(code, *streams.texts())
    assert check in (None, code), done.output
    return done
