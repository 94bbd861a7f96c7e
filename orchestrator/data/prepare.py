"""The job's data section -> tokenised datasets on disk, made once and found again by content."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.data.counts import likeness_notices, loss_notice, loss_refusal, reading_notices
from orchestrator.data.data_files import DataFiles
from orchestrator.data.dataset import DamagedCache, Dataset, build_all, cache_key
from orchestrator.data.readers.files import digest, num_lines
from orchestrator.data.readers.sources import digest_of, fetched, rows_of, skipped_of, sources_of
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rows.row import Row
from orchestrator.data.samples import options_for, renderer_for, template_text
from orchestrator.errors import JobError
from orchestrator.job import manifest
from orchestrator.job.job_file import Job
from orchestrator.job.sections.training import HeldOutFraction, Source
from orchestrator.progress.updates import listener, report

_ROWS_A_REPORT = 256
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.model")


@dataclass(frozen=True)
class Prepared:
    """Training and held-out samples, and where they lie."""

    train: Dataset
    held_out: Dataset | None
    files: DataFiles
    cached: bool


def cache_beside(runs: Path) -> Path:
    """Where the tokenised rows of the runs in a folder lie: two runs on the same rows share them."""
    return runs / ".cache" / "data"


def prepare_data(job: Job, model_folder: Path, max_length: int, cache: Path, say: Callable[[str], None]) -> Prepared:
    """Read, check, render and tokenise the job's rows, or find that this was done before.

    Raises JobError with the broken rows, the missing files or the template's trouble.
    """
    data = job.spec.data
    if removed := manifest.remove_leftovers(cache):
        say(f"removed the leftovers of {removed} killed preparations in {cache}")
    maker = _Maker(job, model_folder, max_length, cache, say)
    train_folder = maker.make(data.train, "data.train")
    train = Dataset.load(train_folder)
    _report(job, train, "data.train", say)
    files = DataFiles(str(model_folder), str(train_folder), chat_template=template_text(job))
    files = replace(files, **digests(job))
    held_out = None
    if isinstance(data.eval, HeldOutFraction):
        files = replace(files, split=data.eval.split, seed=job.spec.train.seed)
        train, held_out = train.split(data.eval.split, job.spec.train.seed)
    elif data.eval is not None:
        eval_folder = maker.make(data.eval, "data.eval")
        files = replace(files, eval=str(eval_folder))
        held_out = Dataset.load(eval_folder)
        _report(job, held_out, "data.eval", say)
    train.statistics.repeated = train.num_repeated()
    if held_out is not None:
        train.statistics.held_out = held_out.overlap(train)
        train.statistics.leaked = held_out.leaks(train)
        held_out.statistics.repeated = held_out.num_repeated()
    for line in likeness_notices(asdict(train.statistics), "data.train"):
        say(line)
    weights = [source.weight for source, _ in sources_of(job, data.train, "data.train")]
    if any(weight != 1 for weight in weights):
        files = replace(files, weights=weights, seed=job.spec.train.seed)
        train = train.mix(weights, job.spec.train.seed)
    return Prepared(train, held_out, files, maker.num_made == 0)


def _report(job: Job, data: Dataset, key: str, say: Callable[[str], None]) -> None:
    """Report rows and files that are not used.  Raises JobError where too much is lost without data.truncate."""
    statistics = asdict(data.statistics)
    if not job.spec.data.truncate and (refusal := loss_refusal(statistics, key)):
        raise JobError(refusal)
    notice = loss_notice(statistics, key)
    skipped = skipped_of(job, getattr(job.spec.data, key.removeprefix("data.")), key)
    for line in ([notice] if notice else []) + reading_notices(statistics, key) + skipped:
        say(line)


def digests(job: Job) -> dict[str, Any]:
    """The digests of the job's data files, for data.json."""
    stated = {"train": job.spec.data.train, "eval": job.spec.data.eval}
    return {
        f"{name}_digest": digest_of(job, value, f"data.{name}")
        for name, value in stated.items()
        if value is not None and not isinstance(value, HeldOutFraction)
    }


def datasets(files: DataFiles) -> tuple[Dataset, Dataset | None]:
    """Training and held-out samples.  Raises DamagedCache."""
    data = Dataset.load(Path(files.train))
    held_out = Dataset.load(Path(files.eval)) if files.eval else None
    if files.split:
        assert files.seed is not None  # stands beside it
        data, held_out = data.split(files.split, files.seed)
    return data.mix(files.weights, files.seed or 0) if files.weights else data, held_out


def _told(sources: Iterable[Iterable[Row]], total: int | None) -> Iterator[Iterator[Row]]:
    """The rows of each source, which as they are read tell how far that is."""
    done = 0

    def told(rows: Iterable[Row]) -> Iterator[Row]:
        nonlocal done
        for row in rows:
            done += 1
            if done % _ROWS_A_REPORT == 0:
                report("tokenising", done, None if total is None else max(total, done))
            yield row

    for rows in sources:
        yield told(rows)


def _num_rows(sources: list[tuple[Source, list[Path]]]) -> int | None:
    """How many rows there are to read, where somebody is told and lines say it."""
    if listener() is None:
        return None
    total = 0
    for source, files in sources:
        counts = [num_lines(file) for file in files]
        if not files or None in counts:
            return None
        total += min(sum(count or 0 for count in counts), source.max_samples or sys.maxsize)
    return total


class _Maker:
    """Makes datasets for one job; the tokenizer is loaded only when something must be tokenised."""

    def __init__(self, job: Job, model_folder: Path, max_length: int, cache: Path, say: Callable[[str], None]) -> None:
        self.job, self.model_folder, self.max_length, self.cache, self.say = job, model_folder, max_length, cache, say
        self.num_made = 0
        self._renderer: Renderer | None = None

    def make(self, value: Any, key: str) -> Path:
        """The folder of the tokenised samples of one data key."""
        sources = fetched(sources_of(self.job, value, key), key)
        folder = self.cache / self._name(sources)
        if folder.exists() or folder.is_symlink():
            try:
                Dataset.load(folder)
                return folder
            except DamagedCache as error:
                self.say(f"{key}: the tokenised rows in {folder} are damaged ({error.damage}); they are made again")
        self._renderer = self._renderer or renderer_for(self.job, self.model_folder)
        self.say(f"tokenising {key} ...")
        rows = _told((rows_of(self.job, source, files) for source, files in sources), _num_rows(sources))
        build_all(rows, self._renderer, options_for(self.job, self.max_length), folder)
        self.num_made += 1
        return folder

    def _name(self, sources: list[tuple[Source, list[Path]]]) -> str:
        data = self.job.spec.data
        tokenizer = sorted({file for pattern in _TOKENIZER_FILES for file in self.model_folder.glob(pattern)})
        template = template_text(self.job)
        return cache_key(
            [(source.model_dump(exclude={"weight"}), [digest(file) for file in files]) for source, files in sources],
            [data.roles, data.ignore_columns, data.train_on_eos],
            self.job.spec.train.seed if any(source.max_samples for source, _ in sources) else None,
            [(file.name, digest(file)) for file in tokenizer if file.is_file()],
            [template, data.system_prompt, data.assistant_only_loss, data.completion_only_loss],
            options_for(self.job, self.max_length).deciding,
        )
