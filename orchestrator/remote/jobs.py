"""A job on a cluster that only HTTP reaches: started there, its verbs answered there, its result fetched.

On the cluster `orchestrator submit` runs as it would here; `--run-id` makes the same command go on where the run
stands, so a head that restarts loses nothing.  Here stays `runs/<run_id>/remote.json`, by which `status`, `logs`,
`stop`, `resume` and `fetch` find it from any shell.  Which door it went through, a dashboard or an API server, only
`opened` and `_start` know.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from clusters.job_backend import ENDED, Door, JobGone, JobLost, RemoteJob, VerbFailed
from clusters.ray.connect import CannotConnect
from clusters.ray.jobs import JobsDoor
from clusters.safe.reading import BadInput, printable, read_json, record
from clusters.units import format_bytes
from orchestrator.errors import ClusterError, JobError, RunFailed, Stopped
from orchestrator.job.job_file import Job
from orchestrator.job.secrets import refuse_written_out
from orchestrator.remote import package
from orchestrator.runs.run_folder import RunFolder

KUBERAY = "kuberay"
SENT = "sent.json"  # the files that were sent, with where they came from
_AGAIN_S = 1.0
_LOST_S = 60.0  # that a broken line is tried again
_Say = Callable[[str], None]


@dataclass(frozen=True)
class Remote:
    """Where a run lives that was started from here."""

    address: str  # http://HOST:PORT, or kuberay[:[CONTEXT/]NAMESPACE]
    storage: str  # the folder of runs there
    attempts: tuple[str, ...]  # submissions, the newest last
    uploads: str | None = None  # the folder there that holds its data
    is_closed: bool = False  # its result is here, and nothing of the job is left there

    @classmethod
    def of(cls, run: RunFolder) -> Remote | None:
        path = run.path / "remote.json"
        if not path.exists():
            return None
        try:
            found = record(cls, read_json(path), str(path))
            if not found.attempts and not found.is_closed:
                raise BadInput(f"{path}: names no attempt")
            own = f"{found.storage.removesuffix('/runs')}/jobs/{run.run_id}"
            if found.uploads not in (None, own):  # it is deleted at the end
                raise BadInput(f"{path}: uploads: {printable(found.uploads or '')} is not {printable(own)}")
        except BadInput as error:
            raise JobError(f"{error}. Delete the folder; what runs on the cluster is not touched by that") from None
        return found

    def keep(self, run: RunFolder) -> Remote:
        run.write("remote.json", json.dumps(asdict(self), indent=1))
        return self


def submit(job: Job, address: str, output_dir: Path, say: _Say, follow: bool = True) -> RunFolder:
    """Send a job to a dashboard and, with `follow`, stay until it ends; its result then lies in the run folder here.

    Raises JobError for what cannot be sent, ClusterError where nobody answers, RunFailed when the job fails there.
    Ctrl-C detaches: the job goes on.
    """
    refuse_written_out(yaml.safe_load(job.text), "the package, which others of the cluster may read,")
    with RunFolder.take(output_dir, job.spec.name) as run, begun(run, job):
        with in_our_words(address):
            door = JobsDoor(address, run.path / "package")
        say_sent(run, package.pack(job, run.path / "package"), say)
        size = package.size_of(run.path / "package")
        say(f"sending {format_bytes(size)} with the project itself to {address} ...")
        _start(door, run, Remote(address, job.spec.cluster.storage, ()))
    say(f"run {run.run_id}")
    if follow:
        attach(run, say)
    return run


def say_sent(run: RunFolder, packed: package.Packed, say: _Say) -> None:
    """The list of what leaves this machine, for a person and in sent.json."""
    for line in packed.lines():
        say(line)
    run.write(SENT, json.dumps(packed.as_dict(), indent=1))


@contextlib.contextmanager
def begun(run: RunFolder, job: Job) -> Iterator[None]:
    """A folder that is a run once the block has sent its job; nothing is left behind of what never began."""
    try:
        yield
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    run.begin({"origin.json": json.dumps({"folder": str(job.folder)}), "job.yaml": job.text})


def attach(run: RunFolder, say: _Say) -> None:
    """Print what the job prints until it ends, then fetch its result.  Raises RunFailed when it failed there."""
    remote = _remote(run)
    name = remote.attempts[-1]
    try:
        with in_our_words(remote.address):
            door = opened(run, remote)
            found = _until_it_ends(door, run, name, say)
    except KeyboardInterrupt:
        raise RunFailed(
            f"detached; the job goes on. `orchestrator logs {run.run_id} --follow` attaches again,"
            f" `orchestrator stop {run.run_id}` ends it"
        ) from None
    _bring_home(run, remote, door, found, say)
    if run.state_by_events() == "stopped":
        raise Stopped(f"stopped as asked. `orchestrator resume {run.run_id}` goes on there")
    if found.state != "SUCCEEDED":
        why = f": {found.message}" if found.message else ""
        raise RunFailed(f"the job {found.state.lower()}{why}. `orchestrator resume {run.run_id}` goes on there")


def _until_it_ends(door: Door, run: RunFolder, name: str, say: _Say) -> RemoteJob:
    broken_since = None
    with (run.path / "printed.log").open("w", encoding="utf-8") as kept:  # a fresh door hands out every line
        while True:
            try:
                for line in door.follow(name, say):
                    say(line)
                    kept.write(line + "\n")
                    broken_since = None
                return door.look(name)
            except JobGone:
                raise
            except JobLost as error:
                broken_since = broken_since or time.monotonic()
                if time.monotonic() - broken_since > _LOST_S:
                    raise ClusterError(
                        f"{error}. The job goes on there; `orchestrator logs {run.run_id} --follow` attaches again"
                    ) from error
                time.sleep(_AGAIN_S)


def _bring_home(run: RunFolder, remote: Remote, door: Door, found: RemoteJob, say: _Say) -> None:
    """Fetch an ended job's run folder and give back what it holds there; a job may have ended before it had one."""
    with in_our_words(remote.address):
        try:
            package.receive(door.ask(remote.attempts[-1], ["send", run.run_id, "--runs", remote.storage]), run.path)
            say(f"fetched {run.run_id} into {run.path}")
        except VerbFailed as error:
            if found.state == "SUCCEEDED":
                raise RunFailed(f"the result could not be fetched: {error}") from error
            say(f"nothing could be fetched: {error}")
        if found.state == "FAILED" and run.job().spec.kubernetes.keep_failed_s is not None:
            return
        if remote.uploads and run.state_by_events() == "finished":
            door.remove(remote.attempts[-1], remote.uploads)
        if door.tidy(remote.attempts[-1]):
            replace(remote, is_closed=True).keep(run)


def verb(run: RunFolder, *arguments: str) -> str:
    """What a verb of ours prints when it is run on the cluster, beside the job."""
    remote = _remote(run)
    with in_our_words(remote.address):
        try:
            return opened(run, remote).ask(remote.attempts[-1], [*arguments, "--runs", remote.storage])
        except VerbFailed as error:
            raise RunFailed(str(error)) from error


def look(run: RunFolder) -> RemoteJob:
    """What the cluster says of the newest attempt."""
    remote = _remote(run)
    with in_our_words(remote.address):
        return opened(run, remote).look(remote.attempts[-1])


def stop(run: RunFolder) -> str:
    """Ask the job to save and end; one that has not begun is taken back."""
    remote = _remote(run)
    if remote.is_closed:
        raise JobError(f"{run.run_id} is not running; its state is {run.state_by_events()}")
    with in_our_words(remote.address):
        door = opened(run, remote)
        if door.look(remote.attempts[-1]).state == "PENDING" and door.tidy(remote.attempts[-1]):
            replace(remote, is_closed=True).keep(run)
            return f"{run.run_id} had not begun; it is taken back\n"
    return verb(run, "stop", run.run_id)


def resume(run: RunFolder, say: _Say) -> None:
    """Start the same command again: it finds its run folder there and goes on."""
    if run.state_by_events() == "finished":
        raise JobError(f"{run.run_id} is finished; there is nothing to resume")
    if not start_again(run):
        raise JobError(f"{run.run_id} is running there; `orchestrator logs {run.run_id} --follow` attaches")
    attach(run, say)


def start_again(run: RunFolder) -> bool:
    """Start the next attempt; whether that was needed: one that runs is left alone."""
    remote = _remote(run)
    with in_our_words(remote.address):
        door = opened(run, remote)
        # A job that is gone was taken away, or the cluster is a new one; its storage may be the old.
        with contextlib.suppress(JobGone):
            if door.look(remote.attempts[-1]).state not in ENDED:
                return False
        _start(door, run, remote)
    return True


def printed(run: RunFolder) -> str:
    """Everything the newest attempt printed so far."""
    remote = _remote(run)
    if remote.is_closed:
        kept = run.path / "printed.log"
        return kept.read_text(encoding="utf-8") if kept.exists() else ""
    with in_our_words(remote.address):
        return opened(run, remote).logs(remote.attempts[-1])


def fetch(run: RunFolder, say: _Say) -> None:
    """Bring the run folder here, without checkpoints: events, result, adapter."""
    remote = _remote(run)
    if remote.is_closed:
        say(f"{run.run_id} is in {run.path}")
        return
    with in_our_words(remote.address):
        door = opened(run, remote)
        found = door.look(remote.attempts[-1])
    if found.state in ENDED:
        _bring_home(run, remote, door, found, say)
        return
    package.receive(verb(run, "send", run.run_id), run.path)
    say(f"fetched {run.run_id} into {run.path}; it goes on there")


def opened(run: RunFolder, remote: Remote) -> Any:
    """The door that the run went through.  Raises CannotConnect."""
    return opened_at(remote.address) if is_kuberay(remote.address) else JobsDoor(remote.address, run.path / "package")


def opened_at(address: str) -> Any:
    """The API server of kuberay[:[CONTEXT/]NAMESPACE].  Raises ClusterError."""
    from clusters.kubernetes.client import KubeDoor

    with in_our_words(address):
        return KubeDoor(*place_of(address))


def _start(door: Any, run: RunFolder, remote: Remote) -> Remote:
    """Start the next attempt through an open door."""
    if is_kuberay(remote.address):
        from orchestrator.remote.kube_submit import create_again

        name = create_again(door, run)
    else:
        name = f"{run.run_id}-{len(remote.attempts) + 1}"
        command = shlex.join(["python", "-m", "orchestrator", "submit", "job.yaml", "--run-id", run.run_id])
        with in_our_words(remote.address):
            door.start(name, command)
    return replace(remote, attempts=(*remote.attempts, name), is_closed=False).keep(run)


def is_kuberay(address: str) -> bool:
    """Whether an address names an API server, not a dashboard."""
    return address.partition(":")[0] == KUBERAY


def place_of(address: str) -> tuple[str | None, str | None]:
    """Context and namespace of kuberay[:[CONTEXT/]NAMESPACE]; None = the current one.  Raises JobError."""
    context, _, namespace = address.partition(":")[2].rpartition("/")  # a context's name may hold slashes
    if namespace and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
        raise JobError(f"--cluster {address}: {namespace!r} is no namespace (small letters, digits and hyphens)")
    return context or None, namespace or None


def _remote(run: RunFolder) -> Remote:
    remote = Remote.of(run)
    if remote is None:
        raise JobError(f"{run.run_id} runs on this machine; it was not sent to a cluster")
    return remote


@contextlib.contextmanager
def in_our_words(address: str) -> Iterator[None]:
    """What a door raises inside the block as ClusterError with the address."""
    try:
        yield
    except (CannotConnect, JobLost) as error:
        raise ClusterError(f"--cluster {address}: {error}") from error
