"""The paths that a person names, checked once: every verb and every key of a job file resolves its path here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from clusters.safe.reading import checked_path, kind_of, printable, read_text
from clusters.safe.writing import write_whole
from orchestrator.errors import JobError, bad_input_as_job_error

Kind = Literal["file", "folder", "any", "new file", "new folder"]


def resolve_path(value: str | os.PathLike[str], key: str, folder: Path = Path(), kind: Kind = "any") -> Path:
    """The absolute path of what `key` (a job-file key or an option) names, relative to `folder`.

    `kind` is what must lie there; a new file or folder may be written and so need not exist; `any` is a file or a
    folder.  Raises JobError for what is not there, of another kind (a FIFO, a device), or not to be read.
    """
    new, wanted = kind.startswith("new "), kind.removeprefix("new ")
    with bad_input_as_job_error(key):
        path = checked_path(value, folder)
        found = kind_of(path)
    if found is None and not new:
        raise JobError(f"{key}: {printable(str(path))} does not exist. Relative paths start at {folder.resolve()}")
    if found is not None and found not in (("file", "folder") if kind == "any" else (wanted,)):
        give = "file or a folder" if kind == "any" else wanted
        raise JobError(f"{key}: {printable(str(path))} is a {found}; give a {give}")
    if found and not os.access(path, os.R_OK | (os.X_OK if found == "folder" else 0)):
        raise JobError(f"{key}: {printable(str(path))} cannot be read: permission denied")
    return path


def write_text_file(path: Path, text: str, key: str) -> None:
    """Write a file whole or not at all, in the place of one that is there.  Raises JobError."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise JobError(f"{key}: {printable(str(path))} cannot be written: {error.strerror or error}") from None


def read_text_file(value: str | os.PathLike[str], key: str, folder: Path = Path()) -> str:
    """The text of the file that `key` names.  Raises JobError."""
    path = resolve_path(value, key, folder, "file")
    with bad_input_as_job_error(key):
        return read_text(path)
