"""What other verbs of this program say, asked in processes of their own: their libraries stay out of this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_FRESH_S = 30.0  # that an answer about the machines is shown again
_PATIENCE_S = 120.0


class VerbError(Exception):
    """A verb that failed; the text is what it printed."""


class ClusterView:
    """The machines of a cluster, as the verb `nodes` lists them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = asyncio.Lock()
        self._answer: dict[str, Any] = {}
        self._asked_s = float("-inf")

    async def nodes(self) -> dict[str, Any]:
        """{nodes} or {error}, at most half a minute old; several who ask at once wait for one answer."""
        async with self._lock:
            if time.monotonic() - self._asked_s > _FRESH_S:
                try:
                    found = {"nodes": json.loads(await _printed("nodes", "--cluster", self.address, "--json"))}
                except (VerbError, ValueError) as error:
                    found = {"error": str(error)}
                self._answer = {"cluster": self.address, "at": round(time.time()), **found}
                self._asked_s = time.monotonic()
            return self._answer


class Reports:
    """Reports of runs as `report` writes them, one at a time; nothing is written into a run's folder."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def html(self, folder: Path, lang: str) -> str:
        """The page.  Raises VerbError."""
        async with self._lock:
            with tempfile.TemporaryDirectory(prefix="orchestrator-report-") as place:
                file = Path(place) / "report.html"
                await _printed("report", str(folder), "--output", str(file), "--lang", lang)
                return file.read_text(encoding="utf-8")


async def _printed(*arguments: str) -> str:
    """Standard output of `orchestrator ARGUMENTS`.  Raises VerbError."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orchestrator", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_PATIENCE_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise VerbError(f"no answer within {_PATIENCE_S:.0f} s") from None
    finally:
        if process.returncode is None:  # too late, or who asked has gone
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise VerbError(_why(out, err))
    return out.decode("utf-8", "replace")


def _why(out: bytes, err: bytes) -> str:
    """What a verb that failed said: of `--json` its error, else its last lines."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(out)["error"])
    return "\n".join(err.decode("utf-8", "replace").strip().splitlines()[-3:])
