"""What plans say of workers that train apart: what their coming together costs, and what lies beside the adapter."""

import pytest

from strategies.cost.network import Network
from tests.orchestrator.planning.machines import SMALL
from tests.orchestrator.planning.test_pipelines import plan, two

APART = "method: {type: lora}\nstrategy: {mode: ddp, local_steps: 8"


def test_products_wait_for_every_other_workers_adapter_and_their_averaging():
    factors = plan(SMALL, two(1.25e6), f"{APART}}}")
    product = plan(SMALL, two(1.25e6), f"{APART}, local_steps_merge: product}}")

    network = Network(2, 1.25e6, 3e-4)
    sent = 4.0 * product.num_trainable_parameters
    assert product.techniques.local_merge == "product" and product.local_batch_size == 64
    assert product.sync_s == pytest.approx(network.averaged_products_s(sent, 16))
    assert product.sync_s > network.gather_s(2 * sent) == pytest.approx(network.all_reduce_s(sent), rel=0.01)
    assert product.hash != factors.hash and product.memory == factors.memory


def test_what_is_kept_of_restarted_pairs_is_in_the_memory():
    product = plan(SMALL, two(), f"{APART}, local_steps_merge: product}}")
    reset = plan(SMALL, two(), f"{APART}, local_steps_merge: product, local_steps_reset: true}}")

    kept_bytes = 8 * 4.0 * product.num_trainable_parameters
    assert reset.memory.weights_bytes == pytest.approx(product.memory.weights_bytes + kept_bytes)
    assert reset.num_trainable_parameters == product.num_trainable_parameters
