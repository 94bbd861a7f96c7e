"""What makes LoRA special: its parts, its options, and that knobs reach PEFT."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from strategies.methods.lora import Lora
from tests.strategies.test_contract import settings


@pytest.fixture
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def test_rank_and_scale_reach_every_linear_map(model):
    setup = Lora(lora_r=3, lora_alpha=12).setup(model, settings())

    layers = [m for m in setup.model.modules() if hasattr(m, "lora_A") and m.lora_A]
    assert len(layers) == 2 * 7
    assert {layer.lora_A["default"].weight.shape[0] for layer in layers} == {3}
    assert {layer.scaling["default"] for layer in layers} == {4.0}


def test_layers_to_transform_limits_the_adapters(model):
    setup = Lora(layers_to_transform=[1]).setup(model, settings())

    assert setup.parameters
    assert all(".layers.1." in name for name in setup.parameters)


def test_lora_plus_trains_b_faster(model):
    setup = Lora(loraplus_lr_ratio=16.0).setup(model, settings(learning_rate=1e-3))

    rates = {}
    for group in setup.optimizer.param_groups:
        for parameter in group["params"]:
            name = next(name for name, p in setup.parameters.items() if p is parameter)
            rates["B" if "lora_B" in name else "A"] = group["base_lr"]
    assert rates == {"A": 1e-3, "B": 1.6e-2}


@pytest.mark.parametrize("knobs", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_variants_are_passed_through(model, knobs):
    setup = Lora(lora_r=4, lora_alpha=8, **knobs).setup(model, settings())

    config = setup.model.peft_config["default"]
    for key, value in knobs.items():
        assert getattr(config, key) == value


def test_an_adapter_to_begin_with_takes_the_place_of_another_beginning(model, tmp_path):
    with pytest.raises(ValueError, match="init_adapter takes the place of init_lora_weights: pissa"):
        Lora(init_lora_weights="pissa", init_adapter=str(tmp_path)).setup(model, settings())
