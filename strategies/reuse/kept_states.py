"""Where hidden states of samples lie between epochs: in the host's memory, or in a file without a name.

Legend: L tokens of a document, H hidden size.
"""

from __future__ import annotations

import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

_LEFT_BYTES = 2 * 2**30  # of a disk, for checkpoints and for others


class KeptStates(Protocol):
    """Hidden states (L, H) of samples, by the samples' numbers; one that is not there is computed again."""

    num_bytes: int

    def __contains__(self, number: int) -> bool: ...

    def put(self, number: int, states_LH: torch.Tensor) -> None:
        """Keep a copy on the host."""
        ...

    def get(self, number: int) -> torch.Tensor | None:
        """What was kept, on the host; None where it is not there or not what was kept."""
        ...

    def expect(self, numbers: Sequence[int]) -> None:
        """These are asked for next."""
        ...

    def clear(self) -> None: ...


class StatesInMemory:
    """In the memory of this process."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}
        self.num_bytes = 0

    def __contains__(self, number: int) -> bool:
        return number in self._kept

    def put(self, number: int, states_LH: torch.Tensor) -> None:
        self._kept[number] = states_LH.to("cpu", copy=True)
        self.num_bytes += states_LH.nbytes

    def get(self, number: int) -> torch.Tensor | None:
        return self._kept.get(number)

    def expect(self, numbers: Sequence[int]) -> None:
        """Nothing to do: they are here."""

    def clear(self) -> None:
        self._kept.clear()
        self.num_bytes = 0


@dataclass(frozen=True)
class _Entry:
    """Where in the file a sample's states stand, and what they are."""

    begin: int
    shape: torch.Size
    dtype: torch.dtype
    crc: int


class StatesOnDisk:
    """In a file of `folder` that has no name: it is gone however this process ends.

    Read and written rather than mapped, so that a bad block or a full disk is an error here and no signal that ends the
    process.  Bytes that are not those that were written are as good as none.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        """`note` takes a sentence for the user.  Raises OSError where no file can be made there."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._note = note
        self._entries: dict[int, _Entry] = {}
        self._is_full = False
        self.num_bytes = 0

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def put(self, number: int, states_LH: torch.Tensor) -> None:
        if self._is_full:
            return
        bytes_ = states_LH.detach().to("cpu").contiguous().view(torch.uint8).numpy().data.cast("B")
        try:
            free = os.fstatvfs(self._descriptor)
            if free.f_bavail * free.f_frsize < _LEFT_BYTES + len(bytes_):
                raise OSError("the disk is almost full")
            _write(self._descriptor, bytes_, self.num_bytes)
        except OSError as error:
            self._is_full = True
            self._note(
                f"frozen layers: no further results are kept, of {len(self._entries)} samples they are ({error})"
            )
            return
        self._entries[number] = _Entry(self.num_bytes, states_LH.shape, states_LH.dtype, zlib.crc32(bytes_))
        self.num_bytes += len(bytes_)

    def get(self, number: int) -> torch.Tensor | None:
        if (entry := self._entries.get(number)) is None:
            return None
        states_LH = torch.empty(entry.shape, dtype=entry.dtype)
        bytes_ = states_LH.view(torch.uint8).numpy().data.cast("B")
        try:
            _read(self._descriptor, bytes_, entry.begin)
            is_as_written = zlib.crc32(bytes_) == entry.crc
        except OSError:
            is_as_written = False
        if is_as_written:
            return states_LH
        del self._entries[number]
        self._note(f"frozen layers: what was kept of sample {number} cannot be read back; it is computed again")
        return None

    def expect(self, numbers: Sequence[int]) -> None:
        """The kernel reads them ahead, where it takes such advice."""
        if hasattr(os, "posix_fadvise"):
            for entry in (self._entries[number] for number in numbers if number in self._entries):
                size = entry.shape.numel() * entry.dtype.itemsize
                os.posix_fadvise(self._descriptor, entry.begin, size, os.POSIX_FADV_WILLNEED)

    def clear(self) -> None:
        self._entries.clear()
        os.ftruncate(self._descriptor, 0)
        self.num_bytes, self._is_full = 0, False


def _write(descriptor: int, bytes_: memoryview, begin: int) -> None:
    done = 0
    while done < len(bytes_):
        done += os.pwrite(descriptor, bytes_[done:], begin + done)


def _read(descriptor: int, bytes_: memoryview, begin: int) -> None:
    """Raises OSError where the file ends before."""
    done = 0
    while done < len(bytes_):
        found = os.preadv(descriptor, [bytes_[done:]], begin + done)
        if not found:
            raise OSError(f"the file ends at byte {begin + done}")
        done += found
