"""The rows that are specific to new data: read often in a step, rarely in a background (TF-IDF, arXiv 2510.15103).

    score of a row = its share of the step's reads * log((N + 1) / (n + 1))

N tokens of the background, of which n read the row.  The paper counts background batches; tokens are counted here, so
that the score does not depend on how rows are laid out in batches.  For the same reason a step counts the reads of
tokens whose outputs matter to the loss, which padding's do not.
"""

from __future__ import annotations

import torch


class BackgroundCounts:
    """How many tokens of the background read each row, kept as tensors that a checkpoint holds."""

    def __init__(self, num_rows: int) -> None:
        self.readers_M = torch.zeros(num_rows, dtype=torch.int32)
        self.num_tokens = torch.zeros((), dtype=torch.int64)

    def add(self, rows: torch.Tensor) -> None:
        """What each of some tokens reads, (tokens, rows a token)."""
        self.readers_M += torch.bincount(rows.flatten().cpu(), minlength=len(self.readers_M)).int()
        self.num_tokens += len(rows)

    def rareness(self, places_P: torch.Tensor) -> torch.Tensor:
        """log((N + 1) / (n + 1)) of some rows."""
        return torch.log((self.num_tokens + 1) / (self.readers_M[places_P] + 1).double())


def most_specific(
    places_P: torch.Tensor, reads_P: torch.Tensor, background: BackgroundCounts, most: int
) -> torch.Tensor:
    """At most so many of the rows, in ascending order: those with the highest scores, of equal ones the first."""
    if len(places_P) <= most:
        return places_P
    score_P = reads_P.double() / reads_P.sum() * background.rareness(places_P)
    best = score_P.sort(descending=True, stable=True).indices[:most]
    return places_P[best].sort().values
