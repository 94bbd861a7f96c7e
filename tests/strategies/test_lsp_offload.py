"""What is promised of learned sparse projectors and their lanes: SYSTEMS' proofs (a) to (d) and (f), on two cores."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from strategies.lsp_offload import optimizer
from strategies.lsp_offload.adam import AdamNumbers, round_at_random
from strategies.lsp_offload.optimizer import LaneFailed, LspAdamW, Route
from strategies.lsp_offload.projector import SparseProjector, Subspace
from strategies.lsp_offload.schedule import Lanes
from strategies.lsp_offload.transport import EmulatedBus
from strategies.lsp_offload.weights import Learning, Projected

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
    num_bytes = sum(tensor.nbytes for tensor in space.state().values())
    assert num_bytes == (40 + 30) * 4 * (4 + 4)  # (m + n) r values and positions


def net(num_layers=3, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(num_layers)))


NUMBERS = AdamNumbers(1e-2, weight_decay=0.1)


def optimizer_of(model, spaces, lanes=None, bus=None, learning=None, seed=0):
    """`spaces`: given subspaces, or (size, non-zeros) for random ones."""
    sizes = [(space.rows.size, 2) if isinstance(space, Subspace) else space for space in spaces]
    weights = [Projected(place, layer.weight, *sizes[place]) for place, layer in enumerate(model)]
    made = LspAdamW(weights, Route(bus or EmulatedBus(), lanes or Lanes()), NUMBERS, learning, seed=seed)
    for place, layer in enumerate(model):
        layer.register_forward_pre_hook(made.waiter(place))
        if isinstance(spaces[place], Subspace):
            made._state_of(made.weights[place]).update(spaces[place].state())
    return made


def train(model, made, steps, max_grad_norm=0.0, accumulate=1):
    losses = []
    for step in range(steps):
        for part in range(accumulate):
            if part == accumulate - 1:
                made.last_pass(max_grad_norm)
            x = torch.randn(8, SIDE, generator=generator(100 * step + part))
            loss = (model(x) - x.roll(1, 1)).square().mean() / accumulate
            loss.backward()
        losses.append(loss.item())
        made.update(max_grad_norm)
    made.settle()
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
    for step in range(4):
        sum(
            (other(x) - x.roll(1, 1)).square().mean() / 3
            for x in (torch.randn(8, SIDE, generator=generator(100 * step + part)) for part in range(3))
        ).backward()
        whole.update(1.0)
    whole.settle()

    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    made.close()
    whole.close()


def test_layers_overlap_and_nothing_is_stale(monkeypatch):
    """Eight layers of 20 ms in every lane: about a third of the time, and the same weights to the last bit."""
    took, weights, direction = {}, {}, optimizer.direction
    for overlapped in (False, True):
        model = net(8)
        spaces = [Subspace.random((SIDE, SIDE), 8, 2, generator(i)) for i in range(8)]
        lanes = Lanes(transition=2, overlapped=overlapped)
        made = optimizer_of(model, spaces, lanes, SlowBus(0.02))
        slow_backward(model, 0.02)
        monkeypatch.setattr(optimizer, "direction", lambda *given: (time.sleep(0.02), direction(*given))[1])
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
        return tensor


def slow_backward(model, seconds):
    for layer in model:
        layer.register_forward_hook(
            lambda _module, _inputs, out: out.register_hook(lambda _: time.sleep(seconds)) and None
        )


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


def learner(moments="reset", threshold=0.3):
    """One layer whose optimizer has made a step, and the gradient of another pass."""
    model = net(1)
    made = optimizer_of(model, [(8, 2)], learning=Learning(1, threshold, 60, 4, moments))
    train(model, made, 1)
    return model, made, made._state_of(made.weights[0])


def teach(model, made, passes=1):
    made.begin_learning(passes)
    for number in range(passes):
        if number:
            made.next_learning()
        x = torch.randn(8, SIDE, generator=generator(number))
        (model(x) - x.roll(1, 1)).square().mean().backward()
    return made.end_learning()


def test_updates_behind_a_gate_wait_for_it_and_go_shallowest_first():
    lanes, order, gate = Lanes(transition=2), [], Future()
    for layer in (4, 3, 2, 1, 0):
        stages = {
            lane: (lambda lane=lane, layer=layer: order.append((lane, layer))) for lane in ("down", "update", "up")
        }
        lanes.submit(layer, stages, gate)
    time.sleep(0.05)

    assert sorted(order) == [("down", layer) for layer in range(5)]
    gate.set_result(1.0)
    lanes.wait_all()
    assert [layer for lane, layer in order if lane == "update"] == [0, 1, 2, 3, 4]
    lanes.close()


def test_a_projector_that_is_kept_touches_no_state():
    model, made, state = learner(threshold=100.0)
    before = {key: value.clone() for key, value in state.items() if key != "bias"}

    told = teach(model, made)

    assert told["learnt"] == 0 and told["above_threshold"] == 0 and told["bias"] > 0.3
    assert all(torch.equal(value, state[key]) for key, value in before.items())
    made.close()


@pytest.mark.parametrize("moments", ["reset", "project"])
def test_a_new_projector_begins_anew_or_carries_its_moments_over(moments):
    model, made, state = learner(moments)
    old, moment = Subspace.from_state(state, 8), state["exp_avg"].clone()
    weight = model[0].weight.detach().clone()

    told = teach(model, made, passes=2)

    new = Subspace.from_state(state, 8)
    assert told["learnt"] == 1 and told["bias"] < 1 < float(old.bias(torch.randn(SIDE, SIDE)))
    assert torch.equal(model[0].weight, weight) and made.summed[0].grad is None  # it only taught
    if moments == "reset":
        assert not state["exp_avg"].any() and state["step"] == 0
    else:
        assert state["exp_avg"].any() and (state["exp_avg_sq"] >= 0).all() and state["step"] == 1
        assert not torch.equal(state["exp_avg"], moment) and not torch.equal(new.rows.values_MR, old.rows.values_MR)
    made.close()


def test_moments_are_carried_over_by_the_overlap_of_the_subspaces():
    model, made, state = learner("project")
    old, moment = Subspace.from_state(state, 8), state["exp_avg"].clone()

    teach(model, made)

    new = Subspace.from_state(state, 8)
    left, right = dense(new.rows).T @ dense(old.rows), dense(old.columns).T @ dense(new.columns)
    torch.testing.assert_close(state["exp_avg"], left @ moment @ right)
    made.close()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_moves_nothing(max_grad_norm):
    model = net()
    made = optimizer_of(model, [(8, 2)] * 3)
    before = [weight.detach().clone() for weight in model.parameters()]
    made.last_pass(max_grad_norm)
    (model(torch.full((2, SIDE), float("nan")))).sum().backward()

    with pytest.raises(LaneFailed, match="not finite"):
        made.update(max_grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train(model, made, 1, max_grad_norm)  # and the next step is a step
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    made.close()


def test_a_step_that_is_given_up_moves_nothing_and_is_repeated():
    model, other = net(), net()
    made, plain = optimizer_of(model, [(8, 2)] * 3), optimizer_of(other, [(8, 2)] * 3)
    made.last_pass(1.0)
    model(torch.ones(2, SIDE)).sum().backward()
    made.zero_grad()

    train(model, made, 3, 1.0)
    train(other, plain, 3, 1.0)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    made.close()
    plain.close()


def test_without_clipping_a_begun_step_cannot_be_given_up():
    model = net()
    made = optimizer_of(model, [(8, 2)] * 3)
    made.last_pass(0.0)
    model(torch.ones(2, SIDE)).sum().backward()

    with pytest.raises(RuntimeError, match="resume from the checkpoint"):
        made.zero_grad()
    made.close()


def test_a_restored_state_goes_on_bit_by_bit():
    model, other = net(), net(seed=1)
    made = optimizer_of(model, [(8, 2)] * 3, learning=Learning(check_every=3, fit_steps=5))
    again = optimizer_of(other, [(8, 2)] * 3, learning=Learning(check_every=3, fit_steps=5))
    teach(model, made)
    train(model, made, 5)
    other.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    for one, two in zip(made.weights, again.weights, strict=True):
        again.state[two.weight] = {key: value.clone() for key, value in made.state[one.weight].items()}
    for net_, optimizer_ in ((model, made), (other, again)):
        train(net_, optimizer_, 2)
        teach(net_, optimizer_)
        train(net_, optimizer_, 3)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    made.close()
    again.close()


def test_random_rounding_is_right_on_average_and_leaves_what_fits():
    values = torch.tensor([1.0, 1.0 + 2**-10, -3.0 - 2**-9, 0.5])

    drawn = torch.stack([round_at_random(values, generator(i)) for i in range(4000)])

    assert torch.equal(drawn, drawn.bfloat16().float())
    assert torch.equal(drawn[:, 0], torch.ones(4000)) and torch.equal(drawn[:, 3], torch.full((4000,), 0.5))
    torch.testing.assert_close(drawn.mean(0), values, rtol=3e-4, atol=0)


def test_weights_in_bf16_follow_updates_smaller_than_their_spacing():
    model = net(1).bfloat16()
    start = model[0].weight.detach().float().clone()
    made = optimizer_of(model, [Subspace(signed_permutation(SIDE, 1), signed_permutation(SIDE, 2))])
    for group in made.param_groups:
        group["lr"] = 1e-5  # far below the spacing of numbers near 0.2
    made.numbers = AdamNumbers(1e-5)
    for _ in range(40):
        made.last_pass(0.0)
        model[0].weight.grad = None
        (model(torch.ones(1, SIDE, dtype=torch.bfloat16)).float().sum()).backward()
        made.update(0.0)
    made.settle()

    assert model[0].weight.float().sub(start).mean().item() == pytest.approx(-40e-5, rel=0.25)
    made.close()
