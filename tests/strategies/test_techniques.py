"""The catalogue: verdicts follow the device's figures, and every rule of what goes together says why."""

import dataclasses

import pytest

from clusters.capability import DeviceCapability, Library, NodeCapability
from clusters.hardware import datasheet
from strategies import METHODS, TECHNIQUES
from strategies.compatibility import conflict
from strategies.shape import ModelShape
from strategies.techniques.technique import Choice, judge
from strategies.workload import Techniques, Workload

GIB = 2**30
SIZES = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
SHAPE = ModelShape.from_config(SIZES)
GEMMA2 = dataclasses.replace(SHAPE, model_type="gemma2", softcap=True)
MOE = dataclasses.replace(SHAPE, model_type="mixtral", num_experts=8, num_experts_per_token=2)
SWITCHES = Techniques("float32", "document", True, False, 4, 1024)


def cpu(bf16_gflops, fp32_gflops=100):
    flops = {"float32": fp32_gflops * 1e9, "bfloat16": bf16_gflops * 1e9, "float16": 1e9}
    sources = {f"flops_per_s.{name}": "measured" for name in flops}
    return DeviceCapability(
        "cpu", "cpu", 64 * GIB, flops_per_s=flops, memory_bytes_per_s=2e10, op_overhead_s=5e-6, sources=sources
    )


def card(name):
    return datasheet.device(datasheet.find(name))


def node(device):
    return NodeCapability("here", 8, 64 * GIB, (device,))


def verdict(name, device, shape=SHAPE, num_devices=1, **changes):
    technique = next(t for t in TECHNIQUES if t.name == name)
    work = Workload(shape, 160, 160 * 400, 160 * 200, 1024, 16, 10, 160, 1.4 * 400**2, {1: 1.0, 8: 1.4, 16: 2.0})
    dtype = "float32" if device.kind == "cpu" else "bfloat16"
    switches = dataclasses.replace(SWITCHES, dtype=dtype, **changes)
    return judge(technique, Choice(work, METHODS["lora"](), switches), device, node(device), num_devices)


def test_each_technique_of_the_catalogue_states_what_it_does_and_how_it_is_switched_on():
    names = {technique.name for technique in TECHNIQUES}

    assert len(names) == len(TECHNIQUES) >= 24
    assert all(technique.about and technique.switch and technique.quality for technique in TECHNIQUES)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
@pytest.mark.parametrize("device", [cpu(30), card("RTX 3090"), card("GTX 1060 6GB"), card("RX 7900 XTX")])
def test_every_technique_has_a_verdict_with_a_reason_on_every_device(technique, device):
    found = verdict(technique.name, device, num_devices=4)

    assert found.reason
    assert (found.memory_ratio is None) == (found.level == "impossible")


def test_bf16_hurts_a_cpu_without_units_and_helps_one_with_them():
    assert verdict("bf16", cpu(26)).level == "harmful"
    assert verdict("bf16", cpu(380)).level == "effective"


def test_checkpointing_hurts_where_memory_is_plentiful_and_helps_where_it_is_short():
    small = dataclasses.replace(card("RTX 3060"), memory_bytes=7 * GIB)

    assert verdict("gradient checkpointing", cpu(26)).level == "harmful"
    assert verdict("gradient checkpointing", small).level == "effective"


def test_packing_and_batching_help_a_cpu():
    assert verdict("packing", cpu(26)).level == "effective"
    assert verdict("half the length", cpu(26)).level == "effective"
    assert verdict("larger micro-batch", cpu(26)).level in ("effective", "works", "little gain")


def test_eight_bit_states_gain_little_beside_an_adapter():
    assert verdict("8-bit optimizer", card("RTX 3090")).level == "little gain"


@pytest.mark.parametrize(
    ("name", "device", "word"),
    [
        ("flash-attn 2", "RTX 2080 Ti", "Ampere"),
        ("bf16", "RTX 2080 Ti", "no bf16 units"),
        ("torch.compile", "GTX 1080 Ti", "7.0"),
        ("flex attention", "GTX 1080 Ti", "7.0"),
        ("ZeRO-3", "RTX 3090", "divides work"),
    ],
)
def test_what_a_card_cannot_do_is_impossible_with_its_reason(name, device, word):
    found = verdict(name, card(device))

    assert found.level == "impossible"
    assert word in found.reason


@pytest.mark.parametrize("name", ["optimizer offload", "parameter offload", "activation offload", "flash-attn 2"])
def test_gpu_techniques_are_impossible_on_a_cpu(name):
    assert verdict(name, cpu(26)).level == "impossible"


def test_fp16_is_harmful_on_pascal():
    pascal = card("GTX 1080 Ti")

    assert verdict("fp16", pascal).level in ("harmful", "works")
    assert verdict("fp16", pascal).time_ratio > 1


RULES = [
    ("document without packing", {"packing": False}, "lora", None, "packed rows"),
    ("flash in fp32", {"attn_implementation": "flash_attention_2"}, "lora", "RTX 3090", "16 bits"),
    ("flash on Turing", {"attn_implementation": "flash_attention_2", "dtype": "float16"}, "lora", "RTX 2080", "Ampere"),
    ("bf16 on Turing", {"dtype": "bfloat16"}, "lora", "RTX 2080", "no bf16"),
    ("ZeRO alone", {"zero_stage": 2}, "lora", "RTX 3090", "there is only one"),
    ("offload on a CPU", {"offload": "activations"}, "lora", None, "host's already"),
    ("8-bit and offload", {"offload": "optimizer", "optim": "adamw_bnb_8bit"}, "full", "RTX 3090", "CPU in fp32"),
    ("both savings", {"offload": "activations", "gradient_checkpointing": True}, "lora", "RTX 3090", "choose one"),
    ("compile packed", {"torch_compile": True}, "lora", "RTX 3090", "set of document lengths"),
    ("quantised and fetched", {"offload": "parameters"}, "qlora", "RTX 3090", "fetched layer by layer"),
]


@pytest.mark.parametrize(("name", "changes", "method", "where", "word"), RULES, ids=[rule[0] for rule in RULES])
def test_each_conflict_says_why(name, changes, method, where, word):
    device = card(where) if where else cpu(26)

    reason = conflict(METHODS[method](), dataclasses.replace(SWITCHES, **changes), device, SHAPE)

    assert reason is not None and word in reason


def test_conflicts_among_several_devices():
    device = card("RTX 3090")

    def why(method, shape=SHAPE, **changes):
        switches = dataclasses.replace(SWITCHES, dtype="bfloat16", **changes)
        return conflict(METHODS[method](), switches, device, shape, num_devices=2)

    assert "does not shard" in why("qlora", zero_stage=3)
    assert "blocks would be cut" in why("full", zero_stage=2, optim="adamw_bnb_8bit")
    assert "needs ZeRO-3" in why("lora", zero_stage=2, offload="parameters")
    assert why("lora", zero_stage=3) is None


def test_conflicts_with_a_model():
    device = card("RTX 3090")

    assert "caps its scores" in conflict(METHODS["lora"](), SWITCHES, device, GEMMA2)
    eager = dataclasses.replace(SWITCHES, attn_implementation="eager", loss_type="chunked_nll")
    assert "caps its logits" in conflict(METHODS["lora"](), eager, device, GEMMA2)
    assert "experts" in conflict(METHODS["qlora"](), SWITCHES, device, MOE)


LACKING = {
    "absent": (Library("absent"), "bitsandbytes is not installed: pip install -e '.[quant]'"),
    "broken": (Library("broken", "OSError: no libcudart"), "is installed and does not run on RTX 3090: OSError: no"),
}


@pytest.mark.parametrize("state", LACKING)
def test_a_library_that_is_absent_or_broken_rules_out_what_needs_it_and_says_which_it_is(state):
    library, says = LACKING[state]
    device = dataclasses.replace(card("RTX 3090"), libraries={"bitsandbytes": library})

    assert says in conflict(METHODS["qlora"](), SWITCHES, device, SHAPE)
    eight = dataclasses.replace(SWITCHES, optim="adamw_bnb_8bit")
    assert says in conflict(METHODS["full"](), eight, device, SHAPE)


def test_what_only_lacks_a_library_has_the_ratios_it_would_have_with_it():
    absent = dataclasses.replace(card("RTX 3090"), libraries={"bitsandbytes": Library("absent")})
    old = dataclasses.replace(card("RTX 2080 Ti"), libraries={"flash_attn": Library("absent")})

    found, complete = verdict("QLoRA nf4", absent), verdict("QLoRA nf4", card("RTX 3090"))

    assert found.level == "not installed" and found.memory_ratio == complete.memory_ratio
    assert found.reason.startswith("bitsandbytes is not installed: pip install -e '.[quant]'; with it: memory x")
    assert verdict("flash-attn 2", old).level == "impossible"
    assert "needs Ampere or newer" in verdict("flash-attn 2", old).reason


RADEON, OLD_RADEON = card("RX 7900 XTX"), card("RX 6800 XT")


@pytest.mark.parametrize(
    ("method", "changes", "device", "says"),
    [
        ("lora", {"attn_implementation": "sdpa"}, RADEON, None),
        ("lora", {"dtype": "float16"}, OLD_RADEON, None),
        ("lora", {"dtype": "bfloat16"}, OLD_RADEON, "no bf16 units"),
        ("lora", {"attn_implementation": "flash_attention_2"}, RADEON, "not known to run on this Radeon"),
        ("qlora", {}, RADEON, "bitsandbytes is not known to run on this Radeon"),
        ("full", {"optim": "adamw_bnb_8bit"}, RADEON, "bitsandbytes is not known to run on this Radeon"),
        ("qlora", {}, dataclasses.replace(RADEON, libraries={"bitsandbytes": Library("runs")}), None),
    ],
)
def test_an_amd_card_has_16_bits_and_torchs_kernels_and_4_bits_only_where_they_were_seen_to_run(
    method, changes, device, says
):
    found = conflict(METHODS[method](), dataclasses.replace(SWITCHES, **changes), device, SHAPE)

    assert (found is None) if says is None else (says in found)


@pytest.mark.parametrize("changes", [{"offload": "optimizer"}, {"offload": "parameters"}, {"zero_stage": 3}])
def test_what_deepspeed_does_is_refused_where_it_is_absent(changes):
    device = dataclasses.replace(card("RTX 3090"), libraries={"deepspeed": Library("absent")})
    count = 2 if "zero_stage" in changes else 1
    techniques = dataclasses.replace(SWITCHES, num_shards=count, **changes)

    assert conflict(METHODS["lora"](), techniques, card("RTX 3090"), SHAPE, count) is None
    says = conflict(METHODS["lora"](), techniques, device, SHAPE, count)
    assert says == "deepspeed is not installed: pip install -e '.[zero]'"


def test_what_goes_together_has_no_conflict():
    assert conflict(METHODS["lora"](), SWITCHES, cpu(26), SHAPE) is None


def test_the_extra_that_brings_a_library_is_the_one_that_pyproject_declares():
    import tomllib
    from pathlib import Path

    from orchestrator.errors import EXTRAS as of_imports
    from strategies.techniques.libraries import EXTRAS

    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]

    assert EXTRAS
    for library, extra in EXTRAS.items():
        assert any(requirement.startswith(library) for requirement in extras[extra])
        assert of_imports[library] == extra
    assert any(requirement.startswith("nvidia-ml-py") for requirement in extras["train"])
