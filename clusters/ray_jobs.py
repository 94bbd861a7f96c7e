"""Start work on a Ray cluster through its dashboard (Ray Jobs API): only HTTP reaches it, nothing runs here.

https://docs.ray.io/en/latest/cluster/running-applications/job-submission/
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.connect import CannotConnect, RefusesToken, has_token, refusal

UPLOAD_LIMIT_BYTES = 500 * 2**20  # Ray keeps a package in its head's memory and refuses more than 512 MiB
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobLost(Exception):
    """The cluster knows no job of that name, or the line to it broke; the text says which."""


@dataclass(frozen=True)
class RemoteJob:
    """What a cluster says of a job."""

    state: str  # PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED
    message: str


class JobsDoor:
    """A cluster's dashboard.  Every call raises JobLost when the line breaks."""

    def __init__(self, address: str) -> None:
        """`address` is http://HOST:PORT.  Raises CannotConnect, RefusesToken."""
        self.address = address
        with _shown_as_asked(address):
            from ray.job_submission import JobSubmissionClient

            try:
                self._client: Any = JobSubmissionClient(address)  # takes the token with it
            except Exception as error:  # ConnectionError, RuntimeError, AuthenticationError ... by Ray's mood
                if "uthentication" in type(error).__name__ + str(error):
                    raise RefusesToken(refusal(address)) from error
                raise CannotConnect(f"no Ray dashboard at {address}: {_first_line(error)}") from error

    def start(self, name: str, command: str, folder: Path) -> None:
        """Upload a folder, then run a command in it on the head; `name` must be new there."""
        with _line(self.address):
            self._client.submit_job(
                submission_id=name,
                entrypoint=command,
                runtime_env={"working_dir": str(folder)},
                entrypoint_num_cpus=0,
            )

    def look(self, name: str) -> RemoteJob:
        with _line(self.address):
            found = self._client.get_job_info(name)
        return RemoteJob(str(found.status.value), found.message or "")

    def logs(self, name: str) -> str:
        """Everything the job printed so far."""
        with _line(self.address):
            return self._client.get_job_logs(name)

    def forget(self, name: str) -> None:
        """Remove a job that has ended from the cluster's list."""
        with _line(self.address), contextlib.suppress(RuntimeError):
            self._client.delete_job(name)

    def wait(self, name: str, timeout_s: float, poll_s: float = 0.5) -> RemoteJob:
        """Until the job has ended.  Raises JobLost after the time."""
        until = time.monotonic() + timeout_s
        while (found := self.look(name)).state not in ENDED:
            if time.monotonic() > until:
                raise JobLost(f"{name} has not ended after {timeout_s:.0f} s")
            time.sleep(poll_s)
        return found


@contextlib.contextmanager
def _shown_as_asked(address: str) -> Iterator[None]:
    """A token is shown only to a cluster that asks for one: it is not everybody's business."""
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

    os.environ["RAY_AUTH_MODE"] = "token" if _asks_for_token(address) else "disabled"
    Config.initialize("")  # Ray reads the mode once; so it does itself when it changes it
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        Config.initialize("")


@contextlib.contextmanager
def _line(address: str) -> Iterator[None]:
    import requests

    try:
        yield
    except requests.exceptions.RequestException as error:
        raise JobLost(f"the line to {address} broke: {_first_line(error)}") from error
    except RuntimeError as error:
        text = str(error)
        if "404" in text or "does not exist" in text:
            raise JobLost(_first_line(error)) from error
        if "size" in text.lower() and "exceed" in text.lower():
            raise CannotConnect(_first_line(error)) from error
        raise


def _asks_for_token(address: str) -> bool:
    """Whether the dashboard refuses a stranger.  Raises CannotConnect where nothing answers."""
    import requests

    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=5)
    except requests.exceptions.RequestException as error:
        raise CannotConnect(f"no Ray dashboard at {address}: {_first_line(error)}") from error
    if answer.status_code in (401, 403):
        if not has_token():
            raise RefusesToken(refusal(address))
        return True
    if answer.status_code != 200:
        raise CannotConnect(f"{address} answers {answer.status_code}: that is no Ray dashboard")
    return False


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
