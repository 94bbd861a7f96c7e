"""A model in stages on emulated machines: the quick start, and a model that is larger than each machine's memory."""

import json
import os
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cluster.emulator import Machine, unavailable
from tests.cluster.test_faults import events, finished, started_lab
from tests.conftest import needs_smollm2

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(unavailable() is not None, reason=unavailable() or ""),
    pytest.mark.timeout(3600),
]
NAMES = ("one", "two", "three")
SPEEDS = (1.0, 0.7, 0.5)  # of a core each
MEMORY_BYTES = 2 * 2**30  # of a machine, of which Ray's own processes take a quarter and a worker's libraries another
SMALL_JOB = """\
name: larger-than-a-machine
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: train.jsonl, max_length: 64}}
method: {{lora_r: 4}}
train: {{global_batch_size: 2, max_steps: 3, learning_rate: 1e-4, lr_scheduler_type: constant}}
strategy: {{{strategy}}}
cluster: {{address: "{address}:6379", num_workers: {workers}, wait_for_nodes_s: 40}}
tracking: {{report_to: []}}
"""


def stages_of(run):
    """Node -> its layers, in the order of stages."""
    stages = [(part.node, part.techniques.stage) for part in run.plan().nodes]
    return {node: (stage.first_layer, stage.end_layer) for node, stage in stages if stage}


@needs_smollm2
def test_the_quick_start_through_three_unequal_stages(tmp_path, model_folder):
    with started_lab([Machine("head"), *map(Machine, NAMES)], tmp_path, model_folder) as lab:
        for name, speed in zip(NAMES, SPEEDS, strict=True):
            lab.cluster.slow_down(name, speed)
        address = f"cluster.address={lab.cluster.address('head')}:6379"
        ways = {
            "stages": ("strategy.mode=pipeline", "strategy.pipeline.stages=3", "strategy.shares=planned"),
            "alone": ("cluster.num_workers=1",),
        }
        same = ("model.dtype=float32", "data.packing=false", "train.per_device_train_batch_size=4")  # one rounding
        matches, stages = {}, {}
        for way, keys in ways.items():
            options = [part for key in (address, *same, *keys) for part in ("--set", key)]
            process, run = lab.start_job("submit", "quickstart", *options)
            finished(process, run)
            matches[way], stages[way] = run.result().after.scores["exact_match"], stages_of(run)
            seconds = run.result().train_seconds
            print(json.dumps({"way": way, "stages": stages[way], "exact_match": matches[way], "seconds": seconds}))

    assert len(stages["stages"]) == 3 and len({end - first for first, end in stages["stages"].values()}) > 1
    assert stages["alone"] == {}
    assert matches["stages"] == matches["alone"] >= 0.6


@pytest.fixture(scope="module")
def large_model(tmp_path_factory, model_folder):
    """537 million parameters, 2.1 GB, with the small model's tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=1024, intermediate_size=4096, num_hidden_layers=32, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    (folder / "model.safetensors").unlink()  # the small model's
    return folder


@pytest.fixture(scope="module")
def small_lab(tmp_path_factory, model_folder):
    machines = [Machine("head"), *(Machine(name, memory_bytes=MEMORY_BYTES) for name in NAMES)]
    with started_lab(machines, tmp_path_factory.mktemp("lab"), model_folder) as lab:
        yield lab


@pytest.mark.parametrize(
    "strategy, workers",
    [("mode: pipeline, pipeline: {stages: 3}", 3), ("offload: weights", 1)],
    ids=["stages", "streamed"],
)
def test_a_model_larger_than_each_machines_memory(small_lab, large_model, strategy, workers):
    size = sum(file.stat().st_size for file in large_model.glob("*.safetensors"))
    assert size > MEMORY_BYTES
    text = SMALL_JOB.format(
        model=large_model, strategy=strategy, workers=workers, address=small_lab.cluster.address("head")
    )
    (small_lab.folder / "large.yaml").write_text(text)
    forget_pages(large_model)
    for name in NAMES:
        (small_lab.cluster.cgroup(name, "memory") / "memory.max_usage_in_bytes").write_text("0")
    process, run = small_lab.start_job("submit", "large.yaml")
    finished(process, run)

    assert len(run.steps()) == 3 and not events(run, "failure")
    for name in NAMES:
        peak, limit, killed = memory_of(small_lab, name)
        print(json.dumps({"machine": name, "model": size, "limit": limit, "peak": peak, "killed": killed}))
        assert peak <= limit == MEMORY_BYTES and killed == 0


def forget_pages(folder):
    """Have the kernel drop what it holds of these files: whoever reads them next is charged for it."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(lab, name):
    """Highest use of a machine, its limit, and how often the kernel ended a process for memory."""
    folder = lab.cluster.cgroup(name, "memory")
    control = dict(line.split() for line in (folder / "memory.oom_control").read_text().splitlines())
    peak, limit = (int((folder / f"memory.{one}_in_bytes").read_text()) for one in ("max_usage", "limit"))
    return peak, limit, int(control["oom_kill"])
