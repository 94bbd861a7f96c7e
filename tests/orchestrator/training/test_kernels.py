"""The check that packed documents stay apart: made as training computes, with a reason for what is not used."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from clusters.safe.cache import cache_folder
from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.runs.events import Note
from orchestrator.training.evaluate import evaluating
from orchestrator.training.model.kernels import fastest_on_cpu, with_known_layers, without_leaks
from orchestrator.training.model.loading import Placing, load_model
from orchestrator.training.worker_context import WorkerContext
from strategies.reuse.kept_states import StatesOnDisk
from strategies.step import document_attention
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques

CPU = torch.device("cpu")


@pytest.fixture
def model(model_folder):
    document_attention.register()
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def job(folder, model_folder, packing="auto"):
    return parse_job(
        f"model: {{model_name_or_path: {model_folder}}}\ndata: {{train: a.jsonl, packing: {packing}}}\n", folder
    )


def checked(model, job, dtype="float32", **switches):
    """(techniques that keep documents apart, notes)"""
    events = []
    planned = Techniques(dtype, "document", True, False, 1, 64, **switches)
    context = WorkerContext(job, None, None, "", CPU, record=events.append)
    techniques = without_leaks(model, planned, context)
    return techniques, [event.text for event in events if isinstance(event, Note)]


def refuses(model, attention, error):
    """Every layer of the model raises `error` under an attention."""

    def refuse(module, *_):
        if model.config._attn_implementation == attention or attention == "any":
            raise error

    model.model.layers[0].register_forward_pre_hook(refuse)


def test_the_check_computes_as_training_does(model, model_folder, tmp_path):
    seen = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))

    found, notes = checked(model, job(tmp_path, model_folder), "bfloat16")

    assert (seen, notes) == ({torch.bfloat16}, [])
    assert (found.attn_implementation, found.packing) == ("document", True)


def test_a_kernel_that_refuses_is_named_with_its_words_and_another_is_used(model, model_folder, tmp_path):
    refuses(model, "document", RuntimeError("no kernel image is available\nfor this device"))

    found, notes = checked(model, job(tmp_path, model_folder))

    assert found.packing and found.attn_implementation == model.config._attn_implementation == "sdpa"
    assert notes == ["document attention: this model does not run with it (no kernel image is available); using sdpa"]


def test_memory_that_runs_out_is_no_leak(model, model_folder, tmp_path):
    refuses(model, "any", torch.OutOfMemoryError("CUDA out of memory"))

    with pytest.raises(torch.OutOfMemoryError):
        checked(model, job(tmp_path, model_folder))


def test_where_nothing_keeps_documents_apart_rows_are_padded_or_the_job_that_asks_for_packing_is_refused(
    model, model_folder, tmp_path
):
    refuses(model, "any", TypeError("unexpected argument"))

    found, notes = checked(model, job(tmp_path, model_folder))

    assert not found.packing and "unexpected argument" in notes[-1] and notes[-1].endswith("rows are padded instead")
    with pytest.raises(JobError, match=r"data.packing: document attention: .* Set data.packing: false"):
        checked(model, job(tmp_path, model_folder, packing="true"))


def test_rows_are_tried_end_to_end_with_common_beginnings_once_or_padded_where_the_model_refuses(model):
    found = fastest_on_cpu(model, 8)
    refuses(model, "document", TypeError("forward() got an unexpected keyword argument"))
    padded = fastest_on_cpu(model, 8)

    assert (found.attn_implementation, found.packing, found.share_prefixes) == ("document", True, True)
    assert (padded.attn_implementation, padded.packing, padded.share_prefixes) == ("sdpa", False, False)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_sdpa_is_loaded_evaluated_and_tried_with_eager_attention(tokenizer_folder, tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shutil.copytree(tokenizer_folder, tmp_path / "gemma")
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(tmp_path / "gemma")

    model = load_model(str(tmp_path / "gemma"), job(tmp_path, tmp_path / "gemma"), Placing("float32", CPU, "sdpa"))

    with evaluating(model, "sdpa") as inner:
        assert inner.config._attn_implementation == "eager"
    found = fastest_on_cpu(model, 8)
    assert (found.attn_implementation, found.packing, model.config._attn_implementation) == ("eager", False, "eager")


def test_common_beginnings_are_computed_once_where_the_model_keeps_to_them(model, model_folder, tmp_path):
    found, notes = checked(model, job(tmp_path, model_folder), "bfloat16", share_prefixes=True)

    assert found.share_prefixes and not notes


def test_a_kernel_that_does_not_know_trees_computes_row_by_row(model, model_folder, tmp_path):
    refuses(model, "document", RuntimeError("no kernel image is available"))

    found, notes = checked(model, job(tmp_path, model_folder), share_prefixes=True)

    assert found.packing and not found.share_prefixes
    assert notes[-1] == "common beginnings are computed row by row: sdpa attention does not know them"


def test_a_model_with_dropout_computes_row_by_row_unless_the_job_asks_for_trees(model, model_folder, tmp_path):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1

    found, notes = checked(model, job(tmp_path, model_folder), share_prefixes=True)
    assert not found.share_prefixes and "at random" in notes[-1]

    asked = parse_job(
        f"model: {{model_name_or_path: {model_folder}}}\ndata: {{train: a.jsonl, share_prefixes: true}}\n", tmp_path
    )
    with pytest.raises(JobError, match=r"data\.share_prefixes: the model drops"):
        checked(model, asked, share_prefixes=True)


def upper_half(model, model_folder, tmp_path, text="", layers="[1]", kept=True):
    """(setup, techniques, notes) of an adapter of some layers, with what lower ones make of a sample kept."""
    notes, parsed = [], parse_job(
        f"model: {{model_name_or_path: {model_folder}}}\ndata: {{train: a.jsonl}}\n"
        f"method: {{type: lora, layers_to_transform: {layers}}}\n{text}",
        tmp_path,
    )  # fmt: skip
    planned = Techniques("float32", "document", True, False, 1, 64, cache_frozen_activations=kept)
    context = WorkerContext(parsed, None, None, "", CPU, record=lambda note: notes.append(note.text))
    model.set_attn_implementation("document")
    settings = TrainSettings(1e-2, 0.0, "sgd", 0.9, 0.999, 1e-8, planned, 3)
    setup = parsed.spec.methods()[0].setup(model, settings)
    return setup, with_known_layers(setup, planned, context), notes


def test_lower_layers_are_skipped_where_the_model_can_do_without_them(model, model_folder, tmp_path):
    setup, found, notes = upper_half(model, model_folder, tmp_path)

    assert found.cache_frozen_activations and setup.lower.num_bytes == 0
    assert notes == ["what the 1 lowest layers make of a sample is kept from its first pass"]


def test_on_the_disk_they_lie_in_a_file_without_a_name_or_are_computed_again(
    model, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    setup, found, notes = upper_half(model, model_folder, tmp_path, kept="disk")

    assert found.cache_frozen_activations == "disk" and isinstance(setup.lower._states, StatesOnDisk)
    assert notes[-1].endswith("is kept from its first pass, on the disk")
    assert list(cache_folder("activations").iterdir()) == []
    cache_folder("activations").rmdir()
    cache_folder("activations").touch()
    other = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    _, found, notes = upper_half(other, model_folder, tmp_path, kept="disk")
    assert not found.cache_frozen_activations and "File exists" in notes[-1]


def test_where_the_first_layer_trains_all_rows_pass_all_layers_unless_the_job_asks(model, model_folder, tmp_path):
    setup, found, notes = upper_half(model, model_folder, tmp_path, layers="[0, 1]")
    assert not found.cache_frozen_activations and setup.lower is None
    assert notes == ["all samples pass the frozen layers in every epoch: its first layer trains"]

    with pytest.raises(JobError, match=r"train\.cache_frozen_activations: its first layer trains"):
        other = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        upper_half(other, model_folder, tmp_path, "train: {cache_frozen_activations: true}", layers="[0, 1]")
