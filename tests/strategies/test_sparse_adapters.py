"""Sparse adapters: which entries are chosen, and how experts merge."""

import pytest
import torch

from strategies.adapter_bank.sparse import Sparse, averaged_where_they_meet, sensitive, shira_mask


def an_expert(seed, low, high, shape=(8, 12)):
    draw = torch.Generator().manual_seed(seed)
    places = torch.arange(low, high)
    return Sparse(places, torch.randn(len(places), generator=draw), shape)


def test_disjoint_experts_merge_to_the_exact_sum():
    experts = [an_expert(0, 0, 30), an_expert(1, 30, 50), an_expert(2, 60, 96)]

    merged = averaged_where_they_meet(experts)

    assert torch.equal(merged.delta(), sum(expert.delta() for expert in experts))
    for expert in experts:
        assert torch.equal(merged.delta().flatten()[expert.places], expert.values)


def test_entries_that_two_have_are_averages():
    one, other = an_expert(0, 0, 40), an_expert(1, 30, 60)

    merged = averaged_where_they_meet([one, other]).delta().flatten()

    torch.testing.assert_close(merged[30:40], (one.values[30:40] + other.values[:10]) / 2)
    assert torch.equal(merged[:30], one.values[:30]) and torch.equal(merged[40:60], other.values[10:])


def test_a_mask_has_the_density_that_was_asked_for_and_the_largest_scores():
    draw = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(32, 48, generator=draw), torch.randn(32, 48, generator=draw)

    mask = sensitive(weight, grad, 200)

    scores = (weight * grad).abs()
    assert int(mask.sum()) == 200
    assert scores[mask].min() >= scores[~mask].max()


def test_blocks_are_chosen_whole():
    draw = torch.Generator().manual_seed(0)

    mask = sensitive(torch.randn(32, 48, generator=draw), torch.randn(32, 48, generator=draw), 3 * 256, block=16)

    squares = mask.view(2, 16, 3, 16).sum((1, 3))
    assert sorted(squares.flatten().tolist()) == [0, 0, 0, 256, 256, 256]
    with pytest.raises(ValueError, match="do not divide"):
        sensitive(torch.ones(30, 48), torch.ones(30, 48), 5, block=16)


def test_experts_of_two_models_are_refused():
    with pytest.raises(ValueError, match="different models"):
        averaged_where_they_meet([an_expert(0, 0, 4), an_expert(0, 0, 4, (12, 8))])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT builds its tensors so
def test_peft_trains_the_chosen_entries_and_no_others():
    from peft import ShiraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False))
    weight, x = model[0].weight, torch.randn(5, 12)
    model(x).square().sum().backward()
    gradients, before = {id(weight): weight.grad.clone()}, weight.detach().clone()
    chosen = sensitive(before, gradients[id(weight)], 20)

    config = ShiraConfig(r=1, target_modules=["0"], mask_type="random", init_weights=True)
    config.mask_fn = shira_mask(gradients)
    tuned = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1)
    tuned(x).square().sum().backward()
    optimizer.step()

    changed = tuned.merge_and_unload()[0].weight.detach() - before
    assert int(chosen.sum()) == 1 * (8 + 12)
    assert changed[chosen].abs().min() > 0
    assert not changed[~chosen].any()
    sparse = Sparse.of(changed, chosen)
    assert torch.equal(sparse.delta(), changed) and sparse.density == pytest.approx(20 / 96)
