"""Run a program that may hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_within(
    command: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The program's exit status and output; after `timeout_s` it is killed with all it started.

    `subprocess.run(timeout=...)` waits without limit for the program it has killed, and a program stuck in a broken
    driver never dies.  Raises subprocess.TimeoutExpired, and OSError when the program cannot be started.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, so that its children can be killed too
        env=env,
        cwd=cwd,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException:  # also Ctrl-C, which a program in a group of its own does not hear
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
