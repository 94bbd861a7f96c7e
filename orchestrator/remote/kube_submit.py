"""Submits a job to Kubernetes: plan for its nodes, render the objects, copy data to the volume, create the RayJob."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from clusters.units import format_bytes
from orchestrator.errors import JobError
from orchestrator.job.job_file import Job
from orchestrator.lifecycle import machines
from orchestrator.remote import jobs, kube_nodes, kube_objects, package
from orchestrator.remote.backends import open_kubernetes
from orchestrator.remote.record import ClusterTarget, Remote, Say, begin_when_sent, parse_kuberay, wrap_errors
from orchestrator.runs.run_folder import RunFolder


def submit(job: Job, target: ClusterTarget, output_dir: Path, say: Say, follow: bool = True) -> RunFolder:
    """Send a job as a RayJob and, with `follow`, wait until it ends and fetch its result into the run folder here.

    A `run_id` that was sent before is continued.
    Raises JobError and NothingFits before anything is created, ClusterError, RunFailed.
    """
    name = target.run_id or new_name(job)
    kube_objects.check_name(name)
    known = RunFolder(output_dir / name)
    if known.has_started:
        return _continue(known, say, follow)
    client = open_kubernetes(target.address)
    with wrap_errors(target.address):
        objects = make_objects(job, name, target, client, say)
        with RunFolder.take(output_dir, job.spec.name, name) as run:
            if run.has_started:
                raise JobError(f"another process has just started {name}; the same command continues it")
            with begin_when_sent(run, job):
                _send(run, client, objects, say)
                uploads = objects.folder if objects.uploads or objects.texts else None
                Remote(target.address, objects.runs, (name,), uploads=uploads).keep(run)
    say(f"run {name} in {client.namespace}")
    if follow:
        jobs.attach(run, say)
    return run


def render(job: Job, target: ClusterTarget, file: Path, say: Say) -> str:
    """Write the RayJob into a file, planned for the declared node classes or those of the cluster; the run's name.

    Raises JobError, NothingFits, ClusterError.
    """
    name = target.run_id or new_name(job)
    kube_objects.check_name(name)
    is_planned_here = target.hardware is not None or target.attach is not None
    client = None if is_planned_here else open_kubernetes(target.address)
    kube_objects.write(make_objects(job, name, target, client, say), file, say)
    return name


def make_objects(job: Job, name: str, target: ClusterTarget, client: Any, say: Say) -> kube_objects.Objects:
    """Plan and render.  Without a client the target names the node classes or a RayCluster."""
    from orchestrator.lifecycle.prepare import plan_without_data

    namespace = client.namespace if client else parse_kuberay(target.address)[1] or "default"
    if target.attach:
        return kube_objects.render_on(target.attach, job, namespace, name)
    if target.hardware:
        capability = machines.declared(target.hardware)
    else:
        capability = kube_nodes.read_nodes(client.nodes(), job.spec.kubernetes)
    ready = plan_without_data(job, capability, say)
    return kube_objects.render(job, ready.plan, capability, namespace, name)


def _continue(run: RunFolder, say: Say, follow: bool) -> RunFolder:
    """Restart a run that ended, wait for one that runs."""
    if run.state_by_events() != "finished":
        jobs.restart(run)
        if follow:
            jobs.attach(run, say)
    return run


def _send(run: RunFolder, client: Any, objects: kube_objects.Objects, say: Say) -> None:
    """Create a run's objects, its data first, and keep them in kube.yaml."""
    run.write("kube.yaml", kube_objects.to_yaml(objects.job, *([objects.config] if objects.config else [])))
    package.report(objects.sent, run, say)
    say(objects.ends)
    client.rehearse(objects.job, objects.config)
    if objects.uploads or objects.texts:
        packed = package.archive(objects.uploads, objects.texts)
        say(f"sending {format_bytes(len(packed))} to the volume ...")
        client.put(objects.name, objects.job, objects.folder, packed)
    client.start(objects.name, objects.job, objects.config)


def new_name(job: Job) -> str:
    """A run's name that Kubernetes accepts; the time at its end stays whole however long the job's name is."""
    stamp = f"{datetime.now():%m%d-%H%M%S}"
    return f"{kube_objects.object_name(job.spec.name)[: 46 - len(stamp)].rstrip('-')}-{stamp}"
