"""An adapter as GGUF: read back it is the correction of every map, under llama.cpp's names and in its order of rows."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.numpy import save_file

from orchestrator.job.model_files import packaged_file
from strategies.adapter_bank import gguf_adapter
from strategies.adapter_bank.adapter import Adapter, Unusable
from tests.conftest import needs_smollm2
from tests.strategies.adapter_bank.gguf_files import expanded

gguf = pytest.importorskip("gguf")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MAPS = {  # inputs, outputs, and llama.cpp's name
    "self_attn.q_proj": (32, 32, "attn_q"),
    "self_attn.k_proj": (32, 16, "attn_k"),
    "self_attn.v_proj": (32, 16, "attn_v"),
    "self_attn.o_proj": (32, 32, "attn_output"),
    "mlp.gate_proj": (32, 48, "ffn_gate"),
    "mlp.up_proj": (32, 48, "ffn_up"),
    "mlp.down_proj": (48, 32, "ffn_down"),
}


def an_adapter(folder, maps=MAPS, outside=(), **config):
    draw = numpy.random.default_rng(0)
    tensors = {}
    names = {f"model.layers.{layer}.{name}": sides for layer in (0, 1) for name, sides in maps.items()}
    for name, (inputs, outputs, _) in {**names, **dict.fromkeys(outside, (32, 64, ""))}.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = draw.standard_normal((4, inputs), numpy.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = draw.standard_normal((outputs, 4), numpy.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def read(file):
    found = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in found.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in found.tensors}


def correction(tensors, alpha, name, config):
    """What llama.cpp adds to a weight, its rows put back as transformers has them."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    a_RI, b_OR = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
    delta_OI = alpha / a_RI.shape[0] * b_OR @ a_RI
    if config["model_type"] in ("llama", "mistral"):
        delta_OI = LlamaTensorProcessor(config).process(delta_OI, f"{name}.weight").weights
    return delta_OI


@pytest.mark.parametrize("family", gguf_adapter.ARCHITECTURES)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2, "down_proj": 0.5}}])
def test_every_map_is_corrected_by_what_the_adapter_adds(tmp_path, family, settings):
    folder, config = an_adapter(tmp_path / "adapter", **settings), {**SIZES, "model_type": family}

    count = gguf_adapter.write(folder, config, "the base", tmp_path / "adapter.gguf")

    fields, tensors = read(tmp_path / "adapter.gguf")
    alpha = 12.0 if "use_rslora" in settings else 6.0  # 6 times the root of 4
    assert fields["general.architecture"] == gguf_adapter.ARCHITECTURES[family]
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", alpha)
    assert fields["general.base_model.0.name"] == "the base"
    wanted = Adapter(folder).corrections()
    assert count == len(wanted) == 14 and len(tensors) == 28
    for layer in (0, 1):
        for name, (_, _, short) in MAPS.items():
            factors = wanted[f"model.layers.{layer}.{name}"]
            found = correction(tensors, alpha, f"blk.{layer}.{short}", config)
            numpy.testing.assert_allclose(found, (factors.b_OR @ factors.a_RI).numpy(), rtol=1e-5, atol=1e-5)


def test_for_readers_of_whole_numbers_alpha_is_whole_and_the_correction_the_same(tmp_path):
    folder, config = an_adapter(tmp_path / "adapter", lora_alpha=6.4), {**SIZES, "model_type": "qwen2"}

    gguf_adapter.write(folder, config, "base", tmp_path / "adapter.gguf", whole_alpha=True)

    fields, tensors = read(tmp_path / "adapter.gguf")
    assert fields["adapter.lora.alpha"] == 6.0
    factors = Adapter(folder).factors("model.layers.0.mlp.up_proj")
    found = correction(tensors, 6.0, "blk.0.ffn_up", config)
    numpy.testing.assert_allclose(found, (factors.b_OR @ factors.a_RI).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "mixtral", "gemma3", None])
def test_a_family_that_was_not_tried_is_refused(tmp_path, family):
    with pytest.raises(Unusable, match=r"were not tried with llama\.cpp"):
        gguf_adapter.write(an_adapter(tmp_path / "a"), {**SIZES, "model_type": family}, "base", tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("outside", "settings", "reason"),
    [
        ((), {"use_dora": True}, "use_dora"),
        ((), {"bias": "all"}, "bias"),
        ((), {"modules_to_save": ["norm"]}, "modules_to_save"),
        (("lm_head",), {}, "lm_head, which llama.cpp's adapters of llama do not"),
    ],
)
def test_what_is_more_than_pairs_in_layers_is_refused(tmp_path, outside, settings, reason):
    folder = an_adapter(tmp_path / "adapter", outside=outside, **settings)

    with pytest.raises(Unusable, match=reason):
        gguf_adapter.write(folder, {**SIZES, "model_type": "llama"}, "base", tmp_path / "adapter.gguf")

    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.slow
@needs_smollm2
def test_llama_cpp_gives_the_probabilities_that_peft_gives(tmp_path):
    """On the packaged base, expanded for both."""
    pytest.importorskip("xllamacpp")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.export.check import llama_cpp
    from orchestrator.job.model_files import locate

    base = locate("smollm2-135m-instruct", Path())
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 40)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((base / "config.json").read_text())
    gguf_adapter.write(tmp_path / "adapter", config, "SmolLM2", tmp_path / "adapter.gguf")
    tokenizer = AutoTokenizer.from_pretrained(base)
    file = expanded(packaged_file("smollm2-135m-instruct"), tmp_path / "base.gguf")
    ids = tokenizer("My favourite thing in the world is a", add_special_tokens=False)["input_ids"]

    def ours(one):
        with torch.no_grad():
            return one(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    def theirs(adapter):
        choice = llama_cpp(file, adapter)({"prompt": ids, "max_tokens": 1, "logprobs": 40})
        found = choice["logprobs"]["content"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in found}

    tuned = ours(model)
    with model.disable_adapter():
        plain = ours(model)

    for wanted, found in ((plain, theirs(None)), (tuned, theirs(tmp_path / "adapter.gguf"))):
        assert len(found) == 40
        assert max(abs(wanted[token].item() - value) for token, value in found.items()) < 0.02
    assert (tuned - plain).abs().max() > 1
