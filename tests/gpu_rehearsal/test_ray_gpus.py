"""Ray told of four GPUs that are not there: workers, jobs, trials and others get distinct ones.  No kernel runs."""

import dataclasses
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from clusters.capability import DeviceCapability
from clusters.hardware.interfaces import gloo_talks_at, interface_at
from clusters.ray.connect import connect
from clusters.ray.gpu_reservation import (
    CannotReserve,
    GpuGone,
    Reservation,
    ReservedGpu,
    Wanted,
    _start,
    by_uuid,
    matched,
    reserve,
    see,
    visible,
)
from clusters.units import GIB
from tests.orchestrator.planning.test_choice import SMALL, machine, plan
from tests.processes import wait_for

UUIDS = tuple(f"GPU-{index}aaaaaaa-0000-1111-2222-333333333333" for index in range(4))
LOST = "ab" * 28  # the id of a node that is in no cluster
SMI = f"""#!{sys.executable}
import sys
query = next(a.split("=", 1)[1].split(",") for a in sys.argv if a.startswith("--query-gpu="))
for index, uuid in enumerate({UUIDS!r}):
    row = {{"index": index, "uuid": uuid, "name": "Card", "memory.free": 24000, "memory.total": 24576,
           "power.limit": 350, "driver_version": "580.95", "compute_cap": "8.6", "pci.bus_id": f"0{{index}}:00.0"}}
    print(", ".join(str(row[key]) for key in query))
"""


def with_uuids(node, first=0):
    """The same machine, its GPUs known by UUID."""
    number = iter(UUIDS[first:])
    devices = (device if device.kind == "cpu" else dataclasses.replace(device, uuid=next(number))
               for device in node.devices)  # fmt: skip
    return dataclasses.replace(node, devices=tuple(devices))


@pytest.fixture(scope="module")
def on_two_gpus():
    """A plan of two workers for the second and third of these GPUs."""
    node = with_uuids(machine("a", "RTX 3090", "RTX 3090"), first=1)
    made = plan(SMALL, node, text="cluster: {num_workers: 2}\n", samples=6400)
    assert [part.uuid for part in made.nodes] == [*UUIDS[1:3]]
    return SimpleNamespace(plan=made, node=node)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray as `submit` starts it on a machine of four GPUs, and its only node."""
    import ray

    folder = tmp_path_factory.mktemp("bin")
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    gpus = [DeviceCapability("cuda", "Card", 24 * GIB, uuid=uuid) for uuid in UUIDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with connect("local", num_slots=4, cores_per_slot=1, gpus=gpus):
            yield SimpleNamespace(node=ray.get_runtime_context().get_node_id())
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def wanting(cluster, *numbers, others=()):
    return [Wanted(cluster.node, (UUIDS[number], *(UUIDS[other] for other in others))) for number in numbers]


def ids(reservation):
    return [one.id for one in reservation.held]


def gpus_become_free(count):
    """Whether so many are free, once what was given back is known."""
    import ray

    return wait_for(lambda: ray.available_resources().get("GPU", 0) == count)


def test_the_planned_gpus_are_held_and_the_others_given_back(cluster):
    reservation = reserve(wanting(cluster, 2, 0), print)

    assert ids(reservation) == [UUIDS[2], UUIDS[0]]
    assert gpus_become_free(2)
    reservation.release()
    assert gpus_become_free(4)


def test_another_user_of_the_cluster_gets_a_gpu_that_no_job_has(cluster):
    import ray

    class Other:
        def sees(self):
            return os.environ["CUDA_VISIBLE_DEVICES"]

    mine = reserve(wanting(cluster, 0, 1), print)
    other = ray.remote(Other).options(num_gpus=1, num_cpus=0).remote()

    assert ray.get(other.sees.remote()) not in ids(mine)
    mine.release()
    ray.kill(other)


def test_two_jobs_that_were_planned_for_one_gpu_get_two_that_are_alike(cluster):
    first, second = (reserve(wanting(cluster, 3, others=(2,)), print) for _ in range(2))

    assert {*ids(first), *ids(second)} == {UUIDS[3], UUIDS[2]}
    first.release()
    second.release()


def test_a_job_waits_for_its_gpu_says_so_and_holds_nothing_meanwhile(cluster):
    first, said = reserve(wanting(cluster, 3), print), []

    assert reserve(wanting(cluster, 3), said.append, is_over=lambda: True) is None
    assert len(said) == 1 and UUIDS[3] in said[0]
    assert gpus_become_free(3)
    first.release()


def test_a_gpu_that_was_taken_out_of_its_machine_is_not_waited_for(cluster):
    with pytest.raises(GpuGone, match=f"GPU-old, which the plan is for, is no longer in its node: .*{UUIDS[3]}"):
        reserve([Wanted(cluster.node, ("GPU-old",))], print, is_over=lambda: True)
    assert gpus_become_free(4)


def test_a_lost_node_is_not_waited_for_and_is_a_failure_that_is_recovered_from(cluster, on_two_gpus, tmp_path):
    from clusters.capability import ClusterCapability
    from orchestrator.errors import RunFailed
    from orchestrator.runs.run_folder import RunFolder
    from orchestrator.training.workers.launch import launch

    (tmp_path / "capability.json").write_text(json.dumps(ClusterCapability((on_two_gpus.node,)).as_dict()))

    assert _start(LOST, 1) is None  # lost between the question and the answer
    with pytest.raises(CannotReserve, match="left the cluster"):
        reserve([Wanted(LOST, (UUIDS[0],))], print, is_over=lambda: True)
    with pytest.raises(RunFailed, match="left the cluster"):
        launch(RunFolder(tmp_path), on_two_gpus.plan, {}, {"a": LOST})
    assert gpus_become_free(4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own settings, where a trainer is made
def test_two_workers_see_one_planned_gpu_each_before_cuda_starts(cluster, on_two_gpus, tmp_path):
    from ray.train import RunConfig, ScalingConfig

    from clusters.ray.connect import SLOT
    from orchestrator.training.workers.launch import _Trainer, _WorkerSetup, environments

    def worker(config):
        import ray.train
        import torch

        told = {
            "sees": os.environ["CUDA_VISIBLE_DEVICES"],
            "order": os.environ["CUDA_DEVICE_ORDER"],
            "gloo": os.environ["GLOO_SOCKET_IFNAME"],
            "allocator": os.environ["PYTORCH_ALLOC_CONF"],
            "started": torch.cuda.is_initialized(),
        }
        rank = ray.train.get_context().get_world_rank()
        Path(f"{config['folder']}/{rank}.json").write_text(json.dumps(told))

    reservation = reserve(wanting(cluster, 1, 2), print)
    own = environments(on_two_gpus.plan, reservation, {})
    _Trainer(
        worker,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={SLOT: 1}),
        run_config=RunConfig(name="two", storage_path=str(tmp_path / "ray")),
        backend_config=_WorkerSetup(backend="gloo", environments=own),
    ).fit()
    reservation.release()

    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["sees"] for one in told] == [UUIDS[1], UUIDS[2]]
    assert all(one["order"] == "PCI_BUS_ID" and one["gloo"] == "lo" for one in told)
    assert not any(one["started"] for one in told)
    assert all(one["allocator"] == "expandable_segments:True" for one in told)


def test_two_trials_at_a_time_see_two_gpus(cluster, on_two_gpus, tmp_path, monkeypatch):
    from clusters.ray.connect import SLOT
    from orchestrator.runs.search_folder import Trial
    from orchestrator.search import tuning

    class Looks(tuning._Runner):
        """A worker that says what it sees in place of training."""

        def _take(self, config):
            self.number = config["number"]

        def step(self):
            (tmp_path / str(self.number)).touch()
            until = time.monotonic() + 600
            while not all((tmp_path / number).exists() for number in ("0", "1")) and time.monotonic() < until:
                time.sleep(0.1)
            trial = Trial(self.number, {}, "finished", reason=os.environ["CUDA_VISIBLE_DEVICES"], steps=1)
            return {"step": 1, "judged": 0.0, "trial": dataclasses.asdict(trial), "done": True}

    class Search:
        """Two trials of one plan."""

        def __init__(self):
            self.waiting, self.trials = [0, 1], []

        def next_trial(self):
            return tuning.NextTrial(self.waiting.pop(0), {}, {"a": [on_two_gpus.plan]}, "") if self.waiting else None

        def started(self, number): ...

        def ended(self, trial):
            self.trials.append(trial)

        def failed(self, number, reason):
            raise AssertionError(reason)

        def enough(self):
            return False

    monkeypatch.setattr(tuning, "_Runner", Looks)
    search = Search()
    tuning.tune_trials(tmp_path, search, tuning.Slots({"a": 2}, {SLOT: 1.0}, {}), 2, tuning.Decisions("none", 1))

    assert len(search.trials) == 2
    seen = {trial.reason for trial in search.trials}
    assert len(seen) == 2 and seen <= set(UUIDS)


@pytest.mark.parametrize(
    ("wanted", "held", "found"),
    [
        ([("a",), ("b",)], ["b", "a"], {0: 1, 1: 0}),
        ([("a", "b"), ("b", "a")], ["b", "a"], {0: 1, 1: 0}),
        ([("a", "b", "c"), ("a", "b")], ["b", "c"], {0: 1, 1: 0}),  # who is content with fewer goes first
        ([(), ("a",)], ["a", "b"], {0: 1, 1: 0}),
        ([("a",)], ["b"], {}),
        ([()], ["0"], {0: 0}),
    ],
)
def test_who_gets_which_of_the_held_gpus(wanted, held, found):
    assert matched([Wanted("node", uuids) for uuids in wanted], held) == found


def test_a_gpu_is_as_good_as_the_planned_one_with_its_name_and_with_room(on_two_gpus):
    from clusters.capability import ClusterCapability
    from orchestrator.training.workers.gpu_locks import equivalent_gpus

    planned, alike = on_two_gpus.node.gpus
    full = dataclasses.replace(alike, memory_bytes=1 * GIB)
    part = on_two_gpus.plan.nodes[0]

    def uuids(*gpus):
        node = dataclasses.replace(on_two_gpus.node, devices=gpus)
        return equivalent_gpus(part, ClusterCapability((node,)))

    assert uuids(planned, alike) == (planned.uuid, alike.uuid)
    assert uuids(planned, full) == (planned.uuid,)
    assert uuids(planned, dataclasses.replace(alike, name="GTX 1060 6GB")) == (planned.uuid,)


def test_where_ray_has_no_gpus_the_planned_one_is_used(on_two_gpus):
    from orchestrator.training.workers.launch import environments, in_order, notices

    reservation = Reservation([None, ReservedGpu("3", None)])
    own = environments(on_two_gpus.plan, reservation, {"a": "id"})
    unreserved, exchanged = notices(on_two_gpus.plan, reservation)

    assert "does not assign" in unreserved and "of a:" in unreserved and UUIDS[2] in exchanged
    assert [one["CUDA_VISIBLE_DEVICES"] for one in in_order(["id", "id"], own)] == [UUIDS[1], "3"]


def test_each_maker_has_its_own_variable():
    nvidia = [DeviceCapability("cuda", "Card", 1, uuid=uuid) for uuid in UUIDS[:2]]

    assert visible("cuda", "GPU-1") == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert visible("rocm", "GPU-1") == {"ROCR_VISIBLE_DEVICES": "GPU-1", "HIP_VISIBLE_DEVICES": "0"}
    assert visible("rocm", "1") == {"HIP_VISIBLE_DEVICES": "1"}
    assert visible("cpu", None) == {}
    assert by_uuid(nvidia)["CUDA_VISIBLE_DEVICES"] == f"{UUIDS[0]},{UUIDS[1]}"
    assert by_uuid([*nvidia, DeviceCapability("cuda", "Card", 1)]) == {}


def test_a_worker_in_which_cuda_has_started_is_no_longer_given_a_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    with pytest.raises(RuntimeError, match="CUDA has started before"):
        see({"CUDA_VISIBLE_DEVICES": UUIDS[0]})
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != UUIDS[0]


@pytest.mark.parametrize(
    ("kinds", "backend"),
    [
        (("cuda", "cuda"), "nccl"),
        (("rocm", "rocm"), "nccl"),
        (("cuda", "rocm"), "gloo"),
        (("cuda", "cpu"), "gloo"),
        (("cuda",), "gloo"),
        (("cpu", "cpu"), "gloo"),
    ],
)
def test_only_gpus_of_one_maker_talk_by_nccl(on_two_gpus, kinds, backend):
    parts = (dataclasses.replace(on_two_gpus.plan.nodes[0], kind=kind) for kind in kinds)

    assert dataclasses.replace(on_two_gpus.plan, nodes=tuple(parts)).backend == backend


def test_gloo_talks_where_the_cluster_knows_the_node_and_not_at_the_name_of_the_machine(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    gloo_talks_at("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"

    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    gloo_talks_at("127.0.1.1")  # what Debian calls the machine by: no interface's own
    assert "GLOO_SOCKET_IFNAME" not in os.environ

    gloo_talks_at("127.0.0.1")
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == interface_at("127.0.0.1")
    assert interface_at("127.0.0.1") in {name for _, name in socket.if_nameindex()}
