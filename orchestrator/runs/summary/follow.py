"""A run's summary in memory, which grows with its events: of a file of any length only what was appended is read."""

from __future__ import annotations

import os

from clusters.safe.reading import BadInput, open_regular
from orchestrator.errors import JobError
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.lines import read_lines
from orchestrator.runs.summary.summary_file import summary_and_end


class FollowedRun:
    """The events of a run so far; `update` reads what came since."""

    def __init__(self, run: RunFolder) -> None:
        """Raises JobError for events that cannot be read."""
        self.run = run
        self.summary, self.num_bytes = EventSummary(), 0
        self._inode = 0
        self._begin()

    def update(self) -> bool:
        """Whether there was anything new.  Raises JobError."""
        try:
            found = (self.run.path / "events.jsonl").stat()
        except OSError:
            return False
        if found.st_ino != self._inode or found.st_size < self.num_bytes:  # another file took its place
            self._begin()
            return True
        return found.st_size > self.num_bytes and self._read_on()

    def _begin(self) -> None:
        self.summary, self.num_bytes = summary_and_end(self.run)
        file = self.run.path / "events.jsonl"
        self._inode = file.stat().st_ino if file.exists() else 0

    def _read_on(self) -> bool:
        before, file = self.num_bytes, self.run.path / "events.jsonl"
        try:
            with open_regular(file) as stream:
                stream.seek(self.num_bytes, os.SEEK_SET)
                for content, lines in read_lines(stream):
                    self.num_bytes += len(content)
                    self.summary.add(lines)
        except (OSError, BadInput) as error:
            raise JobError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return self.num_bytes > before
