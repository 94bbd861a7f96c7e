"""An embedded cluster is its user's alone: tried from another address, without its token, and as another user."""

import os
import socket
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from clusters.ray.connect import SLOT, CannotConnect, Connection, connect
from clusters.ray.node_daemon import CannotServe, address_towards
from tests.clusters.stranger import tries

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "GLOO_SOCKET_IFNAME")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a token that Ray left for everyone to read."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("a" * 64)
    (folder / ".ray" / "auth_token").chmod(0o644)
    return folder


@pytest.fixture(scope="module")
def embedded(home):
    """A cluster that is up, though the environment asks for one without a token."""
    import psutil

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_AUTH_TOKEN", "of another cluster")
        before = {name: os.environ.get(name) for name in NAMES}
        with connect("local", num_slots=1, cores_per_slot=1):
            import ray

            @ray.remote
            def where():
                return ray.util.get_node_ip_address()

            inside = ray.get(where.remote())
            folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            listening = [
                (process.name(), *connection.laddr)
                for process in processes
                for connection in process.net_connections("inet")
                if connection.status == "LISTEN"
            ]
            commands = [" ".join(process.cmdline()) for process in processes[1:]]
            address = ray.get_runtime_context().gcs_address
            yield SimpleNamespace(folder=folder, listening=listening, address=address, inside=inside, commands=commands)
        after = {name: os.environ.get(name) for name in NAMES}
        assert after == before and not folder.exists()


def test_it_listens_on_loopback_alone(embedded):
    assert len(embedded.listening) >= 5 and embedded.inside == "127.0.0.1"
    assert {address.removeprefix("::ffff:") for _, address, _ in embedded.listening} == {"127.0.0.1"}


def test_it_has_no_autoscaler_log_monitor_or_dashboard(embedded):
    running = " ".join(embedded.commands)

    assert "/raylet/raylet " in running
    assert "monitor.py" not in running and "dashboard/dashboard.py" not in running


def test_who_comes_from_another_address_of_the_machine_is_refused(embedded):
    try:
        outside = address_towards()
    except CannotServe:
        pytest.skip("this machine has no address but loopback")
    if outside.startswith("127."):
        pytest.skip("this machine has no address but loopback")

    for name, _, port in embedded.listening:
        with pytest.raises(ConnectionRefusedError), socket.create_connection((outside, port), timeout=5):
            pytest.fail(f"{name} answers at {outside}:{port}")


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_nobody_comes_in_without_its_token(embedded, token):
    assert tries(embedded.folder, embedded.address, token=token)["cluster"] == "closed"


def test_another_user_finds_every_door_closed(embedded):
    if os.getuid() != 0:
        pytest.skip("only root can try as another user")

    assert set(tries(embedded.folder, embedded.address, user="65534").values()) == {"closed"}


def test_the_token_is_its_own_and_only_its_owner_reads_it(embedded, home):
    token, users = embedded.folder / "auth_token", home / ".ray" / "auth_token"

    assert [stat.S_IMODE(path.stat().st_mode) for path in (embedded.folder, token, users)] == [0o700, 0o600, 0o600]
    assert len(token.read_text()) == 64 and token.read_text() != users.read_text() == "a" * 64
    assert embedded.folder.parent == Path(tempfile.gettempdir())


def test_a_folder_for_temporary_files_that_is_too_deep_for_sockets_is_not_used(tmp_path, monkeypatch):
    from clusters.ray.connect import _private_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 40)))
    with _private_folder() as folder:
        assert folder.parent == Path("/tmp")
    assert not folder.exists()


def test_a_folder_for_temporary_files_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")

    with pytest.raises(CannotConnect, match=r"no space for Ray's own files .*TMPDIR"), connect("local", 1, 1):
        pytest.fail("it started")


def test_a_node_that_offers_slots_may_join_after_the_connection(monkeypatch):
    """A pod's Ray starts beside the job that waits for it: cores of a head are not what its workers offer."""
    import ray

    connection = Connection(cores_per_slot=2)
    offered = {"CPU": 2.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: offered)
    assert connection.slot_resources == {"CPU": 2.0}

    offered[SLOT] = 1.0

    assert connection.slot_resources == {SLOT: 1.0}
