"""The tensors of a folder by its files' headers: whole ones are listed, every other file is refused with a reason."""

import json
import random
import shutil
import struct

import pytest

from orchestrator.data.samples import renderer_for
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.job.model_check import check_model
from orchestrator.job.weights import stored_tensors

TENSORS = {"model.a.weight": ("F32", [2, 3]), "model.b.weight": ("BF16", [4])}


def safetensors(tensors=TENSORS, **changes) -> bytes:
    """A file of zeros, its header as the tensors say but for `changes` of single entries."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F32": 4, "BF16": 2}[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header |= changes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def refusal(folder) -> str:
    with pytest.raises(JobError) as caught:
        stored_tensors(folder)
    return str(caught.value)


def test_names_shapes_and_types_are_listed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors())

    found = stored_tensors(tmp_path)

    assert {name: (one.dtype, list(one.shape)) for name, one in found.items()} == TENSORS


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has 0 bytes; a safetensors file begins with"),
        (safetensors()[:7], "has 7 bytes"),
        (safetensors()[:40], "is cut: its header is of 155 bytes, the whole file of 40; download it again"),
        (safetensors()[:-5], "is cut or too long: its tensors have 32 bytes, the file 27; download it again"),
        (safetensors() + b"\0", "is cut or too long: its tensors have 32 bytes, the file 33"),
        (struct.pack("<Q", 2**63) + b"{}", "its header is of 9223372036854775808 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (struct.pack("<Q", 4) + b"[1] ", "is a list, not an object"),
        (struct.pack("<Q", 400) + b"[" * 200 + b"]" * 200, "is nested too deeply"),
        (safetensors(**{"model.b.weight": entry("BF16", [4], [20, 28])}), "model.b.weight overlaps another or leaves"),
        (safetensors(**{"model.b.weight": entry("BF16", [4], [24, 2**80])}), "model.b.weight"),
        (safetensors(**{"model.b.weight": entry("BF16", [-4], [24, 32])}), "has the shape [-4]"),
        (safetensors(**{"model.b.weight": {"dtype": "F32"}}), "shape field required"),
    ],
)
def test_a_file_that_is_cut_or_damaged_is_refused(tmp_path, content, reason):
    (tmp_path / "model.safetensors").write_bytes(content)

    assert reason in refusal(tmp_path)


def test_any_other_bytes_are_refused_or_listed_and_never_a_traceback(tmp_path):
    seeds, path = random.Random(0), tmp_path / "model.safetensors"
    refused = 0
    for _ in range(400):
        content = bytearray(safetensors())
        for _ in range(seeds.randint(1, 6)):
            content[seeds.randrange(len(content) - 32)] = seeds.randrange(256)
        path.write_bytes(content[: seeds.choice((len(content), len(content), seeds.randrange(len(content))))])
        try:
            stored_tensors(tmp_path)
        except JobError:
            refused += 1

    assert refused > 300


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "model-1.safetensors", "b": "model-2.safetensors"}, "model-2.safetensors is not there: the download"),
        ({"model.c": "model-1.safetensors"}, "lacks model.c, which model.safetensors.index.json says"),
        ({"a": "../model-1.safetensors"}, "is not the name of a file beside it"),
        ({"a": "/etc/passwd"}, "is not the name of a file beside it"),
        ({"a": 7}, "should be a valid string"),
        (["a"], "weight_map"),
    ],
)
def test_an_index_must_name_whole_files_beside_it(tmp_path, weight_map, reason):
    (tmp_path / "model-1.safetensors").write_bytes(safetensors())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert reason in refusal(tmp_path)


def test_shards_are_put_together(tmp_path):
    for number, name in enumerate(TENSORS):
        (tmp_path / f"model-{number}.safetensors").write_bytes(safetensors({name: TENSORS[name]}))
    listed = {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))

    assert list(stored_tensors(tmp_path)) == list(TENSORS)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "It can be planned (`plan`), not trained"),
        (["llama.Q4_K_M.gguf"], "is a GGUF file, made for inference"),
        (["model-00001-of-00002.safetensors"], "download the folder again, index included"),
        (["consolidated.00.pth"], "is not a file that transformers loads"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter's folder"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds_instead(tmp_path, files, reason):
    for name in files:
        (tmp_path / name).write_text("")

    assert reason in refusal(tmp_path)


def test_names_in_a_pytorch_file_are_read_without_running_its_pickle(tmp_path):
    import torch

    state = {"model.a.weight": torch.zeros(2, 3), "model.b.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")

    assert sorted(stored_tensors(tmp_path)) == sorted(state)


def test_a_cut_pytorch_file_is_refused(tmp_path):
    import torch

    torch.save({"a.weight": torch.zeros(100)}, tmp_path / "whole")
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "whole").read_bytes()[:300])

    assert "it was cut, or written by PyTorch before 1.6" in refusal(tmp_path)


def test_weights_of_whole_numbers_without_their_scales_are_refused(model_folder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: (tensors[name] * 100).to(torch.int8)}, file, metadata={"format": "pt"})

    with pytest.raises(JobError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds whole numbers \(I8\)"):
        check_model(tmp_path / "model", ())


def test_a_model_without_its_tokenizer_says_which_files_to_fetch(model_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folder / name, tmp_path / name)
    (tmp_path / "job.yaml").write_text("model: {model_name_or_path: .}\ndata: {train: rows.jsonl}\n")

    with pytest.raises(JobError) as caught:
        renderer_for(read_job(tmp_path / "job.yaml"), tmp_path)

    assert "none of its files is there (tokenizer.json" in str(caught.value)
    assert "Fetch or copy its files again" in str(caught.value)


def test_a_tokenizer_that_is_made_from_the_config_alone_is_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    (tmp_path / "job.yaml").write_text("model: {model_name_or_path: .}\ndata: {train: rows.jsonl}\n")

    with pytest.raises(JobError, match="cannot be loaded"):
        renderer_for(read_job(tmp_path / "job.yaml"), tmp_path)
