"""A job's base model and data as the bank knows them; adapters of runs and folders into the bank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.safe.cache import cache_folder
from clusters.safe.reading import BadInput
from orchestrator.data.readers.sources import digest_of
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.job.job_file import Job, parse_job
from orchestrator.runs.condition import export_of, require_finished
from orchestrator.runs.json_files import Values
from orchestrator.runs.run_folder import RunFolder
from strategies.adapter_bank.adapter import Adapter, Unusable, fits_base
from strategies.adapter_bank.card import AdapterCard, BankError
from strategies.adapter_bank.evidence import Evidence, gather
from strategies.adapter_bank.folders import base_digest
from strategies.adapter_bank.store import Bank
from strategies.model.tensor_file import read_header

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Base:
    """The model that a bank's adapters belong to."""

    name: str
    folder: Path
    digest: str


@dataclass(frozen=True)
class Neighbours:
    """The bank's adapters for one base with what is known of their data."""

    cards: list[AdapterCard]
    evidence: list[Evidence]
    adapters: list[Adapter]

    def at(self, places: Iterable[int]) -> Neighbours:
        """Some of them."""
        places = list(places)
        return Neighbours(
            [self.cards[place] for place in places],
            [self.evidence[place] for place in places],
            [self.adapters[place] for place in places],
        )


def base_of(name: str, job_folder: Path, say: Callable[[str], None] = lambda text: None) -> Base:
    """Raises JobError where the model is not to be had."""
    folder = model_files.locate(name, job_folder, None, say)
    return Base(name, folder, base_digest(folder))


def bank_of(job: Job, create: bool = False) -> Bank:
    """The bank that a job names.  Raises BankError where there is none."""
    return Bank(job.path(job.spec.bank.path), create)


def train_digest(job: Job) -> str | None:
    """Of the bytes of the training files, as they are now."""
    return digest_of(job, job.spec.data.train, "data.train")


def evidence_of(data: Any, base: Base) -> Evidence:
    """What the bank keeps of a tokenised data set."""
    return gather((data.tokens(row) for row in range(len(data))), embeddings(base.folder))


def embeddings(folder: Path) -> Any:
    """The base model's token embeddings, V x H in fp32.  Raises JobError where they are not found."""
    from safetensors import SafetensorError, safe_open

    try:
        for file in sorted(folder.glob("*.safetensors")):
            if name := next((name for name in read_header(file) if name.endswith(_EMBEDDINGS)), None):
                with safe_open(file, framework="pt") as tensors:
                    return tensors.get_tensor(name).float().numpy()
    except (BadInput, SafetensorError) as error:
        raise JobError(f"model.model_name_or_path: {error}") from None
    raise JobError(f"model.model_name_or_path: {folder} has no token embeddings under a known name")


def add_run(bank: Bank, run: RunFolder, name: str | None = None, licence: str | None = None) -> AdapterCard:
    """A finished run's adapter, with its data and its scores.

    Raises JobError for a run that is not finished or whose files are damaged or gone, BankError, Unusable.
    """
    from orchestrator.data.prepare import datasets

    finished = require_finished(run)
    exported, files, result, job = finished.exported, finished.data, finished.result, finished.job
    if not export_of(run).is_adapter:
        raise JobError(f"{run.run_id} trained with method {job.spec.method.type}, which produces no adapter")
    if job.spec.build_objective().is_by_document:
        raise JobError(
            f"{run.run_id} trained by {job.spec.objective.type}, and the bank compares adapters by the loss of answers'"
            " tokens"
        )
    folder = Path(files.model)
    base = Base(job.spec.model.model_name_or_path, folder, base_digest(folder))
    adapter = Adapter(exported)
    fits_base(adapter, base.folder)
    data, _ = datasets(files)
    measured = {"before": result.before, "after": result.after}
    scores = {when: numbers for when, one in measured.items() if one and (numbers := _numbers(one.values))}
    card = AdapterCard(
        name=name or bank.name_of(exported) or run.run_id,
        base_name=base.name,
        base_digest=base.digest,
        data_digest=files.train_digest,  # as they were: the files may have changed since
        scores=scores,
        licence=licence or job.spec.bank.licence,
        method=job.spec.method.type,
        run_id=run.run_id,
    )
    return bank.add(exported, card, evidence_of(data, base))


def add_folder(
    bank: Bank, folder: Path, model: str | None, data: Path | None, name: str | None, licence: str | None
) -> AdapterCard:
    """An adapter of another program.  Without its `data` it can be merged, but `adapt` does not find it."""
    adapter = Adapter(folder)
    asked = model or adapter.base_name
    if not asked:
        raise JobError(f"{folder} does not say which model it belongs to; give --model")
    if model and adapter.base_name and _last(model) != _last(adapter.base_name):
        raise JobError(
            f"{folder} was trained on {adapter.base_name}, not on {model}: an adapter fits its own base model only"
        )
    base = base_of(asked, Path())
    fits_base(adapter, base.folder)
    evidence = evidence_of(_tokenised(asked, data), base) if data else None
    name = name or bank.name_of(folder) or folder.name
    card = AdapterCard(name=name, base_name=asked, base_digest=base.digest, licence=licence)
    return bank.add(folder, card, evidence)


def _tokenised(model: str, data: Path) -> Any:
    from orchestrator.data.prepare import prepare_data
    from orchestrator.planning.planner import resolve_max_length

    asked = {"model": {"model_name_or_path": model}, "data": {"train": str(data.absolute())}}
    job = parse_job(json.dumps(asked), Path())
    folder = model_files.locate(model, Path())
    max_length, _ = resolve_max_length(job.spec, model_files.read_config(folder))
    return prepare_data(job, folder, max_length, cache_folder("data"), lambda text: None).train


def _numbers(values: Values) -> dict[str, float]:
    """The scores and the counts of a quality."""
    return {key: value for key, value in values.items() if type(value) in (int, float)}


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def neighbours(bank: Bank, base: Base, say: Callable[[str], None] = lambda text: None) -> Neighbours:
    """Those of the bank for this base whose data is known, their bytes checked; what is damaged is said and not used.

    Raises JobError where there are none.
    """
    contents, near, damaged = bank.contents(), [], [str(one) for one in bank.contents().damaged]
    for card in contents.cards:
        if card.base_digest == base.digest and card.evidence_digest:
            try:
                near.append((card, bank.evidence(card), _checked(bank.adapter(card), base)))
            except (BankError, Unusable) as error:
                damaged.append(f"{card.name}: {error}")
    near = [one for one in near if one[1].is_like(near[0][1])]
    if damaged:
        say("\n".join([*damaged, f"{len(damaged)} damaged are not used; `orchestrator bank verify --repair`"]))
    if not near:
        bases = ", ".join(sorted({card.base_name for card in contents.cards}))
        have = f"its {len(contents.cards)} adapters are for {bases}" if bases else "it is empty"
        other = "Give a job of that model (`bank evaluate --job FILE`), or add: " if bases else ""
        raise JobError(
            f"{bank.path} has no adapter of {base.name} whose data is known: {have}. {other}`bank add RUN` after a run,"
            " or bank.add: true in its job"
        )
    return Neighbours([card for card, _, _ in near], [one for _, one, _ in near], [one for _, _, one in near])


def _checked(adapter: Adapter, base: Base) -> Adapter:
    fits_base(adapter, base.folder)
    return adapter
