"""The data files of a folder: which are read, which belong to another split, and which are not read at all."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusters.safe.cache import cache_folder
from clusters.safe.reading import BadInput, read_json
from orchestrator.data.readers.columnar import write_selected
from orchestrator.data.readers.files import SUFFIXES, digest, kind_of_content, kind_of_name
from orchestrator.data.rows.formats import detect
from orchestrator.errors import JobError

# Names by which the Hugging Face hub recognises splits.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout", "holdout"), "test"),
}
_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_HELD_OUT = re.compile(r"(^|[_.-])(eval|validation|valid|val|dev|test)([_.-]|$)")
_DESCRIPTION_BYTES = 2**20
_ABOUT_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|metadata|config|package)\.json|cache-[\w-]+\.arrow|readme.*|license.*", re.I
)


@dataclass(frozen=True)
class Listing:
    """The files to read, in order, and a sentence for each reason why others are not."""

    files: tuple[Path, ...]
    skipped: tuple[str, ...] = ()


@dataclass
class _Seen:
    """The files below a folder: data files with the split in their names, the others by why they are not read."""

    data: list[tuple[Path, str | None]] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def sentences(self) -> tuple[str, ...]:
        return tuple(
            f"not read: {_count(names, reason)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            for reason, names in sorted(self.skipped.items())
        )


def list_folder(folder: Path, key: str, split: str | None) -> Listing:
    """The data files below `folder` that belong to `split`.

    `split` None: for data.train what is not named as another split, for data.eval validation files, else test files,
    else all.  Raises JobError where nothing is left, naming the splits that are there.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            return _list_saved_dict(folder, key, split)
        # data-....arrow, in old versions dataset.arrow
        if (folder / "state.json").is_file() and any(folder.glob("d*.arrow")):
            return _list_saved(folder, key)
        return _choose(_walk(folder, key, split), folder, key, split)
    except BadInput as error:
        raise JobError(f"{key}: {error}") from None
    except OSError as error:
        raise JobError(f"{key}: the folder {folder} cannot be read: {error.strerror or error}") from None


def split_of_name(file: Path) -> str | None:
    """train, validation or test, by the parts of a path, the file's own first; None where they name none or several."""
    for part in reversed(file.parts):
        found = {_SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLITS}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def check_split_of_file(file: Path, key: str, split: str | None) -> None:
    """Raise JobError where a source asks for a split of a single file that is not named so."""
    if split is None or _is_named_by(file.name, split) or split_of_name(Path(file.name)) == _SPLITS.get(split, split):
        return
    raise JobError(
        f"{key}: split: {split} is given for the file {file.name}, and a file has no splits. Remove `split`, or give a"
        " folder with one file a split"
    )


def _walk(folder: Path, key: str, split: str | None) -> _Seen:
    seen = _Seen()

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        root = Path(place)
        for name in sorted(folders):
            if _is_hidden(name):
                seen.skipped["hidden folder"].append(_relative(root / name, folder))
            elif (root / name).is_symlink():
                seen.skipped["link to a folder"].append(_relative(root / name, folder))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(names):
            file = root / name
            relative = file.relative_to(folder)
            if reason := _reason_to_skip(file, key):
                seen.skipped[reason].append(_relative(file, folder))
            elif split and split not in _SPLITS and any(_is_named_by(part, split) for part in relative.parts):
                seen.data.append((file, split))
            else:
                seen.data.append((file, split_of_name(relative)))
    seen.data.sort(key=lambda item: item[0])
    texts = [file for file, _ in seen.data if kind_of_name(file.name) == "txt"]
    if texts and len(texts) < len(seen.data):  # a note beside the rows
        seen.skipped["text file beside rows"] += [_relative(file, folder) for file in texts]
        seen.data = [item for item in seen.data if item[0] not in texts]
    return seen


def _reason_to_skip(file: Path, key: str) -> str | None:
    if _is_hidden(file.name):
        return "hidden file"
    if not file.exists():
        raise JobError(f"{key}: {file} is a link to a file that is not there. Fetch the file or remove the link")
    if not file.is_file():
        return "special file"
    if _ABOUT_DATA.fullmatch(file.name) or _is_description(file):
        return "file about the data"
    if kind_of_name(file.name) or (not file.suffix and kind_of_content(file) not in (None, "csv", "tsv")):
        return None
    return "file of another kind"


def _choose(seen: _Seen, folder: Path, key: str, split: str | None) -> Listing:
    if not seen.data:
        why = "".join(f"; {sentence}" for sentence in seen.sentences())
        raise JobError(f"{key}: the folder {folder} holds no {', '.join(SUFFIXES)} file{why}")
    labels = {label for _, label in seen.data}
    wanted = _SPLITS.get(split, split) if split else _default(labels, key)
    allowed = {wanted} | ({None} if wanted == "train" else set())
    files = [file for file, label in seen.data if wanted is None or label in allowed]
    for file, label in seen.data:
        if file not in files:
            seen.skipped[f"file of the split {label}" if label else "file of no split"].append(_relative(file, folder))
    if not files:
        found = ", ".join(sorted(label or "files of no split" for label in labels))
        raise JobError(
            f"{key}: the folder {folder} has no file of the split {wanted}; it has: {found}. Name one:"
            f" {{path: {folder.name}, split: {next(iter(sorted(label for label in labels if label)), 'train')}}}"
        )
    return Listing(tuple(files), seen.sentences())


def _default(labels: set[Any], key: str) -> str | None:
    """The split that is read where the job names none; None = all."""
    if key != "data.eval":
        return "train"
    return next((label for label in ("validation", "test") if label in labels), None)


def _list_saved_dict(folder: Path, key: str, split: str | None) -> Listing:
    """A split of what `datasets.DatasetDict.save_to_disk` wrote."""
    names = _field(read_json(folder / "dataset_dict.json"), "splits", folder / "dataset_dict.json")
    kinds = {name: _SPLITS.get(name, name) for name in names}
    wanted = split or _default(set(kinds.values()), key) or "train"
    name = wanted if wanted in kinds else next((name for name, kind in kinds.items() if kind == wanted), None)
    if name is None:
        raise JobError(
            f"{key}: the saved data set {folder} has no split {wanted}; it has: {', '.join(names)}. Name one:"
            f" {{path: {folder.name}, split: {names[0] if names else '...'}}}"
        )
    others = [other for other in names if other != name]
    skipped = (f"not read: {_count(others, 'other split')} ({', '.join(others)})",) if others else ()
    return Listing(_list_saved(folder / name, key).files, skipped)


def _list_saved(folder: Path, key: str) -> Listing:
    """The files of what `datasets.Dataset.save_to_disk` wrote."""
    state = read_json(folder / "state.json")
    files, index = (_named_in(state, folder, name) for name in ("_data_files", "_indices_data_files"))
    if not files:
        raise JobError(f"{key}: {folder / 'state.json'} names no data files; save the data set again with save_to_disk")
    gone = [file.name for file in (*files, *index) if not file.is_file()]
    if gone:
        raise JobError(f"{key}: {folder} lacks {', '.join(gone)}, which its state.json names; save the data set again")
    return Listing((_through_index(files, index, key),) if index else files)


def _named_in(state: Any, folder: Path, name: str) -> tuple[Path, ...]:
    """Files that a state.json names; none where it names something else."""
    parts = state.get(name) if isinstance(state, dict) else None
    names = [part.get("filename") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return tuple(folder / one for one in names if isinstance(one, str) and Path(one).name == one)


def _through_index(files: tuple[Path, ...], index: tuple[Path, ...], key: str) -> Path:
    """A file of the rows that the index names, in its order, as old versions of `datasets` saved a selection.

    Versions of today do not know that index and would read all rows.  The file lies in the cache, by its content.
    """
    name = hashlib.sha256(" ".join(digest(file) for file in (*files, *index)).encode()).hexdigest()
    target = cache_folder("selected-rows", f"{name}.arrow")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_selected(files, index, target, key)
    return target


def _field(values: Any, name: str, file: Path) -> list[str]:
    found = values.get(name) if isinstance(values, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, str) and Path(item).name == item for item in found):
        raise BadInput(f"{file}: names no {name}")
    return found


def _is_description(file: Path) -> bool:
    """Whether a JSON file is a small object that is no row and holds no rows: statistics, settings, a licence."""
    if kind_of_name(file.name) != "json" or file.suffix == ".gz" or file.stat().st_size > _DESCRIPTION_BYTES:
        return False
    try:
        values = read_json(file, allow_nan=True)
    except BadInput:
        return False  # its reader says what is wrong
    if not isinstance(values, dict) or detect(values):
        return False
    return not any(isinstance(part, dict) for value in values.values() if isinstance(value, list) for part in value)


def _count(things: list[str], noun: str) -> str:
    """`3 hidden files`: the first word that names a thing gets its plural."""
    plural = re.sub(r"file|folder|link|split", r"\g<0>s", noun, count=1)
    return f"{len(things)} {noun if len(things) == 1 else plural}"


def _is_hidden(name: str) -> bool:
    """Names that editors, file systems and data engines keep to themselves: .x, ._x, __MACOSX, _SUCCESS, _delta_log."""
    return name.startswith((".", "_"))


def _is_named_by(name: str, split: str) -> bool:
    """Whether a file or folder is named by the split: train_sft.jsonl, train_sft-00000-of-00002.parquet."""
    return re.match(rf"{re.escape(split)}([-.]|$)", name) is not None


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def data_files_of(folder: Path) -> tuple[str | None, str | None]:
    """The one data file of a folder to train on, and the one to measure on; None for each that is not clear."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _DATA_FILES and path.name[0] not in "._")
    held_out = [name for name in names if _HELD_OUT.search(name)]
    train = [name for name in names if name not in held_out]
    if len(train) != 1:
        return None, None
    return train[0], held_out[0] if len(held_out) == 1 else None
