"""A finished run's result as a folder of one kind: whole or not there, and never over files of one's own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clusters.safe.reading import printable
from clusters.safe.writing import new_folder
from orchestrator.errors import JobError, MissingExtra
from orchestrator.export import converter, hub_folder, ollama
from orchestrator.export.hub_folder import Stated
from orchestrator.job import model_files
from orchestrator.runs.condition import Finished, require_finished, require_mergeable, require_text
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.workers.finished import write_merged
from strategies.adapter_bank import gguf_adapter, sparse
from strategies.adapter_bank.adapter import Unusable

Kind = Literal["merged", "gguf", "ollama", "hub-folder"]
RECORD = "export.json"  # by which a folder is known to be an export, that may be written anew


@dataclass(frozen=True)
class ExportWish:
    """What is exported, and how."""

    kind: Kind
    is_merged: bool = False  # base and adapter as one model
    base: str | None = None  # a GGUF file, a name of Ollama's library, or one of the hub
    converter: Path | None = None
    stated: Stated = field(default_factory=Stated)
    may_replace: bool = False


def export(run: RunFolder, output: Path, wish: ExportWish, say: Callable[[str], None]) -> dict[str, Any]:
    """Write `output`; what was written.  Raises JobError where the run's result has no such form, RunFailed."""
    if os.path.lexists(output) and not (wish.may_replace and (output / RECORD).is_file()):
        way = "--force writes an export anew" if (output / RECORD).is_file() else "choose a new folder"
        raise JobError(f"--out {printable(str(output))} exists already; {way}")
    finished = require_finished(run)
    if wish.kind != "hub-folder":
        require_text(run, f"it is not exported as {wish.kind}")
    if wish.kind != "hub-folder" or wish.is_merged:
        require_mergeable(run)
    write = {"merged": _merged, "gguf": _gguf, "ollama": _ollama, "hub-folder": _hub_folder}[wish.kind]
    try:
        with new_folder(output, replaces=True) as folder:
            notes = write(finished, folder, output, wish, say)
            files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
            record = {"kind": wish.kind, "run": run.run_id, "files": files, "notes": notes}
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise JobError(f"--out {printable(str(output))}: cannot be written: {error.strerror or error}") from error
    return {**record, "path": str(output.absolute())}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _merged(finished: Finished, folder: Path, output: Path, wish: ExportWish, say: Callable[[str], None]) -> list[str]:
    """One plain transformers model."""
    return [write_merged(finished.run, finished.job, folder, output).text]


def _gguf(finished: Finished, folder: Path, output: Path, wish: ExportWish, say: Callable[[str], None]) -> list[str]:
    """The adapter as GGUF, or the whole model by llama.cpp's script."""
    name = _base_name(finished)
    if wish.is_merged or not finished.is_adapter:
        notes = _model_as_gguf(finished, folder, wish, say)
        lines = ["```bash", f"llama-cli -m {converter.FILE}", "```"]
    else:
        count = write_adapter(finished, folder / gguf_adapter.FILE, name)
        notes = [f"{count} linear maps of {name} are corrected; it is loaded beside that model as GGUF"]
        lines = ["```bash", f"llama-cli -m BASE.gguf --lora {gguf_adapter.FILE}", "```", "", f"BASE.gguf is {name}."]
    text = "\n".join([f"# {finished.job.spec.name}", "", *lines, ""])
    (folder / "README.md").write_text(text, encoding="utf-8")
    return notes


def _ollama(finished: Finished, folder: Path, output: Path, wish: ExportWish, say: Callable[[str], None]) -> list[str]:
    """A Modelfile with what it names."""
    if not wish.is_merged and finished.is_adapter:
        origin = ollama.place_base(finished, wish.base, folder)
        write_adapter(finished, folder / gguf_adapter.FILE, _base_name(finished), whole_alpha=True)
        return ollama.write_modelfile(finished, folder, origin, has_adapter=True)
    if wish.converter or shutil.which(converter.SCRIPT):
        notes = _model_as_gguf(finished, folder, wish, say)
        return notes + ollama.write_modelfile(finished, folder, f"./{converter.FILE}", has_adapter=False)
    ollama.check_family(finished)
    write_merged(finished.run, finished.job, folder / "model", output / "model")
    return ollama.write_modelfile(finished, folder, "./model", has_adapter=False)


def _hub_folder(
    finished: Finished, folder: Path, output: Path, wish: ExportWish, say: Callable[[str], None]
) -> list[str]:
    """The result with a complete card."""
    is_merged = wish.is_merged or not finished.is_adapter
    hub_folder.check_stated(wish.stated)
    hub_folder.base_on_hub(finished, wish.stated, is_merged)  # before the work of a merge
    merged = None
    if is_merged:
        folder.rmdir()
        merged = write_merged(finished.run, finished.job, folder, output).text
    return [*([merged] if merged else []), *hub_folder.write(finished, folder, wish.stated, is_merged, merged)]


def _model_as_gguf(finished: Finished, folder: Path, wish: ExportWish, say: Callable[[str], None]) -> list[str]:
    script, model = converter.find(wish.converter), folder / "merged"
    text = write_merged(finished.run, finished.job, model, folder).text
    say(f"converting with {script.name} ...")
    converter.convert(script, model, folder / converter.FILE)
    shutil.rmtree(model)
    return [text]


def write_adapter(finished: Finished, file: Path, base_name: str, whole_alpha: bool = False) -> int:
    """How many linear maps it corrects.  Raises JobError with the way out."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf")
    config = model_files.read_config(Path(finished.data.model))
    try:
        if sparse.is_sparse(finished.exported):
            raise Unusable(f"{finished.exported} is single entries of the weights, which GGUF adapters are not")
        return gguf_adapter.write(finished.exported, config, base_name, file, whole_alpha)
    except Unusable as error:
        raise JobError(
            f"{error}. `export --merged` writes it as a plain model, and with llama.cpp's {converter.SCRIPT} `export"
            " --gguf --merged` as GGUF"
        ) from None


def _base_name(finished: Finished) -> str:
    base = model_files.name_for_others(finished.job, Path(finished.data.model), finished.exported)
    return base.title
