"""Sizes read from config.json are those of the models transformers builds, to the parameter."""

import json

import pytest

from strategies.config_values import UnknownArchitecture
from strategies.shape import ModelShape
from tests.conftest import FIXTURES, SHARED
from tests.strategies.test_families import built, counted

SMALL = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": 300,
}
CONFIGS = SHARED / "assets" / "configs"


def counted_layer_by_layer(config):
    """Parameters of the model that transformers builds; two and three layers say what each further one has."""
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    known = {key: value for key, value in config.items() if key not in ("auto_map", "layer_types")}
    two, three = (counted(built({**known, key: layers})) for layers in (2, 3))
    return two + (config[key] - 2) * (three - two)


@pytest.mark.filterwarnings("ignore:.*rope_scaling.*:FutureWarning")
def test_the_sizes_of_65_real_models_are_counted_exactly():
    """fixtures/model_sizes.json has of each model's config.json what its sizes depend on."""
    configs = json.loads((FIXTURES / "model_sizes.json").read_text())
    ours = {name: ModelShape.from_config(config).num_parameters for name, config in configs.items()}

    assert ours == {name: counted_layer_by_layer(config) for name, config in configs.items()}
    assert len(ours) == 65


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"there is no folder {CONFIGS}")
def test_whole_config_files_of_real_models_are_counted_exactly():
    configs = {file.parent.name: json.loads(file.read_text()) for file in sorted(CONFIGS.glob("*/config.json"))}
    ours = {name: ModelShape.from_config(config).num_parameters for name, config in configs.items()}

    assert ours == {name: counted_layer_by_layer(config) for name, config in configs.items()}
    assert len(ours) >= 65


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (
            {
                "model_type": "qwen3_moe",
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "vocab_size": 151936,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
            },
            30_532_122_624,  # the card of Qwen3-30B-A3B: 30.5B in total and 3.3B activated
            3_353_032_704,
        ),
        (
            {
                "model_type": "mixtral",
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "vocab_size": 32000,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            46_702_792_704,  # Mixtral of Experts, arXiv 2401.04088: 47B parameters, 13B of them active
            12_879_925_248,
        ),
        (
            {
                "model_type": "gpt2",
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "vocab_size": 50257,
                "n_positions": 1024,
            },
            124_439_808,
            124_439_808,
        ),
    ],
)
def test_published_counts_a_person_can_check(config, total, active):
    shape = ModelShape.from_config(config)

    assert (shape.num_parameters, shape.num_active_parameters) == (total, active)


def test_the_linear_maps_carry_the_names_peft_knows():
    shape = ModelShape.from_config({"model_type": "phi3", **SMALL})

    assert [(m.name, m.inputs, m.outputs) for m in shape.linears] == [
        ("qkv_proj", 64, 192),
        ("o_proj", 64, 64),
        ("gate_up_proj", 64, 192),
        ("down_proj", 96, 64),
    ]


def test_experts_count_as_weights_and_only_some_are_active():
    dense = ModelShape.from_config({"model_type": "mistral", **SMALL})
    moe = ModelShape.from_config({"model_type": "mixtral", **SMALL, "num_local_experts": 8, "num_experts_per_tok": 2})

    assert moe.num_expert_parameters == 3 * 8 * 3 * 64 * 96
    assert moe.num_router_parameters == 3 * 8 * 64
    assert moe.num_active_parameters - dense.num_parameters == 3 * (3 * 64 * 96 + 8 * 64)


def test_an_unknown_architecture_is_named_with_the_known_ones():
    with pytest.raises(UnknownArchitecture, match=r"'mamba' is not known; known: llama, mistral"):
        ModelShape.from_config({"model_type": "mamba", "hidden_size": 8})


def test_a_model_that_reads_pictures_is_not_counted_as_its_text_part_alone():
    text = {"model_type": "gemma3_text", **SMALL}

    with pytest.raises(UnknownArchitecture, match="'gemma3' is not known"):
        ModelShape.from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})


@pytest.mark.parametrize("broken", [{"hidden_size": -4}, {"num_hidden_layers": 0}, {"vocab_size": 0}])
def test_impossible_sizes_are_refused(broken):
    with pytest.raises(ValueError, match="are not those of a model"):
        ModelShape.from_config({"model_type": "llama", **SMALL, **broken})
