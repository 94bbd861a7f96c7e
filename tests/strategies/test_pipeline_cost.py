"""Steps of stages: the simulation, the cut of layers, the order of devices, and what a stage of a model costs."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch.distributed.pipelining.schedules import Schedule1F1B, _ComputationType

from clusters.units import GIB
from strategies.cost import memory
from strategies.cost.pipeline import (
    Boundary,
    Line,
    Pass,
    Role,
    Search,
    Way,
    orders_of,
    partition,
    simulate,
)
from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.methods.qlora import QLora
from strategies.methods.shira import Shira
from strategies.pipeline import wire
from strategies.pipeline.schedule import num_in_flight, operations
from strategies.pipeline.wire_size import message_bytes
from strategies.shape import ModelShape
from strategies.stage_shape import shape_of_stage, workload_of_stage
from strategies.workload import StagePart, Techniques, Workload
from tests.orchestrator.planning.machines import MIDDLE, SMALL, machine


class Recorder:
    """A stage that notes what a schedule has it do; nothing crosses to its neighbours."""

    def __init__(self, stage_index):
        self.stage_index, self.done = stage_index, []

    def forward_one_chunk(self, number, *_, **__):
        self.done.append((True, number))

    def backward_one_chunk(self, number, *_, **__):
        self.done.append((False, number))

    def no_messages(self, *_):
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = perform_reduce_grad = no_messages


def torch_schedule(count, num_micro_batches, stage=0):
    """torch's schedule for one stage, without the model that its constructor asks for."""
    schedule = object.__new__(Schedule1F1B)
    schedule._num_stages, schedule._n_microbatches, schedule.scale_grads = count, num_micro_batches, False
    schedule._stage = Recorder(stage)
    schedule._check_inputs = lambda *_: ([()] * num_micro_batches, [{}] * num_micro_batches)
    for name in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
        setattr(schedule, name, lambda *_: None)
    return schedule


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("num_micro_batches", range(1, 13))
def test_the_order_of_operations_is_that_of_torchs_1f1b(count, num_micro_batches):
    for stage in range(count):
        schedule = torch_schedule(count, num_micro_batches, stage)
        schedule._step_microbatches()

        assert len(schedule._stage.done) == 2 * num_micro_batches
        found = operations(stage, count, num_micro_batches)
        assert [(one.is_forward, one.micro_batch) for one in found] == schedule._stage.done


@pytest.mark.parametrize("count", range(1, 7))
def test_passes_alternate_as_in_torchs_table(count):
    """`pipeline_order` numbers the last stage's forward passes from 1 and has more than M where M < P: kinds only."""
    kinds = {_ComputationType.FORWARD: True, _ComputationType.FULL_BACKWARD: False}
    for num_micro_batches in range(count, 13):
        table = torch_schedule(count, num_micro_batches)._get_pipeline_order()

        assert len(table) == count
        for stage, actions in table.items():
            expected = [kinds[one.computation_type] for one in actions if one and one.computation_type in kinds]
            assert [one.is_forward for one in operations(stage, count, num_micro_batches)] == expected


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_as_many_micro_batches_are_in_flight_as_are_counted(ahead):
    for count, num_micro_batches in itertools.product(range(1, 5), range(1, 10)):
        for stage in range(count):
            alive = most = 0
            for one in operations(stage, count, num_micro_batches, ahead):
                alive += 1 if one.is_forward else -1
                most = max(most, alive)
            assert most == num_in_flight(stage, count, num_micro_batches, ahead)


def test_equal_stages_without_links_wait_for_the_pipeline_to_fill_and_to_drain():
    """(M + P - 1) micro-batches: the bubble of Narayanan et al., section 2.2."""
    found = simulate([Pass(1.0, 2.0)] * 3, [Boundary(0.0, 1.0)] * 2, 5)

    assert found.step_s == (5 + 3 - 1) * 3.0
    assert found.busy_s == (15.0, 15.0, 15.0)
    assert found.waiting_s == (6.0, 6.0, 6.0)


def test_one_micro_batch_crosses_each_boundary_twice():
    """1 + (4 + 0.5) + 3 + 10 forward and backward, (4 + 0.5) back, 2."""
    found = simulate([Pass(1.0, 2.0), Pass(3.0, 10.0)], [Boundary(8.0, 2.0, 0.5)], 1)

    assert found.step_s == 1 + 4.5 + 3 + 10 + 4.5 + 2


def test_messages_of_one_direction_follow_each_other_and_both_directions_work_together():
    """Forward in nearly no time: the second hidden state leaves when the first has, at 8, while gradient 0 returns."""
    found = simulate([Pass(0.0, 0.0), Pass(1.0, 1.0)], [Boundary(4.0, 1.0)], 3, ahead=2)

    # arrive 4, 8, 12; computed until 6, 10, 14; gradients sent 6-10, 10-14, 14-18
    assert found.begins[1] == (4.0, 5.0, 8.0, 9.0, 12.0, 13.0)
    assert found.step_s == 18.0


def test_micro_batches_ahead_hide_a_link_as_slow_as_a_stage():
    passes, link = [Pass(1.0, 1.0)] * 2, [Boundary(1.5, 1.0)]

    steps = [simulate(passes, link, 16, ahead).step_s for ahead in (0, 1, 2)]

    assert steps[0] > 1.3 * steps[1]
    assert steps[1] > 1.1 * steps[2]
    assert steps[2] > 16 * 2.0


def test_events_are_the_order_of_the_schedule_and_never_overlap_on_a_stage():
    found = simulate([Pass(1.0, 2.0), Pass(0.5, 1.5), Pass(2.0, 2.0)], [Boundary(1.0, 2.0, 0.1)] * 2, 6, ahead=1)
    events = list(found.events)

    assert len(events) == 3 * 6 * 2
    for stage in range(3):
        own = [one for one in events if one.stage == stage]
        assert [(e.is_forward, e.micro_batch) for e in own] == [
            (one.is_forward, one.micro_batch) for one in operations(stage, 3, 6, 1)
        ]
        assert all(one.end_s <= other.begin_s for one, other in itertools.pairwise(own))
        assert sum(one.end_s - one.begin_s for one in own) == pytest.approx(found.busy_s[stage])
    assert max(one.end_s for one in events) == found.step_s


def way(fixed, a_layer, most, name=None):
    return Way(Line(fixed / 3, a_layer / 3), Line(2 * fixed / 3, 2 * a_layer / 3), most, name)


def random_ways(random):
    """A device's ways: the faster holds fewer layers."""
    fast = way(random.choice([0.0, 0.5, 3.0]), random.uniform(0.1, 5.0), random.randint(0, 8), "resident")
    slow = way(fast.total_s(0) + 0.2, 1.5 * fast.total_s(1) + 0.1, random.randint(0, 10), "streamed")
    return [fast, slow] if random.random() < 0.5 else [fast]


def cheapest_s(ways, layers):
    return min((one.total_s(layers) for one in ways if one.most_layers >= layers), default=None)


def cuts(num_layers, count):
    for edges in itertools.combinations(range(1, num_layers), count - 1):
        yield [after - before for before, after in itertools.pairwise((0, *edges, num_layers))]


def brute_force(stages, num_layers):
    found = []
    for layers in cuts(num_layers, len(stages)):
        seconds = [cheapest_s(ways, count) for ways, count in zip(stages, layers, strict=True)]
        if None not in seconds:
            found.append(max(seconds))
    return min(found, default=None)


def test_the_cut_is_the_best_of_all_cuts_memory_included():
    chance, fitting = random.Random(7), 0
    for _ in range(300):
        num_layers, count = chance.randint(1, 8), chance.randint(1, 4)
        stages = [random_ways(chance) for _ in range(count)]
        found, best = partition(stages, num_layers), brute_force(stages, num_layers)

        assert (found is None) == (best is None)
        if found is not None:
            fitting += 1
            assert found.slowest_s == pytest.approx(best)
            assert sum(found.layers) == num_layers
            assert min(found.layers) >= 1
            assert all(w.most_layers >= count for w, count in zip(found.ways, found.layers, strict=True))
    assert 100 < fitting < 290, "neither all fit nor none"


def test_a_slow_link_is_the_slowest_of_a_cut():
    found = partition([[way(0.0, 1.0, 9)], [way(0.0, 1.0, 9)]], 4, slowest_link_s=7.0)

    assert found.layers == (2, 2)
    assert found.slowest_s == 7.0


def search_of(layer_s, most, num_layers=8, num_micro_batches=8, rate=1e3, **changes):
    """Devices of such seconds a layer, on which so many layers fit with one micro-batch in flight."""

    def ways(device: int, role: Role):
        return [way(0.5 * role.is_last, layer_s[device], max(0, most[device] - (role.num_in_flight - 1)))]

    def links(one: int, other: int):
        return Boundary(100.0, rate * (0.1 if {one, other} == {0, 1} else 1.0), 1e-3)

    return Search(num_layers, num_micro_batches, ways, links, **changes)


def test_the_order_is_the_best_of_all_orders():
    chance, found_some = random.Random(3), 0
    for _ in range(40):
        layer_s = [chance.uniform(0.1, 2.0) for _ in range(4)]
        most = [chance.randint(1, 9) for _ in range(4)]
        search = search_of(layer_s, most, rate=chance.choice([1e2, 1e3, 1e5]), worth_a_device=1.0)
        every = [search.best_of(order) for order in orders_of(range(4), range(2, 5))]
        steps = [one.step_s for one in every if one]

        found = search.best(orders_of(range(4), range(2, 5)))

        assert (found is None) == (not steps)
        if found:
            found_some += 1
            assert found.step_s == pytest.approx(min(steps))
            assert found.simulate(8).step_s == found.step_s
    assert found_some > 20


def test_a_device_that_would_hold_all_others_up_stays_out():
    found = search_of([1.0, 1.0, 400.0], [9, 9, 9], rate=1e6).best(orders_of(range(3), (2, 3)))

    assert sorted(found.devices) == [0, 1]


def test_one_more_device_has_to_save_a_twentieth_of_a_step():
    layer_s, orders = [1.0, 1.0, 29.0], list(orders_of(range(3), (2, 3)))

    two, three = (
        search_of(layer_s, [99] * 3, 61, num_micro_batches=64, rate=1e6, worth_a_device=worth).best(iter(orders))
        for worth in (0.95, 1.0)
    )

    assert (len(two.devices), len(three.devices)) == (2, 3)
    assert 0.95 * two.step_s < three.step_s < two.step_s


def test_small_memory_belongs_where_few_micro_batches_are_in_flight():
    """The first of three stages keeps three micro-batches, the last one."""
    found = search_of([1.0, 1.0, 1.0], [9, 9, 3], rate=1e6, aheads=(0,)).best(orders_of(range(3), (3,)))

    assert found.devices[-1] == 2


def test_devices_that_are_alike_are_looked_at_once():
    looked: list[int] = []
    search = search_of([1.0] * 4, [9] * 4)
    counted = replace(search, ways=lambda d, r: looked.append(d) or search.ways(d, r), alike=["a"] * 4)

    counted.best(orders_of(range(4), (2, 3, 4)))

    assert set(looked) == {0, 1, 2, 3}
    assert len(looked) <= 3 * 3 * 4 + 3 * 4, "one order of each number, three depths, and the bounds"


def test_the_best_step_gets_no_shorter_on_a_slower_link():
    for layer_s in ([1.0, 0.4, 2.0], [0.2, 0.3, 0.1]):
        steps = [
            search_of(layer_s, [9, 9, 9], rate=rate).best(orders_of(range(3), (2, 3))).step_s
            for rate in (10, 30, 100, 300, 1e3, 1e4, 1e6)
        ]

        assert steps == sorted(steps, reverse=True)
        assert steps[0] > 2 * steps[-1]


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("width", [64, 100, 896])
def test_a_message_has_the_bytes_that_are_packed(form, width):
    packed = wire.pack(torch.randn(1, 7, width), form)

    assert packed.nbytes == message_bytes(7, width, form) == wire.num_bytes((1, 7, width), form)


# What a stage costs.

UNTIED = replace(SMALL, tied_embeddings=False)
NODE = machine("a", "RTX 4090")
CARD, CPU = NODE.devices
METHODS = {"lora": Lora(), "dora": Lora(use_dora=True), "qlora": QLora(), "full": Full(), "shira": Shira(mask="random")}


def workload_of(shape):
    return Workload(shape, 6400, 6400 * 512, 6400 * 256, 512, 16, 400, 6400, fullest_step_tokens=16 * 512)


def techniques_of(stage=None, **changes):
    return replace(Techniques("bfloat16", "sdpa", True, True, 1, 512, loss_type="chunked_nll", stage=stage), **changes)


def stages_of(*edges):
    return [
        StagePart(number, len(edges) - 1, first, end) for number, (first, end) in enumerate(itertools.pairwise(edges))
    ]


def estimate(method, shape, stage=None, device=CARD, **changes):
    return method.estimate(workload_of(shape), device, NODE, techniques_of(stage, **changes))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [SMALL, UNTIED, MIDDLE], ids=["tied", "untied", "large"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stage_with_all_layers_is_the_model(name, shape, checkpointing):
    whole = estimate(METHODS[name], shape, gradient_checkpointing=checkpointing)
    stage = estimate(METHODS[name], shape, StagePart(0, 1, 0, shape.num_layers), gradient_checkpointing=checkpointing)

    assert stage.memory == whole.memory
    assert stage.time == whole.time
    assert replace(stage, techniques=whole.techniques) == whole


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("edges", [(0, 5, 16), (0, 1, 15, 16), (0, 4, 8, 12, 16)], ids=str)
def test_weights_optimizer_and_checkpoints_of_stages_add_up_to_those_of_the_model(name, edges):
    whole = estimate(METHODS[name], UNTIED)
    parts = [estimate(METHODS[name], UNTIED, stage) for stage in stages_of(*edges)]

    def total(of):
        return sum(of(part) for part in parts), of(whole)

    for of in (
        lambda plan: plan.memory.weights_bytes,
        lambda plan: plan.memory.optimizer_bytes,
        lambda plan: plan.num_trainable_parameters,
        lambda plan: plan.checkpoint_bytes,
        lambda plan: plan.flops_per_token,
        lambda plan: plan.time.compute_s,
    ):
        found, expected = total(of)
        assert found == pytest.approx(expected, rel=0.01 if of(whole) == whole.time.compute_s else 1e-9)


def test_a_tied_output_matrix_is_there_twice():
    whole = estimate(Lora(), SMALL).memory.weights_bytes
    parts = sum(estimate(Lora(), SMALL, stage).memory.weights_bytes for stage in stages_of(0, 8, 16))

    assert parts - whole == pytest.approx(2 * SMALL.vocab_size * SMALL.hidden_size)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("role", ["first", "middle", "last"])
@pytest.mark.parametrize("offload", ["none", "weights"])
def test_what_a_stage_costs_is_affine_in_its_layers(name, role, offload):
    if offload == "weights" and not METHODS[name].keeps_base_frozen:
        return

    def of(layers):
        index, first = {"first": (0, 0), "middle": (1, 3), "last": (2, 16 - layers)}[role]
        return estimate(METHODS[name], UNTIED, StagePart(index, 3, first, first + layers), offload=offload)

    plans = [of(layers) for layers in (2, 5, 8, 11)]

    for measure in (lambda plan: plan.memory.total_bytes, lambda plan: plan.memory.host_bytes):
        a, b, c, d = map(measure, plans)
        if (name, role) == ("full", "last") and b != c:  # of few layers the peak is another moment: the logits'
            assert b - a < c - b < d - c < 1.01 * (c - b)
            continue
        assert b - a == pytest.approx(c - b, rel=1e-6, abs=1e3)
        assert c - b == pytest.approx(d - c, rel=1e-6, abs=1e3)
    times = [plan.time.step_s for plan in plans]
    assert times == sorted(times)
    assert times[3] - times[2] == pytest.approx(times[2] - times[1], rel=0.02)


def test_boundaries_of_micro_batches_in_flight_are_what_checkpointing_keeps():
    """Of the first of three stages with 5 layers: 3 micro-batches x (5 inputs + what was handed on) x tokens x h."""
    whole_h = 512 * 2 * UNTIED.hidden_size
    saved = []
    for ahead in (0, 1):
        plan = estimate(Lora(), UNTIED, StagePart(0, 3, 0, 5, ahead))
        saved.append(plan.memory.activations_bytes)

    assert saved[1] - saved[0] == pytest.approx((5 - 3) * (5 + 1) * whole_h)


def test_without_checkpointing_all_that_a_layer_keeps_is_there_for_each_micro_batch_in_flight():
    two, three = (StagePart(1, count, 3, 8) for count in (3, 4))
    plans = [estimate(Lora(), UNTIED, stage, gradient_checkpointing=False) for stage in (two, three)]
    part = workload_of_stage(workload_of(UNTIED), two)
    techniques = techniques_of(two, gradient_checkpointing=False)
    footprint = Lora().costs(part.shape, techniques).footprint

    saved, _ = memory.activation_bytes(part, techniques, footprint, memory.Stack(), 512)

    assert saved > 5 * 512 * 2 * 10 * UNTIED.hidden_size
    handed_on = 512 * 2 * UNTIED.hidden_size
    assert plans[1].memory.activations_bytes - plans[0].memory.activations_bytes == pytest.approx(saved + handed_on)


def test_received_hidden_states_wait_in_host_memory():
    """Of a stage in the middle: (ahead + 2 posted, 1 on its way) x two neighbours."""
    message = message_bytes(512, UNTIED.hidden_size, "bfloat16")
    stage = StagePart(1, 3, 5, 10, ahead=1, wire="bfloat16")

    assert estimate(Lora(), UNTIED, stage).memory.host_bytes == 2 * 4 * message
    on_cpu = estimate(Lora(), UNTIED, stage, CPU, dtype="float32")
    assert on_cpu.memory.host_bytes == 0.0
    assert on_cpu.memory.buffers_bytes == 2 * 4 * message


def test_a_stage_streams_its_own_layers_alone():
    whole = estimate(QLora(), UNTIED, offload="weights")
    stages = [estimate(QLora(), UNTIED, stage, offload="weights") for stage in stages_of(0, 5, 11, 16)]
    middle = stages[1]

    assert middle.streamed_bytes == pytest.approx(2 * 6 / 16 * streamed_layers(UNTIED), rel=0.01)
    assert sum(one.streamed_bytes for one in stages) == pytest.approx(whole.streamed_bytes, rel=0.01)
    assert middle.memory.logits_bytes == 0.0


def streamed_layers(shape):
    g = 2 * (shape.num_embedding_parameters + shape.hidden_size)
    return estimate(QLora(), shape).memory.weights_bytes - 4 * estimate(QLora(), shape).num_trainable_parameters - g


def test_logits_are_only_where_the_output_matrix_is():
    first, middle, last = (estimate(Lora(), UNTIED, stage) for stage in stages_of(0, 5, 11, 16))

    assert first.memory.logits_bytes == middle.memory.logits_bytes == 0.0
    assert last.memory.logits_bytes == estimate(Lora(), UNTIED).memory.logits_bytes > 0
    matrix = 2 * UNTIED.vocab_size * UNTIED.hidden_size
    layers = (first.memory.weights_bytes - matrix) / 5
    assert middle.memory.weights_bytes == pytest.approx(6 * layers)


def test_only_a_stage_with_chosen_layers_trains_and_gradients_pass_those_above():
    method = Lora(layers_to_transform=[6, 7])
    first, middle, last = (estimate(method, UNTIED, stage) for stage in stages_of(0, 5, 11, 16))
    every = [estimate(Lora(), UNTIED, stage) for stage in stages_of(0, 5, 11, 16)]

    assert first.num_trainable_parameters == last.num_trainable_parameters == 0
    assert middle.num_trainable_parameters == estimate(method, UNTIED).num_trainable_parameters
    assert first.time.compute_s < 0.6 * every[0].time.compute_s, "nothing runs backward below layer 6"
    assert last.time.compute_s > 0.9 * every[2].time.compute_s


def test_layers_without_experts_keep_their_places_in_a_stage():
    config = {"model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000}
    config |= {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0, 4]}
    whole = ModelShape.from_config(config)
    parts = [shape_of_stage(whole, stage) for stage in stages_of(0, 2, 4, 6)]

    assert [part.dense_layers for part in parts] == [(0,), (), (0,)]
    assert sum(part.num_parameters for part in parts) == whole.num_parameters
    assert sum(part.num_product_weights for part in parts) == whole.num_product_weights


def test_the_estimate_of_a_stage_names_a_range_as_any_other():
    plan = estimate(Lora(), UNTIED, stages_of(0, 8, 16)[0])

    assert 0 < plan.memory.low_bytes < plan.memory.total_bytes < plan.memory.high_bytes
    assert plan.memory.total_bytes < 24 * GIB
    assert memory.message_buffers(workload_of(UNTIED), CARD, techniques_of(), 512) == (0.0, 0.0)
