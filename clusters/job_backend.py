"""What a cluster that only HTTP reaches must offer, whoever answers there: a dashboard, or an API server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobLost(Exception):
    """The cluster knows no job of that name, or the line to it broke; the text says which."""


class JobGone(JobLost):
    """It is not there, and waiting brings nothing."""


class VerbFailed(Exception):
    """A command of ours ended there with an error; the text is its last word."""


@dataclass(frozen=True)
class RemoteJob:
    """What a cluster says of a job."""

    state: str  # PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED
    message: str


class Door(Protocol):
    """Where jobs run that were sent.  Every call raises JobLost when the line breaks, CannotConnect when refused."""

    address: str

    def look(self, name: str) -> RemoteJob: ...

    def logs(self, name: str) -> str:
        """Everything the job printed so far."""
        ...

    def follow(self, name: str, notice: Callable[[str], None]) -> Iterator[str]:
        """Each line the job prints, once in the life of this door, until it has ended; what it waits for by notice."""
        ...

    def ask(self, name: str, arguments: list[str]) -> str:
        """What our command line prints when it runs beside the job.  Raises VerbFailed."""
        ...

    def remove(self, name: str, folder: str) -> None:
        """Delete a folder that was sent for a job."""
        ...

    def tidy(self, name: str) -> bool:
        """Give back what a job that has ended holds; whether nothing of it is left there."""
        ...
