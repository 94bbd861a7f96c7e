"""What is computed once is predicted to cost once: tokens, time and memory, by the rows that share a micro-batch."""

import dataclasses

import pytest

from clusters.capability import DeviceCapability, NodeCapability
from strategies import METHODS
from strategies.cost.memory import Footprint
from strategies.cost.reuse import computed_part, ratio_of_step, with_kept_layers, workload_of_trees
from strategies.cost.work import Work
from strategies.shape import ModelShape
from strategies.workload import Techniques, Workload

SMOL = ModelShape(576, 30, 9, 3, 64, 1536, 49152, True)
CPU = DeviceCapability("cpu", "a", 24 * 2**30, flops_per_s={"float32": 1e11, "bfloat16": 2e11})
NODE = NodeCapability("here", 4, 24 * 2**30, (CPU,))
SEPARATE = Techniques("bfloat16", "document", True, False, 1, 1024)
SHARED = dataclasses.replace(SEPARATE, share_prefixes=True)


def workload(**changes):
    """Eight rows of 100 tokens a step, which together have 1.6 tokens for each of their tree."""
    found = Workload(SMOL, 800, 80_000, 8000, 120, 8, 100, 800, mean_square_length=10_100, fullest_step_tokens=900)
    return dataclasses.replace(found, tree_ratio={1: 1.0, 2: 1.2, 4: 1.4, 8: 1.6}, **changes)


def test_rows_together_decide_how_much_is_computed():
    assert computed_part(workload(), SHARED) == pytest.approx(1 / 1.6)
    assert computed_part(workload(share=0.25), SHARED) == pytest.approx(1 / 1.2)
    assert computed_part(workload(), SEPARATE) == 1.0


def test_between_counted_numbers_of_rows_the_ratio_lies_between():
    assert ratio_of_step(workload(share=0.75)) == pytest.approx(1.4 + 0.2 * 0.585, abs=1e-3)
    assert ratio_of_step(workload(global_batch_size=64, num_steps=10)) == 1.6
    assert ratio_of_step(dataclasses.replace(workload(), tree_ratio={})) == 1.0


def test_supervised_tokens_stay_and_the_fullest_step_spares_as_many_tokens():
    left = workload_of_trees(workload(), SHARED)

    assert left.num_tokens == 50_000
    assert left.num_supervised_tokens == 8000
    assert left.fullest_step_tokens == 600
    assert workload_of_trees(workload(), SEPARATE) == workload()


def test_a_step_is_predicted_shorter_and_no_larger():
    method = METHODS["lora"]()
    separate, shared = (method.estimate(workload(), CPU, NODE, one) for one in (SEPARATE, SHARED))

    assert 1 / 1.6 <= shared.time.compute_s / separate.time.compute_s < 0.72
    assert shared.memory.total_bytes < separate.memory.total_bytes
    assert shared.memory.logits_bytes == pytest.approx(separate.memory.logits_bytes, rel=0.1)
    assert (shared.computed_part, separate.computed_part) == (1 / 1.6, 1.0)


UPPER = METHODS["lora"](layers_to_transform=list(range(15, 30)))
KEPT = dataclasses.replace(SEPARATE, cache_frozen_activations=True)


def test_frozen_layers_below_the_first_that_trains_cost_their_first_pass_alone():
    one, three = (workload(num_samples_seen=epochs * 800, num_steps=epochs * 100) for epochs in (1, 3))
    plain, kept = (UPPER.estimate(three, CPU, NODE, techniques) for techniques in (SEPARATE, KEPT))

    assert UPPER.estimate(one, CPU, NODE, KEPT).time == UPPER.estimate(one, CPU, NODE, SEPARATE).time
    # forward 1 and backward 1/2 of the layers' products, of which 2/3 of a half are known
    assert kept.time.compute_s / plain.time.compute_s == pytest.approx(1 - 1 / 3 / 1.5, abs=0.03)
    assert kept.memory.tensors_bytes - plain.memory.tensors_bytes == pytest.approx(80_000 * 576 * 2, rel=0.1)


def test_on_the_disk_no_memory_is_taken_and_each_pass_costs_what_the_disk_takes():
    three = workload(num_samples_seen=2400, num_steps=300)
    node = dataclasses.replace(NODE, disk_write_bytes_per_s=1e8, disk_read_bytes_per_s=4e8)
    in_memory, plain = (UPPER.estimate(three, CPU, node, one) for one in (KEPT, SEPARATE))

    on_disk = UPPER.estimate(three, CPU, node, dataclasses.replace(KEPT, cache_frozen_activations="disk"))

    assert on_disk.disk_bytes == 80_000 * 576 * 2 and in_memory.disk_bytes == 0
    assert on_disk.memory.total_bytes == plain.memory.total_bytes < in_memory.memory.total_bytes
    moved = 8 * 100 * 576 * 2  # of a step
    taken = on_disk.time.transfer_s - in_memory.time.transfer_s
    assert taken == pytest.approx(moved * (1 / 3 / 1e8 + 2 / 3 / 4e8))


def test_a_gpu_keeps_them_in_the_memory_of_its_host():
    card = DeviceCapability("cuda", "card", 24 * 2**30, flops_per_s={"bfloat16": 1e14}, compute_capability=(8, 6))
    node = NodeCapability("here", 4, 24 * 2**30, (card, CPU))
    three = workload(num_samples_seen=2400, num_steps=300)

    plain, kept = (UPPER.estimate(three, card, node, techniques).memory for techniques in (SEPARATE, KEPT))

    assert kept.total_bytes == plain.total_bytes
    assert kept.host_bytes - plain.host_bytes == 80_000 * 576 * 2


@pytest.mark.parametrize(("epochs", "passes"), [(1, 1.0), (2, (1 + 1 - 0.5) / 2), (3, (1 + 0.5 + 0.25) / 3)])
def test_a_worker_of_two_knows_what_it_has_met_before(epochs, passes):
    alone = dataclasses.replace(KEPT, max_length=100)  # a sample a row
    half = workload(num_samples_seen=epochs * 800, num_steps=epochs * 100, share=0.5)

    _, work = with_kept_layers(half, alone, Footprint(0.0, 0), Work(False, first_layer=15))

    assert work.lower_passes == pytest.approx(passes)


def test_a_row_of_many_samples_is_known_to_one_of_two_workers_by_chance_alone():
    half, rows = workload(num_samples_seen=2400, num_steps=300, share=0.5), []
    for max_length in (100, 200, 400):
        techniques = dataclasses.replace(KEPT, max_length=max_length)
        rows.append(with_kept_layers(half, techniques, Footprint(0.0, 0), Work(False, first_layer=15))[1].lower_passes)

    assert rows == sorted(rows) and rows[-1] > 0.85


def test_where_the_first_layer_trains_nothing_is_kept():
    three = workload(num_samples_seen=2400, num_steps=300)
    method = METHODS["lora"]()

    assert method.estimate(three, CPU, NODE, KEPT).time == method.estimate(three, CPU, NODE, SEPARATE).time
