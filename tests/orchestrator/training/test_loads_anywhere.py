"""A result on another machine: another user, none of our caches, plain PEFT; and what was trained on few bits here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.job.hub import name_in_cache
from orchestrator.job.job_file import read_job
from orchestrator.job.model_files import BaseName, name_for_others
from orchestrator.runs.condition import require_finished
from orchestrator.training.workers import finished
from strategies.adapter_bank.adapter import Adapter
from tests.cases.training import trained
from tests.conftest import rows, write_jsonl

NOBODY = 65534
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ELSEWHERE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
text = tokenizer.apply_chat_template([{"role": "user", "content": "one red cat"}], tokenize=False)
with torch.no_grad():
    logits = model(torch.arange(3, 19)[None]).logits
print(repr((text, logits.double().sum().item())))
"""


@pytest.fixture(scope="module")
def job_file(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    shutil.copytree(model_folder, folder / "models" / "tiny")
    write_jsonl(folder / "train.jsonl", rows(16))
    (folder / "job.yaml").write_text(
        "model: {model_name_or_path: models/tiny, dtype: float32}\n"
        "data: {train: train.jsonl, eval: {split: 0.25}}\n"
        "method: {lora_r: 4, lora_alpha: 8.0}\n"
        "train: {max_steps: 2, global_batch_size: 4, learning_rate: 3e-2}\n"
        "eval: {max_new_tokens: 4, max_rows: 2}\n"
    )
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def run_and_job(job_file):
    return trained(job_file)


def test_a_project_that_moves_as_a_whole_finds_its_base_there(run_and_job, job_file, tmp_path):
    run, job = run_and_job
    moved = shutil.copytree(job_file.parent, tmp_path / "別の 場所")
    there, away = job_file.parent / "models", job_file.parent / "models-away"
    there.rename(away)
    try:
        found = type(run)(moved / run.path.relative_to(job_file.parent))
        assert found.data().model == str(moved / "models" / "tiny")
        assert require_finished(found).data.model == str(moved / "models" / "tiny")
        assert finished.merge(found, job, tmp_path / "merged").largest_difference < 1e-3
    finally:
        away.rename(there)


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root needs setpriv to be another user")
def test_another_user_on_a_machine_without_our_caches_loads_it_with_plain_peft(run_and_job, job_file, tmp_path_factory):
    run, _ = run_and_job
    there = tmp_path_factory.mktemp("another machine")
    adapter = shutil.copytree(run.path / "adapter", there / "adapter")
    base = shutil.copytree(job_file.parent / "models" / "tiny", there / "tiny")
    environment = {"PATH": os.environ["PATH"], "HOME": str(there / "no home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(base), str(adapter)]
    if os.getuid() == 0:  # files of another owner, read by one whom their modes bind
        for path in (adapter, *adapter.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]

    done = subprocess.run(command, capture_output=True, text=True, cwd=there, env=environment)

    assert done.returncode == 0, done.stderr
    text, total = eval(done.stdout)
    assert text == "<|im_start|>user\none red cat<|im_end|>\n"
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run.path / "adapter")).eval()
    with torch.no_grad():
        assert total == pytest.approx(model(torch.arange(3, 19)[None]).logits.double().sum().item(), rel=1e-6)


def test_the_adapter_knows_the_way_to_its_base_and_which_files_it_is(run_and_job, job_file, tmp_path):
    run, _ = run_and_job
    config = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    base = json.loads((run.path / "adapter" / "base_model.json").read_text())

    assert config["base_model_name_or_path"] == base["name"] == "../../../models/tiny"
    assert (config["lora_alpha"], type(config["lora_alpha"])) == (8, int)
    assert (
        base["files"]["model.safetensors"]["bytes"]
        == (job_file.parent / "models/tiny/model.safetensors").stat().st_size
    )
    assert set(base["files"]) >= {"config.json", "tokenizer.json"}
    assert Adapter(run.path / "adapter").base_name == str((job_file.parent / "models/tiny").resolve())
    texts = [path for path in (run.path / "adapter").iterdir() if path.suffix in (".json", ".jinja")]
    assert len(texts) > 4 and not [path for path in texts if str(job_file.parent) in path.read_text()]


def test_the_umask_decides_who_reads_it(run_and_job, job_file):
    before = os.umask(0o027)
    try:
        private, _ = trained(job_file, name="private")
    finally:
        os.umask(before)

    def modes(run):
        return {path.stat().st_mode & 0o777 for path in (run.path / "adapter").iterdir()}

    assert modes(private) == {0o640} and (private.path / "adapter").stat().st_mode & 0o777 == 0o750
    assert modes(run_and_job[0]) == {0o666 & ~before}


def job_of(tmp_path, model, **more):
    (tmp_path / "job.yaml").write_text(
        json.dumps({"model": {"model_name_or_path": model, **more}, "data": {"train": "t.jsonl"}})
    )
    return read_job(tmp_path / "job.yaml")


def snapshot(tmp_path):
    folder = tmp_path / "hub" / "models--some-org--a-model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def test_a_hub_model_is_named_with_the_commit_that_was_trained_on(tmp_path):
    located = snapshot(tmp_path)

    named = name_for_others(job_of(tmp_path, "some-org/a-model", model_revision="main"), located, tmp_path / "adapter")

    assert named == BaseName("some-org/a-model", COMMIT)


def test_a_folder_of_the_hubs_cache_is_the_hub_model(tmp_path):
    located = snapshot(tmp_path)

    named = name_for_others(job_of(tmp_path, str(located)), located, tmp_path / "adapter")

    assert named == BaseName("some-org/a-model", COMMIT)
    assert name_in_cache(tmp_path) is None


def test_a_packaged_model_keeps_the_name_by_which_it_is_had(tmp_path):
    job = job_of(tmp_path, "SmolLM2-135M-Instruct")

    assert name_for_others(job, Path("/cache/models/smollm2"), tmp_path) == BaseName("smollm2-135m-instruct")


def test_a_model_that_trained_on_four_bits_is_evaluated_on_four_and_merged_in_its_bases_precision(
    job_file, tmp_path, monkeypatch
):
    model = job_file.parent / "models" / "half"
    shutil.copytree(job_file.parent / "models" / "tiny", model)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    run, job = trained(job_file, "method.type=qlora", "model.model_name_or_path=models/half", name="four-bits")
    loaded, load = [], AutoModelForCausalLM.from_pretrained

    def watched(*arguments, **keywords):
        made = load(*arguments, **keywords)
        weights = (made[0] if isinstance(made, tuple) else made).get_decoder().layers[0].mlp.up_proj.weight
        loaded.append(weights.dtype)
        return made

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)

    found = finished.evaluate(run, job, finished.load_data(run)[1])
    assert loaded == [torch.uint8]  # two weights a byte
    assert found["eval_loss"] == pytest.approx(run.result().after.eval_loss, rel=1e-3)

    agreement = finished.merge(run, job, tmp_path / "merged")
    assert loaded[1:] == [torch.bfloat16] * 2 and agreement.largest_difference <= agreement.tolerance
    sizes = [(path / "model.safetensors").stat().st_size for path in (model, tmp_path / "merged")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert [name for name, _ in finished.variants(run, finished.context_of(run, job))] == ["base", "adapter"]
    assert loaded[3:] == [torch.uint8] * 2
