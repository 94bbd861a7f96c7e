"""The models of people's jobs: what is loaded, what is adapted, what the plan says of it."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import plan_without_data
from orchestrator.lifecycle.validate import check
from strategies.train_setup import TrainSettings
from tests.cases.models import TEMPLATES
from tests.cli import called


def test_a_case_finds_the_models_its_jobs_name(case):
    folder = case("07-pandas-nan")

    model = folder / "../models/llama-chatml"
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 49152
    assert (model / "chat_template.jinja").read_text() == TEMPLATES["llama-chatml"]
    assert (folder / "job.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_model_of_the_cases_is_built(case_models, name):
    assert (case_models.build(name) / "model.safetensors").is_file()


def refusal(folder, job: str, verb=check) -> str:
    with pytest.raises(JobError) as caught:
        verb(read_job(folder / job))
    return str(caught.value)


def planned(folder, job: str):
    """The plan of a job's model and data sizes for one card with much memory."""
    card = DeviceCapability("cuda", "H100", 80 * 2**30, compute_capability=(9, 0))
    node = NodeCapability("here", 16, 512 * 2**30, (card,))
    ready = plan_without_data(read_job(folder / job), ClusterCapability((node,)), lambda text: None)
    return ready.plan, ready.work


def test_26_27_keys_of_other_tools_are_read_or_named_with_what_to_write(case):
    axolotl, factory = case("26", with_models=False), case("27", with_models=False)

    job = read_job(axolotl / "only-known.yml")
    assert (job.spec.method.type, job.spec.method.lora_target_modules) == ("lora", "all-linear")
    assert (job.spec.train.per_device_train_batch_size, job.spec.train.gradient_accumulation_steps) == (2, 2)
    told = refusal(axolotl, "lora.yml")
    assert "logging_steps: there is no such key: every step is logged; remove it" in told
    assert "val_set_size: there is no such key: write data.eval: {split: 0.1}" in told
    assert "local_steps" not in told
    told = refusal(factory, "sft.yaml")
    assert "template: there is no such key: the tokenizer's own chat template is used" in told
    assert "did you mean" not in told


def test_26_27_files_of_other_tools_become_valid_jobs(case, case_models):
    axolotl, factory = case("26", with_models=False), case("27")
    case_models.link(axolotl.parent, ["llama-chatml"])
    (factory / "data").mkdir()
    shutil.copy(factory / "data.jsonl", factory / "data/faq.jsonl")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    faq = {"file_name": "faq.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (factory / "data/dataset_info.json").write_text(json.dumps({"my_faq": faq}))

    for folder, file in ((axolotl, "lora.yml"), (factory, "sft.yaml")):
        hint = called("validate", file, cwd=folder, check=2).stderr
        command = hint.partition("orchestrator ")[2].split()
        called(*command, cwd=folder, check=0)
        assert check(read_job(folder / "job.yaml"))["valid"], file
    spec = read_job(axolotl / "job.yaml").spec
    assert (spec.data.train, spec.data.eval.split, spec.data.max_length) == ("data.jsonl", 0.1, 512)
    assert (spec.train.learning_rate, spec.train.warmup_steps) == (2e-4, 10)


def test_27_all_means_all_linear_maps_and_a_comma_list_is_split(case):
    folder = case("27", with_models=False)

    assert read_job(folder / "mapped.yaml").spec.method.lora_target_modules == "all-linear"
    assert read_job(folder / "comma.yaml").spec.method.lora_target_modules == ["q_proj", "v_proj"]


def test_27_what_was_asked_for_is_what_is_adapted(case):
    folder = case("27")

    comma, _ = planned(folder, "comma.yaml")
    every, _ = planned(folder, "mapped.yaml")

    check(read_job(folder / "comma.yaml"))
    assert comma.num_trainable_parameters == 2 * 8 * ((32 + 32) + (32 + 16))
    assert every.num_trainable_parameters == 2 * 8 * (64 + 48 + 48 + 64 + 3 * 96)


def test_32_a_quantised_model_is_refused_by_its_method_s_name(case):
    folder = case("32", with_models=False)

    for verb in (check, lambda job: plan_without_data(job, None, lambda text: None)):
        assert "its weights are stored quantised (gptq, 4 bits" in refusal(folder, "gptq.yaml", verb)


def test_33_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(case):
    told = refusal(case("33"), "job.yaml")

    assert "the tokenizer has 49,154 tokens, the model's embedding 49,152 rows: '<|ticket|>' (number 49152)" in told
    assert "resize_token_embeddings" in told


def test_36_gpt_2_s_transposed_maps_are_adapted_also_in_chosen_layers(case):
    from strategies.measure.trace import build

    folder = case("36")
    for job, trained in (("job.yaml", 2 * 8 * 512), ("layers.yaml", 8 * 512)):
        spec = read_job(folder / job).spec
        check(read_job(folder / job))
        plan, _ = planned(folder, job)
        config = json.loads((folder / "../models/gpt2/config.json").read_text())
        techniques = replace(plan.techniques, attn_implementation="sdpa")
        settings = TrainSettings(1e-4, 0, "adamw_torch", 0.9, 0.999, 1e-8, techniques, 0)
        setup = build(config, 2, spec.methods()[0], settings, "meta")

        assert plan.num_trainable_parameters == sum(p.numel() for p in setup.parameters.values()) == trained


def test_39_weights_that_would_not_load_are_refused_with_the_first_keys_and_the_usual_cause(case, case_models):
    from safetensors.torch import load_file, save_file

    folder, source = case("39"), case_models.build("llama-untied")
    tensors = load_file(source / "model.safetensors")
    changed = {
        "prefix": {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        "shapes": {**tensors, "lm_head.weight": tensors["lm_head.weight"][:100].clone()},
    }
    for name, state in changed.items():
        shutil.copytree(source, folder / name, dirs_exist_ok=True)
        save_file(state, folder / name / "model.safetensors", {"format": "pt"})

    prefix, shapes = refusal(folder, "prefix.yaml"), refusal(folder, "shapes.yaml")
    assert "21 tensors are missing in the files and would start from random values (lm_head.weight" in prefix
    assert "Names hold 'base_model.model.', as PEFT names them: call merge_and_unload()" in prefix
    assert "lm_head.weight is [100, 32] in the files, [49152, 32] by config.json" in shapes


def test_58_experts_are_counted_by_their_own_width(case):
    _, work = planned(case("58", with_models=False), "job.yaml")

    assert work.shape.num_parameters == 30_532_122_624
    assert work.shape.num_active_parameters < 3.5e9


def test_59_the_memory_that_is_named_is_the_one_that_is_too_small(case):
    folder = case("59", with_models=False)
    card = DeviceCapability("cuda", "RTX 3090", 24 * 2**30, compute_capability=(8, 6))
    node = NodeCapability("here", 8, 64 * 2**30, (card,))

    with pytest.raises(NothingFits) as caught:
        plan_without_data(read_job(folder / "job.yaml"), ClusterCapability((node,)), lambda text: None)

    needs, has = re.search(r"needs ([\d.]+) GiB, has ([\d.]+) GiB usable of the node's own", str(caught.value)).groups()
    assert float(needs) > float(has)


@pytest.mark.parametrize(("job", "size"), [("a", 32), ("b", 8), ("c", 64), ("h", 100)])
def test_64_rows_accumulation_and_workers_make_the_step(case, job, size):
    plan, _ = planned(case("64"), f"{job}.yaml")

    assert plan.global_batch_size == size
    assert "per_device_train_batch_size" in plan.reasons["train.global_batch_size"]


@pytest.mark.parametrize(
    ("job", "words"),
    [("d", "1 workers is 8; leave one of them auto"), ("f", "max_steps is 0"), ("g", "warmup_steps is 500, more than")],
)
def test_64_contradictions_are_refused_by_every_verb(case, job, words):
    folder = case("64")

    for verb in (check, lambda read: planned(folder, f"{job}.yaml")):
        assert words in refusal(folder, f"{job}.yaml", verb)


def test_64_max_steps_decides_over_epochs_and_says_so(case):
    folder = case("64")

    plan, _ = planned(folder, "e.yaml")

    assert plan.num_steps == 5
    assert any("num_train_epochs: 10 is not used" in text for text in check(read_job(folder / "e.yaml"))["notices"])


def test_65_modules_trained_in_full_are_counted_in_memory_and_time(case):
    folder = case("65", with_models=False)
    text = (folder / "job.yaml").read_text()
    (folder / "both.yaml").write_text(
        text.replace("lora_r: 16", "lora_r: 16, modules_to_save: [lm_head, embed_tokens]")
    )

    without, _ = planned(folder, "job.yaml")
    both, _ = planned(folder, "both.yaml")

    more = 2 * 128256 * 4096
    assert both.num_trainable_parameters == without.num_trainable_parameters + more
    assert both.nodes[0].memory.optimizer_bytes - without.nodes[0].memory.optimizer_bytes == 8 * more
    assert both.nodes[0].time.update_s > without.nodes[0].time.update_s
