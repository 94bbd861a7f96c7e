"""Opens the job backend that a run was sent through and starts its attempts: a dashboard, or an API server."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from clusters.ray.jobs import RayJobsClient
from orchestrator.remote import kube_objects
from orchestrator.remote.record import Remote, is_kuberay, parse_kuberay, wrap_errors
from orchestrator.runs.run_folder import RunFolder


def open_backend(run: RunFolder, remote: Remote) -> Any:
    """The JobBackend at a remote's address.  Raises ClusterError."""
    if is_kuberay(remote.address):
        return open_kubernetes(remote.address)
    with wrap_errors(remote.address):
        return RayJobsClient(remote.address, run.path / "package")


def open_kubernetes(address: str) -> Any:
    """A KubeClient for kuberay[:[CONTEXT/]NAMESPACE].  Raises ClusterError."""
    from clusters.kubernetes.client import KubeClient

    with wrap_errors(address):
        return KubeClient(*parse_kuberay(address))


def start_attempt(backend: Any, run: RunFolder, remote: Remote) -> Remote:
    """Start a run's first or next attempt and record it.  Raises ClusterError."""
    with wrap_errors(remote.address):
        if is_kuberay(remote.address):
            name = run.run_id
            _replace_objects(backend, run)
        else:
            plain = run.run_id if run.run_id.isascii() else kube_objects.object_name(run.run_id)  # also part of a URL
            name = f"{plain}-{len(remote.attempts) + 1}"
            command = ["python", "-m", "orchestrator", "submit", "job.yaml", "--run-id", run.run_id]
            backend.start(name, shlex.join(command))
    return replace(remote, attempts=(*remote.attempts, name), is_closed=False).keep(run)


def _replace_objects(client: Any, run: RunFolder) -> None:
    """Create a run's objects again, in place of those that ended."""
    job, config = kube_objects.read(run.path / "kube.yaml")
    client.tidy(run.run_id)
    client.wait_gone(run.run_id)
    client.start(run.run_id, job, config)
