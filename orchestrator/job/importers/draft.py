"""A job that is being made of another tool's configuration: its settings, and what has no counterpart."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

_SECRET = re.compile(r"(hf|hub|wandb|comet|swanlab|api|access)\w*_(token|key)|api_key|password|secret")
Group = Literal["default", "planner", "matters"]
GROUPS: dict[Group, str] = {
    "matters": "not supported, and matters",
    "planner": "decided by the planner",
    "default": "ignored, as it is the default here",
}


@dataclass(frozen=True)
class Setting:
    """A value of the job, and the words that say where it came from."""

    value: Any
    origin: str
    line: int | str | None = None  # of the other tool's file; None for its default


@dataclass(frozen=True)
class Left:
    """A key without a counterpart, and what happens instead."""

    key: str
    value: Any
    line: int | str
    instead: str


@dataclass
class JobDraft:
    """What has been read so far of one file, whose keys are dotted where they are nested."""

    tool: str
    values: Mapping[str, Any]  # of the whole file, as it is written
    flat: Mapping[str, Any]  # key -> value
    lines: Mapping[str, int | str]  # key -> line of the file
    source: Path  # folder of the file
    target: Path  # folder of the job
    settings: dict[str, Setting] = field(default_factory=dict)
    left: dict[Group, list[Left]] = field(default_factory=lambda: {group: [] for group in GROUPS})
    unset: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # their keys that had a say

    def set(self, key: str, value: Any, their_key: str) -> None:
        """Take a value for our `key` from theirs; the last one counts, and all that had a say are named."""
        self.used.add(their_key)
        line, before = self.line(their_key), self.settings.get(key)
        origin = f"{their_key}, line {line}" if isinstance(line, int) else their_key
        self.settings[key] = Setting(value, f"{before.origin}; {origin}" if before else origin, line)

    def set_default(self, key: str, value: Any) -> None:
        """Take the tool's own default for a key that its file does not set."""
        if key not in self.settings:
            self.settings[key] = Setting(value, f"default of {self.tool}")

    def leave(self, group: Group, their_key: str, instead: str) -> None:
        """Note a key without a counterpart."""
        value = "***" if _SECRET.search(their_key) else self.flat.get(their_key)
        self.left[group].append(Left(their_key, value, self.line(their_key), instead))

    def drop(self, key: str, group: Group, instead: str) -> None:
        """Take a setting out again; each of their keys that had a say is listed, unless it is the tool's default."""
        setting = self.settings.pop(key)
        if setting.line is not None:
            for one in setting.origin.split("; "):
                self.leave(group, one.partition(",")[0], instead)

    def line(self, their_key: str) -> int | str:
        """The line of a key, of what it stands in where it has none of its own."""
        while their_key and their_key not in self.lines:
            their_key = their_key.rpartition(".")[0]
        return self.lines.get(their_key, 1)

    def path(self, text: Any) -> Any:
        """A path of their file as the job has to spell it; what is no path here stays as it is, a name of the hub."""
        if isinstance(text, Path):
            return self.beside(text)
        if not isinstance(text, str) or not text.strip() or Path(text).is_absolute() or text.startswith("~"):
            return text
        found = self._found(text)
        if found is None and text.startswith(("./", "../")):  # no name of the hub
            found = self.source / text
        return self.beside(found) if found else text

    def is_here(self, text: str) -> bool:
        """Whether a path of their file is one of this machine."""
        return self._found(text) is not None

    def _found(self, text: str) -> Path | None:
        return next((place / text for place in (self.source, Path.cwd()) if (place / text).exists()), None)

    def beside(self, path: Path) -> str:
        """A path as the job spells it: relative where it lies not far from the job."""
        try:
            relative = Path(os.path.relpath(path, self.target)).as_posix()
        except ValueError:  # on another drive of Windows
            return str(path.resolve())
        return str(path.resolve()) if relative.startswith("../../..") else relative

    def document(self) -> dict[str, Any]:
        """The settings as a job file's sections."""
        document: dict[str, Any] = {}
        for key, setting in self.settings.items():
            section, _, name = key.rpartition(".")
            (document.setdefault(section, {}) if section else document)[name] = setting.value
        return document
