"""Adapters in a folder of an object store, from which machines without this one's disk load them.

An adapter's folder there is named by its name and its digest: the same one is copied once, a changed one is another.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, first_line, open_regular
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Unusable
from strategies.adapter_bank.folders import digest_of

_ADDRESS = re.compile(
    r"(s3|gs)://[a-z0-9][\w.-]{1,220}(/[\w.=-]+)*|abfss://[\w.-]+@[\w.-]+(/[\w.=-]+)*", flags=re.ASCII
)
_LONGEST_NAME, _DIGITS = 80, 12
_CHUNK_BYTES = 1 << 22


class StoreError(Exception):
    """An object store that cannot be reached or written; the text says which and why."""


def address_mistake(address: str) -> str | None:
    """What is wrong with a store's address.  Keys never stand in it."""
    if _ADDRESS.fullmatch(address.rstrip("/")):
        return None
    return f"{address}: give s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or abfss://CONTAINER@ACCOUNT/FOLDER"


def path_part(name: str) -> str:
    """A name that is safe in paths, addresses and shells."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_LONGEST_NAME].strip(".-") or "unnamed"


@dataclass
class ObjectStore:
    """A folder of an object store; credentials are what the store's own library finds on this machine."""

    address: str  # s3://BUCKET/FOLDER
    files: Any = None  # a pyarrow.fs.FileSystem; None until it is connected
    folder: str = ""  # where that file system has it

    def connect(self) -> None:
        """Raises StoreError."""
        if self.files is not None:
            return
        from pyarrow import fs

        try:
            self.files, self.folder = fs.FileSystem.from_uri(self.address.rstrip("/"))
        except (OSError, ValueError, NotImplementedError) as error:
            raise StoreError(f"{self.address}: {first_line(error)}") from None

    def put(self, source: Path, inside: str, name: str) -> str:
        """Copy an adapter into the subfolder `inside`, unless it is there; what its folder is called.

        Raises StoreError, and Unusable for a folder without an adapter's files.
        """
        try:
            label = f"{path_part(name)}-{digest_of(source)[:_DIGITS]}"
            paths = {one: f"{self.folder}/{inside}/{label}/{one}" for one in (WEIGHTS, CONFIG)}
            sizes = {one: (source / one).stat().st_size for one in paths}
        except OSError as error:
            raise Unusable(f"{source} cannot be read: {error.strerror}") from None
        try:
            found = self.files.get_file_info(list(paths.values()))
            if [info.size for info in found] == list(sizes.values()):
                return label
            for one, path in paths.items():  # the configuration last: readers look for it first
                with open_regular(source / one) as stream, self.files.open_output_stream(path) as target:
                    shutil.copyfileobj(stream, target, _CHUNK_BYTES)
        except BadInput as error:
            raise Unusable(str(error)) from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.address}/{inside}/{label}: {first_line(error)}") from None
        return label
