"""What is promised of learned sparse projectors and their lanes: SYSTEMS' proofs (a) to (d) and (f), on two cores."""

import threading
import time

import pytest
import torch

from strategies.lsp_offload.optimizer import AdamNumbers, LaneFailed, LspAdamW, ProjectedWeight
from strategies.lsp_offload.projector import SparseProjector, Subspace
from strategies.lsp_offload.schedule import Lanes
from strategies.lsp_offload.transport import EmulatedBus

SIDE = 24


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(side):
    """The projector as a matrix: only tests make one."""
    out = torch.zeros(side.values_MR.shape[0], side.size)
    return out.scatter_add_(1, side.positions_MR.long(), side.values_MR)


def signed_permutation(side, seed):
    order = torch.randperm(side, generator=generator(seed)).to(torch.int32)[:, None]
    signs = torch.randint(0, 2, (side, 1), generator=generator(seed + 1)) * 2.0 - 1
    return SparseProjector(signs, order, side)


@pytest.mark.parametrize(("rows", "size", "nonzeros"), [(40, 16, 4), (7, 5, 5), (9, 64, 1)])
def test_a_row_has_its_non_zeros_in_different_columns(rows, size, nonzeros):
    made = SparseProjector.random(rows, size, nonzeros, generator())

    assert all(len(set(row)) == nonzeros for row in made.positions_MR.tolist())
    assert made.positions_MR.min() >= 0 and made.positions_MR.max() < size
    assert made.values_MR.shape == (rows, nonzeros)


def test_every_column_is_as_likely_as_another():
    made = SparseProjector.random(20_000, 10, 3, generator())

    counts = torch.bincount(made.positions_MR.flatten(), minlength=10)
    assert (counts / 6000 - 1).abs().max() < 0.05


@pytest.mark.parametrize("nonzeros", [0, 17])
def test_a_row_without_room_is_refused(nonzeros):
    with pytest.raises(ValueError, match="between 1 and the subspace's 16"):
        SparseProjector.random(8, 16, nonzeros, generator())


def test_image_and_way_back_are_the_products_they_stand_for():
    space = Subspace.random((40, 30), 16, 4, generator())
    gradient = torch.randn(40, 30, generator=generator(1))
    left, right = dense(space.rows), dense(space.columns)

    torch.testing.assert_close(space.image(gradient), left.T @ gradient @ right)
    torch.testing.assert_close(space.back(space.image(gradient)), left @ (left.T @ gradient @ right) @ right.T)
    other = Subspace.random((40, 30), 16, 4, generator(2))
    torch.testing.assert_close(other.rows.overlap(space.rows), dense(other.rows).T @ left)
    assert space.num_bytes == (40 + 30) * 4 * (4 + 4)  # (m + n) r values and positions


def net(num_layers=3, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(num_layers)))


def optimizer_of(model, spaces, lanes=None, bus=None, numbers=AdamNumbers(weight_decay=0.1)):
    weights = [ProjectedWeight(place, layer.weight, spaces[place]) for place, layer in enumerate(model)]
    made = LspAdamW(weights, bus or EmulatedBus(), lanes or Lanes(), numbers, 1e-2)
    for place, layer in enumerate(model):
        layer.register_forward_pre_hook(made.waiter(place))
    return made


def train(model, made, steps, max_grad_norm=0.0, accumulate=1):
    made.max_grad_norm = max_grad_norm
    losses = []
    for step in range(steps):
        made.expect(accumulate)
        for part in range(accumulate):
            x = torch.randn(8, SIDE, generator=generator(100 * step + part))
            loss = (model(x) - x.roll(1, 1)).square().mean() / accumulate
            loss.backward()
            made.pass_done()
        losses.append(loss.item())
        made.update()
    made.lanes.wait_all()
    return losses


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_signed_permutations_make_it_adam(max_grad_norm):
    """A subspace that loses nothing: the trajectory is AdamW's, with clipping and weight decay."""
    model, other = net(), net()
    spaces = [Subspace(signed_permutation(SIDE, 10 * i), signed_permutation(SIDE, 10 * i + 5)) for i in range(3)]
    made = optimizer_of(model, spaces)
    adam = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(20):
        x = torch.randn(8, SIDE, generator=generator(100 * step))
        (other(x) - x.roll(1, 1)).square().mean().backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(other.parameters(), max_grad_norm)
        adam.step()
        adam.zero_grad()

    train(model, made, 20, max_grad_norm)

    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)
    made.close()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_fitting_finds_a_gradient_of_low_rank_and_random_projectors_do_not(rank):
    left = torch.randn(96, rank, generator=generator(1))
    gradient = left @ torch.randn(rank, 80, generator=generator(2))
    space = Subspace.random((96, 80), 40, 2 * rank, generator(3))

    fitted, bias = space.fitted(gradient, 400, 0.0)

    assert space.bias(gradient) > 1
    assert bias < 0.05 and float(fitted.bias(gradient)) == pytest.approx(bias, abs=1e-4)
    assert torch.equal(fitted.rows.positions_MR, space.rows.positions_MR)


def test_what_crosses_the_bus_is_two_images_a_step():
    bus = EmulatedBus()
    model = net()
    made = optimizer_of(model, [Subspace.random((SIDE, SIDE), 8, 2, generator(i)) for i in range(3)], bus=bus)

    train(model, made, 5)

    assert bus.down_bytes == bus.up_bytes == 5 * 3 * 8 * 8 * 4
    made.close()


def test_accumulated_images_are_the_image_of_accumulated_gradients():
    spaces = [Subspace.random((SIDE, SIDE), 8, 2, generator(i)) for i in range(3)]
    model, other = net(), net()
    made = optimizer_of(model, spaces)
    train(model, made, 4, accumulate=3, max_grad_norm=1.0)
    whole = optimizer_of(other, spaces)
    whole.max_grad_norm = 1.0
    for step in range(4):
        sum(
            (other(x) - x.roll(1, 1)).square().mean() / 3
            for x in (torch.randn(8, SIDE, generator=generator(100 * step + part)) for part in range(3))
        ).backward()
        whole.pass_done()
        whole.update()
    whole.lanes.wait_all()

    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    made.close()
    whole.close()


def test_layers_overlap_and_nothing_is_stale():
    """Eight layers of 20 ms in every lane: about a third of the time, and the same weights to the last bit."""
    took, weights = {}, {}
    for overlapped in (False, True):
        model = net(8)
        spaces = [Subspace.random((SIDE, SIDE), 8, 2, generator(i)) for i in range(8)]
        lanes = Lanes(transition=2, overlapped=overlapped)
        made = optimizer_of(model, spaces, lanes, SlowBus(0.02))
        slow_backward(model, 0.02)
        slow_updates(made, 0.02)
        start = time.perf_counter()
        losses = train(model, made, 3)
        took[overlapped], weights[overlapped] = time.perf_counter() - start, (losses, [*model.parameters()])
        made.close()

    assert took[True] <= 0.65 * took[False], took
    assert weights[True][0] == weights[False][0]
    assert all(torch.equal(a, b) for a, b in zip(weights[True][1], weights[False][1], strict=True))


class SlowBus(EmulatedBus):
    """Every copy takes a fixed time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def _carried(self, tensor):
        time.sleep(self.seconds)
        return tensor.detach().clone()


def slow_backward(model, seconds):
    for layer in model:
        layer.register_forward_hook(
            lambda _module, _inputs, out: out.register_hook(lambda _: time.sleep(seconds)) and None
        )


def slow_updates(made, seconds):
    for one in made.weights:
        adam = one.adam
        one.adam = lambda *arguments, adam=adam: (time.sleep(seconds), adam(*arguments))[1]


def test_deep_layers_are_served_as_they_come_and_shallow_ones_shallowest_first():
    lanes, order, gate = Lanes(transition=2), [], threading.Event()
    nothing = {"update": lambda: None, "up": lambda: None}
    lanes.submit(5, {"down": gate.wait, **nothing})
    time.sleep(0.05)
    for layer in (4, 3, 2, 1, 0):
        lanes.submit(layer, {"down": lambda layer=layer: order.append(layer), **nothing})
    gate.set()
    lanes.wait_all()

    assert order == [0, 1, 4, 3, 2]
    assert {span.lane for span in lanes.spans} == {"down", "update", "up"}
    lanes.close()


def test_a_projector_that_is_kept_touches_no_state():
    space = Subspace(signed_permutation(SIDE, 1), signed_permutation(SIDE, 2))
    one = ProjectedWeight(0, torch.nn.Parameter(torch.zeros(SIDE, SIDE)), space)
    one.adam(torch.randn(SIDE, SIDE, generator=generator(1)), AdamNumbers())
    before = one.exp_avg_DD.clone(), one.exp_avg_sq_DD.clone(), one.num_updates

    assert not one.learn(torch.randn(SIDE, SIDE, generator=generator(2)), 50, 0.3, "reset")
    assert one.subspace is space and one.num_learnt == 0
    assert torch.equal(one.exp_avg_DD, before[0]) and torch.equal(one.exp_avg_sq_DD, before[1])
    assert one.num_updates == before[2]


@pytest.mark.parametrize("moments", ["reset", "project"])
def test_a_new_projector_begins_anew_or_carries_its_moments_over(moments):
    one = ProjectedWeight(0, torch.nn.Parameter(torch.zeros(SIDE, 20)), Subspace.random((SIDE, 20), 8, 2, generator()))
    gradient = torch.randn(SIDE, 20, generator=generator(1))
    one.adam(one.subspace.image(gradient), AdamNumbers())
    old, moment = one.subspace, one.exp_avg_DD.clone()

    assert one.learn(gradient, 30, 0.1, moments)

    assert one.num_learnt == 1 and one.bias < float(old.bias(gradient))
    if moments == "reset":
        assert not one.exp_avg_DD.any() and one.num_updates == 0
    else:
        left, right = dense(one.subspace.rows).T @ dense(old.rows), dense(old.columns).T @ dense(one.subspace.columns)
        torch.testing.assert_close(one.exp_avg_DD, left @ moment @ right)
        assert (one.exp_avg_sq_DD >= 0).all()


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = net()
    made = optimizer_of(model, [Subspace.random((SIDE, SIDE), 8, 2, generator(i)) for i in range(3)])
    before = [weight.detach().clone() for weight in model.parameters()]
    (model(torch.full((2, SIDE), float("nan")))).sum().backward()
    made.pass_done()
    made.update()

    with pytest.raises(LaneFailed, match="not finite"):
        made.lanes.wait_all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    made.close()


def test_a_restored_state_goes_on_bit_by_bit():
    spaces = [Subspace.random((SIDE, SIDE), 8, 2, generator(i)) for i in range(3)]
    model, other = net(), net(seed=1)
    made = optimizer_of(model, spaces)
    train(model, made, 5)
    state = {place: {key: value.clone() for key, value in one.items()} for place, one in made.state().items()}
    other.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    again = optimizer_of(other, [Subspace.random((SIDE, SIDE), 8, 2, generator(i + 9)) for i in range(3)])
    again.restore(state)
    train(model, made, 5)
    train(other, again, 5)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    made.close()
    again.close()
