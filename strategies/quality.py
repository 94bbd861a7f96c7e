"""What published runs say of a method's quality before anything was trained."""

from __future__ import annotations

from dataclasses import dataclass

_SAME_SIZE = 2.0  # times as many parameters or as few: beyond, a benchmark's score is another model's
LLAMA_3B = 3.2e9  # parameters of Llama-3.2-3B, the model of PEFT's MetaMathQA suite
MATHS = ("metamath", "gsm8k")  # what that suite trains on, and what it tests with


@dataclass(frozen=True)
class QualityPrior:
    """A method's score in a published run; a prior, never a promise.

    The scores of methods that were run side by side order them anywhere.  The number itself says something only of a
    model of the same size that learns the same kind of task.
    """

    score: float  # accuracy on the benchmark named in `source`, 0 .. 1
    uncertainty: float  # one standard deviation
    source: str
    num_parameters: float = LLAMA_3B  # of the model that was trained
    datasets: tuple[str, ...] = MATHS  # parts of the names of data sets with its kind of task

    def applies(self, num_parameters: float, data: str) -> bool:
        """Whether a model is of the same size class, and the data, by its name, of the same kind of task."""
        ratio = num_parameters / self.num_parameters
        return 1 / _SAME_SIZE <= ratio <= _SAME_SIZE and any(name in data.lower() for name in self.datasets)
