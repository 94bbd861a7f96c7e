"""Supervised fine-tuning: the mean loss of the answers' tokens (strategies/step/supervised_logits.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.objectives.contract import ObjectiveDefaults, RowKind


@dataclass(frozen=True)
class Sft(ObjectiveDefaults):
    """Supervised fine-tuning: answers are trained token by token."""

    name: ClassVar[str] = "sft"
    rows: ClassVar[RowKind] = "answers"
