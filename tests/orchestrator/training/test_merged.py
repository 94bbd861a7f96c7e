"""Base and adapter written as one plain model, tensor by tensor: what PEFT merges, in the memory of one tensor."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.training.model import merged
from strategies.model import tensor_stream


def tuned(base, folder, **options):
    """An adapter of random weights beside the model in `base`, as PEFT writes it; what PEFT merges, in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder, save_embedding_layers=False)
    return {name: tensor.float() for name, tensor in model.merge_and_unload().state_dict().items()}


def gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_what_peft_merges(model_folder, tmp_path, family, dtype):
    from transformers import AutoModelForCausalLM

    base = gpt2(tmp_path / "gpt2") if family == "gpt2" else model_folder
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "base")
    wanted = tuned(tmp_path / "base", tmp_path / "adapter", use_rslora=True, fan_in_fan_out=family == "gpt2")

    said = merged.stream(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")

    before = load_file(tmp_path / "base" / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and said == str(dtype).removeprefix("torch.")
    found = model.state_dict()
    assert found.keys() == wanted.keys() and {tensor.dtype for tensor in found.values()} == {dtype}
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.float(),
            wanted[name],
            rtol=8e-3 if dtype == torch.bfloat16 else 1e-5,
            atol=4e-3 if dtype == torch.bfloat16 else 1e-6,
        )
    moved = [
        name
        for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items()
        if not torch.equal(tensor, before[name])
    ]
    assert len(moved) == (4 if family == "gpt2" else 14)


def large(folder, num_maps=48, side=1024):
    """A base of `num_maps` maps that nobody computes with, in two files, and an adapter of some of them."""
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(num_maps)]
    weights = {f"{name}.weight": torch.full((side, side), 0.5, dtype=torch.bfloat16) for name in names}
    for part in (0, 1):
        save_file(
            {name: weights[name] for name in list(weights)[part::2]}, folder / "base" / f"model-{part}.safetensors"
        )
    factors = {}
    for name in names[::2]:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.full((2, side), 0.25)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.full((side, 2), 0.5)
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
    return num_maps * side * side * 2


def peak_resident_bytes():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory")
def test_memory_holds_a_few_maps_and_never_the_model(tmp_path):
    model_bytes = large(tmp_path)
    map_bytes = 1024 * 1024 * 4  # in fp32
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_resident_bytes()

    merged.stream(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", shard_bytes=model_bytes // 5)

    assert peak_resident_bytes() - before < 6 * map_bytes < model_bytes / 3
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{number:05d}-of-00006.safetensors" for number in range(1, 7)]
    assert index["metadata"]["total_size"] == model_bytes
    assert max((tmp_path / "merged" / name).stat().st_size for name in shards) < model_bytes // 5 + 10_000
    found = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "merged" / shard).items()}
    corrected = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(0, 48, 2)]
    assert {name for name, tensor in found.items() if (tensor == 1.0).all()} == set(corrected)  # 0.5 + 4/2 * 2/8
    assert sum((tensor == 0.5).all().item() for tensor in found.values()) == 24
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {"model_type": "llama", "dtype": "bfloat16"}


def test_what_was_trained_as_a_whole_is_written_in_the_types_of_its_base(model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).save_pretrained(tmp_path / "model")

    merged.stream(tmp_path / "model", tmp_path / "base", tmp_path / "merged")

    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "a part of its base's weights"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_what_is_more_than_two_factors_is_left_to_peft(model_folder, tmp_path, options, reason):
    tuned(model_folder, tmp_path / "adapter", **options)

    with pytest.raises(merged.NotStreamable, match=reason):
        merged.stream(tmp_path / "adapter", model_folder, tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_tensors_of_every_kind_are_read_as_they_were_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(7),
        "c": torch.tensor(2.5),
        "d": torch.tensor([True, False, True]),
        "e": torch.empty(0, 4),
        "f": torch.randn(9).to(torch.float8_e4m3fn),
    }
    spelt = {dtype: name for name, dtype in tensor_stream.DTYPES.items()}
    plans = [tensor_stream.TensorPlan(name, spelt[one.dtype], tuple(one.shape)) for name, one in tensors.items()]

    tensor_stream.write_shards(tmp_path, plans, tensors.__getitem__)

    for found in (load_file(tmp_path / "model.safetensors"), tensor_stream.TensorFiles(tmp_path)):
        for name, wanted in tensors.items():
            tensor = found.read(name) if isinstance(found, tensor_stream.TensorFiles) else found[name]
            assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
    with pytest.raises(ValueError, match="planned as"):
        tensor_stream.write_shards(tmp_path, plans[:1], lambda name: torch.zeros(3, 5))
