"""What documents were worth to an objective, added up over micro-batches and workers (TRL's metrics).

Legend: D documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from strategies.objectives.contract import RowKind


class RewardTotals:
    """Totals of rewards since they were last taken: sums and numbers of good and bad answers, pairs in order."""

    num_totals = 5

    def __init__(self, rows: RowKind) -> None:
        self._of_pairs = rows == "pairs"
        self._totals: torch.Tensor | None = None

    def clear(self) -> None:
        self._totals = None

    def count(self, rewards_D: torch.Tensor, is_good_D: torch.Tensor | None = None) -> None:
        """Add documents; of pairs, whose `is_good_D` is None, the chosen one stands before the rejected one."""
        of_pairs = is_good_D is None
        if is_good_D is None:
            is_good_D = torch.arange(len(rewards_D), device=rewards_D.device) % 2 == 0
        chosen_D, rejected_D = rewards_D * is_good_D, rewards_D * ~is_good_D
        right = (chosen_D[0::2] > rejected_D[1::2]) if of_pairs else is_good_D[:0]
        found = (chosen_D.sum(), is_good_D.sum(), rejected_D.sum(), (~is_good_D).sum(), right.sum())
        new = torch.stack([one.to(rewards_D) for one in found])
        self._totals = new if self._totals is None else self._totals + new

    def take(self) -> list[float]:
        """The totals, to be added up over workers; they begin anew."""
        totals, self._totals = self._totals, None
        return [0.0] * self.num_totals if totals is None else totals.tolist()

    def metrics_of(self, totals: Sequence[float]) -> dict[str, float]:
        """Metrics by the totals of all workers; those of answers of which there were none are left out."""
        chosen, num_chosen, rejected, num_rejected, num_right = totals
        found = {"rewards/chosen": chosen / num_chosen} if num_chosen else {}
        found |= {"rewards/rejected": rejected / num_rejected} if num_rejected else {}
        if len(found) == 2:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        if self._of_pairs and num_chosen:
            found["rewards/accuracies"] = num_right / num_chosen
        return found
