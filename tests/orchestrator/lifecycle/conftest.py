"""A job that is planned in a moment: a config.json, eight rows, declared machines; no torch, no weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle.machines import declared
from tests.conftest import rows, write_jsonl

CONFIG = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture
def job_with(tmp_path):
    """A function that makes the job, with more text in its file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    write_jsonl(tmp_path / "train.jsonl", rows(8))

    def make(text="", data=""):
        head = f"model: {{model_name_or_path: model}}\ndata: {{train: train.jsonl{data}}}\n"
        return parse_job(f"{head}checkpoint: {{output_dir: {tmp_path / 'runs'}}}\n{text}", Path(tmp_path))

    return make


@pytest.fixture(scope="session")
def machine():
    """A declared one without GPUs."""
    cluster = declared(Path("home-lab"))
    (node, *_) = [node for node in cluster.nodes if not node.gpus]
    return replace(cluster, nodes=(node,), links=())
