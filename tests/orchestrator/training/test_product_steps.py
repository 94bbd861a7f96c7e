"""Local steps whose workers average products B A (LTE): what is averaged, kept, resumed, sent and refused."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.data.packing import split_by_share
from orchestrator.errors import JobError
from orchestrator.training import checkpoint
from orchestrator.training.local_steps import ProductSteps
from orchestrator.training.loop import train
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.shares import Shares
from orchestrator.training.state import Hooks, Progress, Training
from strategies import METHODS
from strategies.adapter_bank.algebra import Factors, add, near, square, truncate
from strategies.compatibility import conflict
from strategies.methods.kept_pairs import pairs_of
from strategies.shape import ModelShape
from strategies.step.state import gather
from strategies.train_setup import TrainSettings
from strategies.workload import StagePart
from tests.orchestrator.training.test_loop import ONE_BY_ONE, SCHEDULE
from tests.orchestrator.training.test_uneven import joined
from tests.processes import run_ranks
from tests.strategies.test_contract import CPU

PRODUCT = dataclasses.replace(ONE_BY_ONE, local_merge="product")
RESET = dataclasses.replace(ONE_BY_ONE, local_merge="reset")
GPU = dataclasses.replace(CPU, kind="cuda", name="GPU", compute_capability=(8, 6))


def prepared(model_folder, techniques, optim="adamw_torch", **options):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    settings = TrainSettings(3e-3, 0.0, optim, 0.9, 0.999, 1e-8, techniques, 3)
    return METHODS["lora"](lora_r=4, **options).setup(model, settings)


def run(setup, data_folder, techniques, rounds, group=None, local=4, progress=None, save=None, size=12, **schedule):
    """Events by kind; `rounds` of `size` samples, local steps of `local`."""
    events, group = {}, group or ProcessGroup()
    hooks = Hooks(
        lambda event: events.setdefault(event.kind, []).append(event), save or (lambda now: "x"), lambda: None
    )
    order, when = Order(24, size, seed=5, num_train_epochs=9, max_steps=rounds), {"max_grad_norm": 0.0} | schedule
    shares = Shares([1 / group.size] * group.size, is_fixed=True)
    schedule = dataclasses.replace(SCHEDULE, **when)
    parts = (Dataset.load(data_folder), None, order, schedule, techniques, group, progress or Progress(), hooks)
    train(Training(setup, *parts, shares, local))
    return events


def losses(events):
    return [step.loss for step in events["step"]]


def deltas(setup):
    """dW of each map: what trains and what is kept."""
    kept = setup.kept.correction if setup.kept else lambda name: None
    return {
        pair.name: (pair.scale * pair.b_OR @ pair.a_RI + (kept(pair.name).delta() if setup.kept else 0)).detach()
        for pair in pairs_of(setup.model, setup.parameters)
    }


class InParts:
    """An order whose steps are the local steps of another's, a worker alone."""

    def __init__(self, order, lengths, size):
        self._order, self._lengths, self._size = order, lengths, size
        self.num_steps, self.epoch = order.num_steps * order.global_batch_size // size, order.epoch

    def sample_ids(self, step):
        whole, part = divmod(step * self._size, self._order.global_batch_size)
        ids = self._order.sample_ids(whole)
        (own,) = split_by_share([int(self._lengths[one]) for one in ids], [1.0])
        return [ids[one] for one in own[part : part + self._size]]


def test_one_worker_is_plain_lora_bit_for_bit(model_folder, data_folder):
    plain, apart = prepared(model_folder, ONE_BY_ONE), prepared(model_folder, PRODUCT)
    data, order = Dataset.load(data_folder), Order(24, 12, seed=5, num_train_epochs=9, max_steps=2)
    schedule, hooks = dataclasses.replace(SCHEDULE, max_grad_norm=0.0), Hooks(print, lambda now: "x", lambda: None)
    steps = InParts(order, data.lengths, 4)
    train(Training(plain, data, None, steps, schedule, ONE_BY_ONE, ProcessGroup(), Progress(), hooks))

    events = run(apart, data_folder, PRODUCT, 2)

    assert "between" not in events and steps.num_steps == 6
    for name, weight in plain.parameters.items():
        assert torch.equal(weight, apart.parameters[name]), name


def worker(rank, size, port, model_folder, data_folder, out, techniques, how):
    group = joined(rank, size, port)
    setup = prepared(model_folder, techniques, how.pop("optim", "adamw_torch"))
    made = {}
    outer_step = ProductSteps.outer_step

    def noted(self, step):
        made[step] = ({p.name: (p.scale * p.b_OR @ p.a_RI).detach() for p in setup.pairs}, self._weight)
        return outer_step(self, step)

    ProductSteps.outer_step = noted
    before = deltas(setup)
    events = run(setup, data_folder, techniques, 2, group, **how)
    found = {
        "losses": losses(events),
        "made": made,
        "deltas": deltas(setup),
        "before": before,
        "texts": [(one.text, one.extra) for one in events["between"]],
        "sent": [step.step_bytes_sent for step in events["step"]],
        "numbers": sum(p.numel() for p in setup.parameters.values()),
        "weights": {name: p.detach() for name, p in setup.parameters.items()},
        "kept": setup.kept.used if setup.kept else 0,
    }
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def of_three(tmp_path, model_folder, data_folder, techniques, **how):
    run_ranks(worker, 3, str(model_folder), data_folder, str(tmp_path), techniques, how)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]


def test_restarted_pairs_leave_the_dense_average_of_what_each_worker_made(model_folder, data_folder, tmp_path):
    found = of_three(tmp_path, model_folder, data_folder, RESET)

    for name, delta in found[0]["deltas"].items():
        dense = sum(weight * made[name] for one in found for made, weight in one["made"].values())
        assert (delta - dense).abs().max() < 1e-6, name
        assert delta.abs().max() > 1e-4
    assert sum(one["made"][0][1] for one in found) == pytest.approx(1.0)
    assert all(torch.equal(found[0]["deltas"][name], found[2]["deltas"][name]) for name in found[0]["deltas"])
    assert found[0]["kept"] == 2 * 3 * 4 and all(extra["truncation_error"] == 0 for _, extra in found[0]["texts"])
    assert not any(weight.any() for name, weight in found[0]["weights"].items() if "lora_B" in name)


def test_products_are_averaged_up_to_the_rank_of_a_pair_and_the_error_is_recorded(model_folder, data_folder, tmp_path):
    found = of_three(tmp_path, model_folder, data_folder, PRODUCT, size=24, local=2)

    left = changed = 0.0
    start = {name: torch.zeros_like(delta) for name, delta in found[0]["deltas"].items()}
    first = {name: sum(one["made"][0][0][name] * one["made"][0][1] for one in found) for name in start}
    for dense in first.values():
        singular = torch.linalg.svdvals(dense.double())
        left, changed = left + float(singular[4:].square().sum()), changed + float(singular.square().sum())
    (text, extra), _ = found[0]["texts"]
    assert extra["truncation_error"] == pytest.approx((left / changed) ** 0.5, rel=1e-2) and 0 < left < changed
    assert text.startswith("averaged corrections of 3 workers; ") and "beyond the adapter's rank" in text
    for name, delta in found[0]["deltas"].items():
        dense = sum(one["made"][1][0][name] * one["made"][1][1] for one in found)
        u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
        assert (delta - (u[:, :4] * s[:4]) @ vh[:4]).abs().max() < 1e-6, name
    for one in found[1:]:
        assert all(torch.equal(weight, found[0]["weights"][name]) for name, weight in one["weights"].items())
        assert one["losses"] == found[0]["losses"]


def test_each_worker_sends_its_pairs_to_all_others(model_folder, data_folder, tmp_path):
    first, *_ = of_three(tmp_path, model_folder, data_folder, PRODUCT)

    assert first["sent"] == [2 * 4 * first["numbers"]] * 2


def test_one_sgd_step_from_a_fresh_pair_is_the_synchronous_one(model_folder, data_folder, tmp_path):
    """Three workers with about four samples each, in one local step."""
    alone = prepared(model_folder, ONE_BY_ONE, "sgd")
    run(alone, data_folder, ONE_BY_ONE, 1, local=None)
    synchronous = deltas(alone)

    found = of_three(tmp_path, model_folder, data_folder, RESET, optim="sgd", local=12)

    for name, delta in synchronous.items():
        averaged = sum(one["made"][0][0][name] * one["made"][0][1] for one in found)
        assert (averaged - delta).abs().max() < 1e-6 < 1e-5 < delta.abs().max(), name


def test_a_pair_keeps_the_basis_it_was_trained_in():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 30, generator=draw), 1e-3 * torch.randn(20, 4, generator=draw)
    others = [a + 0.01 * torch.randn(4, 30, generator=draw) for _ in range(3)]
    mean = add([Factors(one, b) for one in others], [1 / 3] * 3)
    cut, _, whole = truncate(mean, 4)

    found = near(cut, a)

    assert (found.delta() - cut.delta()).abs().max() < 1e-7
    assert (found.a_RI - a).norm() < 0.05 * a.norm() < (cut.a_RI - a).norm()
    assert square(mean) == pytest.approx(whole, rel=1e-4) == float(mean.delta().square().sum())


@pytest.mark.parametrize("techniques", [PRODUCT, RESET])
def test_a_resumed_run_is_bit_equal(model_folder, data_folder, tmp_path, techniques):
    whole, kept = prepared(model_folder, techniques), {}
    expected = run(whole, data_folder, techniques, 4, save=lambda now: kept.setdefault(now.step, copy.copy(now)),
                   save_steps=2)  # fmt: skip
    half = prepared(model_folder, techniques)
    run(half, data_folder, techniques, 2)
    checkpoint.save(tmp_path, gather(half), kept[2].as_dict())

    again = prepared(model_folder, techniques)
    found = checkpoint.newest(tmp_path, pytest.fail)
    found.restore(again)
    events = run(again, data_folder, techniques, 4, progress=Progress.from_dict(found.state))

    assert losses(events) == losses(expected)[2:]
    for name, weight in gather(whole).weights.items():
        assert torch.equal(weight, gather(again).weights[name]), name


def test_what_was_kept_is_in_one_adapter_of_pefts_and_what_has_no_room_is_cut(model_folder, data_folder, tmp_path):
    from peft import PeftModel

    setup, ids = prepared(model_folder, RESET), torch.arange(20)[None]
    events = run(setup, data_folder, RESET, 10)
    setup.export(tmp_path / "out", None)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))

    config, trained = loaded.peft_config["default"], setup.model.peft_config["default"]
    assert (config.r, trained.r, setup.kept.used) == (32, 4, 32)
    errors = [one.extra["truncation_error"] for one in events["between"]]
    assert errors[:8] == [0] * 8 and all(error > 0 for error in errors[8:])
    with torch.no_grad():
        setup.model.eval(), loaded.eval()
        assert torch.allclose(setup.model(ids).logits, loaded(ids).logits, rtol=0, atol=1e-5)
    names = dict(loaded.named_parameters())
    assert all(torch.equal(names[name], weight) for name, weight in setup.written().items())
    assert losses(events)[-1] < losses(events)[0]


SHAPE = ModelShape(64, 2, 4, 2, 16, 128, 500, True)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (METHODS["full"](), {}, "full trains no low-rank adapter: set it to factors"),
        (METHODS["lora"](use_dora=True), {}, "use_dora is more than pairs of A and B over a base that stays as it is"),
        (METHODS["lora"](init_lora_weights="pissa"), {}, "init_lora_weights: pissa is more than pairs"),
        (METHODS["lora"](lora_target_modules=["q_proj", "embed_tokens"]), {}, "leave embedding"),
        (METHODS["lora"](), {"zero_stage": 1, "num_shards": 2, "state_share": 0.5}, "set strategy.mode to ddp"),
        (METHODS["lora"](), {"stage": StagePart(0, 2, 0, 1)}, "set strategy.mode to ddp"),
        (METHODS["lora"](), {"local_merge": "reset", "torch_compile": True}, "local_steps_reset is untested with"),
    ],
)
def test_what_has_no_products_to_average_is_refused_before_the_start(method, changes, words):
    techniques = dataclasses.replace(PRODUCT, **changes)

    assert words in str(conflict(method, techniques, GPU, SHAPE, 2))
    assert conflict(METHODS["lora"](), PRODUCT, GPU, SHAPE, 2) is None


def test_a_setup_without_pairs_does_not_train(model_folder, data_folder):
    setup = METHODS["full"]().setup(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        TrainSettings(3e-3, 0.0, "sgd", 0.9, 0.999, 1e-8, PRODUCT, 3),
    )

    with pytest.raises(JobError, match="products are averaged of pairs of A and B"):
        run(setup, data_folder, PRODUCT, 1)
