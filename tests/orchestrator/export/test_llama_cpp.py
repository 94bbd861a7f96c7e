"""Runs on the packaged model in llama.cpp: an adapter beside the file that the model is packaged as, a pruned model."""

import json
import shutil

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


@pytest.mark.slow
@needs_smollm2
@pytest.mark.skipif(
    not shutil.which("convert_hf_to_gguf.py"), reason="llama.cpp's convert_hf_to_gguf.py is not on PATH"
)
@pytest.mark.parametrize("groups", ["mlp", "mlp+attention"])
def test_llama_cpp_answers_as_a_model_that_was_pruned(tmp_path, groups):
    pytest.importorskip("xllamacpp")
    write_jsonl(tmp_path / "train.jsonl", rows(24))
    (tmp_path / "job.yaml").write_text(
        "model: {model_name_or_path: smollm2-135m-instruct, dtype: float32}\n"
        "data: {train: train.jsonl, eval: {split: 0.25}}\n"
        f"method: {{type: experimental_pruned_lora, ratio: 0.3, groups: {groups}, mask_every: 1}}\n"
        "train: {max_steps: 4, global_batch_size: 4, learning_rate: 1e-3}\n"
        "eval: {max_new_tokens: 8, num_samples: 6}\n"
    )
    run, _ = trained(tmp_path / "job.yaml")

    done = called("export", "runs/run", "--gguf", "--check", "--out", "g", "--json", cwd=tmp_path, check=0)

    found = json.loads(done.stdout)["check"]
    stored = (run.path / "model" / "model.safetensors").stat().st_size  # in fp32; the converter writes fp16
    assert (tmp_path / "g" / "model.gguf").stat().st_size == pytest.approx(stored / 2, rel=0.05)
    assert found["engine"] == "llama.cpp" and found["compared"] >= 4
    assert found["equal"] >= 0.75 * found["compared"], found["differ"]
