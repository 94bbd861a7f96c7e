"""A process that tries inputs: its own home, one world, a fresh folder for each input."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from pathlib import Path

os.environ["COLUMNS"] = "400"  # before the consoles are made: wide tables fold nothing

from clusters.probe.node import probe_node
from tests.fuzz.case import Case
from tests.fuzz.judge import Ended, empty, judge
from tests.fuzz.kinds import KINDS, case_of
from tests.fuzz.world import World


class Session:
    """Judges inputs one after another below a folder, without the network."""

    kinds = tuple(KINDS)

    def __init__(self, place: Path) -> None:
        self.place, self.world = place.resolve(), World(place.resolve() / "world")
        self.world.folder.mkdir()
        for name in ("home", "cache", "tmp"):
            (self.place / name).mkdir()
        os.environ.update(
            HOME=str(self.place / "home"),
            XDG_CACHE_HOME=str(self.place / "cache"),
            TMPDIR=str(self.place / "tmp"),
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
        )
        tempfile.tempdir = None  # chosen again
        os.environ.pop("RAY_ADDRESS", None)
        warnings.simplefilter("ignore")
        for library in ("datasets", "transformers"):  # their first import is no fault of the input that meets it
            importlib.import_module(library)
        probe_node()  # a machine is measured once, which takes longer than an input may

    def case(self, kind: str, seed: int, number: int) -> Case:
        return case_of(kind, seed, number, self.world)

    def judge(self, kind: str, seed: int, number: int) -> tuple[Ended, str | None]:
        """How one input ended, and what is wrong with that."""
        folder = self.place / "here"
        empty(folder)
        return judge(self.case(kind, seed, number), folder)

    def show(self, kind: str, seed: int, number: int, ended: Ended) -> None:
        case = self.case(kind, seed, number)
        print(f"--- {kind} {number}: orchestrator {' '.join(map(ascii, case.arguments))}")
        for name, content in case.files.items():
            shown = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
            print(f"    {name} ({len(shown)} bytes): {shown[:600]!r}")
        print(f"    {dict(case.specials)}\n    exit code {ended.code} after {ended.seconds:.2f} s")
        print(ascii(ended.output[:3000]))
