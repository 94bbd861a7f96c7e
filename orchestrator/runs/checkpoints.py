"""Which checkpoints of a run are whole, found without torch, and which is handed back.

step-00000040/  weights.safetensors  optimizer.safetensors  state.json  manifest.json (size and SHA-256 of each)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.job import manifest

FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class ChosenStep:
    """The step whose weights are handed back, and why not the one that was best."""

    step: int
    eval_loss: float | None
    instead_of: str | None = None
    reason: str | None = None

    @property
    def text(self) -> str | None:
        """What to say of it; None where it is what was trained last, without a choice."""
        if self.reason:
            loss = "" if self.eval_loss is None else f" ({self.eval_loss:.4f})"
            return (
                f"checkpoint {self.instead_of} has the lowest held-out loss, but cannot be used ({self.reason}):"
                f" handing back step {self.step}{loss}, the next best"
            )
        if self.eval_loss is None:
            return None
        return f"handing back step {self.step}, which has the lowest held-out loss"


def complete(folder: Path) -> list[Path]:
    """Checkpoints in a folder that were written to their end, the oldest first."""
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when every file has its size and SHA-256."""
    if not path.is_dir():
        return "is gone"
    return manifest.damage(path, FILES)


def whole(folder: Path) -> Path | None:
    """The newest checkpoint whose every byte verifies."""
    return next((path for path in reversed(complete(folder)) if verify(path) is None), None)


def choose(folder: Path, losses: Mapping[int, float], last_step: int) -> ChosenStep:
    """The step of the lowest held-out loss whose weights are there: those of `last_step` are in memory.

    `losses` are those measured on the way, by step; one that is no number is never the lowest.  Checkpoints are
    verified from the best on.
    """
    reason, best = None, None
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    for step, loss in sorted(finite.items(), key=lambda pair: (pair[1], pair[0])):
        path = folder / f"step-{step:08d}"
        best = best or path.name
        damage = None if step == last_step else verify(path)
        if damage is None:
            return ChosenStep(step, loss, best if reason else None, reason)
        reason = reason or damage
    return ChosenStep(last_step, losses.get(last_step), best, reason)
