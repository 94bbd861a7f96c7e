"""A model with masks computes what the model computes that is handed back in its place."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from strategies.families import FAMILIES
from strategies.shape import ModelShape
from strategies.step.state import gather
from tests.strategies.pruning.models import GATED, masks_of, prepared, small

HEADS = tuple(name for name in GATED if name not in ("glm", "glm4", "olmo2", "olmo3", "phi3"))
IDS = torch.arange(3, 33).reshape(2, 15)


def pruned(name, **options):
    """A family's model with random masks, its logits, and the sizes that remain of it by its method."""
    model = small(name, **({"layers": 6} if options.get("score") == "layer" else {}))
    shape = ModelShape.from_config(model.config.to_dict())
    method, setup = prepared(model, **options)
    masks = masks_of(setup)
    for kind, one in masks.groups.items():
        scores = torch.rand(one.rows, one.count, generator=torch.Generator().manual_seed(4))
        masks.remove(kind, scores, one.removed)
    setup.model.eval()
    with torch.no_grad():
        return setup, setup.model(IDS).logits, method, shape


def loaded(setup, folder):
    setup.export(folder, None)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


CASES = (
    [(name, {}) for name in GATED]
    + [(name, {"groups": "mlp+attention"}) for name in HEADS]
    + [(name, {"score": "layer"}) for name in GATED]
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_masked_is_sliced_and_has_the_size_that_was_told(name, options, tmp_path):
    setup, logits, method, shape = pruned(name, **options)

    model = loaded(setup, tmp_path / "out")

    with torch.no_grad():
        found = model(IDS).logits
    assert (found - logits).abs().max() <= 1e-5 * max(1.0, logits.abs().max().item())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    smaller = ModelShape.from_config(config)
    assert smaller.num_parameters == sum(p.numel() for p in model.parameters()) < shape.num_parameters
    assert f": {smaller.num_parameters:,} of {shape.num_parameters:,} parameters" in method.exports(shape).sizes
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert stored == smaller.num_parameters


def test_every_family_with_a_gated_mlp_and_no_experts_is_among_the_cases():
    known = {n for n, one in FAMILIES.items() if one.mlp[0] in ("gate_proj", "gate_up_proj") and not one.experts}

    assert known == set(GATED)


def test_what_is_masked_has_no_part_in_the_logits(tmp_path):
    setup, logits, _, _ = pruned("llama", groups="mlp+attention")
    masks = masks_of(setup)

    base = setup.model.get_base_model()
    with torch.no_grad():
        for number, layer in enumerate(base.model.layers):
            gone = masks.kept_KN["channels"][number] == 0
            layer.mlp.up_proj.base_layer.weight[gone] = 1e3
        assert torch.equal(setup.model(IDS).logits, logits)
        layer.mlp.up_proj.base_layer.weight[~gone] += 1
        assert not torch.equal(setup.model(IDS).logits, logits)


def test_without_masks_the_whole_model_is_written(tmp_path):
    model = small("qwen2")
    _, setup = prepared(model)
    count = sum(p.numel() for n, p in setup.model.named_parameters() if "lora_" not in n)

    found = loaded(setup, tmp_path / "out")

    assert sum(p.numel() for p in found.parameters()) == count


def test_what_is_compared_with_the_files_is_what_they_hold(tmp_path):
    setup, _, _, _ = pruned("llama", groups="mlp+attention")
    setup.export(tmp_path / "out", None)

    files, written = load_file(tmp_path / "out" / "model.safetensors"), setup.written()

    assert len(written) == 3 * (7 + 5)  # each layer's maps, and the biases of those whose rows leave
    assert all(torch.equal(files[name], tensor) for name, tensor in written.items())


def test_a_base_in_sixteen_bits_is_handed_back_in_sixteen_bits(tmp_path):
    model = small("llama").to(torch.bfloat16)
    _, setup = prepared(model)
    masks_of(setup).remove("channels", torch.rand(3, 40), 12)

    setup.export(tmp_path / "out", None)

    files = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in files.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_holds_masks_and_scores(tmp_path):
    setup, _, _, _ = pruned("llama", groups="mlp+attention")

    weights = gather(setup).weights

    for kind in ("channels", "heads"):
        kept, gradient = weights[f"pruning.{kind}.kept"], weights[f"pruning.{kind}.gradient"]
        assert kept.shape == gradient.shape[1:] and len(gradient) == (3 if kind == "channels" else 4)


def test_layers_of_unequal_width_are_no_model(tmp_path):
    setup, _, _, _ = pruned("llama")
    masks_of(setup).kept_KN["channels"][1, :] = 1

    with pytest.raises(ValueError, match="as many channels must remain in every layer"):
        setup.export(tmp_path / "out", None)
