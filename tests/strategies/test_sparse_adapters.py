"""Sparse adapters: which entries are chosen, and how experts merge."""

from pathlib import Path

import pytest
import torch

from strategies.adapter_bank.adapter import Unusable
from strategies.adapter_bank.sparse import (
    Sparse,
    average_shared_entries,
    is_sparse,
    merge,
    merge_by,
    read,
    select_sensitive,
)


def an_expert(seed, low, high, shape=(8, 12)):
    draw = torch.Generator().manual_seed(seed)
    places = torch.arange(low, high)
    return Sparse(places, torch.randn(len(places), generator=draw), shape)


def test_disjoint_experts_merge_to_the_exact_sum():
    experts = [an_expert(0, 0, 30), an_expert(1, 30, 50), an_expert(2, 60, 96)]

    merged = average_shared_entries(experts)

    assert torch.equal(merged.delta(), sum(expert.delta() for expert in experts))
    for expert in experts:
        assert torch.equal(merged.delta().flatten()[expert.places], expert.values)


def test_entries_that_two_have_are_averages():
    one, other = an_expert(0, 0, 40), an_expert(1, 30, 60)

    merged = average_shared_entries([one, other]).delta().flatten()

    torch.testing.assert_close(merged[30:40], (one.values[30:40] + other.values[:10]) / 2)
    assert torch.equal(merged[:30], one.values[:30]) and torch.equal(merged[40:60], other.values[10:])


def test_a_mask_has_the_density_that_was_asked_for_and_the_largest_scores():
    draw = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(32, 48, generator=draw), torch.randn(32, 48, generator=draw)

    mask = select_sensitive(weight, grad, 200)

    scores = (weight * grad).abs()
    assert int(mask.sum()) == 200
    assert scores[mask].min() >= scores[~mask].max()


def test_blocks_are_chosen_whole():
    draw = torch.Generator().manual_seed(0)

    mask = select_sensitive(torch.randn(32, 48, generator=draw), torch.randn(32, 48, generator=draw), 3 * 256, block=16)

    squares = mask.view(2, 16, 3, 16).sum((1, 3))
    assert sorted(squares.flatten().tolist()) == [0, 0, 0, 256, 256, 256]
    with pytest.raises(ValueError, match="do not divide"):
        select_sensitive(torch.ones(30, 48), torch.ones(30, 48), 5, block=16)


def test_experts_of_two_models_are_refused():
    with pytest.raises(ValueError, match="different models"):
        average_shared_entries([an_expert(0, 0, 4), an_expert(0, 0, 4, (12, 8))])


def test_task_arithmetic_takes_away_and_ties_elects_signs():
    one, other = an_expert(0, 0, 40), an_expert(1, 30, 60)

    less = merge_by([one, other], [1.0, -0.5], "linear").delta()
    elected = merge_by([one, other], [1.0, 1.0], "ties", density=1.0).delta().flatten()

    torch.testing.assert_close(less, one.delta() - 0.5 * other.delta())
    here, there = one.values[30:40], other.values[:10]
    larger = torch.where(here.abs() > there.abs(), here, there)
    agree = here.sign() == there.sign()
    torch.testing.assert_close(elected[30:40], torch.where(agree, (here + there) / 2, larger))
    assert torch.equal(elected[:30], one.values[:30])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 8, bias=False) for _ in range(2))

    def forward(self, x):
        return self.layers[0](x) + self.layers[1](x)


def a_shira_adapter(folder: Path, seed: int, rank: int = 1) -> dict[str, torch.Tensor]:
    """What PEFT saves of random entries; its corrections by map."""
    from peft import ShiraConfig, get_peft_model

    torch.manual_seed(seed)
    config = ShiraConfig(r=rank, target_modules=["layers.0", "layers.1"], random_seed=seed, init_weights=False)
    tuned = get_peft_model(Net(), config)
    tuned.save_pretrained(str(folder))
    layers = {name: tuned.base_model.model.get_submodule(name) for name in config.target_modules}
    return {name: layer.get_delta_weight("default").to_dense() for name, layer in layers.items()}


def test_peft_reads_merged_sparse_adapters(tmp_path):
    from peft import PeftModel

    deltas = [a_shira_adapter(tmp_path / f"of-{seed}", seed) for seed in range(3)]

    entries, shared = merge([tmp_path / f"of-{seed}" for seed in range(3)], tmp_path / "merged")

    assert is_sparse(tmp_path / "merged")
    assert entries + shared == 3 * 2 * (8 + 12) and shared > 0
    merged = PeftModel.from_pretrained(Net(), str(tmp_path / "merged")).merge_and_unload()
    for name in ("layers.0", "layers.1"):
        held_by = sum((delta[name] != 0).float() for delta in deltas).clamp(min=1)
        exact = Net().get_submodule(name).weight + sum(delta[name] for delta in deltas) / held_by
        torch.testing.assert_close(merged.get_submodule(name).weight, exact)


def test_what_is_no_sparse_adapter_is_named_and_nothing_is_written(tmp_path):
    a_shira_adapter(tmp_path / "good", 0)
    a_shira_adapter(tmp_path / "cut", 1)
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])

    with pytest.raises(Unusable, match=r"cut.adapter_model\.safetensors: is cut"):
        merge([tmp_path / "good", tmp_path / "cut"], tmp_path / "merged")
    with pytest.raises(Unusable, match=r"holds no readable adapter_config\.json"):
        is_sparse(tmp_path)
    with pytest.raises(FileExistsError):
        merge([tmp_path / "good"], tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "good"]
    assert len(read(tmp_path / "good")) == 2
