"""Every option that adds trained parameters: what LoRA counts is what PEFT trains, and what it exports PEFT loads."""

import copy

import pytest
import torch
from peft import PeftModel

from strategies.methods.lora import Lora
from strategies.model.architecture import architecture_of
from strategies.shape import ModelShape
from strategies.workload import Techniques
from tests.strategies.test_contract import settings
from tests.strategies.test_families import built

pytestmark = [  # PEFT's, on tied embeddings and on the doubled rank of experts' gate and up, which it does apply
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"intermediate_size": 24, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MODELS = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True, **SIZES},
    "llama tied": {"tie_word_embeddings": True, **SIZES},
    "phi": SIZES,
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, "n_positions": 30},
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 12, "max_position_embeddings": 40},
    "gemma3_text": {**SIZES, "head_dim": 6},
    "qwen3_moe": {
        **SIZES,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "qwen2_moe": {
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 14,
    },
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}
ANY_QUERY = ["q_proj", "c_attn"]
OUTSIDE = ["embed_tokens", "wte", "lm_head"]
OPTIONS = {
    "nothing beside": {},
    "some maps": {"lora_target_modules": ANY_QUERY, "lora_r": 3},
    "an expression": {"lora_target_modules": r".*\.(q_proj|c_attn|v_proj)"},
    "some layers": {"layers_to_transform": [1]},
    "the embedding saved": {"modules_to_save": ["embed_tokens", "wte"]},
    "the output matrix saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": OUTSIDE, "bias": "all"},
    "norms saved": {"modules_to_save": ["norm", "ln_1", "ln_f"]},
    "the embedding adapted": {"lora_target_modules": ["embed_tokens", "wte"]},
    "both adapted": {"lora_target_modules": [*ANY_QUERY, *OUTSIDE]},
    "tokens": {"trainable_token_indices": [1, 7, 49]},
    "tokens beside a saved output matrix": {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
    "all biases": {"bias": "all"},
    "biases of adapted maps": {"bias": "lora_only", "lora_target_modules": ANY_QUERY},
    "magnitudes": {"use_dora": True, "lora_target_modules": ANY_QUERY},
    "magnitudes of the embedding": {"use_dora": True, "lora_target_modules": [*ANY_QUERY, *OUTSIDE]},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "lora_target_modules": ["q_proj"]},
    "experts alone": {"target_parameters": ["experts.down_proj"], "lora_target_modules": []},
    "experts by their earlier names": {"lora_target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]},
}
EXPERTS = ("experts", "experts alone")
TECHNIQUES = Techniques("float32", "sdpa", False, False, 2, 16)


def config_of(model):
    return {"model_type": model.split()[0], **MODELS[model]}


def chosen(model, name):
    """The options as they are named in a model; None where it has nothing of the kind."""
    shape = ModelShape.from_config(config_of(model))
    if name in EXPERTS and not shape.num_experts:
        return None
    options, names = dict(OPTIONS[name]), {**shape.named_maps, **shape.named_parts}
    for key in ("lora_target_modules", "modules_to_save"):
        if isinstance(options.get(key), list) and name != "experts by their earlier names":
            found = [one for one in options[key] if any(module.endswith(one) for module in names)]
            if options[key] and not found:
                return None
            options[key] = found
    if name == "experts by their earlier names" and shape.family.earlier_maps[:1] != ("gate_proj",):
        return None
    return options


def is_refused(model, name):
    """Rows of a tied matrix beside all of it."""
    return name == "tokens beside a saved output matrix" and ModelShape.from_config(config_of(model)).tied_embeddings


CASES = [
    (model, name)
    for model in MODELS
    for name in OPTIONS
    if chosen(model, name) is not None and not is_refused(model, name)
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_what_is_counted_is_what_peft_trains(model, name):
    method, config = Lora(**{"lora_r": 2, **(chosen(model, name) or {})}), config_of(model)
    real = built(config, "cpu")
    assert method.find_misfits(architecture_of(real)) == []
    shape = ModelShape.from_config(config)
    assert method.refuses(TECHNIQUES, shape) is None

    setup = method.setup(real, settings())

    trained = sum(parameter.numel() for parameter in setup.parameters.values())
    assert method.costs(shape, TECHNIQUES).footprint.num_trainable == trained
    assert method.costs(shape, TECHNIQUES).work.num_trainable == trained


RELOADED = [
    ("llama", "both saved"),
    ("llama tied", "tokens"),
    ("llama tied", "both adapted"),
    ("gemma3_text", "the embedding adapted"),
    ("llama", "magnitudes"),
    ("phi", "all biases"),
    ("gpt2", "biases of adapted maps"),
    ("qwen3_moe", "nothing beside"),
    ("mixtral", "experts"),
    ("granitemoe", "experts alone"),
]


@pytest.mark.parametrize(("model", "name"), RELOADED)
def test_what_is_exported_computes_the_same_when_peft_loads_it(model, name, tmp_path):
    method, config = Lora(**{"lora_r": 2, **(chosen(model, name) or {})}), config_of(model)
    base = built(config, "cpu")
    weights, tokens = copy.deepcopy(base.state_dict()), torch.tensor([[1, 7, 49, 3, 5, 7]])
    setup = method.setup(base, settings())
    with torch.no_grad():
        before = setup.model.eval()(input_ids=tokens).logits
        for parameter in setup.parameters.values():
            parameter += 0.3 * torch.randn_like(parameter)
        trained = setup.model.eval()(input_ids=tokens).logits
    setup.export(tmp_path, None)

    def base_again():
        again = built(config, "cpu")
        again.load_state_dict(weights)
        return again

    loaded, by_transformers = PeftModel.from_pretrained(base_again(), str(tmp_path)).eval(), base_again()
    by_transformers.load_adapter(str(tmp_path))

    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(loaded(input_ids=tokens).logits, trained, atol=1e-5, rtol=1e-4)
    is_same = torch.allclose(by_transformers.eval()(input_ids=tokens).logits, trained, atol=1e-5, rtol=1e-4)
    assert is_same == ("transformers" in method.exports(ModelShape.from_config(config)).loads_with)


@pytest.mark.parametrize(
    ("model", "options", "vllm", "llama_cpp"),
    [
        ("llama", {}, None, None),
        ("llama", {"lora_r": 512, "init_lora_weights": "orthogonal", "layers_to_transform": [1]}, None, None),
        ("llama", {"lora_r": 513}, "its ranks end at 512, this is 513", None),
        ("llama", {"use_rslora": True}, None, "they scale by alpha / r"),
        ("llama", {"use_dora": True}, "no magnitudes (use_dora)", "no magnitudes (use_dora)"),
        ("llama", {"bias": "all"}, "no biases", "no biases"),
        ("llama", {"modules_to_save": ["lm_head"]}, "no modules trained in full", "no modules trained in full"),
        ("llama", {"trainable_token_indices": [3]}, "no rows of single tokens", "no rows of single tokens"),
        ("llama", {"init_lora_weights": "pissa_niter_4"}, "(init_lora_weights: pissa_niter_4)", "weights away first"),
        ("llama", {"lora_target_modules": ["embed_tokens"]}, "embedding or output matrix", "were not tried with it"),
        ("qwen3_moe", {}, "corrections of stacked experts", "corrections of stacked experts"),
    ],
)
def test_engines_that_read_the_files_themselves_take_pairs_of_a_and_b(model, options, vllm, llama_cpp):
    exports = Lora(**options).exports(ModelShape.from_config(config_of(model)))

    for engine, words in (("vllm", vllm), ("llama.cpp", llama_cpp)):
        assert (engine in exports.loads_with) == (words is None)
        assert words is None or words in exports.cannot[engine]
    assert exports.format == "peft-lora" and "peft" in exports.loads_with
    assert ("transformers" in exports.loads_with) == (not options.get("use_dora"))


def test_a_sentence_names_every_engine_once():
    exports = Lora(use_rslora=True, bias="all").exports(ModelShape.from_config(config_of("llama")))

    pairs = "it takes pairs of A and B alone, no biases"
    assert exports.sentences == [
        "Loads with: PEFT, transformers",
        f"Not with vLLM: {pairs}",
        f"Not with llama.cpp, by its converters to GGUF: {pairs}; they scale by alpha / r, not by alpha / sqrt(r)"
        " (use_rslora); `export --gguf` does",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable_token_indices": [3, 50]}, "trainable_token_indices: 50: the model has tokens 0 to 49"),
        ({"trainable_token_indices": [3, 3]}, "names 3 twice"),
        ({"trainable_token_indices": []}, "no token would train"),
        ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "modules_to_save trains all of"),
        ({"target_parameters": ["mlp.experts.down"]}, "'mlp.experts.down' is no stacked tensor of experts; those are"),
    ],
)
def test_tokens_and_tensors_that_cannot_train_are_named(options, words):
    real = built(config_of("qwen3_moe"))

    assert words in " ".join(Lora(**options).find_misfits(architecture_of(real)))


def test_rows_of_single_tokens_train_beside_all_of_an_output_matrix_that_is_not_tied():
    method, tokens = Lora(lora_r=2, **OPTIONS["tokens beside a saved output matrix"]), torch.tensor([[3, 4, 5]])
    apart, tied = ({**config_of("llama"), "tie_word_embeddings": is_tied} for is_tied in (False, True))

    setup = method.setup(built(apart, "cpu"), settings())
    setup.model(tokens).logits.square().sum().backward()

    outside = {name: p.grad for name, p in setup.parameters.items() if ".layers." not in name}
    assert len(outside) == 2 and all(gradient.any() for gradient in outside.values())
    assert method.refuses(TECHNIQUES, ModelShape.from_config(apart)) is None
    assert method.refuses(TECHNIQUES, ModelShape.from_config(tied)) == (
        "trainable_token_indices: of this model lm_head is the embedding's own matrix, which modules_to_save trains as"
        " a whole: leave trainable_token_indices out, or take lm_head out of modules_to_save, since the rows of single"
        " tokens train in both"
    )
    with pytest.raises(ValueError, match="TrainableTokensLayer wraps an unknown layer type"):  # what it is refused for
        method.setup(built(tied, "cpu"), settings()).model(tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_dropout": 0.1}, "which lora_dropout cannot be combined with"),
        ({"use_dora": True}, "which use_dora cannot be combined with"),
        ({"target_parameters": ["experts.down_proj"]}, "corrects the experts already"),
        ({"lora_target_modules": ["up_proj"]}, "lie in one tensor: name both of them or none"),
    ],
)
def test_corrections_of_experts_that_peft_cannot_make_are_refused(options, words):
    shape = ModelShape.from_config(config_of("qwen3_moe"))

    assert words in Lora(**options).refuses(TECHNIQUES, shape)
