"""Names of models: which files of the hub are fetched, which code is trusted, and misspelt names."""

import json
import time

import pytest

from orchestrator.errors import JobError
from orchestrator.job import hub, model_files
from orchestrator.job.tokenizer_size import check_tokens, tokens_from
from orchestrator.progress.updates import ProgressUpdate, reporting_to

CONFIG = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("listing", "missing"),
    [
        ([*CONFIG, "model.safetensors"], []),
        ([*CONFIG, *SHARDS, "pytorch_model.bin", "pytorch_model.bin.index.json"], ["pytorch_model.bin*"]),
        ([*CONFIG, "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["tf_model.h5", "flax_model.msgpack"]),
        (
            [*CONFIG, *SHARDS, "consolidated.safetensors", "original/consolidated.00.pth"],
            ["consolidated*", "original*"],
        ),
        ([*CONFIG, "model.safetensors", "model.fp16.safetensors", "model-Q4.gguf"], ["model.fp16*", "*.gguf"]),
        ([*CONFIG, "model.safetensors", "modeling_own.py"], ["*.py"]),
        (["config.json", "model.safetensors", "qwen.tiktoken", "spiece.model", "source.spm", "vocab.txt"], []),
        (["config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"], []),
        (
            ["config.json", "model.safetensors", "onnx/model.onnx", "onnx/config.json", "README.md"],
            ["onnx*", "README*"],
        ),
    ],
)
def test_the_files_that_a_model_needs_are_fetched_and_no_others(listing, missing):
    from fnmatch import fnmatch

    wanted = hub.wanted_files(listing)

    assert wanted == sorted(name for name in listing if not any(fnmatch(name, pattern) for pattern in missing))


def test_code_is_fetched_only_where_it_is_trusted():
    listing = ["config.json", "model.safetensors", "modeling_own.py"]

    assert "modeling_own.py" in hub.wanted_files(listing, with_code=True)


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        (["config.json"], "it holds no weights"),
        (["llama.Q4_K_M.gguf"], r"only \.gguf files"),
        (["adapter_config.json", "adapter_model.safetensors"], r"only \.safetensors files of other kinds"),
    ],
)
def test_a_repository_without_weights_that_can_be_trained_is_refused(listing, words):
    with pytest.raises(JobError, match=words):
        hub.wanted_files(listing)


@pytest.mark.parametrize("revision", [None, "main", "master"])
def test_code_from_the_hub_runs_only_at_a_stated_revision(revision):
    with pytest.raises(JobError, match="state the commit that you have read"):
        hub.check_trust("me/own", revision, True)
    hub.check_trust("me/own", "0123abc", True)
    hub.check_trust("me/own", None, False)


def folder_of_models(tmp_path):
    for name in ("llama-chatml", "phi"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2-135m-instuct", "did you mean smollm2-135m-instruct?"),
        ("SmolLM2-135M-Instrct", "did you mean smollm2-135m-instruct?"),
        ("models/llama-chatlm", "did you mean models/llama-chatml?"),
        ("./models/none", "is not a folder. Paths are relative to"),
        ("a/b/c", "is not a folder"),
        ("llama.Q4_K_M.gguf", "is a file's name; give the folder"),
        ("s3://bucket/model", "is an address"),
        ("models", "holds no config.json"),
        ("my model!", "nor a valid name on the hub"),
        ("a\0b", "NUL"),
        ("x" * 5000, "name"),
    ],
)
def test_a_wrong_name_is_refused_at_once_with_the_nearest_right_one(tmp_path, name, words):
    began = time.monotonic()

    with pytest.raises(JobError) as caught:
        model_files.local_folder(name, folder_of_models(tmp_path))

    assert words in str(caught.value)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "gpt2", "HuggingFaceTB/SmolLM2-1.7B-Instruct"])
def test_a_name_of_the_hub_is_left_to_the_hub(tmp_path, name):
    assert model_files.local_folder(name, folder_of_models(tmp_path)) is None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Qwen/Qwen2.5-0.5B-Instuct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Qwen/Qwen2.5-1.5B-Instruct", None),  # another size
        ("Qwen/Qwen2.5-0.5B", None),
        ("Qwen/Qwen2.5-0.5B-Instruct", None),
        ("google/gemma", None),
    ],
)
def test_a_name_that_is_almost_one_of_the_cache_is_said(tmp_path, monkeypatch, name, near):
    (tmp_path / "models--Qwen--Qwen2.5-0.5B-Instruct").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    assert hub.find_similar(name) == near


@pytest.mark.parametrize("content", ["[]", "7", "{", "[" * 200 + "]" * 200, '"x"', "\x00"])
def test_a_config_file_of_anything_is_a_mistake(tmp_path, content):
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(JobError, match=r"config\.json"):
        model_files.read_config(tmp_path)


TOKENIZERS = {
    "BPE": {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<|c|>"}]}},
    "Unigram": {"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0], ["<|c|>", -2.0]]}}},
    "slow": {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<|c|>": 2}},
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "<|c|>"}}}},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_without_a_row_in_the_embedding_is_refused_before_training(tmp_path, kind):
    for name, values in TOKENIZERS[kind].items():
        (tmp_path / name).write_text(json.dumps(values))

    assert tokens_from(tmp_path, 2) == {2: "<|c|>"}
    check_tokens(tmp_path, 3)
    with pytest.raises(JobError, match=r"has 3 tokens, the model's embedding 2 rows: '<\|c\|>' \(number 2\) has none"):
        check_tokens(tmp_path, 2)


def test_placeholders_of_images_that_a_text_model_inherits_are_no_fault(tmp_path):
    added = [{"id": 262144, "content": "<image_soft_token>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": added}))

    check_tokens(tmp_path, 262144)


@pytest.mark.parametrize("values", [7, [], {"model": 3}, {"model": {"vocab": 3}}, {"added_tokens": [3, {"id": "x"}]}])
def test_a_tokenizer_file_of_anything_is_no_traceback(tmp_path, values):
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))

    try:
        check_tokens(tmp_path, 10)
    except JobError as error:
        assert "tokenizer.json" in str(error)


def test_what_the_hubs_client_fetches_is_told_in_bytes_and_drawn_nowhere(capfd):
    heard = []
    with reporting_to(heard.append):
        bar_of = hub._bar_of(1000)

    assert hub._bar_of(1000) is None  # where nobody listens the client draws its own
    written = bar_of(total=0, unit="B", unit_scale=True, name="huggingface_hub.snapshot_download")
    came = bar_of(total=0, unit="B", unit_scale=True, name="huggingface_hub.snapshot_download.transfer")
    files = bar_of(total=3, desc="Fetching 3 files")
    for bar, count in ((came, 300), (files, 1), (written, 200), (written, 700)):
        bar.update(count)
    for bar in (written, came, files):
        bar.close()

    assert heard == [ProgressUpdate("download", done, 1000, "bytes") for done in (300, 900)]
    assert capfd.readouterr() == ("", "")
