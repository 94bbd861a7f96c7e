"""The verb `fetch`, and how the verbs of a run work on a cluster that only HTTP reaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from clusters.job_backend import ENDED
from orchestrator.cli.options import RunArgument, RunsOption, out, print_json, print_result, say, show
from orchestrator.errors import JobError, RunFailed
from orchestrator.remote.record import ClusterTarget, Remote
from orchestrator.runs.run_folder import RunFolder
from orchestrator.views.screen import write

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job

verbs = typer.Typer()


def is_remote(run: RunFolder) -> bool:
    """Whether a run was sent to a cluster from here."""
    return Remote.of(run) is not None


def is_closed(run: RunFolder) -> bool:
    """Whether everything of a run that was sent is here again."""
    found = Remote.of(run)
    return found is not None and found.is_closed


def submit(job: Job, target: ClusterTarget, file: Path | None, detach: bool, as_json: bool) -> None:
    """Send a job and wait until it ends, unless detached; with a file write its RayJob there instead."""
    from orchestrator.lifecycle.prepare import output_dir
    from orchestrator.remote import jobs, kube_submit, package

    if file and target.is_kuberay:
        name = kube_submit.render(job, target, file, say)
        if as_json:
            print_json({"run": name, "path": str(file)})
        return
    say_line = _line_printer(as_json)
    if target.is_kuberay:
        run = kube_submit.submit(job, target, output_dir(job), say_line, follow=not detach)
    elif target.run_id:
        raise JobError("--run-id belongs to --cluster kuberay, not to a dashboard")
    else:
        run = jobs.submit(job, target.address, output_dir(job), say_line, follow=not detach)
    if not detach:
        print_result(run, as_json)
    elif as_json:
        print_json({"run": run.run_id, "path": str(run.path), "sent": run.read_json(package.SENT)})
    else:
        show(f"{run.run_id} runs on {target.address}: orchestrator logs {run.run_id} --follow")


def resume(run: RunFolder, as_json: bool) -> None:
    """Start its next attempt on the cluster."""
    from orchestrator.remote import jobs

    jobs.resume(run, _line_printer(as_json))


def status(run: RunFolder, as_json: bool) -> None:
    """Ask the cluster; a job that has no run folder yet is described by its state alone."""
    from orchestrator.remote import jobs

    found = jobs.look(run)
    if found.state != "PENDING":
        try:
            shown = jobs.run_verb(run, "status", run.run_id, *(["--json"] if as_json else []))
            (write if as_json else show)(shown.rstrip("\n"))
            return
        except RunFailed:
            if found.state not in ENDED:
                raise
    state = "waiting" if found.state == "PENDING" else found.state.lower()
    row = {"run": run.run_id, "state": state, "message": found.message}
    if as_json:
        print_json(row)
    else:
        out.print("\n".join(f"{key:<13} {value}" for key, value in row.items()), soft_wrap=True)


def logs(run: RunFolder, follow: bool) -> None:
    """Print what the job has printed on the cluster."""
    from orchestrator.remote import jobs

    if follow and not is_closed(run):
        jobs.attach(run, _line_printer(False))
    else:
        show(jobs.read_logs(run).rstrip("\n"))


def stop(run: RunFolder) -> None:
    """Ask the job on the cluster to save and stop."""
    from orchestrator.remote import jobs

    show(jobs.stop(run).rstrip("\n"))


@verbs.command()
def fetch(run: RunArgument = "latest", runs: RunsOption = Path("runs")) -> None:
    """Bring a run that was sent to a cluster here: its events, result and adapter."""
    from orchestrator.remote import jobs

    found = RunFolder.find(run, runs)
    if not is_remote(found):
        raise JobError(f"{found.run_id} ran on this machine; it is in {found.path}")
    jobs.fetch(found, say)


@verbs.command(hidden=True)
def send(run: RunArgument, runs: RunsOption = Path("runs")) -> None:
    """Print a run folder as text; `fetch` runs this on the cluster."""
    from orchestrator.remote import package

    write(package.send(RunFolder.find(run, runs)))


def _line_printer(as_json: bool) -> Callable[[str], None]:
    return say if as_json else show
