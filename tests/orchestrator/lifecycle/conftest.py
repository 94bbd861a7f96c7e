"""A job that is planned in a moment: a config.json, eight rows, declared machines; no torch, no weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle.machines import declared
from tests.conftest import SMALL_MODEL, rows, write_jsonl


@pytest.fixture
def job_with(tmp_path):
    """A function that makes the job, with more text in its file."""
    (tmp_path / "model").mkdir()
    shutil.copy(SMALL_MODEL / "config.json", tmp_path / "model")
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
