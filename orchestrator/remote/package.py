"""Packs a job for a cluster (its files under new names, its job file, the project) and unpacks its result."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from clusters.safe.archives import Bounds, unpack
from clusters.safe.reading import BadInput, checked_path, kind_of, printable
from clusters.units import GIB, format_bytes
from orchestrator.data.readers.sources import is_pattern, sources_of
from orchestrator.errors import JobError, RunFailed, bad_input_as_job_error
from orchestrator.job import model_files
from orchestrator.job.job_file import Job, path_values
from orchestrator.job.scoring.functions import files_of
from orchestrator.job.sections.training import Source
from orchestrator.runs.run_folder import RunFolder

UPLOAD_LIMIT_BYTES = 500 * 2**20  # of all files; Ray refuses a package of more than 512 MiB
SENT = "sent.json"  # the files that were sent, with where they came from
_PROJECT = ("orchestrator", "strategies", "clusters")
_BEGIN, _END = "-----BEGIN RUN-----", "-----END RUN-----"
_NOT_FETCHED = ("checkpoints", "logs", "stop", "replan")
_STAYS = ("remote.json", SENT)  # what a run says of where it is is never fetched
_SHOWN = 5  # files of a list, and links
_LEAST_FETCHED_BYTES, _EXPANSION, _MOST_FETCHED = int(GIB), 20, 10_000


@dataclass(frozen=True)
class Packed:
    """The files of a job that are sent: those that are read, nothing else of their folders."""

    places: dict[Path, str] = field(default_factory=dict)  # a path of the job file -> its name there
    files: dict[str, Path] = field(default_factory=dict)  # the name there of a file -> what its bytes are read from
    links: dict[str, Path] = field(default_factory=dict)  # those that are links here -> where they lead

    modules: dict[str, Path] = field(default_factory=dict)  # those of its own metrics, which keep their names

    @property
    def num_bytes(self) -> int:
        """Of all files; a link counts as its target."""
        return sum(size_of(file) for file in self.files.values())

    def lines(self) -> Iterator[str]:
        """For a person: count, size, first names, links."""
        if not self.files:
            yield "sends no files: every node can read the job's data and model"
            return
        shown = [f"{place} ({format_bytes(size_of(file))})" for place, file in self.files.items()]
        yield f"sends {len(self.files)} files of the job, {format_bytes(self.num_bytes)}: {_first(shown)}"
        if self.links:
            leads = [f"{place} -> {file}" for place, file in self.links.items()]
            yield f"{len(leads)} of them are links; their targets are sent: {_first(leads)}"

    def as_dict(self) -> dict[str, Any]:
        """For machines: every file with where it comes from."""
        files = [{"name": place, "bytes": size_of(file), "path": str(file)} for place, file in self.files.items()]
        return {"num_files": len(files), "num_bytes": self.num_bytes, "files": files, "links": sorted(self.links)}


def _first(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return printable(", ".join(items[:_SHOWN]) + more)


def pack(job: Job, folder: Path) -> Packed:
    """Write the package for a dashboard: the job, its files, the project.  Raises JobError past Ray's limit."""
    packed = find_files(job)
    folder.mkdir(parents=True)
    for place, file in packed.files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / place)
    (folder / "job.yaml").write_text(make_document(job, packed.places, job.spec.cluster.storage), encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    for package in _PROJECT:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return packed


def report(packed: Packed, run: RunFolder, say: Callable[[str], None]) -> None:
    """List what leaves this machine: for a person by `say`, for machines in sent.json."""
    for line in packed.lines():
        say(line)
    run.write(SENT, json.dumps(packed.as_dict(), indent=1))


def archive(files: dict[str, Path], texts: dict[str, str]) -> bytes:
    """A .tar.gz of files and texts by their names on the cluster; links are followed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1, dereference=True) as made:
        for place, file in files.items():
            made.add(file, place, recursive=False)
        for place, text in texts.items():
            entry = tarfile.TarInfo(place)
            entry.size, entry.mode = len(text.encode()), 0o644
            made.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


def size_of(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def find_files(job: Job) -> Packed:
    """Find the local files of a job that must be sent; what every node can read stays where it is.

    Of a folder only the files that are read are sent.  Raises JobError for more than can be sent, and for other things
    than files.
    """
    shared = [Path(path) for path in job.spec.cluster.shared_paths]
    packed = Packed()
    for value, listed in _read_paths(job):
        source = job.path(value)
        if is_pattern(value) and not source.exists():
            _add_matches(packed, source, listed(source), shared)
            continue
        if not source.exists() or any(source.is_relative_to(path) for path in shared):
            continue
        name = Path(value).name if Path(value).name not in ("", ".", "..") else source.name
        place = packed.places.setdefault(source, f"{len(packed.places)}-{name}")
        for file in listed(source):
            inner = f"{place}/{file.relative_to(source).as_posix()}" if source.is_dir() else place
            packed.files[inner] = _regular(file)
            written = file if source.is_dir() else job.folder / Path(value).expanduser()
            if written.is_symlink() or packed.files[inner] != file:
                packed.links[inner] = packed.files[inner]
    metrics = [] if job.spec.eval.metrics == "auto" else job.spec.eval.metrics
    packed.modules.update({name: _regular(file) for name, file in files_of(metrics, job.folder).items()})
    packed.files.update(packed.modules)
    _refuse_too_large(packed)
    return packed


def _add_matches(packed: Packed, source: Path, found: list[Path], shared: list[Path]) -> None:
    """The files that a pattern matches, numbered into a folder; the pattern becomes one of all that lie there."""
    if all(any(file.is_relative_to(path) for path in shared) for file in found):
        return
    folder = f"{len(packed.places)}-matches"
    packed.places[source] = f"{folder}/*"
    for number, file in enumerate(found):
        packed.files[f"{folder}/{number:05}-{file.name}"] = _regular(file)


def _read_paths(job: Job) -> Iterator[tuple[str, Callable[[Path], list[Path]]]]:
    """Each value of the job file that may be a path, with the function that lists the files read from it."""
    spec = job.spec
    if spec.data.chat_template != "tokenizer":
        yield spec.data.chat_template, lambda path: [path]
    code = spec.model.trust_remote_code
    yield spec.model.model_name_or_path, lambda path: model_files.files_of(path, code) if path.is_dir() else [path]
    for key, value in (("data.train", spec.data.train), ("data.eval", spec.data.eval)):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str | Source):
                yield item if isinstance(item, str) else item.path, partial(_data_files, job, item, key)


def _data_files(job: Job, item: str | Source, key: str, path: Path) -> list[Path]:
    """The files of a source, with those that mark a saved data set."""
    files = [file for _, files in sources_of(job, item, key) for file in files]
    about = {path / "dataset_dict.json", *(file.parent / "state.json" for file in files)} if path.is_dir() else set()
    return files + sorted(file for file in about if file.is_file())


def _regular(file: Path) -> Path:
    """The file whose bytes are sent.  Raises JobError for anything but a regular file."""
    with bad_input_as_job_error():
        found = checked_path(file)
        kind = kind_of(found)
    if kind != "file":
        raise JobError(f"{printable(str(file))} is {f'a {kind}' if kind else 'a dangling link'}: it cannot be sent")
    return found


def _refuse_too_large(packed: Packed) -> None:
    """Raises JobError for more than can be sent."""
    if packed.num_bytes > UPLOAD_LIMIT_BYTES:
        largest = max(packed.files.values(), key=size_of)
        raise JobError(
            f"the job's {len(packed.files)} files have {format_bytes(packed.num_bytes)},"
            f" {printable(str(largest))} alone {format_bytes(size_of(largest))}; at most"
            f" {format_bytes(UPLOAD_LIMIT_BYTES)} can be sent. Put them where every node can read them and name that"
            " folder in cluster.shared_paths"
        )


def make_document(job: Job, files: dict[Path, str], storage: str, **cluster: Any) -> str:
    """The job file for the cluster: local paths under their new names, its cluster, its folder of runs."""
    document = yaml.safe_load(job.text)
    path_values(document, lambda value: files.get(job.path(value), value))
    document.setdefault("cluster", {}).update({"address": "auto", **cluster})
    document.setdefault("checkpoint", {})["output_dir"] = storage
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def send(run: RunFolder) -> str:
    """A run folder without checkpoints as text between two marks: what `orchestrator send` prints beside the job."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as made:
        for path in sorted(run.path.iterdir()):
            if path.name not in _NOT_FETCHED and not path.name.startswith("."):
                made.add(path, path.name, filter=lambda entry: entry if entry.isreg() or entry.isdir() else None)
    return f"{_BEGIN}\n{base64.encodebytes(out.getvalue()).decode()}{_END}"


def receive(text: str, folder: Path) -> None:
    """Unpack what `send` printed; each part replaces what was there.  Raises RunFailed."""
    work = folder / f".fetched-{uuid.uuid4().hex[:8]}"
    try:
        payload = base64.b64decode(text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)])
        bounds = Bounds(max(_LEAST_FETCHED_BYTES, _EXPANSION * len(payload)), _MOST_FETCHED, is_gzip=True)
        unpack(io.BytesIO(payload), work, bounds)
        if strange := [path.name for path in work.iterdir() if path.name in _STAYS or path.name.startswith(".")]:
            raise BadInput(f"it contains {printable(strange[0])}")
        for part in work.iterdir():
            _replace(part, folder / part.name)
    except ValueError as error:
        raise RunFailed(f"what came from the cluster is not a run: {error}") from error
    except OSError as error:
        raise RunFailed(f"what came from the cluster cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(part: Path, place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        old = place.with_name(f".{place.name}-{uuid.uuid4().hex[:8]}")
        os.rename(place, old)
        os.rename(part, place)
        shutil.rmtree(old)
    else:
        os.replace(part, place)
