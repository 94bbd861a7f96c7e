"""Where model and tokenised samples of a run lie: the contents of data.json, by which workers find the same samples."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataFiles:
    """Folders of the model and of the tokenised samples, and digests of the files that the samples were made of."""

    model: str
    train: str
    eval: str | None = None
    split: float | None = None  # of the training rows, where those are held out
    seed: int | None = None  # of the split and of the weights
    weights: list[float] | None = None  # of the sources of train, where they are not all 1
    train_digest: str | None = None
    eval_digest: str | None = None
    chat_template: str | None = None  # where the job states one
    statistics: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)
