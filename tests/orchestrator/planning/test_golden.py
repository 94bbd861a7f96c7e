"""Plans reviewed by eye: six machines x ten models, each with the reason that an expert would give.

`python -m tests.orchestrator.planning.test_golden` writes the plans anew beside their reasons: look at every change.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability, NodeCapability
from clusters.units import GIB
from orchestrator.errors import NothingFits
from orchestrator.job.job_file import parse_job
from orchestrator.planning import planner, workload
from strategies.shape import ModelShape
from tests.orchestrator.planning.machines import LARGE, MIDDLE, SMALL, machine

FILE = Path(__file__).parents[2] / "golden" / "plans.json"


def _shape(model_type: str, hidden: int, layers: int, heads: tuple[int, int, int], mlp: int, **more) -> ModelShape:
    num_heads, num_kv_heads, head_dim = heads
    config = {"model_type": model_type, "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp}
    config |= {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    return ModelShape.from_config(config | {"tie_word_embeddings": False} | more)


_GEMMA_2 = {"vocab_size": 256000, "tie_word_embeddings": True, "attn_logit_softcapping": 50.0}
_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
MODELS = {
    "Qwen2.5-0.5B": _shape("qwen2", 896, 24, (14, 2, 64), 4864, vocab_size=151936, tie_word_embeddings=True),
    "Llama-3.2-1B": SMALL,
    "Gemma-2-2B": _shape("gemma2", 2304, 26, (8, 4, 256), 9216, **_GEMMA_2),
    "Llama-3.2-3B": _shape("llama", 3072, 28, (24, 8, 128), 8192, vocab_size=128256, tie_word_embeddings=True),
    "Qwen2.5-7B": _shape("qwen2", 3584, 28, (28, 4, 128), 18944, vocab_size=152064),
    "Llama-3.1-8B": MIDDLE,
    "Gemma-2-9B": _shape("gemma2", 3584, 42, (16, 8, 256), 14336, **_GEMMA_2),
    "Qwen2.5-14B": _shape("qwen2", 5120, 48, (40, 8, 128), 13824, vocab_size=152064),
    "Qwen3-30B-A3B": _shape("qwen3_moe", 2048, 48, (32, 4, 128), 6144, vocab_size=151936, **_EXPERTS),
    "Llama-3.1-70B": LARGE,
}
MACHINES: dict[str, NodeCapability] = {
    "a laptop with 8 GB": machine("a", "RTX 4060 Laptop", cores=8, memory_gib=16),
    "a 12 GB card": machine("a", "RTX 3060 12GB", cores=8, memory_gib=32),
    "a 24 GB card": machine("a", "RTX 4090", memory_gib=64),
    "two 24 GB cards": machine("a", "RTX 3090", "RTX 3090", memory_gib=128),
    "four A100": machine("a", *["A100 SXM 80GB"] * 4, cores=64, memory_gib=512),
    "a CPU box": machine("a", cores=16, memory_gib=64),
}


def describe(model: str, machine: str) -> str:
    """The plan in one line; where nothing fits, the first remedy."""
    spec = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 2048}\n", Path()).spec
    work, _, _ = workload.describe(spec, MODELS[model], [512] * 1600, 1600 * 256, 1)
    try:
        made = planner.make_plan(spec, work, ClusterCapability((MACHINES[machine],)), 2048, None, {})
    except NothingFits as error:
        return f"refused: {str(error).splitlines()[-1].strip()}"
    t = made.techniques
    rows = f"{t.per_device_train_batch_size} x {t.max_length}" if t.packing else f"{t.per_device_train_batch_size} rows"
    switches = [t.dtype, t.attn_implementation, "packed" if t.packing else "padded", rows, t.loss_type, t.optim]
    switches += ["recomputing"] * t.gradient_checkpointing + [f"{t.offload} offloaded"] * (t.offload != "none")
    switches += [f"zero{t.zero_stage}"] * bool(t.zero_stage)
    memory = f"{made.memory.total_bytes / GIB:.1f} GiB"
    return f"{made.method['type']} on {len(made.nodes)}: {', '.join(switches)}; {memory}, {made.step_s:.3g} s a step"


CASES = [(model, machine) for machine in MACHINES for model in MODELS]


@pytest.mark.parametrize(("model", "machine"), CASES)
def test_a_plan_is_the_one_that_was_reviewed(model, machine):
    reviewed = json.loads(FILE.read_text(encoding="utf-8"))[f"{model} on {machine}"]

    assert reviewed["why"], "the reason an expert would give"
    assert describe(model, machine) == reviewed["plan"]


def test_every_reviewed_plan_is_of_these_models_and_machines():
    assert len(CASES) == 60
    assert set(json.loads(FILE.read_text(encoding="utf-8"))) == {f"{model} on {machine}" for model, machine in CASES}


def main() -> None:
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    new = {}
    for model, machine_ in CASES:
        name = f"{model} on {machine_}"
        new[name] = {**old.get(name, {"why": ""}), "plan": describe(model, machine_)}
        if old.get(name, {}).get("plan") != new[name]["plan"]:
            print(f"{name}:\n  was {old.get(name, {}).get('plan')}\n  is  {new[name]['plan']}")
    FILE.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
