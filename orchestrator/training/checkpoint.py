"""Checkpoints that are complete or not there.

    step-00000040/  weights.safetensors  optimizer.safetensors  state.json  manifest.json (size and SHA-256 of each)

Written into a temporary folder, every file fsynced, the manifest last, then renamed; a reader takes the newest folder
whose manifest verifies, so a crash at any point leaves the one before.  Holds the trained weights only: adapter-sized
for an adapter method.  safetensors and JSON, never pickle.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clusters.safe.writing import new_folder
from orchestrator.job import manifest
from orchestrator.runs.checkpoints import complete, verify
from strategies.step.state import restore
from strategies.train_setup import TrainSetup, TrainState


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return self.state["step"]

    def restore(self, setup: TrainSetup, with_optimizer: bool = True) -> None:
        """Load weights, and optimizer state unless only the weights are wanted, into `setup`."""
        weights = load_file(self.path / "weights.safetensors")
        if weights.keys() != setup.all_names:
            raise ValueError(f"{self.path} holds other weights than this method trains")
        moments: dict[str, dict[str, torch.Tensor]] = {}
        if with_optimizer:
            for name, value in load_file(self.path / "optimizer.safetensors").items():
                weight, _, key = name.rpartition("//")
                moments.setdefault(weight, {})[key] = value
        restore(setup, TrainState(weights, moments))


def save(folder: Path, held: TrainState, state: dict[str, Any]) -> Path:
    """Write a checkpoint of `held` with `state` (JSON-able, holds `step`) and return its folder.

    Raises OSError when it cannot be written; then nothing of it is left and the one before is untouched.
    """
    final = folder / f"step-{state['step']:08d}"
    moments = {f"{name}//{key}": value for name, own in held.moments.items() for key, value in own.items()}
    try:
        # What is replaced is the same step, saved by the run that was interrupted after it.
        with new_folder(final, replaces=True) as temporary:
            save_file(held.weights, temporary / "weights.safetensors")
            save_file(_without_aliases(moments), temporary / "optimizer.safetensors")
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            _verify_written(temporary / "weights.safetensors", held.weights)
            _verify_written(temporary / "optimizer.safetensors", moments)
            manifest.write(temporary, step=state["step"])
    except SafetensorError as error:  # how that library says that the disk is full
        raise OSError(error.args[0] if error.args else "cannot be written") from error
    return final


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every byte verifies; damaged ones are named through `warn` and skipped."""
    return next(filter(None, (read(path, warn) for path in reversed(complete(folder)))), None)


def read(path: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint at `path` if it verifies."""
    if damage := verify(path):
        warn(f"checkpoint {path.name} is damaged ({damage}); using the one before")
        return None
    return Checkpoint(path, json.loads((path / "state.json").read_text()))


def prune(folder: Path, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one named `best`, and what a crash left half-written."""
    for path in [*complete(folder)[:-keep], *folder.glob("*.tmp-*")]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)


def _without_aliases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, a copy wherever two are one piece of memory: safetensors writes no such pair.

    An 8-bit optimizer keeps one table of its code for all weights.
    """
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if address and address in seen else tensor
        seen.add(address)
    return found


def _verify_written(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read back what was written: a digest of bytes that the disk got wrong would vouch for them."""
    with safe_open(file, framework="pt") as written:
        for name, tensor in tensors.items():
            if not torch.equal(_bytes(written.get_tensor(name)), _bytes(tensor)):
                raise OSError(errno.EIO, f"{file.name} is not on the disk as it was written ({name})")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bits, so that a NaN equals itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
