"""The files of one run: their names, and how they are read and written.

runs/<run_id>/
  job.yaml           the job as submitted        origin.json       folder its relative paths start from
  capability.json    the machines                plan.json         every `auto` resolved, with reasons
  data.json          the tokenised samples       events.jsonl      what happened, one JSON object a line
  result.json        quality before and after    rejected.jsonl    rows skipped under data.strict: false
  checkpoints/  adapter/ (or model/)  logs/      stop, replan      ask a running job to save, and end or plan again
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from clusters.masking import holds_secret, masked_values
from orchestrator.errors import JobError, RunFailed


class RunFolder:
    """One run on disk.  Only rank 0 and the driver write events, each line in one write."""

    marker = "job.yaml"  # a folder that holds it is a run

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_id(self) -> str:
        return self.path.name

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
        return next((self.path / name for name in ("adapter", "model") if (self.path / name).is_dir()), None)

    @classmethod
    def create(cls, output_dir: Path, name: str, run_id: str | None = None) -> Self:
        """A new folder named after the job and the moment, or as `run_id` says: one that nothing was begun in."""
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        names = [run_id] if run_id else [f"{name}-{stamp}{end}" for end in ("", *(f"-{n}" for n in range(2, 100)))]
        for path in (output_dir / name for name in names):
            try:
                path.mkdir(parents=True, exist_ok=run_id is not None)
            except FileExistsError:
                continue
            except OSError as error:
                raise JobError(f"checkpoint.output_dir: {output_dir} cannot be written: {error.strerror}") from None
            (path / "logs").mkdir(exist_ok=True)
            return cls(path)
        raise JobError(f"checkpoint.output_dir: {output_dir} holds a hundred runs of this second")

    @classmethod
    def find(cls, name: str, output_dir: Path) -> Self:
        """A run by path, by id, by the start of its id when that is unambiguous, or `latest`."""
        output_dir = output_dir.expanduser()  # `~` reaches a cluster unexpanded: the home is the one there
        for path in (Path(name), output_dir / name):
            if (path / cls.marker).is_file():
                return cls(path.resolve())
        runs = cls.all(output_dir)
        if name == "latest" and runs:
            return runs[-1]
        matching = [run for run in runs if run.run_id.startswith(name)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise JobError(
                f"{name}: {len(matching)} runs in {output_dir} start so: {', '.join(r.run_id for r in matching[:5])}"
            )
        known = ", ".join(run.run_id for run in runs[-5:]) or "none yet"
        raise JobError(f"{name}: no such run in {output_dir}. Runs there: {known}. --runs names another folder")

    @classmethod
    def all(cls, output_dir: Path) -> list[Self]:
        """Every run in a folder, oldest first."""
        if not output_dir.is_dir():
            return []
        runs = [cls(path.resolve()) for path in output_dir.iterdir() if (path / cls.marker).is_file()]
        return sorted(runs, key=lambda run: ((run.path / cls.marker).stat().st_mtime_ns, run.run_id))

    def write(self, name: str, text: str) -> None:
        """Write a file so that it is there whole or not at all; one that holds a password is its owner's alone."""
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.touch(0o600 if holds_secret(text) else 0o666)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    def read_json(self, name: str) -> Any | None:
        """A JSON file of the run, None while it is not there."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise JobError(f"{self.path / name}: is not JSON: {error}") from None

    def record(self, event: str, **fields: Any) -> None:
        """Append an event without passwords; `time` is seconds since the epoch.  Raises RunFailed: the disk is full."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **masked_values(fields)})
        try:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise RunFailed(
                f"{self.path / 'events.jsonl'} cannot be written: {error.strerror}. Free some space, then"
                f" `orchestrator resume {self.run_id}`"
            ) from error

    def events(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Complete events from a byte offset on, and the offset after them."""
        try:
            with (self.path / "events.jsonl").open("rb") as stream:
                stream.seek(offset)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], offset
        parsed = []
        for line in whole.split(b"\n"):
            with contextlib.suppress(ValueError):  # a line cut by a power loss, never the last complete one
                parsed.append(json.loads(line))
        return [event for event in parsed if isinstance(event, dict)], offset + len(whole) + len(newline)

    def steps(self) -> dict[int, dict[str, Any]]:
        """The last report of each step; a resumed run reports some steps twice."""
        return {event["step"]: event for event in self.events()[0] if event["event"] == "step"}

    def state(self) -> str:
        """running | finished | stopped | failed | interrupted (the driver died)."""
        if self.is_locked():
            return "running"
        state = self.state_by_events()
        return state if state != "running" else "interrupted"

    def state_by_events(self) -> str:
        """The last state written down; a driver that died has written none."""
        states = [event["state"] for event in self.events()[0] if event["event"] == "state"]
        return states[-1] if states else "interrupted"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the driver while a run is alive; the kernel lets go of it however the driver ends."""
        with (self.path / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise JobError(f"{self.run_id} is running; `orchestrator stop {self.run_id}` stops it first") from None
            yield

    def is_locked(self) -> bool:
        try:
            with (self.path / ".lock").open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def utc(seconds: float) -> str:
    """Seconds since the epoch as local time to the second."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
