"""What the verbs do for runs that live on a cluster behind a dashboard, and the verb `fetch`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from orchestrator import remote
from orchestrator.errors import JobError
from orchestrator.jobfile import Job
from orchestrator.rundir import RunFolder
from orchestrator.verbs import RunArgument, RunsOption, out, print_json, say


def is_remote(run: RunFolder) -> bool:
    """Whether a run was sent to a cluster from here."""
    return (run.path / "remote.json").exists()


def submit(job: Job, address: str, detach: bool, as_json: bool) -> RunFolder:
    """Send a job; stay until it ends, unless detached."""
    from orchestrator.run import output_dir

    run = remote.submit(job, address, output_dir(job), _listener(as_json), follow=not detach)
    if detach:
        if as_json:
            print_json({"run": run.run_id, "path": str(run.path)})
        else:
            out.print(f"{run.run_id} runs on {address}: orchestrator logs {run.run_id} --follow", soft_wrap=True)
    return run


def resume(run: RunFolder, as_json: bool) -> None:
    """Start it again where it runs."""
    remote.resume(run, _listener(as_json))


def status(run: RunFolder, as_json: bool) -> None:
    """Ask the cluster."""
    sys.stdout.write(remote.verb(run, "status", run.run_id, *(["--json"] if as_json else [])))


def logs(run: RunFolder, follow: bool) -> None:
    """What the job printed there."""
    if follow:
        remote.attach(run, _listener(False))
    else:
        sys.stdout.write(remote.printed(run))


def stop(run: RunFolder) -> None:
    """Ask the job there to save and stop."""
    sys.stdout.write(remote.verb(run, "stop", run.run_id))


def render(job: Job, cluster: str, hardware: Path | None, file: Path | None) -> None:
    """Plan for the declared node classes and write the RayJob."""
    from datetime import datetime

    from orchestrator import kube
    from orchestrator.machines import declared
    from orchestrator.run import plan_without_data

    if file is None or hardware is None:
        raise JobError(
            "--cluster kuberay: give --hardware FILE, which declares the cluster's node classes, and --render FILE for"
            " the RayJob; nothing is sent to an API server by this version"
        )
    capability = declared(hardware)
    ready = plan_without_data(job, capability, say)
    name = kube.object_name(f"{job.spec.name}-{datetime.now():%m%d-%H%M%S}")
    kube.write(kube.rendered(job, ready.plan, capability, cluster.partition(":")[2] or "default", name), file, say)


def fetch(run: RunArgument = "latest", runs: RunsOption = Path("runs")) -> None:
    """Bring a run that was sent to a cluster here: its events, result and adapter."""
    found = RunFolder.find(run, runs)
    if not is_remote(found):
        raise JobError(f"{found.run_id} ran on this machine; it is in {found.path}")
    remote.fetch(found, say)


def send(run: RunArgument, runs: RunsOption = Path("runs")) -> None:
    """The other side of `fetch`, on the cluster."""
    sys.stdout.write(remote.send(RunFolder.find(run, runs)) + "\n")


def _listener(as_json: bool) -> Callable[[str], None]:
    return say if as_json else lambda text: out.print(text, markup=False, highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    app.command()(fetch)
    app.command(hidden=True)(send)
