"""Samples a step, as transformers counts them, and model files whose values are anything."""

import math
import re
from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.planning import workload


def spec_of(train: str, cluster: str = "{}"):
    text = f"model: {{model_name_or_path: m}}\ndata: {{train: t.jsonl}}\ntrain: {train}\ncluster: {cluster}\n"
    return parse_job(text, Path()).spec


def size_of(train: str, num_samples=100, num_workers=1):
    return workload._global_batch_size(spec_of(train), num_samples, num_workers)


@pytest.mark.parametrize(
    ("train", "workers", "size", "reason"),
    [
        ("{}", 1, 12, "at least 8 steps an epoch"),
        ("{per_device_train_batch_size: 64}", 1, 64, "64 x gradient_accumulation_steps 1 x workers 1"),
        ("{per_device_train_batch_size: 8}", 3, 24, "8 x gradient_accumulation_steps 1 x workers 3"),
        ("{gradient_accumulation_steps: 4}", 1, 32, "8 rows a device where none are stated, as in transformers"),
        ("{per_device_train_batch_size: 2, gradient_accumulation_steps: 4}", 1, 8, "2 x gradient_accumulation_steps 4"),
        ("{per_device_train_batch_size: 2, gradient_accumulation_steps: 4}", 5, 40, "x workers 5"),
        ("{per_device_train_batch_size: 200, gradient_accumulation_steps: 4}", 1, 100, "is 800, and the data has 100"),
        ("{global_batch_size: 16, gradient_accumulation_steps: 4}", 1, 16, None),
        ("{global_batch_size: 16, per_device_train_batch_size: 2}", 1, 16, None),
        ("{global_batch_size: 1000000000}", 1, 100, "1000000000 is stated, and the data has 100 rows: each epoch"),
    ],
)
def test_a_step_is_rows_times_accumulation_times_workers(train, workers, size, reason):
    found, why = size_of(train, num_workers=workers)

    assert found == size
    assert (why is None) if reason is None else (reason in why)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("{global_batch_size: 16, per_device_train_batch_size: 2, gradient_accumulation_steps: 4}", "1 workers is 8"),
        ("{global_batch_size: 16, per_device_train_batch_size: 64}", "is 64, more than train.global_batch_size"),
        ("{global_batch_size: 2, gradient_accumulation_steps: 4}", "is 4, more than train.global_batch_size"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_before_and_while_planning(train, words):
    with pytest.raises(JobError, match=words):
        size_of(train)
    with pytest.raises(JobError, match=words):
        workload.check_batch(spec_of(train), 1)


def test_stated_parts_of_a_step_fix_how_many_workers_train():
    spec = spec_of("{global_batch_size: 16, per_device_train_batch_size: 2, gradient_accumulation_steps: 4}")

    assert workload.num_workers_of_batch(spec, 4) == 2
    assert workload.num_workers_of_batch(spec, 1) is None
    workload.check_batch(spec, 4)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("{max_steps: 0}", "train.max_steps is 0: nothing would be trained"),
        ("{max_steps: 20, warmup_steps: 500}", "train.warmup_steps is 500, more than the 20 steps .* beyond 4%"),
    ],
)
def test_steps_that_make_no_training_are_refused(train, words):
    assert any(re.search(words, text) for text in workload.step_mistakes(spec_of(train)))


def test_max_steps_decides_over_stated_epochs_and_says_so():
    assert workload.step_notices(spec_of("{max_steps: 5}")) == []
    assert (
        "train.num_train_epochs: 10 is not used"
        in workload.step_notices(spec_of("{max_steps: 5, num_train_epochs: 10}"))[0]
    )


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_deep: list = []
for _ in range(90):
    _deep = [_deep]
ANYTHING = ["text", [], {}, _deep, -1, 0, 1.5, math.nan, math.inf, 10**30, True, None, "\ud800", "[/red]"]


@pytest.mark.parametrize("key", [*LLAMA, "text_config", "quantization_config", "head_dim", "is_encoder_decoder"])
def test_a_field_of_any_type_is_a_model_or_a_mistake(key):
    for value in ANYTHING:
        config = {**LLAMA, key: value}
        for read in (workload.model_shape, workload.max_positions):
            try:
                read(config)
            except JobError as error:
                assert "model.model_name_or_path" in str(error)


@pytest.mark.parametrize("key", LLAMA)
def test_a_missing_field_has_the_library_s_meaning_or_is_named(key):
    config = {name: value for name, value in LLAMA.items() if name != key}
    optional = {"intermediate_size", "num_key_value_heads", "max_position_embeddings"}
    optional |= {"tie_word_embeddings", "attention_bias"}

    if key in optional:
        workload.model_shape(config)
    else:
        with pytest.raises(JobError, match=key):
            workload.model_shape(config)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq, 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, r"\(awq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "8 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"\(fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_model_that_is_stored_quantised_is_refused_by_the_method_s_name(stated, words):
    with pytest.raises(JobError, match=words):
        workload.model_shape({**LLAMA, "quantization_config": stated})


def test_an_unknown_family_is_refused_with_its_name():
    for named in ("deepseek_v3", "mamba", None, 7):
        with pytest.raises(JobError, match=str(named)):
            workload.model_shape({**LLAMA, "model_type": named})


def test_a_model_that_reads_pictures_too_is_refused_with_the_way_out():
    with pytest.raises(JobError, match=r"reads more than text .* give its text-only model"):
        workload.model_shape({"model_type": "gemma3", "text_config": {"hidden_size": 2560}, "vision_config": {}})
