"""What of a job is sent to a cluster: its files by new names, its document with those names, the project itself."""

from __future__ import annotations

import base64
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import yaml

from clusters.units import format_bytes
from orchestrator.errors import JobError, RunFailed
from orchestrator.jobfile import Job, path_values
from orchestrator.rundir import RunFolder

UPLOAD_LIMIT_BYTES = 500 * 2**20  # of all files; Ray refuses a package of more than 512 MiB
_PROJECT = ("orchestrator", "strategies", "clusters")
_BEGIN, _END = "-----BEGIN RUN-----", "-----END RUN-----"
_NOT_FETCHED = ("checkpoints", "logs", "stop", "replan")


def pack(job: Job, folder: Path) -> int:
    """Write what a dashboard takes: the job, its files, the project; its bytes.  Raises JobError past Ray's limit."""
    files = packed_files(job)
    refuse_too_large(files)
    folder.mkdir(parents=True)
    for source, place in files.items():
        if source.is_dir():
            shutil.copytree(source, folder / place)
        else:
            shutil.copyfile(source, folder / place)
    (folder / "job.yaml").write_text(document_with(job, files, job.spec.cluster.storage), encoding="utf-8")
    root = Path(__file__).resolve().parents[1]
    for package in _PROJECT:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return size_of(folder)


def archive(files: dict[Path, str], texts: dict[str, str]) -> bytes:
    """Files and texts by their new names as a .tar.gz."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as made:
        for source, place in files.items():
            made.add(source, place)
        for place, text in texts.items():
            entry = tarfile.TarInfo(place)
            entry.size, entry.mode = len(text.encode()), 0o644
            made.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


def refuse_too_large(files: dict[Path, str]) -> None:
    """Raises JobError for more than can be sent."""
    size = 0
    for source in files:
        size += size_of(source)
        if size > UPLOAD_LIMIT_BYTES:
            raise JobError(
                f"{source} has {format_bytes(size_of(source))}, and no more than {format_bytes(UPLOAD_LIMIT_BYTES)} can"
                " be sent in all. Put it where every node sees it and name that folder in cluster.shared_paths"
            )


def size_of(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def packed_files(job: Job) -> dict[Path, str]:
    """What of a job is local and must be sent -> its name there.  What every node sees stays where it is."""
    shared = [Path(path) for path in job.spec.cluster.shared_paths]
    files: dict[Path, str] = {}
    for value in path_values(yaml.safe_load(job.text)):
        source = job.path(value)
        if source.exists() and source not in files and not any(source.is_relative_to(path) for path in shared):
            files[source] = f"{len(files)}-{source.name}"
    return files


def document_with(job: Job, files: dict[Path, str], storage: str, **cluster: Any) -> str:
    """The job file as it is read there: local paths by their names, the cluster it is on, the folder of runs."""
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
                made.add(path, path.name)
    return f"{_BEGIN}\n{base64.encodebytes(out.getvalue()).decode()}{_END}"


def receive(text: str, folder: Path) -> None:
    """The other side of `send`.  Raises RunFailed."""
    try:
        payload = text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)]
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(payload)), mode="r:gz") as sent:
            sent.extractall(folder, filter="data")
    except (ValueError, tarfile.TarError) as error:
        raise RunFailed(f"what came from the cluster is no run: {error}") from error
