"""Start work on a Ray cluster through its dashboard (Ray Jobs API): only HTTP reaches it, nothing runs here.

https://docs.ray.io/en/latest/cluster/running-applications/job-submission/
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clusters.job_backend import ENDED, JobGone, JobLost, RemoteJob, VerbFailed
from clusters.ray.connect import CannotConnect, RefusesToken, has_token, refusal
from clusters.safe.reading import first_line

_POLL_S = 1.0
_VERB_S = 180.0  # that a verb may take on the cluster
_PATIENCE_S = (5.0, 120.0)  # to connect, between two bytes: Ray itself would wait without end


class RayJobsClient:
    """A cluster's dashboard."""

    def __init__(self, address: str, folder: Path) -> None:
        """`address` is http://HOST:PORT; `folder` is what the job and our verbs run in, sent when it is needed.

        Raises CannotConnect, RefusesToken.
        """
        self.address, self._folder = address, folder
        self._printed: dict[str, int] = {}  # characters by job
        with _send_token_if_wanted(address):
            try:
                self._client: Any = _client(address)  # takes the token with it
            except Exception as error:  # ConnectionError, RuntimeError, AuthenticationError ... by Ray's mood
                if "uthentication" in type(error).__name__ + str(error):
                    raise RefusesToken(refusal(address)) from error
                raise CannotConnect(f"no Ray dashboard at {address}: {first_line(error)}") from error

    def start(self, name: str, command: str) -> None:
        """Upload the folder, then run a command in it on the head; `name` must be new there.

        Nothing secret may go with it: Ray writes what a job's environment is given into its logs.
        """
        asked = {"working_dir": str(self._folder)}
        with _line(self.address):
            self._client.submit_job(submission_id=name, entrypoint=command, runtime_env=asked, entrypoint_num_cpus=0)

    def look(self, name: str) -> RemoteJob:
        with _line(self.address):
            found = self._client.get_job_info(name)
            return RemoteJob(str(found.status.value), str(found.message or ""))

    def logs(self, name: str) -> str:
        """Everything the job printed so far."""
        with _line(self.address):
            text = self._client.get_job_logs(name)
            if not isinstance(text, str):
                raise TypeError("the log is not text")
            return text

    def follow(self, name: str, notice: Callable[[str], None]) -> Iterator[str]:
        while True:
            has_ended = self.look(name).state in ENDED
            text, start = self.logs(name), self._printed.get(name, 0)
            whole = len(text) if has_ended else text.rfind("\n") + 1
            self._printed[name] = max(start, whole)
            yield from text[start:whole].splitlines()
            if has_ended:
                return
            time.sleep(_POLL_S)

    def ask(self, name: str, arguments: list[str]) -> str:
        verb = f"{name}-{arguments[0]}-{uuid.uuid4().hex[:6]}"
        self.start(verb, shlex.join(["python", "-m", "orchestrator", *arguments]))
        until = time.monotonic() + _VERB_S
        while (found := self.look(verb)).state not in ENDED:
            if time.monotonic() > until:
                raise JobLost(f"{verb} has not ended after {_VERB_S:.0f} s")
            time.sleep(_POLL_S / 2)
        said = self.logs(verb)
        with _line(self.address), contextlib.suppress(RuntimeError):
            self._client.delete_job(verb)  # else the cluster's list of jobs would be full of our questions
        if found.state != "SUCCEEDED":
            raise VerbFailed(said.strip().splitlines()[-1] if said.strip() else found.message)
        return said

    def remove(self, name: str, folder: str) -> None:
        """Ray removes what it was sent by itself."""

    def tidy(self, name: str) -> bool:
        """The job stays in the cluster's list, with what it printed."""
        return False


def _client(address: str) -> Any:
    """Ray's client, whose every request ends."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # else it prints each upload

    class Patient(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": _PATIENCE_S, **options})

    return Patient(address)


@contextlib.contextmanager
def _send_token_if_wanted(address: str) -> Iterator[None]:
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
        raise JobLost(f"the connection to {address} broke: {first_line(error)}") from error
    except RuntimeError as error:
        text = str(error)
        if "404" in text or "does not exist" in text:
            raise JobGone(first_line(error)) from error
        if "size" in text.lower() and "exceed" in text.lower():
            raise CannotConnect(first_line(error)) from error
        raise JobLost(f"{address} answers: {first_line(error)}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # not what a dashboard sends
        raise JobLost(f"{address} sent an answer that could not be read: {first_line(error)}") from error


def _asks_for_token(address: str) -> bool:
    """Whether the dashboard refuses a stranger.  Raises CannotConnect where nothing answers."""
    import requests

    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=5)
    except (requests.exceptions.RequestException, ValueError) as error:
        raise CannotConnect(f"no Ray dashboard at {address}: {first_line(error)}") from error
    if answer.status_code in (401, 403):
        if not has_token():
            raise RefusesToken(refusal(address))
        return True
    if answer.status_code != 200:
        raise CannotConnect(f"{address} answers {answer.status_code}: that is not a Ray dashboard")
    return False
