"""Applications of Ray Serve on a cluster, through its dashboard: only HTTP reaches it, and nothing of Ray is loaded.

A PUT names all applications that a cluster shall have, so those of others are read first and named again as they are:
Ray leaves them running, as their code and options are the same.
https://docs.ray.io/en/latest/serve/api/index.html#serve-rest-api
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from clusters.ray.connect import CannotConnect, RefusesToken, has_token, read_token, refusal
from clusters.safe.reading import BadInput, first_line, load_json, printable

_APPLICATIONS = "/api/serve/applications/"
_PATIENCE = aiohttp.ClientTimeout(total=60, connect=5)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_REDACTED = "<redacted>"  # in place of a value that the dashboard does not show
_HTTP_PORT = 8000  # Serve's, where it is not said


class DashboardRefuses(Exception):
    """What the dashboard answers where it does not do what it was asked; the text says why."""


@dataclass(frozen=True)
class DeployedPart:
    """One deployment of an application."""

    status: str
    message: str
    num_running: int
    num_wanted: int


@dataclass(frozen=True)
class DeployedApplication:
    """An application as the dashboard shows it."""

    status: str  # NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY or DELETING
    message: str
    parts: Mapping[str, DeployedPart] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All that Ray says of its trouble."""
        return "\n".join(one for one in (self.message, *(part.message for part in self.parts.values())) if one)

    @property
    def reason(self) -> str:
        """The line that matters of it: of a traceback the exception, of a deployment before the application."""
        said = [last_line(part.message) for part in self.parts.values() if part.status != "HEALTHY" and part.message]
        return "; ".join(said or [last_line(self.message)]) or f"its state is {self.status}"

    @property
    def progress(self) -> str:
        """Its parts, with what keeps them waiting."""
        parts = (
            f"{name} {one.num_running} of {one.num_wanted} running"
            + (f" ({last_line(one.message)})" * bool(one.message))
            for name, one in self.parts.items()
        )
        return ", ".join([self.status.lower(), *parts])


class ServeDashboard:
    """A cluster's dashboard, asked for its Serve applications."""

    def __init__(self, address: str) -> None:
        """`address` is http://HOST:PORT."""
        self.address = address.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._headers: dict[str, str] = {}
        self.version = ""  # Ray's, once it is open

    @property
    def pip_line(self) -> str:
        """What installs Ray Serve LLM there."""
        return f"pip install 'ray[llm]=={self.version}' on every node of the cluster"

    async def open(self) -> None:
        """Connect.  A token is shown only to a cluster that asks for one.

        Raises CannotConnect, RefusesToken, DashboardRefuses.
        """
        self._session = aiohttp.ClientSession(timeout=_PATIENCE)
        try:
            found = await self._ask("GET", "/api/version")
        except RefusesToken:
            if not has_token():
                raise
            try:
                self._headers = {"Authorization": f"Bearer {read_token()}"}
            except OSError as error:
                raise RefusesToken(f"{refusal(self.address)}; it cannot be read: {error.strerror}") from None
            found = await self._ask("GET", "/api/version")
        if not isinstance(found, dict) or not isinstance(version := found.get("ray_version"), str):
            raise CannotConnect(f"{self.address} does not answer as a Ray dashboard")
        self.version = printable(version)

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    async def details(self) -> dict[str, Any]:
        """Serve's state: its applications, its HTTP options, its proxies."""
        found = await self._ask("GET", _APPLICATIONS)
        if not isinstance(found, dict) or not isinstance(found.get("applications", {}), dict):
            raise DashboardRefuses(f"{self.address} sent a state of Serve that could not be read")
        return found

    async def apply(self, name: str, config: Mapping[str, Any] | None) -> None:
        """Deploy the application `name`, or remove it, and keep all others.

        Raises DashboardRefuses where others cannot be kept; nothing is changed then.
        """
        details = await self.details()
        if config is None and name not in details.get("applications", {}):
            return
        body: dict[str, Any] = {"applications": [*others_than(name, details), *([config] if config else [])]}
        if details.get("target_capacity") is not None:
            body["target_capacity"] = details["target_capacity"]
        await self._ask("PUT", _APPLICATIONS, body)

    async def num_gpus(self) -> tuple[int, float]:
        """Nodes that are there, and their GPUs."""
        found = await self._ask("GET", "/api/v0/nodes?limit=10000")
        try:
            nodes = [one for one in found["data"]["result"]["result"] if one["state"] == "ALIVE"]
            return len(nodes), sum(float(one["resources_total"].get("GPU", 0)) for one in nodes)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise DashboardRefuses(f"{self.address} sent a list of nodes that could not be read") from None

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        assert self._session
        try:
            async with self._session.request(
                method, f"{self.address}{path}", json=body, headers=self._headers, allow_redirects=False
            ) as reply:
                status, text = reply.status, await reply.text(errors="replace")
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            raise CannotConnect(f"no Ray dashboard at {self.address}: {first_line(error) or 'no answer'}") from None
        if status in (401, 403):
            raise RefusesToken(refusal(self.address))
        if status == 404 and path == "/api/version":
            raise CannotConnect(f"{self.address} does not answer as a Ray dashboard")
        if status == 501:
            raise DashboardRefuses(f"Ray Serve is not installed at {self.address}: {self.pip_line}")
        if status != 200:
            raise DashboardRefuses(f"{self.address} answers {status}: {printable(text.strip())[:1000]}")
        try:
            return load_json(text) if text.strip() else None
        except BadInput as error:
            raise DashboardRefuses(f"{self.address} sent an answer that could not be read: {error}") from None


def others_than(name: str, details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configurations of all applications that a PUT would remove, but `name`.

    Those that a program deployed (serve.run) are no matter of a PUT.  Raises DashboardRefuses.
    """
    kept, lost = [], []
    for other, found in details.get("applications", {}).items():
        if other == name or found.get("status") == "DELETING" or found.get("source") == "imperative":
            continue
        config = found.get("deployed_app_config")
        if isinstance(config, dict) and _REDACTED not in json.dumps(config):
            kept.append(config)
        else:
            lost.append(other)
    if lost:
        raise DashboardRefuses(
            f"other applications run there whose configuration the dashboard does not show ({', '.join(lost)}), and"
            " to deploy one more would remove them. Remove them first, or use another cluster"
        )
    return kept


def application_in(details: Mapping[str, Any], name: str) -> DeployedApplication | None:
    """Raises DashboardRefuses for a state that cannot be read."""
    if (found := details.get("applications", {}).get(name)) is None:
        return None
    try:
        parts = {
            part: DeployedPart(
                str(one["status"]),
                str(one.get("message", "")),
                sum(replica["state"] == "RUNNING" for replica in one["replicas"]),
                int(one["target_num_replicas"]),
            )
            for part, one in found["deployments"].items()
        }
        return DeployedApplication(str(found["status"]), str(found.get("message", "")), parts)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise DashboardRefuses(f"the state of the application {name} could not be read") from None


def http_addresses(details: Mapping[str, Any], dashboard: str) -> Iterator[str]:
    """Where Serve may answer: first the dashboard's host, as of a tunnel or a gateway, then each of its proxies."""
    options = details.get("http_options") or {}
    scheme = "https" if options.get("ssl_certfile") else "http"
    proxies = (details.get("proxies") or {}).values()
    hosts = [urlsplit(dashboard).hostname, *(one.get("node_ip") for one in proxies if one.get("status") == "HEALTHY")]
    for host in dict.fromkeys(one for one in hosts if one):
        yield f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.get('port') or _HTTP_PORT}"


def last_line(text: str) -> str:
    """The last line that begins at the margin: of a traceback the exception."""
    lines = [line.rstrip() for line in _COLOUR.sub("", text).splitlines() if line.strip() and not line[0].isspace()]
    return printable(lines[-1])[:500] if lines else ""
