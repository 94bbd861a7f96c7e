"""What an API server says of its nodes becomes machines to plan for."""

import pytest

from clusters.units import GIB
from orchestrator.errors import JobError
from orchestrator.job.sections.machines import KubernetesSection
from orchestrator.remote.kube_nodes import read_nodes

PLAIN = KubernetesSection()


def node(name, cpu="16", memory="64Gi", gpus="0", product=None, vram=None, **spec):
    labels = {"nvidia.com/gpu.product": product, "nvidia.com/gpu.memory": vram}
    return {
        "metadata": {"name": name, "labels": {key: value for key, value in labels.items() if value}},
        "spec": spec,
        "status": {"allocatable": {"cpu": cpu, "memory": memory, "nvidia.com/gpu": gpus}},
    }


def test_cpus_and_cards_are_read_and_something_is_left_to_others():
    found = read_nodes(
        [
            node("plain", cpu="15890m", memory="65536Mi"),
            node("cards", gpus="2", product="NVIDIA-GeForce-RTX-4090", vram="24564"),
            node("small", cpu="1", memory="4Gi"),
        ],
        PLAIN,
    )

    plain, cards, small = found.nodes
    assert (plain.num_cores, small.num_cores) == (14, 1)
    assert plain.memory_bytes == pytest.approx(0.9 * 64 * GIB, rel=0.01)
    assert [device.name for device in cards.gpus] == ["RTX 4090", "RTX 4090"]
    assert cards.gpus[0].memory_total_bytes == 24 * GIB


def test_nodes_that_take_no_pods_are_left_out():
    control = node("control", taints=[{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}])
    gpu = node("gpu", gpus="1", product="Tesla-T4", taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}])
    found = read_nodes([control, node("cordoned", unschedulable=True), gpu], PLAIN)

    assert [one.name for one in found.nodes] == ["gpu"]


def test_nothing_to_plan_for_names_the_way_out():
    with pytest.raises(JobError, match=r"Wonder 9.*--hardware FILE"):
        read_nodes([node("odd", gpus="1", product="Wonder-9")], PLAIN)
    with pytest.raises(JobError, match=r"no node of the cluster takes pods"):
        read_nodes([], PLAIN)


def test_what_the_job_bears_and_selects_decides_which_nodes_count():
    ours = node("ours", taints=[{"key": "team", "value": "ml", "effect": "NoSchedule"}])
    ours["metadata"]["labels"]["pool"] = "training"
    theirs = node("theirs")
    bears = [{"key": "team", "value": "ml", "effect": "NoSchedule"}]

    def names(**asked):
        return [one.name for one in read_nodes([ours, theirs], KubernetesSection(**asked)).nodes]

    assert names() == ["theirs"]
    assert names(tolerations=bears) == ["ours", "theirs"]
    assert names(tolerations=[{"operator": "Exists"}], node_selector={"pool": "training"}) == ["ours"]
    assert names(tolerations=[{**bears[0], "value": "web"}]) == ["theirs"]
