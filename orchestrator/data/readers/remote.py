"""Data files at addresses (S3, Google Cloud Storage, HTTP ...), fetched once into the user's cache through fsspec."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clusters.safe.cache import cache_folder
from clusters.safe.reading import first_line, printable
from orchestrator.data.readers.files import kind_of_name
from orchestrator.errors import JobError
from orchestrator.progress.updates import ProgressUpdate, listener

# What fsspec needs beside itself, as pip calls it, by the scheme of an address.
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
}
_VERSION_FIELDS = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "generation", "updated", "size", "blob_id")


def scheme_of(text: str) -> str | None:
    """The scheme of an address, in lower case; None for a path."""
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", text.strip())
    return match[1].lower() if match else None


def name_of(address: str) -> str:
    """The name of the file at an address, without what stands behind a question mark."""
    return Path(urlsplit(address).path if scheme_of(address) in ("http", "https") else address).name


def fetch(address: str, key: str) -> list[Path]:
    """The files at an address, which may hold `*`, in the cache; those that did not change are there already.

    Raises JobError.
    """
    scheme = scheme_of(address) or ""
    package = PACKAGES[scheme]
    if importlib.util.find_spec("fsspec") is None or importlib.util.find_spec(package) is None:
        raise JobError(
            f"{key}: {printable(address)}: reading {scheme}:// needs a package: pip install fsspec {package}"
        )
    from fsspec.core import get_fs_token_paths

    try:
        system, _, paths = get_fs_token_paths(address)
        found = [_fetch_one(system, path) for path in sorted(paths)]
    except Exception as error:  # each file system raises its own types
        raise JobError(
            f"{key}: {printable(address)} cannot be fetched: {printable(first_line(error)) or type(error).__name__}."
            " Check the address and the credentials of this machine"
        ) from None
    if not found:
        raise JobError(f"{key}: {printable(address)}: no file is there")
    return found


def _fetch_one(system: Any, path: str) -> Path:
    info = system.info(path)
    version = {name: str(info[name]) for name in _VERSION_FIELDS if info.get(name) is not None}
    label = hashlib.sha256(json.dumps([str(system.protocol), path, version]).encode()).hexdigest()[:24]
    file = cache_folder("fetched", label, name_of(path if scheme_of(path) else f"x://{path}"))
    if len(version) < 2 or not file.is_file():  # a size alone tells no version
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        system.get_file(path, str(part), callback=_bar())
        part.replace(file)
    return file


def _bar() -> Any:
    """What a file system tells of the bytes that came, for who listens."""
    from fsspec.callbacks import Callback

    listen = listener()

    class Bar(Callback):
        def call(self, *_: Any, **__: Any) -> None:
            if listen:
                listen(ProgressUpdate("download", self.value, self.size, "bytes"))

    return Bar()


def checked_address(text: str, key: str) -> str | None:
    """An address that can be read; None for a path.  Raises JobError for one that cannot."""
    scheme = scheme_of(text)
    if scheme is None:
        return None
    address, rest = text.strip(), text.strip().partition("://")[2]
    if scheme == "file":
        raise JobError(
            f"{key}: {printable(text)} is an address of this machine. Give the path alone: {printable(rest)}"
        )
    if scheme not in PACKAGES:
        raise JobError(
            f"{key}: {printable(text)} is an address of a kind that is not read; read are"
            f" {', '.join(f'{one}://' for one in PACKAGES)}. Fetch the file first, and give its path"
        )
    if not name_of(address) or (kind_of_name(name_of(address)) is None and "*" not in name_of(address)):
        raise JobError(
            f"{key}: {printable(text)} names no data file. Give the address of a file (....jsonl, .csv, .parquet ...)"
            " or a pattern that ends so (.../*.jsonl)"
        )
    return address
