"""What a server serves: runs, adapters and models by name, each with its base model; a bank is followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clusters.safe.reading import BadInput, checked_path, kind_of, read_json
from orchestrator.errors import JobError
from orchestrator.job import model_files
from orchestrator.runs.condition import require_finished, require_text
from orchestrator.runs.run_folder import RunFolder
from orchestrator.serving.engines.protocol import ServedModel
from strategies.adapter_bank.card import AdapterCard, BankError
from strategies.adapter_bank.folders import base_digest
from strategies.adapter_bank.store import Bank

BASE = "base"  # the name of the model that was not tuned; of a second one, base:NAME


@dataclass
class ServedBase:
    """A base model, and the run whose precision and device are used for it."""

    folder: str
    name: str  # as a user knows it
    run: str | None = None


class Catalog:
    """Models by name.  What is named must be there; of a followed bank, what cannot be served is reported once."""

    def __init__(self, bank: Bank | None, say: Callable[[str], None]) -> None:
        self.say = say
        self.bases: dict[str, ServedBase] = {}  # by digest; the first is `base`
        self._bank, self._follows = bank, False
        self._named: dict[str, ServedModel] = {}
        self._followed: dict[str, ServedModel] = {}
        self._stamp: object = None
        self._said: set[str] = set()

    @property
    def models(self) -> dict[str, ServedModel]:
        """All that is served now, with the bases of what was tuned."""
        found = self._named | self._followed
        tuned = {model.base for model in found.values() if model.folder}
        return {model.name: model for model in self._base_models() if model.base in tuned} | found

    def base_of(self, model: ServedModel) -> ServedBase:
        return next(base for base in self.bases.values() if base.folder == model.base)

    def add(self, name: str, runs: Path) -> None:
        """An adapter of the bank, a folder with an adapter or a model, or a finished run.  Raises JobError."""
        if self._bank and (card := _find(self._bank, name)):
            self._put(self._named, self._of_card(self._bank, card))
            return
        try:
            folder = checked_path(name)
            is_folder = kind_of(folder) == "folder"
        except BadInput as error:
            raise JobError(str(error)) from None
        if is_folder and any((folder / one).is_file() for one in ("adapter_config.json", "config.json")):
            self._put(self._named, self._of_folder(folder.absolute()))
        else:
            self._put(self._named, self._of_run(RunFolder.find(name, runs)))

    def follow(self) -> None:
        """Serve all that the bank holds, and what comes into it.  Raises BankError where it cannot be read."""
        self._follows = True
        self.refresh()

    def refresh(self) -> list[ServedModel]:
        """Look at the followed bank again; what is no longer served.  Raises BankError."""
        if not self._follows or self._bank is None or (stamp := _stamp(self._bank)) == self._stamp:
            return []
        contents, found = self._bank.contents(), {}
        problems = [f"damaged: {one}" for one in contents.damaged]
        for card in contents.cards:
            try:
                self._put(found, self._of_card(self._bank, card))
            except (JobError, BankError, OSError) as error:
                problems.append(f"{card.name} is not served: {error}")
        gone = [model for name, model in self._followed.items() if found.get(name) != model]
        self._followed, self._stamp = found, stamp
        for problem in problems:
            if problem not in self._said:
                self._said.add(problem)
                self.say(problem)
        return gone

    def _of_run(self, run: RunFolder) -> ServedModel:
        finished = require_finished(run)
        require_text(run, "it cannot be served as a chat model")
        spec, exported = finished.job.spec, finished.exported.absolute()
        base = self._base(finished.data.model, spec.model.model_name_or_path, str(run.path.absolute()))
        return ServedModel(run.run_id, base.folder, str(exported), _modified(exported), spec.data.system_prompt)

    def _of_folder(self, folder: Path) -> ServedModel:
        if not (folder / "adapter_config.json").is_file():
            base = self._base(str(folder), folder.name, is_whole=True)
            return ServedModel(folder.name, base.folder, None, _modified(folder))
        try:
            settings = read_json(folder / "adapter_config.json")
        except BadInput as error:
            raise JobError(str(error)) from None
        name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        if isinstance(settings, dict) and settings.get("task_type") == "SEQ_CLS":
            raise JobError(f"{folder} gives texts a score or a label (task_type SEQ_CLS) and writes none: not served")
        if not isinstance(name, str) or not name:
            raise JobError(f"{folder} does not say which model it belongs to (base_model_name_or_path)")
        base = self._base(str(model_files.locate(name, folder, None, self.say)), name)
        return ServedModel(folder.name, base.folder, str(folder), _modified(folder))

    def _of_card(self, bank: Bank, card: AdapterCard) -> ServedModel:
        folder = bank.folder(card.digest)
        if not (base := self.bases.get(card.base_digest)):
            where = model_files.locate(card.base_name, Path(), None, self.say)
            if base_digest(where) != card.base_digest:
                raise JobError(f"it was trained on another {card.base_name} than the one in {where}")
            base = self._base(str(where), card.base_name)
        return ServedModel(card.name, base.folder, str(folder), _modified(folder))

    def _base(self, folder: str, name: str, run: str | None = None, is_whole: bool = False) -> ServedBase:
        """The base in a folder; a copy of it serves adapters as well, and a model that is served whole only itself.

        A digest looks at parts of the files: two whole models may differ elsewhere, or in their templates alone.
        """
        here = Path(folder).resolve()
        base = next((one for one in self.bases.values() if Path(one.folder).resolve() == here), None)
        if base is None:
            key = str(here) if is_whole else base_digest(Path(folder))
            base = self.bases.setdefault(key, ServedBase(folder, name))
        base.run = base.run or run
        return base

    def _base_models(self) -> Iterator[ServedModel]:
        for number, base in enumerate(self.bases.values()):
            yield ServedModel(f"{BASE}:{base.name}" if number else BASE, base.folder)

    def _put(self, models: dict[str, ServedModel], model: ServedModel) -> None:
        if model.name == BASE:
            raise JobError(f"{model.folder}: is called {BASE}, as the model that was not tuned; rename it")
        other = self._named.get(model.name, model)
        if other != model:
            raise JobError(f"two models are called {model.name}: {other.folder} and {model.folder}; rename one")
        models[model.name] = model


def open_catalog(names: Sequence[str], runs: Path, bank: Bank | None, say: Callable[[str], None]) -> Catalog:
    """The models that a command names; of a bank all, where it names none.  Raises JobError, BankError."""
    catalog = Catalog(bank, say)
    for name in names:
        catalog.add(name, runs)
    if bank and not names:
        catalog.follow()
    if not catalog.models:
        raise JobError("there is nothing to serve: `orchestrator bank add RUN` puts an adapter into the bank")
    return catalog


def _find(bank: Bank, name: str) -> AdapterCard | None:
    return next((card for card in bank.contents().cards if card.name == name), None)


def _stamp(bank: Bank) -> object:
    """What changes when an adapter comes, goes or gets another card."""
    objects = bank.path / "objects"
    try:
        return sorted(
            (str(path), path.stat().st_mtime_ns) for path in (objects, *objects.glob("*"), *objects.glob("*/*"))
        )
    except OSError:  # one went while it was looked at
        return None


def _modified(folder: Path) -> int:
    return int(folder.stat().st_mtime)
