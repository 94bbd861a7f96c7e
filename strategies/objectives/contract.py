"""The contract between a training objective and everything that plans or runs it.

An objective is a frozen dataclass whose fields are its options, with TRL's names.  It says which rows it trains on and
whether it needs a reference; of whole documents it is a pure function from the log-probabilities of a micro-batch's
answers, or from the scores of whole documents, to a loss of each sample.  The loss of a step is the mean over its
samples: what micro-batches and workers add up is exact, whatever their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # torch is for workers; planning must not load it
    import torch

RowKind = Literal["answers", "pairs", "labelled"]
Head = Literal["tokens", "score"]  # what a model ends in: its output matrix, or one number a document in its place
DOCUMENTS: dict[RowKind, int] = {"answers": 1, "pairs": 2, "labelled": 1}  # of a sample


@dataclass(frozen=True)
class AnswerScores:
    """What a model makes of the answers of a micro-batch's documents: of each pair the chosen one, then the rejected.

    Legend: D documents, N pairs.
    """

    logps_D: torch.Tensor  # sums of log p(token | the document so far) over the answer
    tokens_D: torch.Tensor  # of the answers
    reference_D: torch.Tensor | None  # `logps_D` of the reference; None where the objective needs none
    is_good_D: torch.Tensor | None = None  # of labelled rows
    divergence: float = 0.0  # of labelled rows: mean log ratio of answers to other questions, at least 0

    def pairs(self, values_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of the chosen and of the rejected documents (N,)."""
        return values_D[0::2], values_D[1::2]

    @property
    def log_ratios_D(self) -> torch.Tensor:
        """How much likelier an answer is than under the reference."""
        assert self.reference_D is not None
        return self.logps_D - self.reference_D

    @property
    def mean_logps_D(self) -> torch.Tensor:
        """A token."""
        return self.logps_D / self.tokens_D


@dataclass(frozen=True)
class DocumentScores:
    """What a model with a score makes of a micro-batch's documents: of each pair the chosen one, then the rejected.

    Legend: D documents, N pairs.
    """

    scores_D: torch.Tensor
    margins_N: torch.Tensor | None = None  # of rows that say how much better the chosen answer is

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the chosen and of the rejected documents (N,)."""
        return self.scores_D[0::2], self.scores_D[1::2]


class ObjectiveDefaults(Protocol):
    """What holds for an objective that does not say otherwise: objectives inherit this and state what differs."""

    rows: ClassVar[RowKind] = "pairs"
    needs_reference: ClassVar[bool] = False
    learns_prompts: ClassVar[bool] = False  # its likelihood term is of the chosen document's prompt as well
    head: ClassVar[Head] = "tokens"
    reads_margins: ClassVar[bool] = False  # rows may say by how much the chosen answer is the better one

    @property
    def needs_divergence(self) -> bool:
        """Whether its loss asks how far the model has moved from the reference, on answers to other questions."""
        return False

    @property
    def nll_weight(self) -> float:
        """Of the mean loss of the step's chosen tokens, which is added to the loss of pairs."""
        return 0.0

    @property
    def is_by_document(self) -> bool:
        """Whether its loss is of whole documents; else it is the mean over supervised tokens."""
        return self.rows != "answers"

    @property
    def writes_text(self) -> bool:
        """Whether what is trained can still write answers; else it gives documents a score."""
        return self.head == "tokens"

    @property
    def num_documents(self) -> int:
        """Of a sample."""
        return DOCUMENTS[self.rows]


@runtime_checkable
class Objective(ObjectiveDefaults, Protocol):
    """A training objective: what each has to say for itself beside the defaults."""

    name: ClassVar[str]  # as the registry and the job file spell it


@runtime_checkable
class DocumentObjective(Objective, Protocol):
    """An objective over the likelihood of whole documents."""

    def losses(self, scores: AnswerScores) -> torch.Tensor:
        """The loss of each sample (N,), without the likelihood term of `nll_weight`."""
        ...

    def rewards(self, scores: AnswerScores) -> torch.Tensor:
        """What each document is worth to it (D,), as TRL counts it."""
        ...


@runtime_checkable
class ScoreObjective(Objective, Protocol):
    """An objective over the scores of whole documents."""

    def score_losses(self, scores: DocumentScores) -> torch.Tensor:
        """The loss of each sample (N,)."""
        ...
