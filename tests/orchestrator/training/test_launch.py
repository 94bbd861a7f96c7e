"""Where workers meet before they train."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from orchestrator.training.workers import launch
from orchestrator.training.workers.connections import store_at
from tests.orchestrator.planning.test_choice import SMALL, machine, plan


@pytest.mark.parametrize(
    ("machines", "backend"),
    [
        ((machine("a", "RTX 3090"),), "gloo"),
        ((machine("a", "RTX 3090", "RTX 3090"),), "nccl"),
        ((machine("a", "RTX 3090"), machine("b")), "gloo"),
    ],
)
def test_only_several_gpus_ask_for_nccl(machines, backend):
    text = "strategy: {mode: ddp}\n" if sum(len(node.gpus) or 1 for node in machines) > 1 else ""
    made = plan(SMALL, *machines, link_bytes_per_s=1e10, samples=3200, text=text)

    assert len(made.nodes) == sum(len(node.gpus) or 1 for node in machines)
    assert made.backend == backend


def test_the_store_of_the_workers_listens_on_the_address_that_was_named_alone():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    with ThreadPoolExecutor(2) as both:  # each waits for the other
        first = both.submit(store_at, "127.0.0.1", port, 2, timedelta(seconds=20), listener)
        second = both.submit(store_at, "127.0.0.1", port, 2, timedelta(seconds=20))
        served, joined = first.result(), second.result()

    joined.set("a", "1")
    assert served.get("a") == b"1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


@pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning:ray.data.context")  # Ray 2.60 reads options of its own
@pytest.mark.parametrize("is_embedded", [True, False])
def test_ray_train_starts_no_actor_that_has_nothing_to_do(is_embedded):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy.factory import create_scaling_policy

    trainer = launch._Trainer(print, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig())
    trainer.is_embedded = is_embedded
    policy = create_scaling_policy(trainer.scaling_config)

    callbacks = {type(one).__name__ for one in trainer._create_default_callbacks()}
    launch.request_nothing(policy)
    policy._send_resource_request()
    policy._maybe_send_resource_request()
    policy._cancel_resource_request()

    assert "BackendSetupCallback" in callbacks and "DatasetsCallback" not in callbacks
    assert ("PlacementGroupCleanerCallback" in callbacks) is not is_embedded
    assert policy._coordinator_client is None  # which would start the actor
