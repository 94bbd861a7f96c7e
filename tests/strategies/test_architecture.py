"""What a model is made of, without its weights: do the files fit it, and which modules may an adapter name."""

import json

import pytest

from strategies.families import FAMILIES
from strategies.model.architecture import (
    Architecture,
    CannotBuild,
    LoadReport,
    architecture_of,
    build,
    faults,
    load_report,
)
from strategies.model.targets import AdapterChoice, mistakes
from tests.strategies.test_families import random_config

MODULES = {
    "model.embed_tokens": "Embedding",
    "model.layers.0.self_attn": "Attention",
    "model.layers.0.self_attn.qkv_proj": "Linear",
    "model.layers.0.mlp.down_proj": "Linear",
    "model.layers.1.self_attn.qkv_proj": "Linear",
    "model.layers.1.mlp.down_proj": "Linear",
    "lm_head": "Linear",
}
PARAMETERS = {f"{name}.weight": (4, 4) for name in MODULES if name != "model.layers.0.self_attn"}
BUILT = Architecture("phi3", MODULES, PARAMETERS, "model.layers", 2, "lm_head", 96)


@pytest.mark.parametrize(
    ("targets", "layers", "saved", "words"),
    [
        (["qkv_proj"], None, None, None),
        (["self_attn.qkv_proj", "down_proj"], [1], ["lm_head"], None),
        ("all-linear", [0, 1], ["embed_tokens"], None),
        (r".*\.1\..*_proj", None, None, None),
        (r".*\.1\..*_proj", [1], None, None),
        (["q_proj"], None, None, "'q_proj' is no module of this phi3 model; here the queries, keys and values are qkv"),
        (["qkv_proj", "gate_proj"], None, None, "'gate_proj' is no module of this phi3 model; its linear maps are"),
        (["self_attn"], None, None, "'self_attn' is a Attention, which adapters cannot correct"),
        ([], None, None, "empty list: nothing would be adapted"),
        ("all", None, None, "the expression 'all' matches the name of no module"),
        ("(", None, None, "cannot be used"),
        (r"([\w.]|[\w.][\w.]|[\w.][\w.][\w.])+o", None, None, "takes too long to match"),
        (["down_proj"], [2], None, "layers_to_transform: 2: the model has layers 0 to 1"),
        (["down_proj"], [-1], None, "layers_to_transform: -1"),
        (["down_proj"], [], None, "layers_to_transform is an empty list"),
        (["lm_head"], [1], None, "none of these modules lies in the layers 1"),
        (["down_proj"], None, ["score"], "modules_to_save: 'score' is no module of this model"),
        (["down_proj"], None, ["down_proj"], "trained in full and by an adapter"),
    ],
)
def test_every_name_of_an_adapter_must_match_a_module(targets, layers, saved, words):
    named = targets if isinstance(targets, str) else tuple(targets)
    choice = AdapterChoice(named, None if layers is None else tuple(layers), tuple(saved or ()))
    found = mistakes(BUILT, "lora_target_modules", choice)

    assert (found == []) if words is None else (words in found[0]), found


@pytest.mark.parametrize(
    ("missing", "unexpected", "words"),
    [
        ((), (), None),
        ((), ("score.weight", "model.vision_tower.layers.0.weight"), None),
        (("lm_head.weight",), (), "1 tensor is missing in the files and would start from random values"),
        (("lm_head.weight",), (), "Its output matrix was not saved: where it is the embedding's, set tie_word_emb"),
        ((), ("lm_head.bias",), "1 tensor is in the files alone and would be dropped (lm_head.bias)"),
        ((), ("model.layers.2.mlp.down_proj.weight",), "would be dropped (model.layers.2.mlp"),
        (("lm_head.weight",), ("_orig_mod.lm_head.weight",), "as torch.compile names them"),
        (("lm_head.weight",), ("module.lm_head.weight",), "as DistributedDataParallel names them"),
        (("lm_head.weight",), ("base_model.model.lm_head.weight",), "as PEFT names them"),
        (("lm_head.weight",), ("student.lm_head.weight",), "begin with 'student.', which the model's do not"),
        ((), ("model.layers.0.mlp.down_proj.lora_A.weight",), "saved with an adapter in it"),
        ((), ("model.layers.0.mlp.down_proj.weight_scale_inv",), "quantised, which its config.json does not say"),
    ],
)
def test_a_load_report_is_judged_with_the_usual_cause(missing, unexpected, words):
    stored = [name for name in PARAMETERS if name not in missing] + list(unexpected)

    found = faults(LoadReport(missing, unexpected, ()), PARAMETERS, stored)

    assert (found is None) if words is None else (words in (found or "")), found


@pytest.fixture(scope="module")
def built(model_folder):
    return build(model_folder)


def test_a_model_is_built_without_its_weights(built, model_folder):
    found = architecture_of(built)

    assert all(parameter.device.type == "meta" for parameter in built.parameters())
    assert (found.layers, found.num_layers, found.output) == ("model.layers", 2, "lm_head")
    assert len(found.linear_maps) == 14
    assert found.num_parameters == sum(p.numel() for p in built.parameters())


def test_the_report_is_that_of_the_loader_itself(built, model_folder):
    from orchestrator.job.weights import stored_tensors

    stored = {name: (one.shape, one.dtype) for name, one in stored_tensors(model_folder).items()}
    wrong = {f"base_model.model.{name}": value for name, value in stored.items()}
    short = {name: ((7, *shape[1:]), dtype) for name, (shape, dtype) in stored.items()}

    assert load_report(built, stored) == LoadReport((), (), ())
    assert len(load_report(built, wrong).unexpected) == len(stored)
    assert len(load_report(built, short).mismatched) == len(stored)


def test_what_the_library_cannot_build_is_a_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "many"}))

    with pytest.raises(CannotBuild, match="hidden_size"):
        build(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if not family.encoder))
def test_what_the_library_saves_of_every_family_is_found_whole(name, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.job.weights import stored_tensors

    sizes = {key: value for key, value in random_config(name, 0).items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).save_pretrained(tmp_path)
    stored = {tensor: (one.shape, one.dtype) for tensor, one in stored_tensors(tmp_path).items()}

    report = load_report(build(tmp_path), stored)

    assert report == LoadReport((), (), ())
