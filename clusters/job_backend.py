"""What a cluster that only HTTP reaches must offer: implemented for a Ray dashboard and for Kubernetes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobLost(Exception):
    """The cluster knows no job of that name, or the connection broke; the text says which."""


class JobGone(JobLost):
    """The job is not there; waiting does not help."""


class VerbFailed(Exception):
    """A command that was run beside the job failed; the text is the last line it printed."""


@dataclass(frozen=True)
class RemoteJob:
    """The state of a job on its cluster."""

    state: str  # PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED
    message: str


class JobBackend(Protocol):
    """Runs jobs that are sent to it.  Calls raise JobLost when the connection breaks, CannotConnect when refused."""

    address: str

    def look(self, name: str) -> RemoteJob: ...

    def logs(self, name: str) -> str:
        """Everything the job printed so far."""
        ...

    def follow(self, name: str, notice: Callable[[str], None]) -> Iterator[str]:
        """Each line of the job, once in this client's life, until it has ended; `notice` gets what it waits for."""
        ...

    def ask(self, name: str, arguments: list[str]) -> str:
        """Run our command line beside the job; what it prints.  Raises VerbFailed."""
        ...

    def remove(self, name: str, folder: str) -> None:
        """Delete a folder that was sent for a job."""
        ...

    def tidy(self, name: str) -> bool:
        """Delete what a job that has ended holds; whether nothing of it is left there."""
        ...
