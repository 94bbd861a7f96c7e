"""Declared machines and sizes of models, for tests of the planner."""

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware import datasheet
from clusters.units import GIB
from orchestrator.planning.candidates import Candidate, Placed, Slot
from strategies import METHODS
from strategies.contract import MemoryEstimate, StrategyPlan, TimeEstimate
from strategies.shape import ModelShape
from strategies.workload import Techniques


def llama(hidden, layers, heads, kv, mlp, vocab=128256, tied=False):
    return ModelShape.from_config(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "intermediate_size": mlp,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
        }
    )


TINY = llama(576, 30, 9, 3, 1536, vocab=49152, tied=True)  # 135 million
SMALL = llama(2048, 16, 32, 8, 8192, tied=True)  # 1.2 billion parameters
MIDDLE = llama(4096, 32, 32, 8, 14336)  # 8 billion
LARGE = llama(8192, 80, 64, 8, 28672)  # 70 billion


def machine(name, *cards, cores=16, memory_gib=64, **costs):
    cpu = DeviceCapability(
        "cpu",
        f"cpu of {name}",
        memory_gib * GIB,
        flops_per_s={"float32": 5e11},
        memory_bytes_per_s=4e10,
        sources={"flops_per_s.float32": "declared", "memory_bytes_per_s": "declared"},
    )
    devices = tuple(datasheet.device(datasheet.find(card)) for card in cards)
    return NodeCapability(name, cores, memory_gib * GIB, (*devices, cpu), **costs)


def candidate(step_s=1.0, weights_bytes=GIB, method="lora", stage=0, node=None, num_steps=100):
    """One way to train on one device, at a given pace and size."""
    node = node or machine("a", "RTX 3090")
    device = node.devices[0]
    slot = Slot(node, device, device.memory_bytes, 1)
    part = Placed(slot, strategy_plan(step_s, weights_bytes, method, stage), 1.0)
    return Candidate(METHODS[method](), (part,), 0.0, num_steps, 8192)


def strategy_plan(step_s=1.0, weights_bytes=GIB, method="lora", stage=0, host_bytes=0.0, high_bytes=0.0):
    return StrategyPlan(
        method=method,
        techniques=Techniques("bfloat16", "sdpa", False, False, 1, 512, zero_stage=stage, num_shards=max(1, stage)),
        memory=MemoryEstimate(weights_bytes, 0, 0, 0, 0, host_bytes=host_bytes, high_bytes=high_bytes or weights_bytes),
        time=TimeEstimate(step_s, 0, 0, 0),
        num_trainable_parameters=10**6,
        flops_per_token=1e9,
        checkpoint_bytes=1e6,
        gradient_bytes=4e6,
    )
