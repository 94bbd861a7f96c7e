"""The end of a run: what is written is checked against what was trained, and verified whenever it is used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import JobError, RunFailed
from orchestrator.training.model import agreement, export
from orchestrator.training.workers import finished
from tests.cases.training import trained
from tests.conftest import rows, write_jsonl


@pytest.fixture(scope="module")
def job_file(model_folder, tmp_path_factory):
    """Two steps of the tiny model; the learning rate makes a mistake show."""
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(20))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "data: {train: train.jsonl, eval: {split: 0.2}}\n"
        "train: {max_steps: 2, global_batch_size: 4, learning_rate: 3e-2}\n"
        "eval: {max_new_tokens: 4}\n"
    )
    return folder / "job.yaml"


LORA, FULL = ("method.type=lora", "method.lora_r=4"), ("method.type=full",)


@pytest.fixture(scope="module")
def finished_run(job_file):
    return trained(job_file, *LORA)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "is gone"),
        (lambda file: file.write_bytes(b""), "has changed since it was handed back"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has changed since it was handed back"),
        (lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]), "has changed"),
    ],
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"])
def test_a_result_that_is_gone_or_damaged_is_neither_measured_nor_merged(finished_run, tmp_path, name, damage, said):
    run, job = finished_run
    copy = type(run)(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    damage(copy.path / "adapter" / name)

    for use in (lambda: finished.evaluate(copy, job, None), lambda: finished.merge(copy, job, tmp_path / "m")):
        with pytest.raises(JobError, match=said):
            use()
    assert not (tmp_path / "m").exists()


def test_a_merged_model_has_the_precision_of_its_base(job_file, model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "half"
    shutil.copytree(model_folder, base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    run, job = trained(job_file, *LORA, f"model.model_name_or_path={base}", name="half")

    found = finished.merge(run, job, tmp_path / "merged")

    sizes = [(path / "model.safetensors").stat().st_size for path in (base, tmp_path / "merged")]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert found.dtype == config["dtype"] == "bfloat16"
    assert 0 < found.largest_difference < found.tolerance


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_no_numbers_are_not_handed_back(dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    from strategies.step import document_attention

    document_attention.register()
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    portrait = agreement.portrait_of(model, dict(model.named_parameters()), agreement.probe(None, 32), dtype)

    with pytest.raises(RunFailed, match=r"weights that are no numbers, the first is model\.norm\.weight\. Lower"):
        agreement.compare(portrait, None, lambda attention: model, "it")


def spoil(change):
    """An export that writes something else than was trained: a fault of a library, as the check would meet it."""
    write = export.write

    def spoilt(folder, *arguments):
        write(folder, *arguments)
        change(folder)

    return spoilt


def zeros(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)


def other_scale(folder):
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))


def not_loadable(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (zeros, "holds other weights than were trained"),
        (other_scale, "largest difference of a logit"),
        (not_loadable, "cannot be loaded again"),
    ],
)
def test_an_export_that_is_not_what_was_trained_ends_the_run_and_is_handed_to_nobody(
    job_file, monkeypatch, fault, said
):
    monkeypatch.setattr(export, "write", spoil(fault))

    with pytest.raises(RunFailed, match=said):
        trained(job_file, *LORA, name=fault.__name__)

    assert not (job_file.parent / "runs" / fault.__name__ / "adapter").exists()
    assert not (job_file.parent / "runs" / fault.__name__ / "result.json").exists()


def test_a_model_that_does_not_fit_twice_is_compared_weight_by_weight(job_file, monkeypatch):
    monkeypatch.setattr(agreement, "free_bytes", lambda device: 1000)

    run, _ = trained(job_file, *LORA, name="small-machine")

    check = run.read_json("result.json")["handed_back"]["check"]
    assert "logits not compared: it needs" in check["text"] and "28 of the 28 weights" in check["text"]
    assert check["largest_difference"] is None
    assert "not compared" in (run.path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_again_says_what_was_trained_to_the_last_bit(job_file, method, dtype):
    knobs = FULL if method == "full" else (*LORA, "method.use_dora=true")

    run, _ = trained(job_file, *knobs, f"model.dtype={dtype}", name=f"{method}-{dtype}")

    check = run.read_json("result.json")["handed_back"]["check"]
    assert check["largest_difference"] == 0.0 and check["num_weights"] > 10


def test_a_base_whose_generation_settings_contradict_each_other_is_handed_back_all_the_same(
    job_file, model_folder, tmp_path
):
    base = tmp_path / "odd"
    shutil.copytree(model_folder, base)
    (base / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}'
    )

    run, job = trained(job_file, *FULL, f"model.model_name_or_path={base}", name="odd")
    finished.merge(run, job, tmp_path / "merged")

    for folder in (run.path / "model", tmp_path / "merged"):
        settings = json.loads((folder / "generation_config.json").read_text())
        assert (settings["temperature"], settings["eos_token_id"]) == (0.6, [1, 2])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_modules_trained_in_fp32_on_a_16_bit_base_are_compared_within_the_rounding_of_the_base(job_file):
    run, _ = trained(
        job_file, *LORA, "method.modules_to_save=[embed_tokens,norm]", "model.dtype=bfloat16", name="16-bit"
    )

    check = run.read_json("result.json")["handed_back"]["check"]
    assert check["largest_difference"] < check["tolerance"] == pytest.approx(check["largest_logit"] / 16)
