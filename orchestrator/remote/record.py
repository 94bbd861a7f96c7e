"""Where a job is sent (`ClusterTarget`) and where a sent run lives (`Remote`); nothing here talks to a cluster."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clusters.job_backend import JobLost
from clusters.safe.reading import BadInput, printable, read_json, record
from orchestrator.errors import ClusterError, JobError
from orchestrator.runs.run_folder import RunFolder

if TYPE_CHECKING:  # a job's pydantic models wait for a verb that reads a job
    from orchestrator.job.job_file import Job

KUBERAY = "kuberay"
Say = Callable[[str], None]


@dataclass(frozen=True)
class ClusterTarget:
    """`submit --cluster` and the options that go with it."""

    address: str  # http://HOST:PORT, or kuberay[:[CONTEXT/]NAMESPACE]
    hardware: Path | None = None  # declares the node classes in place of the API server
    attach: str | None = None  # a RayCluster to run on instead of one of its own
    run_id: str | None = None

    @property
    def is_kuberay(self) -> bool:
        """Whether the address names a Kubernetes API server."""
        return is_kuberay(self.address)

    @property
    def is_remote(self) -> bool:
        """Whether only HTTP reaches the cluster; else this process joins it, or starts one of its own."""
        return self.is_kuberay or "://" in self.address


@dataclass(frozen=True)
class Remote:
    """Where a run lives that was sent from here: `remote.json` in its folder."""

    address: str  # http://HOST:PORT, or kuberay[:[CONTEXT/]NAMESPACE]
    storage: str  # the folder of runs there
    attempts: tuple[str, ...]  # submissions, the newest last
    uploads: str | None = None  # the folder there that holds its data
    is_closed: bool = False  # its result is here, and nothing of the job is left there

    @property
    def attempt(self) -> str:
        """The newest submission."""
        return self.attempts[-1]

    @classmethod
    def of(cls, run: RunFolder) -> Remote | None:
        """None for a run of this machine.  Raises JobError for a damaged record."""
        path = run.path / "remote.json"
        if not path.exists():
            return None
        try:
            found = record(cls, read_json(path), str(path))
            if not found.attempts and not found.is_closed:
                raise BadInput(f"{path}: lists no attempt")
            own = f"{found.storage.removesuffix('/runs')}/jobs/{run.run_id}"
            if found.uploads not in (None, own):  # it is deleted at the end
                raise BadInput(f"{path}: uploads: {printable(found.uploads or '')} is not {printable(own)}")
        except BadInput as error:
            raise JobError(f"{error}. Delete the folder {run.path}; the job on the cluster is not affected") from None
        return found

    def keep(self, run: RunFolder) -> Remote:
        """Write the record."""
        run.write("remote.json", json.dumps(asdict(self), indent=1))
        return self


def read_remote(run: RunFolder) -> Remote:
    """Raises JobError for a run that was not sent to a cluster."""
    remote = Remote.of(run)
    if remote is None:
        raise JobError(f"{run.run_id} runs on this machine; it was not sent to a cluster")
    return remote


def is_kuberay(address: str) -> bool:
    """Whether an address names a Kubernetes API server, not a dashboard."""
    return address.partition(":")[0] == KUBERAY


def parse_kuberay(address: str) -> tuple[str | None, str | None]:
    """Context and namespace of kuberay[:[CONTEXT/]NAMESPACE]; None = the current one.  Raises JobError."""
    context, _, namespace = address.partition(":")[2].rpartition("/")  # a context's name may hold slashes
    if namespace and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
        raise JobError(
            f"--cluster {address}: {namespace!r} is not a namespace; use lowercase letters, digits and hyphens"
        )
    return context or None, namespace or None


@contextlib.contextmanager
def wrap_errors(address: str) -> Iterator[None]:
    """Turn a job backend's errors into ClusterErrors that name the address."""
    from clusters.ray.connect import CannotConnect

    try:
        yield
    except (CannotConnect, JobLost) as error:
        raise ClusterError(f"--cluster {address}: {error}") from error


@contextlib.contextmanager
def begin_when_sent(run: RunFolder, job: Job) -> Iterator[None]:
    """Make the folder a run once the block has sent its job; delete the folder when the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    run.begin({"origin.json": json.dumps({"folder": str(job.folder)}), "job.yaml": job.text})
