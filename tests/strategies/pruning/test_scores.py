"""Scores of groups: restated dense, beside the full gradient's, and what masks do with them."""

import pytest
import torch

from strategies.methods.kept_pairs import pairs_of
from strategies.pruning import scores
from strategies.pruning.groups import channels_of
from strategies.pruning.masks import GroupMasks
from strategies.pruning.scores import RandomScores, corrected_squares, gradient_squares
from strategies.shape import ModelShape
from tests.conftest import SHARED
from tests.strategies.pruning.models import masks_of, prepared, small

STORIES = SHARED / "assets/models/stories260K"
IDS = torch.arange(3, 33).reshape(2, 15)


def with_gradients(name="llama", **options):
    _, setup = prepared(small(name), num_steps=20, **options)
    setup.model(IDS, labels=IDS).loss.backward()
    return setup, {pair.name.split(".layers.")[1]: pair for pair in pairs_of(setup.model, setup.parameters)}


def norms(pair, side, groups=None):
    """|dL/dB| |W'| of rows, or |dL/dA| |W'| of columns, of `groups` groups of them."""
    weight = (pair.layer.base_layer.weight + pair.scale * pair.b_OR @ pair.a_RI).detach()
    gradient, whole = (pair.b_OR.grad, weight) if side == "rows" else (pair.a_RI.grad.T, weight.T)
    groups = groups or len(whole)
    return gradient.reshape(groups, -1).norm(dim=1) * whole.reshape(groups, -1).norm(dim=1)


def together(*parts):
    return sum(one / one.norm() for one in parts)


def observed(setup):
    setup.between.gradients_ready(0)
    return setup.between._scores


def test_norms_by_pieces_are_those_of_the_whole_map(monkeypatch):
    _, pairs = with_gradients()
    monkeypatch.setattr(scores, "_CHUNK", 7 * 48)  # of rows that do not divide the map's

    for pair in pairs.values():
        weight_OI = pair.layer.base_layer.weight + pair.scale * pair.b_OR @ pair.a_RI
        found = corrected_squares(pair)
        torch.testing.assert_close(found.rows_O, weight_OI.square().sum(dim=1))
        torch.testing.assert_close(found.columns_I, weight_OI.square().sum(dim=0))


def test_a_channel_is_a_row_of_gate_and_up_and_a_column_of_down():
    setup, pairs = with_gradients()
    expected = together(
        norms(pairs["1.mlp.gate_proj"], "rows"),
        norms(pairs["1.mlp.up_proj"], "rows"),
        norms(pairs["1.mlp.down_proj"], "columns"),
    )

    torch.testing.assert_close(observed(setup).of("channels")[1], expected)


def test_gradients_are_averaged_over_steps_until_masks_stay():
    setup, pairs = with_gradients()
    one = gradient_squares(pairs["2.mlp.up_proj"]).rows_O.sqrt()

    for step in range(3):
        setup.between.gradients_ready(step)

    average = setup.buffers["pruning.channels.gradient"]
    torch.testing.assert_close(average[1, 2], (1 - 0.9**3) * one)
    setup.between.gradients_ready(10)  # of 20 steps masks move in the first 10
    torch.testing.assert_close(average[1, 2], (1 - 0.9**3) * one)


def test_a_fused_map_scores_as_gate_and_up():
    setup, pairs = with_gradients("phi3")
    both, down = norms(pairs["0.mlp.gate_up_proj"], "rows"), norms(pairs["0.mlp.down_proj"], "columns")

    torch.testing.assert_close(observed(setup).of("channels")[0], together(both[:40], both[40:], down))


def test_a_key_value_group_is_its_heads_rows_and_their_columns_of_the_output():
    setup, pairs = with_gradients(groups="mlp+attention")
    rows = [norms(pairs[f"2.self_attn.{name}_proj"], "rows", 3) for name in "qkv"]
    output = norms(pairs["2.self_attn.o_proj"], "columns", 3)

    torch.testing.assert_close(observed(setup).of("heads")[2], together(*rows, output))


def test_a_layer_is_all_its_maps():
    _, setup = prepared(small("llama", layers=6), num_steps=20, score="layer")
    setup.model(IDS, labels=IDS).loss.backward()
    pairs = pairs_of(setup.model, setup.parameters)
    by_map = {}
    for pair in pairs:
        by_map.setdefault(pair.name.split(".")[-1], []).append(norms(pair, "rows", 1))

    found = observed(setup).of("layers")

    torch.testing.assert_close(found[0], together(*(torch.cat(one) for one in by_map.values())))
    assert len(by_map) == 7 and found.shape == (1, 6)


def test_masks_take_the_lowest_and_never_give_back_or_touch_what_is_protected():
    groups = channels_of(ModelShape.from_config(small("llama").config.to_dict()), 0.5, 1)
    masks = GroupMasks([groups], small("llama").model.layers, torch.device("cpu"))
    rising = torch.arange(40.0).repeat(3, 1)

    masks.remove("channels", rising, 5)
    masks.remove("channels", -rising, 8)

    gone = [row.nonzero().flatten().tolist() for row in masks.kept_KN["channels"] == 0]
    assert gone == [[0, 1, 2, 3, 4, 37, 38, 39]] * 3 and masks.num_removed("channels") == 8
    masks.remove("channels", rising, 3, may_return=True)
    assert (masks.kept_KN["channels"] == 0).nonzero()[:, 1].tolist() == [0, 1, 2] * 3


def test_layers_that_are_protected_stay_whatever_their_score():
    _, setup = prepared(small("llama", layers=6), score="layer", ratio=0.5)
    masks = masks_of(setup)

    masks.remove("layers", torch.tensor([[0.0, 5.0, 2.0, 1.0, 4.0, 0.0]]), 3)

    assert masks.kept_KN["layers"].tolist() == [[1, 1, 0, 0, 0, 1]]


def test_gates_have_the_gradient_of_the_masks_and_move_alone():
    setup, _ = with_gradients(score="gate")
    masks = masks_of(setup)
    gate = masks.gates["channels"][0]
    layer, seen = setup.model.get_base_model().model.layers[0].mlp.down_proj, []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]), prepend=True)
    (before, expected), slope = (setup.model(IDS, labels=IDS).loss.item(), gate.grad.clone()), 1e-2
    with torch.no_grad():
        masks.kept_KN["channels"][0, 7] += slope
        after = setup.model(IDS, labels=IDS).loss.item()
        masks.kept_KN["channels"][0, 7] -= slope

    assert expected[7].item() == pytest.approx(0.25 * (after - before) / slope, rel=0.1)
    lora = [p.detach().clone() for name, p in setup.parameters.items() if "lora" in name]
    setup.between.gradients_ready(0)
    assert gate.grad is None
    torch.testing.assert_close(gate.detach(), -expected / expected.norm())
    setup.optimizer.step()
    torch.testing.assert_close(gate.detach(), -expected / expected.norm())
    moved = [p for name, p in setup.parameters.items() if "lora" in name]
    assert not any(torch.equal(one, other) for one, other in zip(lora, moved, strict=True))
    assert seen


def test_a_gate_changes_nothing_but_what_is_masked():
    model = small("llama")
    with torch.no_grad():
        before = model(IDS).logits
    _, setup = prepared(model, score="gate")
    for name, parameter in setup.parameters.items():
        if "lora_B" in name:
            parameter.data.zero_()
    for gate in masks_of(setup).gates["channels"]:
        torch.nn.init.normal_(gate.data)

    with torch.no_grad():
        assert torch.equal(setup.model(IDS).logits, before)


def test_random_scores_are_those_of_the_seed():
    groups = [channels_of(ModelShape.from_config(small("llama").config.to_dict()), 0.5, 1)]

    first, second, other = (RandomScores(groups, seed).of("channels") for seed in (1, 1, 2))

    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"there is no folder {STORIES}")
def test_lora_of_rank_8_ranks_channels_as_the_full_gradient_does():
    """Of a trained model on what it was trained for, both averaged over the steps, and nearer than the paper's."""
    from tests.benchmarks.pruning import rank_correlations, subject

    found = rank_correlations(subject("stories260K"), 8, (10, 20))

    assert found[10]["lora"] >= 0.8 and found[20]["lora"] >= 0.85
    assert found[20]["paper"] < 0.75 and found[20]["magnitude"] < 0.5


def test_without_gradients_the_score_is_the_magnitude():
    _, setup = prepared(small("llama"), score="magnitude")
    pairs = {pair.name.split(".layers.")[1]: pair for pair in pairs_of(setup.model, setup.parameters)}
    squares = {name: corrected_squares(pairs[f"0.mlp.{name}_proj"]) for name in ("gate", "up", "down")}

    found = setup.between._scores.of("channels")[0]

    sums = squares["gate"].rows_O, squares["up"].rows_O, squares["down"].columns_I
    torch.testing.assert_close(found, together(*(one.sqrt() for one in sums)))
    assert "pruning.channels.gradient" not in setup.buffers
