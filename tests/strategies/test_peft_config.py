"""Each of PEFT's methods that is known trains, is counted exactly, continues bit by bit and loads again with PEFT."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from strategies.methods import peft_fields
from strategies.methods.peft_config import _OTHERS, KNOWN, PeftMethod
from strategies.shape import ModelShape
from strategies.step.state import restore
from tests.strategies.test_contract import CPU, NODE, base_model, settings, techniques, train, workload

MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 64},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "ROAD": {"group_size": 32},
    "VBLORA": {"num_vectors": 16, "vector_length": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 64},
}


def method_of(kind):
    return PeftMethod({"peft_type": kind, "target_modules": MAPS, **OPTIONS.get(kind, {})})


# What PEFT warns of when it loads: BOFT's kernel for CUDA, and norms, which are no linear maps.
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", KNOWN)
def test_what_trains_is_counted_without_the_model_and_continues_bit_by_bit(kind, model_folder, tmp_path):
    method = method_of(kind)
    model = base_model(method, model_folder)
    shape = ModelShape.from_config(model.config.to_dict())
    assert method.refuses(techniques(), shape) is None

    plan = method.estimate(workload(shape), CPU, NODE, techniques())
    first, second = (method.setup(copy.deepcopy(model), settings()) for _ in range(2))
    first.model.train(), second.model.train()

    assert plan.num_trainable_parameters == sum(one.numel() for one in first.parameters.values())
    state = train(first, 2)
    restore(second, state)
    resumed, straight = train(second, 1), train(first, 1)
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in straight.weights.items())
    assert any(not torch.equal(state.weights[name], weight) for name, weight in straight.weights.items())
    first.export(tmp_path / "out")
    loaded = PeftModel.from_pretrained(base_model(method, model_folder), str(tmp_path / "out")).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        trained = first.model.eval()(ids).logits
        assert torch.allclose(loaded(ids).logits, trained, rtol=0, atol=1e-5)
        other = base_model(method, model_folder).eval()
        if "transformers" in method.exports(shape).loads_with:
            other.load_adapter(str(tmp_path / "out"))
            assert torch.allclose(other(ids).logits, trained, rtol=0, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="does not support"):
                other.load_adapter(str(tmp_path / "out"))


def test_fields_read_from_the_source_are_those_of_the_classes():
    import dataclasses

    known = peft_fields.known_fields()
    assert known is not None
    for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        kind = str(getattr(name, "value", name))
        if kind in KNOWN:
            own = {one.name for one in dataclasses.fields(config)}
            assert set(known[kind]) <= own
            assert own - set(known[kind]) <= {*peft_fields._OURS, "peft_type"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "config names no peft_type; known: BOFT"),
        ({"peft_type": "lora"}, "set method.type: lora"),
        ({"peft_type": "PREFIX_TUNING"}, "virtual tokens before each row"),
        ({"peft_type": "OFT", "oft_blok_size": 8}, "did you mean oft_block_size?"),
        ({"peft_type": "OFT", "task_type": "CAUSAL_LM"}, "it follows from the job; remove it"),
        ({"peft_type": "LOHA", "target_modules": ["nothing"]}, "PEFT's LOHA refuses these options"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_with_the_way_out(config, told, model_folder):
    shape = ModelShape.from_config(base_model(PeftMethod(), model_folder).config.to_dict())

    found = PeftMethod(config).refuses(techniques(), shape)

    assert found is not None and told in found


def test_every_type_that_is_refused_by_name_is_one_of_pefts():
    kinds = {str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING}

    assert set(KNOWN) | _OTHERS.keys() <= kinds
