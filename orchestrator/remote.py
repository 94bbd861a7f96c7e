"""A job on a cluster that only HTTP reaches: packed here, run there, its verbs answered there, its result fetched.

What is sent is one folder: the job with its paths made relative, its data and model where they are local files, and the
project itself.  On the cluster `orchestrator submit` runs as it would here; `--run-id` makes the same command go on
where the run stands, so a head that restarts loses nothing.  Here stays `runs/<run_id>/remote.json`, by which
`status`, `logs`, `stop`, `resume` and `fetch` find it from any shell.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
import shutil
import tarfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from clusters.connect import CannotConnect
from clusters.ray_jobs import ENDED, UPLOAD_LIMIT_BYTES, JobLost, JobsDoor
from clusters.units import format_bytes
from orchestrator.errors import ClusterError, JobError, RunFailed
from orchestrator.jobfile import Job, path_values
from orchestrator.rundir import RunFolder

_POLL_S = 1.0
_VERB_S = 180.0  # that a verb may take on the cluster
_LOST_S = 60.0  # that a broken line is tried again
_PROJECT = ("orchestrator", "strategies", "clusters")
_BEGIN, _END = "-----BEGIN RUN-----", "-----END RUN-----"
_NOT_FETCHED = ("checkpoints", "logs", "stop", "replan")


@dataclass(frozen=True)
class Remote:
    """Where a run lives that was started from here."""

    address: str
    storage: str  # the folder of runs there
    attempts: tuple[str, ...]  # submissions, the newest last

    @classmethod
    def of(cls, run: RunFolder) -> Remote | None:
        values = run.read_json("remote.json")
        return None if values is None else cls(values["address"], values["storage"], tuple(values["attempts"]))

    def keep(self, run: RunFolder) -> None:
        run.write("remote.json", json.dumps(asdict(self), indent=1))


def submit(job: Job, address: str, output_dir: Path, say: Callable[[str], None], follow: bool = True) -> RunFolder:
    """Send a job and, with `follow`, stay until it ends; its result then lies in the run folder here.

    Raises JobError for what cannot be sent, ClusterError where nobody answers, RunFailed when the job fails there.
    Ctrl-C detaches: the job goes on.
    """
    door = _door(address)
    run = RunFolder.create(output_dir, job.spec.name)
    try:
        size = pack(job, run.path / "package")
        say(f"sending {format_bytes(size)} to {address} ...")
        remote = Remote(address, job.spec.cluster.storage, ())
        remote = _start(door, run, remote)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)  # nothing is left behind of what never began
        raise
    run.write("origin.json", json.dumps({"folder": str(job.folder)}))
    run.write("job.yaml", job.text)  # last: a folder with a job.yaml is a run
    say(f"run {run.run_id}")
    if follow:
        attach(run, say)
    return run


def _start(door: JobsDoor, run: RunFolder, remote: Remote) -> Remote:
    name = f"{run.run_id}-{len(remote.attempts) + 1}"
    command = _command("submit", "job.yaml", "--run-id", run.run_id)
    try:
        door.start(name, command, run.path / "package")
    except (JobLost, CannotConnect, RuntimeError) as error:
        raise ClusterError(f"{door.address}: the job could not be started: {str(error).splitlines()[0]}") from error
    remote = Remote(remote.address, remote.storage, (*remote.attempts, name))
    remote.keep(run)
    return remote


def attach(run: RunFolder, say: Callable[[str], None]) -> None:
    """Print what the job prints until it ends, then fetch its result.  Raises RunFailed when it failed there."""
    remote = _remote(run)
    door, name, printed, broken_since = _door(remote.address), remote.attempts[-1], 0, None
    try:
        while True:
            try:
                found = door.look(name)
                text = door.logs(name)
            except JobLost as error:
                broken_since = broken_since or time.monotonic()
                if time.monotonic() - broken_since > _LOST_S:
                    raise ClusterError(
                        f"{error}. The job goes on there; `orchestrator logs {run.run_id} --follow` attaches again"
                    ) from error
                time.sleep(_POLL_S)
                continue
            broken_since = None
            whole = text.rfind("\n") + 1 if found.state not in ENDED else len(text)
            for line in text[printed:whole].splitlines():
                say(line)
            printed = max(printed, whole)
            if found.state in ENDED:
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        raise RunFailed(
            f"detached; the job goes on. `orchestrator logs {run.run_id} --follow` attaches again,"
            f" `orchestrator stop {run.run_id}` ends it"
        ) from None
    fetch(run, say)
    if found.state != "SUCCEEDED":
        raise RunFailed(
            f"the job {found.state.lower()} on {remote.address}. `orchestrator resume {run.run_id}` goes on there"
        )


def verb(run: RunFolder, *arguments: str) -> str:
    """What a verb of ours prints when it is run on the cluster, beside the job."""
    remote = _remote(run)
    door, name = _door(remote.address), f"{run.run_id}-{arguments[0]}-{uuid.uuid4().hex[:6]}"
    try:
        door.start(name, _command(*arguments, "--runs", remote.storage), run.path / "package")
        found, said = door.wait(name, _VERB_S), door.logs(name)
        door.forget(name)
    except JobLost as error:
        raise ClusterError(f"{remote.address}: {error}") from error
    if found.state != "SUCCEEDED":
        raise RunFailed(said.strip().splitlines()[-1] if said.strip() else found.message)
    return said


def resume(run: RunFolder, say: Callable[[str], None]) -> None:
    """Start the same command again: it finds its run folder there and goes on."""
    remote = _remote(run)
    door = _door(remote.address)
    try:
        state = door.look(remote.attempts[-1]).state
    except JobLost:  # the cluster is a new one; its storage may be the old
        state = "FAILED"
    if state not in ENDED:
        raise JobError(f"{run.run_id} is running on {remote.address}; `orchestrator logs {run.run_id} --follow`")
    _start(door, run, remote)
    attach(run, say)


def printed(run: RunFolder) -> str:
    """Everything the newest attempt printed so far."""
    remote = _remote(run)
    try:
        return _door(remote.address).logs(remote.attempts[-1])
    except JobLost as error:
        raise ClusterError(f"{remote.address}: {error}") from error


def fetch(run: RunFolder, say: Callable[[str], None]) -> None:
    """Bring the run folder here, without checkpoints: events, result, adapter."""
    text = verb(run, "send", run.run_id)
    try:
        payload = text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)]
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(payload)), mode="r:gz") as archive:
            archive.extractall(run.path, filter="data")
    except (ValueError, tarfile.TarError) as error:
        raise RunFailed(f"what came from the cluster is no run: {error}") from error
    say(f"fetched {run.run_id} into {run.path}")


def send(run: RunFolder) -> str:
    """The other side of `fetch`: the folder as text between two marks."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for path in sorted(run.path.iterdir()):
            if path.name not in _NOT_FETCHED and not path.name.startswith("."):
                archive.add(path, path.name)
    return f"{_BEGIN}\n{base64.encodebytes(out.getvalue()).decode()}{_END}"


def pack(job: Job, folder: Path) -> int:
    """Write what is sent; its bytes.  Raises JobError past what Ray takes."""
    files = packed_files(job)
    size = 0
    for source in files:
        size += size_of(source)
        if size > UPLOAD_LIMIT_BYTES:
            raise JobError(
                f"{source} has {format_bytes(size_of(source))}, and no more than {format_bytes(UPLOAD_LIMIT_BYTES)} can"
                " be sent in all. Put it where every node sees it and name that folder in cluster.shared_paths"
            )
    folder.mkdir(parents=True)
    for source, place in files.items():
        if source.is_dir():
            shutil.copytree(source, folder / place)
        else:
            shutil.copyfile(source, folder / place)
    document = document_with(job, files, job.spec.cluster.storage)
    (folder / "job.yaml").write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
    root = Path(__file__).resolve().parents[1]
    for package in _PROJECT:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return size_of(folder)


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


def document_with(job: Job, files: dict[Path, str], storage: str) -> dict[str, Any]:
    """The job file as it is read there: local paths by their names, the cluster it is on, the folder of runs."""
    document = yaml.safe_load(job.text)
    path_values(document, lambda value: files.get(job.path(value), value))
    document.setdefault("cluster", {}).update({"address": "auto"})
    document.setdefault("checkpoint", {})["output_dir"] = storage
    return document


def _command(*arguments: str) -> str:
    return shlex.join(["python", "-m", "orchestrator", *arguments])


def _remote(run: RunFolder) -> Remote:
    remote = Remote.of(run)
    if remote is None:
        raise JobError(f"{run.run_id} runs on this machine; it was not sent to a cluster")
    return remote


def _door(address: str) -> JobsDoor:
    try:
        return JobsDoor(address)
    except CannotConnect as error:
        raise ClusterError(f"--cluster {address}: {error}") from error
