"""Ray told of two GPUs by number, on a machine of two makers: two drivers, and cards that Ray cannot name."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from clusters.capability import DeviceCapability
from clusters.hardware.gpus import look_at_gpus
from clusters.ray.connect import connect
from clusters.ray.gpu_reservation import Wanted, _Holder, reserve
from clusters.units import GIB
from tests.gpu_rehearsal.cards import RTX_3090, RX_7900_XTX, Machine, radeon

OTHER_DRIVER = """
import sys
import ray
from clusters.ray.gpu_reservation import Wanted, reserve
node, *uuids = sys.argv[1:]
ray.init(address="auto", log_to_driver=False, logging_level="error")
reservation = reserve([Wanted(node, tuple(uuids))], print)
print("holds", reservation.held[0].id, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray as `submit` starts it where a driver tells no UUIDs, its only node, and the UUIDs that are there."""
    import ray

    folder = tmp_path_factory.mktemp("bin")
    second = radeon("Radeon RX 7900 XTX", 23.98, 300, "327.0", "0000:0a:00.0")
    Machine((RTX_3090, RTX_3090), (RX_7900_XTX, second)).install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            patch.delenv(name, raising=False)
        gpus, _ = look_at_gpus()
        with connect("local", 2, 1, gpus=[DeviceCapability("cuda", "Card", 24 * GIB)] * 2):
            yield SimpleNamespace(
                node=ray.get_runtime_context().get_node_id(),
                address=ray.get_runtime_context().gcs_address,
                nvidia=[gpu.uuid for gpu in gpus if gpu.kind == "cuda"],
                amd=[gpu.uuid for gpu in gpus if gpu.kind == "rocm"],
            )


def test_the_jobs_of_two_drivers_get_two_gpus(cluster):
    environment = {
        **os.environ,
        "RAY_ADDRESS": cluster.address,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # on loopback
    command = [sys.executable, "-c", OTHER_DRIVER, cluster.node, *cluster.nvidia]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as other:  # type: ignore[call-overload]
        theirs = next(line.split()[1] for line in other.stdout if line.startswith("holds"))
        mine = reserve([Wanted(cluster.node, tuple(cluster.nvidia))], print)
        other.stdin.close()

    assert {theirs, mine.held[0].id} == set(cluster.nvidia)
    mine.release()


def test_a_card_that_ray_does_not_hand_out_is_not_waited_for(cluster):
    said = []
    reservation = reserve([Wanted(cluster.node, (cluster.amd[1],))], said.append, is_over=lambda: True)

    assert reservation is not None and reservation.held == [None]
    assert not said


def test_a_holder_names_the_one_of_two_radeons_that_it_is_shown(cluster):
    import ray

    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"HIP_VISIBLE_DEVICES": "1"}}}
    holder = ray.remote(_Holder).options(num_gpus=1, **options).remote()

    assert ray.get(holder.gpu.remote()) == cluster.amd[1]
    assert {*cluster.amd} <= {*ray.get(holder.uuids.remote())}
    ray.kill(holder)
