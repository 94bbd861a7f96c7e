"""The published measurements are read as they were meant: units, GPUs, conditions; and nothing is guessed at."""

import csv
import math
from collections import Counter

import pytest

from tests.benchmarks.published import COLUMNS, config, from_columns, read
from tests.conftest import SHARED

TABLES = SHARED / "tables"
CONFIGS = SHARED / "assets/configs"
GIB = 2**30
pytestmark = pytest.mark.skipif(not TABLES.is_dir() or not CONFIGS.is_dir(), reason="no ../shared with the tables")


@pytest.fixture(scope="module")
def everything():
    return read(TABLES)


@pytest.fixture(scope="module")
def at(everything):
    return {record.source: record for record in everything[0]}


def at_least(found, expected):
    assert {source: min(found.get(source, 0), count) for source, count in expected.items()} == expected


def test_every_source_gives_its_records(everything):
    found = Counter((record.source.split(".csv")[0], record.metric == "memory_bytes") for record in everything[0])
    memory = {source: count for (source, is_memory), count in found.items() if is_memory}
    times = {source: count for (source, is_memory), count in found.items() if not is_memory}
    at_least(
        memory,
        {
            "b_dissecting_2311_03687": 9,
            "b_reproductions_nthu_2311_03687": 11,
            "c_lsp_offload_2406_10181": 3,
            "e_deepspeed": 5,
            "e_litgpt": 57,
            "e_ms_swift": 69,
            "e_peft_metamathqa": 9,
            "e_torchtune": 15,
        },
    )
    at_least(
        times,
        {
            "b_dissecting_2311_03687": 9,
            "b_reproductions_nthu_2311_03687": 11,
            "derived_step_time_fit": 60,
            "e_deepspeed": 2,
            "e_optimum_benchmark_llama2": 49,
            "e_peft_metamathqa": 5,
            "e_torchtune": 15,
        },
    )


def test_every_row_is_a_record_or_counted(everything):
    records, skipped = everything
    lines = 0
    for path in TABLES.glob("*.csv"):
        with path.open(newline="") as file:
            lines += sum(1 for _ in csv.DictReader(file))
    assert sum(skipped.values()) + len({record.source.split("@")[0] for record in records}) == lines


def test_records_are_whole(everything):
    for record in everything[0]:
        shape = config(record.model, CONFIGS)
        assert shape["vocab_size"] and shape["model_type"], record.model
        assert math.isfinite(record.value) and record.value > 0
        assert record.gpu and record.num_gpus >= 1
        assert (record.method == "full") == (record.lora_r is None) == (record.targets == "")
        assert (record.method == "qlora") == (record.quantization is not None)
        assert record.metric in ("memory_bytes", "step_s", "tokens_per_s")
        assert (record.measured_as != "") == (record.metric == "memory_bytes")
        assert record.kind == "formula" or (record.micro_batch >= 1 and record.length >= 128)
        assert record.metric == "memory_bytes" or record.mean_length
        if record.metric == "memory_bytes":
            assert 1e8 < record.value < 85 * GIB, "per GPU, in bytes"
        if record.metric == "step_s":
            assert 0.05 < record.value < 60


def test_memory_in_bytes_of_one_gpu(at):
    litgpt = at["e_litgpt.csv:28"]  # printed in 1e9
    assert (litgpt.model, litgpt.micro_batch, litgpt.length, litgpt.value) == ("llama-2-7b", 2, 1304, 29.07e9)
    assert (litgpt.trained_dtype, litgpt.targets, litgpt.gradient_checkpointing) == ("bf16", "q,v", False)
    swift = at["e_ms_swift.csv:171"]  # printed in GiB
    assert swift.value == pytest.approx(57.67 * GIB)
    assert (swift.model, swift.attention, swift.gradient_checkpointing, swift.targets) == (
        "qwen-7b",
        "eager",
        False,
        "fused",
    )
    peft = at["e_peft_metamathqa.csv:194"]
    assert (peft.value, peft.lora_r, peft.targets, peft.gpu, peft.measured_as) == (
        22292725760,
        32,
        "q,v",
        "L40S",
        "reserved",
    )
    assert at["b_dissecting_2311_03687.csv:2"].value == pytest.approx(66.7 * GIB)


def test_conditions_that_the_tables_do_not_state(at):
    several = at["e_litgpt.csv:84"]  # FSDP with checkpointing on several GPUs only
    assert (several.num_gpus, several.zero_stage, several.gradient_checkpointing) == (2, 3, True)
    assert at["e_litgpt.csv:112"].model == "gemma-2-2b"  # called gemma-2b there
    assert at["e_ms_swift.csv:9"].quantization == "nf4-dq" and "kbit-fp32" in at["e_ms_swift.csv:9"].extras
    pretraining = at["b_reproductions_nthu_2311_03687.csv:23"]
    assert (pretraining.num_gpus, pretraining.zero_stage, pretraining.value) == (3, 3, pytest.approx(40.34 * GIB))
    flags = at["e_torchtune.csv:30"]
    assert flags.extras == ("optimizer-in-backward", "activation-offload") and flags.torch_compile
    assert at["e_deepspeed.csv:5"].kind == "formula"


def test_times_are_of_one_micro_batch_or_all_gpus(at):
    samples = at["e_optimum_benchmark_llama2.csv:2"]  # 17.6 samples/s in batches of 16
    assert (samples.metric, samples.value) == ("step_s", pytest.approx(16 / 17.61553393108114))
    accumulated = at["derived_step_time_fit.csv:19@8192"]  # 21.3 s an iteration of 8 micro-batches
    assert (accumulated.model, accumulated.value) == ("qwen-7b", pytest.approx(21.3 / 8, abs=1e-3))
    total = at["e_torchtune.csv:15"]
    assert (total.metric, total.num_gpus, total.value) == ("tokens_per_s", 8, 3497)
    real = at["b_reproductions_nthu_2311_03687.csv:2"]
    assert (real.length, real.mean_length) == (350, 284.3)


def test_any_table_of_the_same_columns(tmp_path):
    def row(**values):
        common = {"paper": "someone", "gpu": "NVIDIA A100-SXM4-80GB", "n_gpus": "1", "seq_len": "2048", "batch": "1"}
        return dict.fromkeys(COLUMNS, "") | common | {"method": "LoRA", "metric": "peak_mem", "unit": "GiB"} | values

    rows = [
        row(model="Qwen/Qwen2.5-7B-Instruct", value="20", flash="FA2", checkpointing="yes", lora_rank="64"),
        row(model="Qwen-7B", n_gpus="2", value="139.2", unit="GB (sum of GPUs)", method="Full-parameter"),
        row(model="Llama 3.1 (8B)", value="10", unit="GB", method="QLoRA r=16", gpu="Tesla T4", batch="2"),
        row(model="Llama 2", params_b="13", value="4.5", metric="s_per_iter", unit="s/it", note="ga=8", method="LoRA"),
        row(
            model="unsloth/Llama-3.2-1B-Instruct",
            value="3000",
            metric="throughput",
            unit="tokens/s per GPU",
            n_gpus="4",
        ),
        row(
            model="meta-llama/Llama-2-70b-hf", method="FSDP QLoRA nf4 double quant", value="1.5", unit="GiB", n_gpus="2"
        ),
        row(model="BLOOM-176B", value="20"),
        row(model="Llama-2-7b-hf", value="OOM"),
        row(model="Llama-2-7b-hf", value="20", seq_len=""),
        row(model="Llama-2-7b-hf", value="20", method="GaLore"),
        row(model="Llama-2-7b-hf", value="3", metric="throughput", unit="samples/s", seq_len="<= 2048"),
        row(model="Llama-2-7b-hf", value="20", metric="rouge_l"),
    ]
    with (tmp_path / "unseen.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    records, skipped = from_columns(tmp_path / "unseen.csv")
    assert [record.model for record in records] == [
        "qwen2.5-7b",
        "qwen-7b",
        "llama-3.1-8b",
        "llama-2-13b",
        "llama-3.2-1b",
        "llama-2-70b",
    ]
    lora, summed, qlora, step, tokens, sharded = records
    assert (lora.attention, lora.gradient_checkpointing, lora.lora_r, lora.value) == ("flash", True, 64, 20 * GIB)
    assert (summed.method, summed.value) == ("full", pytest.approx(69.6e9))
    assert (qlora.gpu, qlora.quantization, qlora.lora_r, qlora.compute_dtype) == ("T4", "nf4", 16, "float16")
    assert (step.metric, step.value) == ("step_s", pytest.approx(4.5 / 8))
    assert (tokens.metric, tokens.value) == ("tokens_per_s", 12000)
    assert (sharded.zero_stage, sharded.quantization) == (3, "nf4-dq")
    assert {reason.split(": ")[1] for reason in skipped} == {
        "model has no config",
        "no single number (OOM, N/A, a range, or a model split over GPUs)",
        "length not given",
        "method is not full, LoRA or QLoRA",
        "time of samples whose mean length is not published",
        "not a memory, step-time or throughput metric",
    }
