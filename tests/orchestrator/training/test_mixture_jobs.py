"""A job of experts of LoRA from its file to the result: planned, resumed, handed back, refused where it cannot be."""

import json

import pytest

from orchestrator.bank.library import add_run
from orchestrator.errors import JobError
from orchestrator.export.check import check
from orchestrator.export.hub_folder import Stated
from orchestrator.export.write import ExportWish, export
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.planning.plan import Plan
from orchestrator.runs.condition import require_finished
from orchestrator.runs.events import StepReport
from orchestrator.training.workers import finished
from orchestrator.training.workers.worker import work
from strategies.adapter_bank.adapter import Unusable
from strategies.adapter_bank.store import Bank
from strategies.mixture.folder import put_on
from strategies.mixture.method import MixLora
from strategies.shape import ModelShape
from tests.cases.training import begun, trained
from tests.conftest import rows, write_jsonl
from tests.strategies.objectives.test_steps import pairs
from tests.strategies.test_contract import techniques

METHOD = "method: {type: experimental_mixlora, num_experts: 4, lora_r: 2, lora_alpha: 4}\n"


@pytest.fixture(scope="module")
def file(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(24))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "data: {train: train.jsonl, eval: {split: 0.25}, max_length: 96}\n"
        "train: {num_train_epochs: 4, global_batch_size: 6, learning_rate: 5e-3, optim: adamw_torch}\n"
        "eval: {eval_steps: 3, before: false, max_new_tokens: 6, max_rows: 3}\n"
        "checkpoint: {save_steps: 3, save_total_limit: 5, load_best_model_at_end: false}\n" + METHOD
    )
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def run(file):
    return trained(file, name="whole")[0]


def prepared(file, *overrides):
    return prepare(read_job(file, list(overrides)), lambda text: None)


def test_a_job_is_planned_trained_handed_back_and_resumed_bit_by_bit(file, run):
    whole = [step.loss for step in run.steps().values()]
    plan, handed = run.plan(), run.result().values["handed_back"]

    assert plan.memory.total_bytes > 0 and plan.step_s > 0 and run.result().after.answers > 0
    assert "gives the logits of what was trained" in handed["check"]["text"]
    assert whole[-1] < whole[0] and plan.num_trainable_parameters == handed_numbers(run)

    resumed, _, node = begun(file, name="resumed")
    resumed.stop_file.touch()
    work(resumed, 0, 1, node, 0)
    resumed.stop_file.unlink()
    work(resumed, 0, 1, node, 0)

    assert [step.loss for step in resumed.steps().values()] == whole and len(whole) == 12
    assert [step.extra_loss for step in resumed.steps().values()] == [step.extra_loss for step in run.steps().values()]


def handed_numbers(run):
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(run.path / "adapter/adapter_model.safetensors").values())


def test_the_balance_is_recorded_beside_the_loss_of_each_step(run):
    for step in run.events_of(StepReport):
        assert set(step.extra_loss) == {"experts/aux_loss", "experts/evenness", "experts/largest_share"}
        assert 0.015 < step.extra_loss["experts/aux_loss"] < 0.06
        assert (
            0.25 <= step.extra_loss["experts/largest_share"] <= 0.5 and 0.5 <= step.extra_loss["experts/evenness"] <= 1
        )
        assert type(step).from_json(step.to_json()) == step


def test_the_plan_says_before_training_who_loads_the_result(file, run):
    from rich.console import Console

    from orchestrator.views.plan import plan_view

    ready = prepared(file)
    console = Console(width=200, record=True)
    console.print(plan_view(ready.job, ready.plan, ready.statistics))
    text = console.export_text()

    assert "Loads with this program alone: evaluate, chat, serve --engine transformers" in text
    assert (
        "Not with vLLM: it corrects a map by one pair of A and B a request" in text and "Not merged: each token" in text
    )
    assert Plan.from_json(ready.plan.to_json()).notes == ready.plan.notes
    other = prepared(file, "method={type: lora}").plan
    assert other.notes == () and "notes" not in json.loads(other.to_json())


def test_its_card_loads_it_by_the_code_that_stands_there(run, model_folder):
    card = (run.path / "adapter/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]

    assert "library_name: finetune-orchestrator" in card and "Not with PEFT: it has no adapter of this type" in card
    assert "merge merged-model" not in card and "PeftModel" not in code
    scope: dict = {}
    exec(code, scope)
    assert scope["model"].model.layers[0].mlp.mixture.sizes.num_experts == 4 and scope["output"].shape[1] > 1


def test_it_is_exported_to_a_folder_and_checked_but_never_merged(run, tmp_path):
    made = export(run, tmp_path / "hub", ExportWish("hub-folder", stated=Stated("org/tiny")), lambda text: None)
    report = check(require_finished(run), tmp_path / "hub", None)

    assert report.engine == "this program" and report.equal == report.compared == 3
    assert "peft" not in (tmp_path / "hub/README.md").read_text().split("---")[1] and made["files"]
    for kind in ("merged", "gguf", "ollama"):
        with pytest.raises(JobError, match="is not merged: each token passes experts of its own choice"):
            export(run, tmp_path / kind, ExportWish(kind), lambda text: None)
    with pytest.raises(JobError, match="is used with its base by `orchestrator chat`"):
        finished.merge(run, run.job(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists() and not (tmp_path / "gguf").exists()
    with pytest.raises(Unusable, match="is a MIXLORA adapter; the bank keeps LoRA"):
        add_run(Bank(tmp_path / "bank", create=True), run)


def test_it_is_evaluated_again_to_the_same_numbers(run):
    from orchestrator.training.model.loading import load_data

    again = finished.evaluate(run, run.job(), load_data(run)[1])

    assert again["eval_loss"] == pytest.approx(run.result().after.scores["eval_loss"], abs=1e-6)
    assert [one["generated"] for one in again["samples"]] == [one.generated for one in run.result().after.samples]


@pytest.mark.parametrize(
    ("packing", "holds"),
    [
        ("false", {"accumulation", "resume", "saved"}),
        ("true", {"accumulation", "documents", "packing", "resume", "saved"}),
    ],
)
def test_it_is_proven_as_every_method_but_for_the_merge(file, monkeypatch, packing, holds):
    from orchestrator.lifecycle.proofs import prove
    from tests.orchestrator.lifecycle.proofs.test_prove import worker_here

    monkeypatch.setattr(prove, "_with_two_workers", lambda ready: (ready, {}))
    monkeypatch.setattr(prove, "_start", worker_here)

    job = read_job(file, [f"data.packing={packing}"])
    found = {one.check: one for one in prove.prove_job(job, lambda text: None)}

    assert {check for check, one in found.items() if one.outcome == "passed"} == holds
    assert found["resume"].difference == 0.0
    assert packing == "true" or found["packing"].reason == "rows are padded here, not packed"
    assert "each token passes experts of its own choice" in str(found["merged"])


def test_its_report_has_the_experts_and_who_loads_it(run, tmp_path):
    from orchestrator.report.markdown import write_markdown
    from orchestrator.report.run import report_of_run

    write_markdown(report_of_run(run, run.job(), "en"), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()

    assert "Beside the loss, at the last step: experts/aux_loss 0.0" in text and "Not with llama.cpp" in text


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("pairs", ("objective={type: dpo, beta: 0.5}", "data.train=pairs.jsonl")),
        ("apart", ("strategy.local_steps=2",)),
        ("plain-descent", ("train.optim=sgd",)),
    ],
)
def test_objectives_over_documents_and_local_steps_train_it_as_well(file, name, overrides):
    write_jsonl(file.parent / "pairs.jsonl", pairs(24))

    run, _ = trained(file, "train.num_train_epochs=2", *overrides, name=name)

    steps = list(run.steps().values())
    assert steps[-1].loss < steps[0].loss and all(step.extra_loss["experts/aux_loss"] > 0.015 for step in steps)
    assert "gives the logits of what was trained" in run.result().values["handed_back"]["check"]["text"]


def test_auto_passes_over_it(file):
    assert not prepared(file, "method={type: auto}").plan.method["type"].startswith("experimental_")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("method.top_k=5",), r"method\.top_k is 5, and there are 4 experts: lower it"),
        (("bank.add=true",), "hands back MIXLORA, which is no sum of them; set it to false"),
        (("data.share_prefixes=true",), r"would count once in the balance: set data\.share_prefixes: false"),
        (("strategy.offload=weights",), r"untested with torch\.compile and streamed weights"),
        (("method.top_k=1",), "greater than or equal to 2"),
        (
            ("strategy={local_steps: 2, local_steps_merge: product}",),
            "belong to experts, which a router chooses: set it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(file, overrides, words):
    with pytest.raises(JobError, match=words):
        prepared(file, *overrides)


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 500, "intermediate_size": 128}


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ({"model_type": "phi3"}, {}, "those of phi3 are gate_up_proj, down_proj: set method.type: lora"),
        ({"model_type": "gpt2", "n_positions": 64}, {}, "those of gpt2 are c_fc, c_proj"),
        ({"model_type": "mixtral"}, {}, "those of mixtral are experts already"),
        ({"model_type": "llama"}, {"zero_stage": 2, "num_shards": 2}, "too little for ZeRO or offload to help"),
        ({"model_type": "llama"}, {"torch_compile": True}, "untested with torch.compile"),
        ({"model_type": "qwen3"}, {}, None),
    ],
)
def test_families_and_techniques_that_cannot_be_are_named(config, changes, words):
    shape = ModelShape.from_config({**SIZES, **config})

    found = MixLora().refuses(techniques(**changes), shape)

    assert found == words if words is None else words in found


def test_stages_and_engines_are_refused_for_any_method_that_adds_a_loss():
    from strategies.compatibility import conflict
    from strategies.workload import StagePart
    from tests.strategies.test_contract import CPU

    shape = ModelShape.from_config({**SIZES, "model_type": "llama"})

    found = conflict(MixLora(), techniques(stage=StagePart(0, 2, 0, 1)), CPU, shape)

    assert found == (
        "experimental_mixlora adds a loss beside the tokens' to each micro-batch from all layers, of which a stage has"
        " some: set strategy.mode to auto or ddp"
    )


def test_a_folder_of_another_model_or_none_is_an_error_with_its_name(run, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    other = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"belongs to another model: model\.layers\.0\.mlp\.mixture\.down\.a_ERI is"):
        put_on(other, run.path / "adapter")
    with pytest.raises(ValueError, match="holds no experts"):
        put_on(other, tmp_path)
    for values, words in (({"top_k": 9}, "of which a token passes 9"), ({"r": "two"}, "be a valid integer")):
        made = tmp_path / f"{values}".replace("'", "")
        made.mkdir()
        settings = json.loads((run.path / "adapter/adapter_config.json").read_text()) | values
        (made / "adapter_config.json").write_text(json.dumps(settings))
        (made / "adapter_model.safetensors").write_bytes((run.path / "adapter/adapter_model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=words):
            put_on(other, made)
