"""A run on the packaged model, its adapter in llama.cpp beside the file that the model is packaged as."""

import json

import pytest

from tests.cases.training import trained
from tests.cli import called
from tests.conftest import needs_smollm2, rows, write_jsonl


@pytest.mark.slow
@needs_smollm2
def test_llama_cpp_answers_held_out_rows_as_the_run_did(tmp_path):
    pytest.importorskip("xllamacpp")
    write_jsonl(tmp_path / "train.jsonl", rows(24))
    (tmp_path / "job.yaml").write_text(
        "model: {model_name_or_path: smollm2-135m-instruct, dtype: float32}\n"
        "data: {train: train.jsonl, eval: {split: 0.25}}\n"
        "train: {max_steps: 4, global_batch_size: 4, learning_rate: 1e-3}\n"
        "eval: {max_new_tokens: 8, num_samples: 6}\n"
    )
    trained(tmp_path / "job.yaml")

    done = called("export", "runs/run", "--gguf", "--check", "--out", "g", "--json", cwd=tmp_path, check=0)

    found = json.loads(done.stdout)["check"]
    assert found["engine"] == "llama.cpp" and found["compared"] >= 4
    assert found["equal"] >= 0.75 * found["compared"], found["differ"]
