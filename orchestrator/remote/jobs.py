"""A job on a cluster that only HTTP reaches: submit it, run verbs beside it, fetch its result.

On the cluster `orchestrator submit` runs as it would here; with `--run-id` the same command continues the run, so a
head that restarts loses nothing.  `runs/<run_id>/remote.json` stays here: `status`, `logs`, `stop`, `resume` and
`fetch` find the job by it from any shell.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import yaml

from clusters.job_backend import ENDED, JobBackend, JobGone, JobLost, RemoteJob, VerbFailed
from clusters.units import format_bytes
from orchestrator.errors import ClusterError, JobError, RunFailed, Stopped
from orchestrator.job.job_file import Job
from orchestrator.job.secrets import refuse_written_out
from orchestrator.remote import package
from orchestrator.remote.backends import open_backend, start_attempt
from orchestrator.remote.record import Remote, Say, begin_when_sent, read_remote, wrap_errors
from orchestrator.runs.run_folder import RunFolder

_RETRY_S = 1.0
_LOST_S = 60.0  # how long a broken connection is retried


def submit(job: Job, address: str, output_dir: Path, say: Say, follow: bool = True) -> RunFolder:
    """Send a job to a dashboard and, with `follow`, wait until it ends and fetch its result into the run folder here.

    Raises JobError for what cannot be sent, ClusterError where nobody answers, RunFailed when the job fails there.
    Ctrl-C detaches: the job continues.
    """
    refuse_written_out(yaml.safe_load(job.text), "the package, which others of the cluster may read,")
    with RunFolder.take(output_dir, job.spec.name) as run, begin_when_sent(run, job):
        remote = Remote(address, job.spec.cluster.storage, ())
        backend = open_backend(run, remote)
        package.report(package.pack(job, run.path / "package"), run, say)
        size = package.size_of(run.path / "package")
        say(f"sending {format_bytes(size)}, the project itself included, to {address} ...")
        start_attempt(backend, run, remote)
    say(f"run {run.run_id}")
    if follow:
        attach(run, say)
    return run


def attach(run: RunFolder, say: Say) -> None:
    """Print what the job prints until it ends, then fetch its result.  Raises RunFailed when it failed there."""
    remote = read_remote(run)
    try:
        with wrap_errors(remote.address):
            backend = open_backend(run, remote)
            found = _follow(backend, run, remote.attempt, say)
    except KeyboardInterrupt:
        raise RunFailed(
            f"detached; the job continues. `orchestrator logs {run.run_id} --follow` attaches again,"
            f" `orchestrator stop {run.run_id}` ends it"
        ) from None
    _fetch_result(backend, run, remote, found, say)
    if run.state_by_events() == "stopped":
        raise Stopped(f"stopped as requested. `orchestrator resume {run.run_id}` continues it on the cluster")
    if found.state != "SUCCEEDED":
        why = f": {found.message}" if found.message else ""
        raise RunFailed(
            f"the job {found.state.lower()}{why}. `orchestrator resume {run.run_id}` continues it on the cluster"
        )


def _follow(backend: JobBackend, run: RunFolder, attempt: str, say: Say) -> RemoteJob:
    """Print each line of a job once, across broken connections, until it has ended."""
    broken_since = None
    with (run.path / "printed.log").open("w", encoding="utf-8") as kept:  # a new client yields every line again
        while True:
            try:
                for line in backend.follow(attempt, say):
                    say(line)
                    kept.write(line + "\n")
                    broken_since = None
                return backend.look(attempt)
            except JobGone:
                raise
            except JobLost as error:
                broken_since = broken_since or time.monotonic()
                if time.monotonic() - broken_since > _LOST_S:
                    raise ClusterError(
                        f"{error}. The job continues there; `orchestrator logs {run.run_id} --follow` attaches again"
                    ) from error
                time.sleep(_RETRY_S)


def _fetch_result(backend: JobBackend, run: RunFolder, remote: Remote, found: RemoteJob, say: Say) -> None:
    """Fetch an ended job's run folder, if it got so far, then delete what the job holds on the cluster."""
    with wrap_errors(remote.address):
        try:
            package.receive(backend.ask(remote.attempt, ["send", run.run_id, "--runs", remote.storage]), run.path)
            say(f"fetched {run.run_id} into {run.path}")
        except VerbFailed as error:
            if found.state == "SUCCEEDED":
                raise RunFailed(f"the result could not be fetched: {error}") from error
            say(f"nothing could be fetched: {error}")
        if found.state == "FAILED" and run.job().spec.kubernetes.keep_failed_s is not None:
            return
        if remote.uploads and run.state_by_events() == "finished":
            backend.remove(remote.attempt, remote.uploads)
        if backend.tidy(remote.attempt):
            replace(remote, is_closed=True).keep(run)


def run_verb(run: RunFolder, *arguments: str) -> str:
    """The output of one of our verbs, run on the cluster beside the job.  Raises RunFailed when the verb fails."""
    remote = read_remote(run)
    with wrap_errors(remote.address):
        try:
            return open_backend(run, remote).ask(remote.attempt, [*arguments, "--runs", remote.storage])
        except VerbFailed as error:
            raise RunFailed(str(error)) from error


def look(run: RunFolder) -> RemoteJob:
    """The state of the newest attempt."""
    remote = read_remote(run)
    with wrap_errors(remote.address):
        return open_backend(run, remote).look(remote.attempt)


def read_logs(run: RunFolder) -> str:
    """Everything that the newest attempt has printed so far."""
    remote = read_remote(run)
    if remote.is_closed:
        kept = run.path / "printed.log"
        return kept.read_text(encoding="utf-8") if kept.exists() else ""
    with wrap_errors(remote.address):
        return open_backend(run, remote).logs(remote.attempt)


def stop(run: RunFolder) -> str:
    """Ask the job to save and stop; one that has not started is cancelled."""
    remote = read_remote(run)
    if remote.is_closed:
        raise JobError(f"{run.run_id} is not running; its state is {run.state_by_events()}")
    with wrap_errors(remote.address):
        backend = open_backend(run, remote)
        if backend.look(remote.attempt).state == "PENDING" and backend.tidy(remote.attempt):
            replace(remote, is_closed=True).keep(run)
            return f"{run.run_id} had not started; it is cancelled\n"
    return run_verb(run, "stop", run.run_id)


def resume(run: RunFolder, say: Say) -> None:
    """Start the same command again: it finds its run folder on the cluster and continues."""
    if run.state_by_events() == "finished":
        raise JobError(f"{run.run_id} is finished; there is nothing to resume")
    if not restart(run):
        raise JobError(f"{run.run_id} is running; `orchestrator logs {run.run_id} --follow` attaches to it")
    attach(run, say)


def restart(run: RunFolder) -> bool:
    """Start the next attempt unless the newest one is still running; whether one was started."""
    remote = read_remote(run)
    with wrap_errors(remote.address):
        backend = open_backend(run, remote)
        # A job that is gone was deleted, or the cluster is a new one; its storage may be the old one.
        with contextlib.suppress(JobGone):
            if backend.look(remote.attempt).state not in ENDED:
                return False
        start_attempt(backend, run, remote)
    return True


def fetch(run: RunFolder, say: Say) -> None:
    """Bring the run folder here, without checkpoints: events, result, adapter."""
    remote = read_remote(run)
    if remote.is_closed:
        say(f"{run.run_id} is in {run.path}")
        return
    with wrap_errors(remote.address):
        backend = open_backend(run, remote)
        found = backend.look(remote.attempt)
    if found.state in ENDED:
        _fetch_result(backend, run, remote, found, say)
        return
    package.receive(run_verb(run, "send", run.run_id), run.path)
    say(f"fetched {run.run_id} so far into {run.path}; the job continues")
