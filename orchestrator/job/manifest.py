"""Folders that are whole or not there: written beside their place, listed by size and SHA-256, then renamed.

    NAME/  ...files...  manifest.json ({"files": {name: {"bytes": n, "sha256": hex}}, ...})

Every file is fsynced and the manifest is written last, so a crash at any point leaves a folder that does not verify.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clusters.safe.locking import hold
from clusters.safe.reading import BadInput, open_regular, read_json
from clusters.safe.writing import sync, write_whole

NAME = "manifest.json"
_LOCK = ".lock"  # of a folder: its folders are made, renamed and removed by one process at a time, for a moment
_WRITING = ".writing"  # locked by the process that fills a temporary folder, as long as it lives


def write(folder: Path, **facts: Any) -> None:
    """List the files of `folder` in its manifest, with `facts` beside them; everything is on disk when it returns."""
    files = {file.name: _measure(file, sync=True) for file in sorted(folder.iterdir()) if file.name != _WRITING}
    write_whole(folder / NAME, json.dumps({**facts, "files": files}, indent=1))
    sync(folder)


def damage(folder: Path, required: Collection[str] = ()) -> str | None:
    """What is wrong with a folder that `write` listed; None when every file, those `required` among them, verifies."""
    try:
        listed = read_json(folder / NAME)
        files = listed.get("files") if isinstance(listed, dict) else None
        if not isinstance(files, dict) or not all(name and Path(name).name == name for name in files):
            return f"{NAME} lists no files"
        if missing := [name for name in required if name not in files]:
            return f"{NAME} does not list {missing[0]}"
        changed = [name for name, expected in files.items() if _measure(folder / name) != expected]
    except (BadInput, OSError) as error:
        return str(error)
    return f"{changed[0]} has changed" if changed else None


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to be filled and handed to `publish`; it is removed at the end.

    `remove_leftovers` knows by a lock in it that its process still lives.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    with ExitStack() as lives:
        with hold(final.parent / _LOCK):
            temporary.mkdir()
            lives.enter_context(hold(temporary / _WRITING, wait=False))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path, required: Collection[str]) -> None:
    """List and rename a filled folder.  A whole `final` that another process made first stays, a damaged one goes."""
    write(temporary)
    with hold(final.parent / _LOCK):
        if damage(final, required):
            remove(final)
            (temporary / _WRITING).unlink(missing_ok=True)
            os.rename(temporary, final)
    sync(final.parent)


def remove(path: Path) -> None:
    """Remove what lies at `path`, whatever it is; a link goes, what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(parent: Path) -> int:
    """Remove the temporary folders of processes that were killed; how many.  Those being written stay."""
    if not any(parent.glob("*.tmp-*")) or not os.access(parent, os.W_OK):
        return 0
    with hold(parent / _LOCK):
        folders = [path for path in parent.glob("*.tmp-*") if path.is_dir() and not path.is_symlink()]
        leftovers = [folder for folder in folders if not _is_being_written(folder)]
        for folder in leftovers:
            shutil.rmtree(folder, ignore_errors=True)
    return len(leftovers)


def _is_being_written(folder: Path) -> bool:
    if not (folder / _WRITING).exists():
        return False
    try:
        with hold(folder / _WRITING, wait=False) as taken:
            return not taken
    except OSError:
        return True  # another user's


def _measure(file: Path, sync: bool = False) -> dict[str, Any]:
    with open_regular(file) as stream:
        measured: dict[str, Any] = {"bytes": os.fstat(stream.fileno()).st_size}
        measured["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        if sync:
            os.fsync(stream.fileno())
    return measured
