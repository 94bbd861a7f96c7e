"""Every family of families.toml against the models transformers builds from random configs, to the parameter."""

import functools
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from strategies.families import FAMILIES
from strategies.shape import ModelShape

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
DECODERS = sorted(name for name, family in FAMILIES.items() if not family.encoder)
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")
_OPTIONAL = ("head_dim", "tie_word_embeddings", "n_inner", "ffn_hidden_size")
_STRANGE = ["head_dim", "num_key_value_heads", "moe_intermediate_size", "ffn_dim", "first_k_dense_replace"]  # to some
_FLAGS = [
    "add_cross_attention",
    "attention_bias",
    "bias",
    "do_layer_norm_before",
    "enable_bias",
    "lm_head_bias",
    "mlp_bias",
    "multi_query",
    "new_decoder_architecture",
    "parallel_attn",
    "qk_layernorm",
    "qkv_bias",
    "tie_word_embeddings",
    "use_bias",
    "use_qk_norm",
    "_remove_final_layer_norm",
]  # each changes a count in some family


@functools.cache
def keys_of(name):
    """The keys of a family's configuration class, with what it fills in."""
    return CONFIG_MAPPING[name]().to_dict()


def random_config(name, seed):
    """A small config of unequal widths with every key that its class has and that sizes depend on."""
    rng, keys = random.Random(f"{name} {seed}"), keys_of(name)
    heads = rng.choice([2, 4, 6])
    kv_heads = rng.choice([n for n in (1, 2, 3, 6) if heads % n == 0])
    hidden, layers, experts = 4 * heads * rng.choice([2, 4, 5]), rng.randint(2, 4), rng.randint(2, 6)
    sizes = {key: rng.randint(9, 60) for key in (*_WIDTHS, "shared_expert_intermediate_size")}
    sizes |= dict.fromkeys(("hidden_size", "n_embd"), hidden)
    sizes |= dict.fromkeys(("num_attention_heads", "n_head"), heads)
    sizes |= dict.fromkeys(("num_hidden_layers", "n_layer"), layers)
    sizes |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), kv_heads)
    sizes |= dict.fromkeys(("max_position_embeddings", "n_positions"), rng.randint(40, 90))
    sizes |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    sizes |= {"vocab_size": rng.randint(100, 300), "head_dim": 2 * rng.randint(2, 9), "rotary_dim": 4}
    sizes |= {"num_experts_per_tok": rng.randint(1, experts), "n_shared_experts": rng.randint(1, 3)}
    sizes |= {"first_k_dense_replace": rng.randint(0, layers), "decoder_sparse_step": rng.randint(1, 3)}
    sizes |= {"mlp_only_layers": rng.sample(range(layers), rng.randint(0, 1))}
    sizes |= {"word_embed_proj_dim": rng.choice([hidden, hidden - 3]), "sliding_window": 8}
    sizes |= {key: rng.random() < 0.5 for key in _FLAGS}
    stated = {
        key: value for key, value in sizes.items() if key in keys and (key not in _OPTIONAL or rng.random() < 0.8)
    }
    for key in FAMILIES[name].only:
        stated.pop(key, None)
    if name in ("ministral", "hunyuan_v1_dense"):  # their code does not compute the width that is left out
        stated["head_dim"] = sizes["head_dim"]
    return {"model_type": name, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **stated}


def built(config, device="meta"):
    known = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **known))


def built_with_score(config):
    known = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        settings = AutoConfig.for_model(config["model_type"], **known, num_labels=1)
        return AutoModelForSequenceClassification.from_config(settings)


def counted(model):
    return sum(parameter.numel() for parameter in model.parameters())


def is_map(module):
    return type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")


def product_weights(model, shape):
    """Of the weights inside the layers, those that a token is multiplied with, by the modules that hold them."""
    total = 0
    for name, module in model.named_modules():
        if name.startswith(f"{shape.family.layers}."):
            if is_map(module) or type(module).__name__.endswith(("Router", "Gate")):
                total += module.weight.numel()
            elif name.endswith(".experts"):
                weights = sum(p.numel() for p in module.parameters())
                total += weights * shape.num_experts_per_token // shape.num_experts
    return total


@pytest.mark.parametrize("name", DECODERS)
def test_random_small_models_are_counted_to_the_last_parameter(name):
    for seed in range(4):
        config = random_config(name, seed)
        shape, model = ModelShape.from_config(config), built(config)
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        idle = experts - experts * shape.num_experts_per_token // max(shape.num_experts, 1)

        assert shape.num_parameters == counted(model), config
        assert shape.num_active_parameters == counted(model) - idle, config
        assert shape.num_product_weights == product_weights(model, shape), config


@pytest.mark.parametrize("name", DECODERS)
def test_maps_have_the_names_and_sizes_of_the_modules_that_transformers_builds(name):
    config = random_config(name, 4)
    shape, model = ModelShape.from_config(config), built(config)
    modules = dict(model.named_modules())
    maps = {n for n, module in modules.items() if is_map(module)}

    assert set(shape.named_maps) == {*maps, shape.family.embedding}
    for module, (_, linear) in shape.named_maps.items():
        assert sorted(modules[module].weight.shape) == sorted((linear.inputs, linear.outputs)), module
        assert (getattr(modules[module], "bias", None) is not None) == linear.bias, module


@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_of_a_model_belongs_to_a_module_that_the_shape_names(name):
    config = {**random_config(name, 5), "tie_word_embeddings": False}
    shape, model = ModelShape.from_config(config), built(config)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    named = {**shape.named_maps, **shape.named_parts}

    for module, (_, part) in named.items():
        assert part.num_parameters == sum(p.numel() for p in modules[module].parameters()), module
    for tensor, (_, stack) in shape.named_stacks.items():
        assert parameters[tensor].shape == (stack.num_experts, stack.outputs, stack.inputs), tensor
    every = [part for _, part in (*named.values(), *shape.named_stacks.values())]
    assert sum(part.num_parameters for part in every) == counted(model)
    assert shape.num_bias_parameters == sum(p.numel() for n, p in parameters.items() if n.endswith(".bias"))


@pytest.mark.parametrize("name", DECODERS)
def test_a_forward_pass_computes_the_products_that_the_shape_says(name):
    config = {**random_config(name, 5), "attn_implementation": "eager", "experts_implementation": "eager"}
    shape, model = ModelShape.from_config(config), built(config, "cpu")
    tokens = 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    computed = counter.get_flop_counts()
    total = sum(computed["Global"].values())
    total -= sum(sum(by.values()) for module, by in computed.items() if module.endswith("rotary_emb"))
    scores = 2 * tokens * shape.query_size * shape.num_layers  # and as many for the values
    width = shape.embedding_size or shape.hidden_size
    projections = 2 * width * shape.hidden_size if shape.embedding_size else 0
    weights = shape.num_product_weights + shape.vocab_size * width + projections

    assert total == 2 * tokens * (weights + scores), config


@pytest.mark.parametrize("name", DECODERS)
def test_a_key_that_changes_the_size_of_a_family_s_models_is_read_or_refused(name):
    """Each key of the configuration class is set to what it is not, and each that is stated is left out."""
    base = random_config(name, 6)
    unread = [
        key for key in keys_of(name) if key not in base and not key.startswith(("output_", "return_", "id2label"))
    ]
    others = [{**base, key: other} for key in unread if (other := _another(keys_of(name)[key])) is not None]
    others += [{k: v for k, v in base.items() if k != key} for key in base if key in _SMALL_DEFAULTS]

    for config in others:
        try:
            real = counted(built(config))
        except Exception:  # not a model at all
            continue
        try:
            ours = ModelShape.from_config(config).num_parameters
        except (KeyError, ValueError):  # refused by name
            continue
        changed = {key for key in {*base, *config} if base.get(key) != config.get(key)}
        assert ours == real, (changed, config)


_SMALL_DEFAULTS = [*_FLAGS, "head_dim", "num_key_value_heads", "num_kv_heads", "num_experts", "num_local_experts"]
_SMALL_DEFAULTS += [
    "n_shared_experts",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "mlp_only_layers",
    "n_positions",
]


def _another(value):
    """A value of the same kind; None where there is none that could matter."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return 3 if value is None else None


@pytest.mark.parametrize("name", DECODERS)
def test_a_model_with_a_score_is_counted_exactly_or_known_not_to_exist(name):
    exists = CONFIG_MAPPING[name] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    assert FAMILIES[name].scored == exists
    if not exists:
        with pytest.raises(ValueError, match=f"no {name} model that gives documents a score"):
            ModelShape.from_config(random_config(name, 1)).with_score()
        return

    for seed in range(3):
        config = random_config(name, seed)
        model = built_with_score(config)
        shape = ModelShape.from_config(config).with_score()
        assert shape.num_parameters == counted(model)
        modules = dict(model.named_modules())
        assert modules["score"].out_features == 1
        missing = [name for name, (_, linear) in shape.named_maps.items() if name not in modules]
        assert not missing
