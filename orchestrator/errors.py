"""Everything that can go wrong and is not our bug.

    OrchestratorError            exit code
    ├── JobError                 2   the job file, its data or its model: the user fixes the job
    │   └── MissingExtra         2   a package this verb needs is not installed
    ├── NothingFits              3   no plan fits the machines
    ├── ClusterError             4   Ray or a machine: cannot connect, cannot start
    └── RunFailed                5   training started and failed; `resume` continues from the last checkpoint
        ├── Diverged             5   the loss stopped being a number
        ├── HardwareChanged      5   a machine is not as it was planned for
        └── Stopped              5   stopped on request, and saved

Exit code 1 is left to bugs, which end in a traceback.  A message says what is wrong with the value seen, then what to
do.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from clusters.safe.masking import masked
from clusters.safe.reading import BadInput
from strategies.techniques import libraries

# Which extra of pyproject.toml brings a package that is loaded late.
EXTRAS = {
    **dict.fromkeys(("torch", "ray", "transformers", "peft", "datasets", "safetensors", "mlflow", "numpy"), "train"),
    **dict.fromkeys(("pyarrow", "huggingface_hub", "rouge_score", "sacrebleu", "sklearn", "regex"), "train"),
    **dict.fromkeys(("optuna", "matplotlib", "jinja2"), "train"),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client", "aiohttp"), "train"),
    "gguf": "quickstart",
    "xllamacpp": "serve",
    "lm_eval": "eval",
    **libraries.EXTRAS,
    "kubernetes": "k8s",
}


class OrchestratorError(Exception):
    """Base of the tree; its text is meant for a person, is printed without a traceback, and shows no password."""

    exit_code = 1
    again = False  # whether the same work may succeed on a second try

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(masked(one) if isinstance(one, str) else one for one in arguments))


_NAMES_KEY = re.compile(r"([a-z]+(?:\.[a-z_]+)+)(?=:? )")  # of the job file, at the beginning of a sentence


class Mistake(str):
    """A mistake as a person reads it, with its parts for a program: where it is, what stands there, what to do."""

    line: int | None
    key: str | None
    value: object
    fix: str | None

    def __new__(
        cls, text: str, line: int | None = None, key: str | None = None, value: object = None, fix: str | None = None
    ) -> "Mistake":
        self = super().__new__(cls, text)
        self.line, self.key, self.value, self.fix = line, key, value, fix
        return self

    @classmethod
    def of(cls, text: str) -> "Mistake":
        """A sentence as a mistake.  What is wrong stands before the first `; ` or `. `, behind it what to do."""
        if isinstance(text, cls):
            return text
        named, parts = _NAMES_KEY.match(text), re.split(r"; |\. ", text, maxsplit=1)
        return cls(text, key=named and named[1], fix=parts[1] if len(parts) > 1 else None)

    def with_text(self, text: str) -> "Mistake":
        """The same mistake in other words."""
        return Mistake(text, self.line, self.key, self.value, self.fix)

    def parts(self) -> dict[str, object]:
        return {"line": self.line, "key": self.key, "value": self.value, "fix": self.fix, "text": str(self)}


class JobError(OrchestratorError):
    """One or more mistakes in a job; all that were found, one a line."""

    exit_code = 2

    def __init__(self, mistakes: str | Sequence[str]) -> None:
        found = map(Mistake.of, [mistakes] if isinstance(mistakes, str) else mistakes)
        self.mistakes = [mistake.with_text(masked(mistake)) for mistake in found]
        super().__init__("\n".join(self.mistakes))


@contextmanager
def bad_input_as_job_error(key: str = "") -> Iterator[None]:
    """Turn a BadInput of the block into a JobError whose text begins with `key`."""
    try:
        yield
    except BadInput as error:
        raise JobError(f"{key}: {error}" if key else str(error)) from None


class MissingExtra(JobError):
    """A package of an extra is missing; the command line makes it of the ImportError that shows it."""

    def __init__(self, package: str) -> None:
        extra = EXTRAS.get(package, "train")
        super().__init__(
            f"this needs the package {package!r}, which is not installed. Type: pip install"
            f" 'finetune-orchestrator[{extra}]' (in a clone of the project: pip install -e '.[{extra}]')"
        )


class NothingFits(OrchestratorError):
    exit_code = 3


class ClusterError(OrchestratorError):
    exit_code = 4


class RunFailed(OrchestratorError):
    exit_code = 5


class Stopped(RunFailed):
    """No failure: the user asked for it."""


class HardwareChanged(RunFailed):
    """A machine is not the one the plan was made for: it is probed and planned again."""


class Diverged(RunFailed):
    """The loss of a step, or a gradient of it, is NaN or infinite; `step` counts from 0."""

    def __init__(self, step: int, sample_ids: Sequence[int], has_loss: bool = False) -> None:
        self.step, self.sample_ids, self.has_loss = step, list(sample_ids), has_loss
        shown = ", ".join(str(sample) for sample in self.sample_ids[:20])
        way = "Lower train.learning_rate or train.max_grad_norm, or set model.dtype: float32"
        if step == 0 and not has_loss:  # weights whose loss is a number are numbers
            way = "Nothing was trained before it: the weights hold no finite numbers, or the type is too narrow. Fetch"
            way += " the model again, or set model.dtype: float32"
        text = f"the loss of step {step + 1} is not a number (samples {shown})"
        if has_loss:
            text = f"a gradient of step {step + 1} is not a number, though its loss is (samples {shown})"
        super().__init__(f"{text}. {way}; `inspect --row N` shows a sample")

    def __reduce__(self) -> tuple[type, tuple[int, list[int], bool]]:  # crosses process borders with its fields
        return type(self), (self.step, self.sample_ids, self.has_loss)
