"""The tensors that a model folder holds, by the headers of its files: names, shapes and types, no weight is read.

Of the files that transformers would load, in its order: `model.safetensors`, its index of shards, `pytorch_model.bin`,
its index.  A safetensors header states every tensor's place, so a cut or overlapping file is known without reading it;
of a `.bin` file only names can be listed, by walking its pickle without running it.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clusters.safe.reading import BadInput, open_regular, printable, read_json, record
from orchestrator.errors import bad_input_as_job_error
from strategies.model.tensor_file import TensorEntry, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header states of one tensor; `shape` is None where only the name is known (`.bin`)."""

    shape: tuple[int, ...] | None
    dtype: str | None  # as safetensors spells it: F32, BF16, ...


@dataclass(frozen=True)
class _Index:
    """The list of shards: which file holds which tensor."""

    weight_map: dict[str, str]


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds files of weights that transformers would load, whole or not."""
    return any((folder / name).exists() for name in (SINGLE, INDEX, BIN, BIN_INDEX))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the files that transformers would load from a model folder, by name.

    Raises JobError for a folder without weights, files that are missing, cut or damaged, and for what is not a model's
    folder at all (an adapter's, GGUF files).
    """
    with bad_input_as_job_error("model.model_name_or_path"):
        if (folder / "adapter_config.json").exists():
            raise BadInput(
                f"{folder} is an adapter's folder (it holds adapter_config.json). Give its base model here, and the"
                " adapter as method.init_adapter; or merge them first"
            )
        for name in (SINGLE, BIN):
            if (folder / name).exists():
                return dict(_of_file(folder / name))
            if (folder / f"{name}.index.json").exists():
                return _of_shards(folder, folder / f"{name}.index.json")
        raise BadInput(f"{folder} holds no weights that can be trained: {_explain_absence(folder)}")


def _explain_absence(folder: Path) -> str:
    """What lies in a folder without weights, and what to do."""
    names = sorted(path.name for path in folder.iterdir()) if os.access(folder, os.R_OK) else []
    if found := [name for name in names if name.endswith(".gguf")]:
        return (
            f"{printable(found[0])} is a GGUF file, made for inference; give the model it was made from"
            " (its model.safetensors)"
        )
    if found := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"there is {printable(found[0])}, but neither {SINGLE} nor {INDEX}, which names the shards; download the"
            " folder again, index included"
        )
    if found := [name for name in names if name.endswith((".bin", ".pth", ".pt", ".h5", ".msgpack", ".onnx"))]:
        return f"{printable(found[0])} is not a file that transformers loads; convert it to {SINGLE}"
    return f"neither {SINGLE} nor {BIN} is there. It can be planned (`plan`), not trained; download its weights too"


def _of_file(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one file.  Raises BadInput."""
    if path.suffix == ".safetensors":
        return ((name, StoredTensor(tuple(e.shape), e.dtype)) for name, e in _header(path).items())
    return ((name, StoredTensor(None, None)) for name in _names_in_bin(path))


def _of_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards that an index names.  Raises BadInput naming absent files and tensors."""
    listed = record(_Index, read_json(index, _MAX_INDEX_BYTES), str(index)).weight_map
    files = sorted(set(listed.values()))
    if bad := [name for name in files if Path(name).name != name or not name.endswith((".safetensors", ".bin"))]:
        raise BadInput(f"{index}: {printable(bad[0])} is not the name of a file beside it")
    if absent := [name for name in files if not (folder / name).exists()]:
        raise BadInput(
            f"{index} names {len(files)} files, and {_few(absent)} {'is' if len(absent) == 1 else 'are'} not there:"
            " the download is not complete; fetch them too"
        )
    found: dict[str, StoredTensor] = {}
    for name in files:
        own = dict(_of_file(folder / name))
        if lacking := sorted(tensor for tensor, file in listed.items() if file == name and tensor not in own):
            raise BadInput(f"{folder / name} lacks {_few(lacking)}, which {index.name} says it holds; fetch both again")
        found |= own
    return found


def _header(path: Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file.  Raises BadInput, with what to do."""
    try:
        return read_header(path)
    except BadInput as error:
        with open_regular(path) as stream:
            is_pointer = stream.read(8) == b"version "  # the small text that Git LFS keeps in the weights' place
        fetch = "it is a Git LFS pointer: `git lfs pull` fetches the file" if is_pointer else "download it again"
        raise BadInput(f"{error}; {fetch}") from None


def _names_in_bin(path: Path) -> list[str]:
    """The names in a PyTorch file: the texts of its pickle, which is walked and never run.  Raises BadInput."""
    with open_regular(path) as stream:
        if not zipfile.is_zipfile(stream):
            raise BadInput(
                f"{path} is not a zip archive: it was cut, or written by PyTorch before 1.6. Download it again, or"
                f" convert it to {SINGLE}"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                inside = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
                if inside is None or archive.getinfo(inside).file_size > _MAX_INDEX_BYTES:
                    raise BadInput(f"{path} is not a file of PyTorch weights: it holds no data.pkl; download it again")
                operations = list(pickletools.genops(archive.read(inside)))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError) as error:
            raise BadInput(f"{path} is damaged: {printable(str(error)[:200])}; download it again") from None
    texts = [str(value) for operation, value, _ in operations if operation.name.endswith("BINUNICODE")]
    return [text for text in texts if "." in text and not text.startswith("torch.")]


def _few(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
