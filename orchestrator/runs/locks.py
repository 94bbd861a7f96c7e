"""Who holds a folder: a lock of the kernel on its `.lock` file, gone however its holder ends.

A reader asks with F_OFD_GETLK, which takes nothing: no reader ever makes a driver's attempt fail.  Locks of the open
file description, not of the process: a driver may ask about its own folder without losing it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import JobError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where runs are read and none is made
    fcntl = None

NAME = ".lock"
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process
_ASK, _TAKE = getattr(fcntl, "F_OFD_GETLK", None), getattr(fcntl, "F_OFD_SETLK", None)


class FolderLocked(OSError):
    """Another process holds the folder; the text says which."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder` inside the block.  Raises Held at once where another does, OSError where it cannot be written."""
    if fcntl is None:
        raise JobError("runs are made on Linux; on Windows in WSL2: type `wsl --install`, then install this there")
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            if _TAKE is None:  # no Linux: readers take the lock for a moment there
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                fcntl.fcntl(descriptor, _TAKE, _flock(fcntl.F_WRLCK))
        except (BlockingIOError, PermissionError) as error:
            raise FolderLocked(holder(folder)) from error
        with contextlib.suppress(OSError):  # a full disk: it is held all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process holds `folder`."""
    if fcntl is None:
        return False
    try:
        with (folder / NAME).open("rb") as stream:
            if _ASK is None:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
            answer = fcntl.fcntl(stream, _ASK, _flock(fcntl.F_RDLCK))
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks: nobody could have taken one
        return False
    return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK


def holder(folder: Path) -> str:
    """Who wrote itself into the lock last, for a message."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return f"process {int(values['pid'])} on {values['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _flock(kind: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)
