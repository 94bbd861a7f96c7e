"""What a job states must be possible together on at least one device."""

import dataclasses
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.planning.planner import offered_slots, switches_of
from orchestrator.planning.refusals import refuse_contradictions
from orchestrator.planning.workload import describe
from tests.orchestrator.planning.machines import SMALL, machine

GPU, TWO_GPUS, CPU = machine("a", "RTX 3090"), machine("b", "RTX 3090", "RTX 3090"), machine("c")


def refuse(text, node, shape=SMALL):
    model = "" if "model:" in text else "model: {model_name_or_path: m}\n"
    data = "" if "data:" in text else "data: {train: a.jsonl}\n"
    spec = parse_job(f"{model}{data}{text}", Path()).spec
    work, _, _ = describe(spec, shape, [512] * 160, 160 * 256, 1)
    refuse_contradictions(spec, work, offered_slots(spec, ClusterCapability((node,))), switches_of(spec, 2048))


@pytest.mark.parametrize(
    ("text", "node", "message"),
    [
        ("strategy: {mode: zero2}\n", GPU, "zero2 divides among devices, and here is one worker"),
        ("strategy: {mode: ddp}\n", GPU, "ddp trains on several devices, and here is one worker; set it to auto"),
        ("strategy: {mode: ddp}\ncluster: {num_workers: 1}\n", TWO_GPUS, "ddp trains on several devices"),
        (
            "cluster: {num_workers: 4}\n",
            TWO_GPUS,
            "cluster.num_workers is 4, with devices for 2: set it to auto",
        ),
        (
            "cluster: {num_workers: 2}\n",
            GPU,
            "cluster.num_workers is 2, with devices for 1: set it to auto",
        ),
        ("strategy: {mode: zero3, local_steps: 4}\n", TWO_GPUS, "workers that train apart hold everything"),
        ("strategy: {local_steps_merge: product}\n", TWO_GPUS, "set strategy.local_steps, or leave it out"),
        ("strategy: {local_steps: 4, local_steps_reset: true}\n", TWO_GPUS, "set strategy.local_steps_merge: product"),
        (
            "method: {type: full}\nstrategy: {local_steps: 4, local_steps_merge: product}\n",
            TWO_GPUS,
            "strategy.local_steps_merge: product averages corrections B A of LoRA, and full trains no low-rank adapter",
        ),
        (
            "method: {type: lora, use_dora: true}\nstrategy: {local_steps: 4, local_steps_merge: product}\n",
            TWO_GPUS,
            "use_dora is more than pairs of A and B",
        ),
        (
            "strategy: {mode: pipeline, local_steps: 4, local_steps_merge: product}\n",
            TWO_GPUS,
            "stages pass on every micro-batch",
        ),
        (
            "method: {type: experimental_boosted_lora}\nstrategy: {local_steps: 4}\n",
            TWO_GPUS,
            "which local steps let drift apart",
        ),
        ("train: {threads: 99}\n", CPU, "train.threads is 99, and no worker has more than [0-9]+ cores; lower it"),
        ("cluster: {nice: 5, address: auto}\n", CPU, "cluster.nice belongs to address: local"),
        ("cluster: {resident: false, address: auto}\n", CPU, "cluster.resident belongs to address: local"),
        ("strategy: {offload: optimizer}\n", CPU, "a CPU's memory is the host's already"),
        (
            "strategy: {deepspeed: {train_micro_batch_size_per_gpu: 4}}\n",
            GPU,
            r"strategy.deepspeed.train_micro_batch_size_per_gpu: the plan decides it; set it by",
        ),
        (
            "model: {model_name_or_path: m, attn_implementation: document}\ndata: {train: a.jsonl, packing: false}\n",
            GPU,
            "document needs data.packing: true",
        ),
        (
            "data: {train: a.jsonl, packing: true}\ntrain: {torch_compile: true}\n",
            GPU,
            "would recompile for every set of document lengths",
        ),
        (
            "model: {model_name_or_path: m, attn_implementation: flash_attention_2, dtype: float32}\n",
            GPU,
            "flash_attention_2 computes in 16 bits; set model.dtype to auto",
        ),
        ("model: {model_name_or_path: m, attn_implementation: flex_attention}\n", CPU, "flex_attention needs a GPU"),
        ("goal: {full_rank: true}\nmethod: {type: lora}\n", GPU, "lora changes weights by a low rank only"),
        (
            "method: {type: qlora}\nstrategy: {mode: zero3}\n",
            TWO_GPUS,
            "the job's settings do not go together: .* does not shard bitsandbytes'",
        ),
    ],
)
def test_a_contradiction_is_refused_with_what_to_change(text, node, message):
    with pytest.raises(JobError, match=message):
        refuse(text, node)


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("", CPU),
        ("strategy: {mode: zero2}\n", TWO_GPUS),
        ("strategy: {mode: ddp}\n", TWO_GPUS),
        ("strategy: {mode: ddp}\n", CPU),
        ("cluster: {num_workers: 2}\n", TWO_GPUS),
        ("cluster: {num_workers: 4}\n", CPU),
        ("strategy: {offload: optimizer}\n", GPU),
        ("model: {model_name_or_path: m, attn_implementation: flash_attention_2}\n", GPU),
        ("goal: {full_rank: true}\nmethod: {type: full}\n", GPU),
    ],
)
def test_what_can_be_done_somewhere_is_not_refused(text, node):
    refuse(text, node)


def test_a_model_that_caps_its_scores_needs_no_word_on_kernels():
    """Eager attention, the only kernel that computes it, is open where the job says nothing of attention."""
    capped = dataclasses.replace(SMALL, softcap=True)

    refuse("", GPU, capped)

    with pytest.raises(JobError, match="the model caps its scores"):
        refuse("model: {model_name_or_path: m, attn_implementation: sdpa}\n", GPU, capped)
