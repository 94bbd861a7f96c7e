"""A real Ray cluster of three nodes on this machine.  The fake is a driver's tool that takes its caller down."""

import os
import socket
import threading

import pytest

from clusters.capability import ClusterCapability
from clusters.probe.link import Peer
from clusters.ray import remote_objects
from clusters.ray.connect import CannotConnect, connect
from clusters.ray.probe import probe_cluster, unique

SMALL = {"object_store_memory": 80 * 2**20, "num_gpus": 0}


@pytest.fixture(scope="module")
def broken_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("broken")


@pytest.fixture(scope="module")
def address(broken_folder, measured):
    """Two nodes that bear the host's name, one of them without a CPU to give, and a broken one."""
    from ray.cluster_utils import Cluster

    tool = broken_folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nif [ -e {broken_folder}/hang ]; then exec sleep 60; fi\nkill -9 $PPID\n")
    tool.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(measured.xdg_cache_home))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **SMALL})
        try:
            cluster.add_node(num_cpus=0, **SMALL)
            path = {"PATH": f"{broken_folder}:{os.environ['PATH']}"}
            cluster.add_node(num_cpus=0, node_name="broken", env_vars=path, **SMALL)
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def probed(address):
    return probe_cluster(address)


def test_every_node_tells_its_figures(probed, measured):
    host = socket.gethostname()

    assert [node.name for node in probed.nodes] == [host, f"{host}-2"]
    assert [node.cpu for node in probed.nodes] == [measured.node.cpu] * 2


def test_the_link_between_two_nodes_is_measured(probed):
    (link,) = probed.links

    assert set(link.between) == {node.name for node in probed.nodes}
    assert 1e6 < link.bytes_per_s < 1e12
    assert 0 < link.round_trip_s < 1


def test_a_node_whose_probe_dies_is_named_and_the_others_count(probed):
    assert list(probed.failed) == ["broken"]
    assert "died" in probed.failed["broken"]
    assert len(probed.nodes) == 2


def test_what_was_probed_survives_a_way_through_json(probed):
    assert ClusterCapability.from_dict(probed.as_dict()) == probed


@pytest.mark.slow
def test_a_node_that_hangs_is_given_up(address, probed, broken_folder):
    (broken_folder / "hang").touch()
    try:
        again = probe_cluster(address, timeout_s=7)
    finally:
        (broken_folder / "hang").unlink()

    assert again.failed == {"broken": "no answer within 7 s"}
    assert len(again.nodes) == 2 and len(again.links) == 1


@pytest.mark.slow
def test_nodes_that_are_one_machine_do_not_measure_at_the_same_time(address, measured):
    remembered = measured.file.read_text()
    try:
        first, second = probe_cluster(address, refresh=True, seconds=0.3).nodes
    finally:
        measured.file.write_text(remembered)

    assert first.cpu == second.cpu != measured.node.cpu  # the second waited for the first and took its figures


def test_this_machine_needs_no_ray(measured, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(measured.xdg_cache_home))

    assert [node.cpu for node in probe_cluster("local").nodes] == [measured.node.cpu]


def test_an_address_without_a_cluster_is_refused():
    with pytest.raises(CannotConnect, match="no Ray cluster at"):
        probe_cluster("127.0.0.1:1")


def test_names_are_made_unique_without_taking_one_that_is_given():
    assert unique(["a", "a", "b", "a"]) == ["a", "a-2", "b", "a-3"]
    assert unique(["a", "a", "a-2"]) == ["a", "a-3", "a-2"]


def receiving(server):
    result = []
    thread = threading.Thread(target=lambda: result.append(server.receive()))
    thread.start()
    return thread, result


def test_a_stranger_at_the_port_does_not_spoil_the_measurement():
    server = Peer()
    port, token = server.listen()
    thread, result = receiving(server)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    round_trip_s = Peer().send("127.0.0.1", port, token)
    thread.join()

    assert result[0] > 1e6
    assert round_trip_s < 1


def test_slots_that_do_not_come_are_counted(address):
    with pytest.raises(CannotConnect, match="of 3 slots to train on 0 joined in 1 s"):
        probe_cluster(address, num_slots=3, slots_timeout_s=1.0)


class Counter:
    def __init__(self, first):
        self.count = first

    def add(self, number):
        self.count += number
        return self.count, os.environ["OMP_NUM_THREADS"]


def test_an_object_lives_on_the_node_that_is_named(address):
    with connect(address, num_slots=1, cores_per_slot=1):
        there = remote_objects.reachable()(socket.gethostname(), Counter, 5)

        assert there.add(2) == (7, "1") and there.add(1) == (8, "1")
        with pytest.raises(remote_objects.NoSuchNode, match="nowhere is not in the cluster, which has"):
            remote_objects.start("nowhere", Counter, 5)
