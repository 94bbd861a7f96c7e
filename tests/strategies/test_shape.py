"""Sizes read from config.json are those of the models transformers builds, to the parameter."""

import json

import pytest
import torch

from strategies.families import FAMILIES
from strategies.shape import ModelShape, UnknownArchitecture
from tests.conftest import FIXTURES

SMALL = {
    "num_attention_heads": 4,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": 300,
}
OWN_NAMES = {
    "gpt2": {"n_head": 4, "n_embd": 64, "n_layer": 3, "n_inner": 96, "vocab_size": 300},
    "gptj": {"n_head": 4, "n_embd": 64, "n_layer": 3, "n_inner": 96, "vocab_size": 300, "rotary_dim": 8},
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {**SMALL, "pad_token_id": 0},
    "smollm3": {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": SMALL,
    "falcon": {k: v for k, v in SMALL.items() if k != "intermediate_size"},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {**SMALL, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    "qwen2_moe": {
        **SMALL,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "olmoe": {**SMALL, "num_key_value_heads": 2, "num_experts": 8, "pad_token_id": 0},
    "glm4_moe": {
        **SMALL,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "pad_token_id": 0,
    },
}


def built(config):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    known = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    loader = AutoModelForMaskedLM if FAMILIES[config["model_type"]].encoder else AutoModelForCausalLM
    with torch.device("meta"):
        return loader.from_config(AutoConfig.for_model(config["model_type"], **known))


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if not family.encoder))
def test_a_small_model_of_every_family_has_the_parameters_its_shape_says(name):
    config = {"model_type": name, **OWN_NAMES.get(name, {**SMALL, "num_key_value_heads": 2})}
    model = built(config)
    full = {**model.config.to_dict(), **config}

    assert ModelShape.from_config(full).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*rope_scaling.*:FutureWarning")
def test_the_sizes_of_65_real_models_are_counted_exactly():
    """fixtures/model_sizes.json has of each model's config.json what its sizes depend on."""
    configs = json.loads((FIXTURES / "model_sizes.json").read_text())
    counted = {name: ModelShape.from_config(config).num_parameters for name, config in configs.items()}
    real = {name: sum(p.numel() for p in built(config).parameters()) for name, config in configs.items()}

    assert counted == real and len(counted) == 65


def test_known_counts_a_person_can_check():
    sizes = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    gpt2 = ModelShape.from_config({"model_type": "gpt2", **sizes})

    assert gpt2.num_parameters == 124_439_808


def test_the_linear_maps_carry_the_names_peft_knows():
    shape = ModelShape.from_config({"model_type": "phi3", **SMALL, "num_key_value_heads": 4})

    assert [(m.name, m.inputs, m.outputs) for m in shape.linears] == [
        ("qkv_proj", 64, 192),
        ("o_proj", 64, 64),
        ("gate_up_proj", 64, 192),
        ("down_proj", 96, 64),
    ]


def test_experts_count_as_weights_and_only_some_are_active():
    dense = ModelShape.from_config({"model_type": "mistral", **SMALL, "num_key_value_heads": 4})
    moe = ModelShape.from_config(
        {"model_type": "mixtral", **SMALL, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    )

    assert moe.num_expert_parameters == 3 * 8 * (3 * 64 * 96 + 64)
    assert moe.num_active_parameters < dense.num_parameters * 2 < moe.num_parameters


MIXED = {**OWN_NAMES["qwen3_moe"], "num_experts_per_tok": 2, "mlp_only_layers": [1], "decoder_sparse_step": 1}


def test_layers_without_experts_are_counted_and_adapted_as_what_they_are():
    config = {"model_type": "qwen3_moe", **MIXED}
    shape, model = ModelShape.from_config(config), built(config)
    maps = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}

    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert set(shape.named_maps) - {shape.family.embedding} == maps


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if not family.encoder))
def test_maps_carry_the_names_of_the_modules_that_transformers_builds(name):
    config = {"model_type": name, **OWN_NAMES.get(name, {**SMALL, "num_key_value_heads": 2})}
    model = built(config)
    shape = ModelShape.from_config({**model.config.to_dict(), **config})

    assert set(shape.named_maps) <= {module for module, _ in model.named_modules()}


def test_an_unknown_architecture_is_named_with_the_known_ones():
    with pytest.raises(UnknownArchitecture, match=r"'mamba' is not known; known: llama, mistral"):
        ModelShape.from_config({"model_type": "mamba", "hidden_size": 8})


@pytest.mark.parametrize("broken", [{"hidden_size": -4}, {"num_hidden_layers": 0}, {"vocab_size": 0}])
def test_impossible_sizes_are_refused(broken):
    with pytest.raises((ValueError, ZeroDivisionError)):
        ModelShape.from_config({"model_type": "llama", **SMALL, **broken})
