"""The files of one run: their names, and how they are read and written.

runs/<run_id>/
  recorded.json      what it was begun with: the text of the files marked *, and digests of the model's files
  job.yaml *         the job as submitted        origin.json *     folder its relative paths start from
  capability.json *  the machines                plan.json *       every `auto` resolved, with reasons
  data.json *        the tokenised samples       events.jsonl      what happened, one JSON object a line
  result.json *      quality before and after    ending.json       what of the end is done: card, bank, tracking
  metrics/           modules of the job's own metrics
  rejected.jsonl     rows skipped under data.strict: false
  verify.json        two ways to the same answer, how far apart they were: of the run's end and of `verify`
  lm_eval.json       scores of public tasks, of `evaluate --tasks`
  bench-serve.json   what `bench --serve` measured, for the report
  checkpoints/  adapter/ (or model/)  logs/      stop, replan      ask a running job to save, and end or plan again

A folder is a run by its recorded.json, which is written first and at once, under the lock.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar

from clusters.safe.masking import masked_values
from clusters.safe.reading import BadInput, checked_path, kind_of, name_mistake, open_regular, printable, read_json
from orchestrator.data.data_files import DataFiles
from orchestrator.errors import JobError
from orchestrator.runs import events, json_files, locks
from orchestrator.runs import record as recorded
from orchestrator.runs.events import Event, StateChange, StepReport
from orchestrator.runs.recorded_folder import Folder
from strategies.export import EXPORT_FOLDERS

if TYPE_CHECKING:  # a list of runs reads no plan and no machines
    from clusters.capability import ClusterCapability
    from orchestrator.planning.plan import Plan
    from orchestrator.runs.json_files import RunResult

E = TypeVar("E", bound=Event)
_EVENT = b'{"event": "'  # as every line is written
_CHUNK_BYTES = 2**16
_LEFTOVERS = ("logs", "package")  # of a start that was killed, beside hidden files


class RunFolder(Folder):
    """One run on disk.  Only rank 0 and the driver write events, each line in one write."""

    kind = "run"
    document = "job.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop"

    @property
    def replan_file(self) -> Path:
        return self.path / "replan"

    def exported(self) -> Path | None:
        """What the run hands back, once it is there."""
        return next((self.path / name for name in EXPORT_FOLDERS if (self.path / name).is_dir()), None)

    # Beginning and finding.

    @property
    def has_started(self) -> bool:
        """Whether this program began a run here; a folder with a job file of one's own is none."""
        if kind := recorded.read_kind(self.path):
            return kind == self.kind
        if _is_file(self.path / recorded.NAME):  # it is damaged
            is_search = _is_file(self.path / "search.yaml")
            return is_search == (self.kind == "search")
        return _is_file(self.path / self.document) and _is_file(self.path / "origin.json")  # an older version's

    @classmethod
    @contextlib.contextmanager
    def take(cls, output_dir: Path, name: str, run_id: str | None = None) -> Iterator[Self]:
        """Hold a folder named after the job and the moment, or as `run_id` says, inside the block.

        It is new, or nothing was begun in it, or `has_started`: somebody was faster.  Raises JobError where another
        process holds it, or where it holds files that are no run's.
        """
        if run_id:
            cls.check_free(output_dir, run_id)
        run = cls(_made(output_dir, name, run_id))
        with run.lock():
            run._must_be_free()  # still, now that nobody else can begin it
            run.logs.mkdir(exist_ok=True)
            yield run

    @classmethod
    def create(cls, output_dir: Path, name: str, run_id: str | None = None) -> Self:
        """A new folder, not locked; its writer locks it again."""
        with cls.take(output_dir, name, run_id) as run:
            return run

    @classmethod
    def check_free(cls, output_dir: Path, run_id: str) -> None:
        """Raises JobError for a name that no new run can have, or under which files of one's own lie."""
        if mistake := name_mistake(run_id):
            raise JobError(f"--run-id {mistake}")
        cls(output_dir / run_id)._must_be_free()

    def _must_be_free(self) -> None:
        """Raises JobError where a folder that is no run holds what a start that was killed does not leave."""
        if self.has_started or not self.path.is_dir():
            return
        listed = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if foreign := [name for name in listed if name not in _LEFTOVERS]:
            raise JobError(
                f"{self.path} holds files that are no {self.kind}'s ({recorded.few(foreign)}): nothing is written"
                " there. Choose another name"
            )

    @classmethod
    def find(cls, name: str, output_dir: Path) -> Self:
        """A run by path, by id, by the start of its id when that is unambiguous, or `latest`."""
        if found := cls.at(name) or cls.at(name, output_dir):
            return found
        runs = cls.all(output_dir)
        if name == "latest" and runs:
            return runs[-1]
        matching = [run for run in runs if run.run_id.startswith(name)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise JobError(
                f"{name}: {len(matching)} runs in {output_dir} begin with it:"
                f" {', '.join(run.run_id for run in matching[:5])}"
            )
        known = ", ".join(run.run_id for run in runs[-5:]) or "none yet"
        raise JobError(
            f"{printable(name)}: no such run in {output_dir}. Runs there: {known}. --runs names another folder"
        )

    @classmethod
    def at(cls, path: str | Path, folder: Path = Path()) -> Self | None:
        """The run in a folder, None where there is none.  Raises JobError for what can be no path."""
        try:
            found = cls(checked_path(path, checked_path(folder)))
            return found if kind_of(found.path) == "folder" and found.has_started else None
        except BadInput as error:
            raise JobError(f"run {error}") from None

    @classmethod
    def all(cls, output_dir: Path) -> list[Self]:
        """Every run in a folder, oldest first."""
        return cls.in_order(run for run in map(cls, folders_in(output_dir)) if run.has_started)

    @classmethod
    def in_order(cls, runs: Iterable[Self]) -> list[Self]:
        """Oldest first."""
        return sorted(runs, key=lambda run: (run.began_ns(), run.run_id))

    def began_ns(self) -> int:
        """When it began, in nanoseconds since the epoch."""
        for name in (self.document, recorded.NAME):  # the record is written again
            with contextlib.suppress(OSError):
                return (self.path / name).stat().st_mtime_ns
        return 0

    # Files that decide the run: read as they were recorded.

    def plan(self) -> Plan:
        """Raises JobError."""
        from orchestrator.planning.plan import Plan

        return Plan.from_json(self._require_text("plan.json"), str(self.path / "plan.json"))

    def capability(self) -> ClusterCapability:
        """The machines; none where none were looked at.  Raises JobError."""
        text = self._text("capability.json")
        return json_files.parse_capability(text or "{}", str(self.path / "capability.json"))

    def data(self) -> DataFiles:
        """Where model and samples lie; the model where a project that was moved has it now.  Raises JobError."""
        found = json_files.parse_record(DataFiles, self._require_text("data.json"), str(self.path / "data.json"))
        if not Path(found.model).exists() and (moved := self._base_beside()):
            return replace(found, model=str(moved))
        return found

    def _base_beside(self) -> Path | None:
        """The base's folder as the adapter names it, from its own place; None where it names none that is there."""
        if (exported := self.exported()) is None:
            return None
        try:
            folder = (exported / read_json(exported / "adapter_config.json")["base_model_name_or_path"]).resolve()
        except (BadInput, OSError, LookupError, TypeError):
            return None
        return folder if folder.is_dir() else None

    def result(self) -> RunResult | None:
        """What the run came to, None while it has no result.  Raises JobError."""
        text = self._text("result.json")
        return None if text is None else json_files.parse_result(text, str(self.path / "result.json"))

    def before(self) -> json_files.Quality | None:
        """What a machine that does not train measured of the base model.  Raises JobError."""
        text = self._text("before.json")
        return None if text is None else json_files.parse_quality(text, str(self.path / "before.json"))

    def readers(self) -> list[Callable[[], Any]]:
        """A call for each file that must be readable: a run that was sent elsewhere has not all of them here."""
        here = {"plan.json": self.plan, "data.json": self.data}
        there = [read for name, read in here.items() if os.path.lexists(self.path / name)]
        return [self.job, self.capability, self.result, *there]

    # Other files.

    def record(self, event: Event) -> None:
        """Append an event, its time set, without passwords.  Raises RunFailed: the disk is full."""
        self.append("events.jsonl", masked_values(event.to_json()) | {"time": round(time.time(), 3)})

    def record_stop(self, request: str = "asked", step: int | None = None) -> None:
        """Record that the run ends before its last step: it was asked to stop, or to plan again."""
        state = "stopped" if request == "asked" else "replanning"
        self.record(StateChange(state, step=self.last_step() if step is None else step))

    def append(self, name: str, values: Mapping[str, Any]) -> None:
        """Append one JSON object as a line, in one write.  Raises RunFailed where the disk is full."""
        try:
            with (self.path / name).open("ab+") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - 1))
                is_cut = size > 0 and stream.read(1) != b"\n"  # by a power loss: what follows is a line of its own
                stream.write((b"\n" if is_cut else b"") + json.dumps(values).encode() + b"\n")
        except OSError as error:
            raise self._cannot_write(name, error) from error

    def events(self, offset: int = 0, num_bytes: int = -1) -> tuple[list[Event], int]:
        """Complete events from a byte offset on, of about `num_bytes` or to the end, and the offset after them."""
        with self._event_stream() as stream:
            stream.seek(offset)
            content = stream.read(num_bytes)
            while num_bytes > 0 and b"\n" not in content and (more := stream.read(num_bytes)):
                content += more
        return events.parse_lines(content), offset + content.rfind(b"\n") + 1

    def end_of_events(self) -> int:
        """The byte offset after the last complete event, read from the end."""
        with self._event_stream() as stream:
            end = stream.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - _CHUNK_BYTES)
                stream.seek(start)
                if found := stream.read(end - start).rfind(b"\n") + 1:
                    return start + found
                end = start
        return 0

    def events_of(self, kind: type[E], *kinds: type[E]) -> list[E]:
        """Every event of some kinds, in their order; lines that say to be of another kind are passed over unread."""
        wanted = (kind, *kinds)
        begins = tuple(b'{"event": "%s"' % one.kind.encode() for one in wanted)
        found: list[E] = []
        with self._event_stream() as stream:
            for line in stream:
                if line.endswith(b"\n") and (line.startswith(begins) or not line.startswith(_EVENT)):
                    event, _ = events.parse_line(line[:-1])
                    found += [event] if isinstance(event, wanted) else []
        return found

    @contextlib.contextmanager
    def _event_stream(self) -> Iterator[BinaryIO]:
        """Empty where there is no file.  Raises JobError."""
        file = self.path / "events.jsonl"
        try:
            with io.BytesIO() if kind_of(file) is None else open_regular(file) as stream:
                yield stream
        except (OSError, BadInput) as error:
            raise JobError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def steps(self) -> dict[int, StepReport]:
        """The last report of each step; a resumed run reports some steps twice."""
        return {event.step: event for event in self.events_of(StepReport)}

    def last_step(self) -> int:
        """The highest step that was reported, 0 before the first."""
        return max((event.step for event in self.events_of(StepReport)), default=0)

    # State.

    def state(self, by_events: str | None = None) -> str:
        """running | finished | stopped | failed | interrupted (the driver died).

        `by_events` is its `state_by_events`, from where the events were read already.
        """
        if self.is_locked():
            return "running"
        return state_without_driver(self.state_by_events() if by_events is None else by_events)

    def state_by_events(self) -> str:
        """The last state written down; a driver that died has written none."""
        changes = self.events_of(StateChange)
        return changes[-1].state if changes else "interrupted"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the driver while a run is alive; the kernel lets go of it however the driver ends."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.hold(self.path))
            except locks.FolderLocked as holder:
                raise JobError(
                    f"{self.run_id} is running ({holder}); `orchestrator stop {self.run_id}` stops it first"
                ) from None
            except OSError as error:
                raise JobError(f"{self.path} cannot be written: {error.strerror}") from None
            yield

    def is_locked(self) -> bool:
        """Whether a driver is alive; asking takes nothing from it."""
        return locks.is_held(self.path)


def folders_in(output_dir: Path) -> Iterator[Path]:
    """The folders that may be runs, as `RunFolder.at` names them.  Raises JobError."""
    output_dir = output_dir.expanduser()  # `~` reaches a cluster unexpanded: the home is the one there
    if not output_dir.is_dir():
        return
    try:
        folder = checked_path(output_dir)
        listed = list(os.scandir(folder))
    except (OSError, BadInput) as error:
        raise JobError(f"{output_dir} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for entry in listed:
        if not entry.is_symlink() and entry.name.isascii():
            if entry.is_dir():
                yield folder / entry.name
            continue
        with contextlib.suppress(BadInput):  # a loop of links is no run, a name that is no text neither
            if kind_of(found := checked_path(entry.path)) == "folder":
                yield found


def runs_and_others(output_dir: Path) -> tuple[list[RunFolder], list[Path]]:
    """The runs in a folder, oldest first, and what may be a search.  Raises JobError."""
    runs, others = [], []
    for path in folders_in(output_dir):
        if (run := RunFolder(path)).has_started:
            runs.append(run)
        elif any(os.path.lexists(path / name) for name in (recorded.NAME, "search.yaml")):
            others.append(path)
    return RunFolder.in_order(runs), others


def _is_file(path: Path) -> bool:
    try:
        return kind_of(path) == "file"
    except BadInput:  # what cannot be looked into
        return False


def _made(output_dir: Path, name: str, run_id: str | None) -> Path:
    """A folder for a new run; with `run_id` it may be there."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [run_id] if run_id else [f"{name}-{stamp}{end}" for end in ("", *(f"-{n}" for n in range(2, 100)))]
    for path in (output_dir / name for name in names):
        try:
            path.mkdir(parents=True, exist_ok=run_id is not None)
        except FileExistsError:
            if run_id:
                raise JobError(f"{path} is a file; choose another name") from None
            continue
        except OSError as error:
            raise JobError(f"checkpoint.output_dir: {output_dir} cannot be written: {error.strerror}") from None
        return path
    raise JobError(f"checkpoint.output_dir: {output_dir} already holds a hundred runs started in this second")


def state_without_driver(by_events: str) -> str:
    """The state of a run that no process holds, of the last one written down."""
    return by_events if by_events != "running" else "interrupted"


def utc(seconds: float) -> str:
    """Seconds since the epoch as local time to the second."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
