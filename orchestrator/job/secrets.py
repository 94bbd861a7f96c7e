"""Secrets are named in a job file, never written out: which names a job uses, their values, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from clusters.safe.masking import holds_secret
from orchestrator.errors import JobError
from orchestrator.job.spec import JobSpec

_URI = "tracking.mlflow_uri"
_NAMED = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_USER_INFO = re.compile(r"(?<=://)[^/?#]*@")
_WAY_OUT = (
    "write ${MLFLOW_PASSWORD} in its place and export MLFLOW_PASSWORD where the job runs (or, for an MLflow server,"
    " leave the user out and export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN)"
)


class SecretMissing(ValueError):
    """An environment variable that a job names is not set; the text names it."""


def secret_names(spec: JobSpec) -> list[str]:
    """Environment variables that must be set where the job runs."""
    in_uri = _NAMED.findall(spec.tracking.mlflow_uri or "") if "mlflow" in spec.tracking.report_to else []
    return list(dict.fromkeys([*spec.cluster.secrets, *in_uri]))


def with_values(uri: str, environment: Mapping[str, str]) -> str:
    """A URI with each `${NAME}` as its value, percent-encoded where it is a user's name or password.

    Raises SecretMissing.
    """

    def value(name: str) -> str:
        if name not in environment:
            raise SecretMissing(f"{_URI} names {name}, which is not set here. Export it")
        return environment[name]

    def encoded(part: re.Match[str]) -> str:
        return _NAMED.sub(lambda found: quote(value(found[1]), safe=""), part[0])

    return _NAMED.sub(lambda found: value(found[1]), _USER_INFO.sub(encoded, uri))


def uri_mistake(uri: str | None) -> str | None:
    """What keeps a URI from being used or masked; the text does not show it."""
    if uri and re.search(r'://[^/?#]*[\s"][^/?#]*@', uri):
        return f"{_URI}: its user or password holds a space or a quotation mark; write it percent-encoded (%20, %22)"
    return None


def find_secrets(document: Any) -> list[str]:
    """Keys of a job document whose value holds a password or a token."""
    return [key for key, text in _texts(document) if holds_secret(text)]


def notices(document: Any) -> list[str]:
    """A warning for each of them."""
    return [
        f"{key} holds a password or a token: it is masked in what is shown and sent, but stays in the run's job.yaml"
        f" and recorded.json, which only you can read. {_way_out(key)}"
        for key in find_secrets(document)
    ]


def refuse_written_out(document: Any, place: str) -> None:
    """Raises JobError for a document with a password or a token that would lie in `place`."""
    if found := find_secrets(document):
        start = f"holds a password or a token, which {place} would show."
        raise JobError([f"{key} {start} {_way_out(key)}" for key in found])


def _way_out(key: str) -> str:
    return f"Name it instead: {_WAY_OUT}" if key == _URI else "Remove it"


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value
