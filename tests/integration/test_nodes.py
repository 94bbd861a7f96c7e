"""head, join and nodes: a mistake is refused at once, with its exit code, and nothing is started."""

import json
import os
import socket

import pytest

from orchestrator.cli.machines import _latest
from tests.cli import called
from tests.processes import free_port


@pytest.fixture(autouse=True)
def no_settings_of_ray(monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


def said(home, *arguments):
    """Exit code, standard output, standard error."""
    done = called(*arguments, cwd=home, HOME=str(home))
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("head", ["host:port", ":6379", "10.0.0.1:99999", "10.0.0.1:0", ""])
def test_what_is_no_address_is_not_knocked_at(tmp_path, head):
    code, _, told = said(tmp_path, "join", head)

    assert code == 2
    assert f"{head!r} is not HOST or HOST:PORT" in told


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        (("head", "--interface", "lo", "--address", "127.0.0.1"), 2, "give one of them"),
        (("head", "--name", "a/b"), 2, "--name 'a/b'"),
        (("head", "--address", "203.0.113.7"), 4, "is not an IPv4 address of this machine"),
        (("head", "--interface", "nosuch0"), 4, "nosuch0: has no IPv4 address here"),
        (("join", "127.0.0.1"), 4, "there is no token in"),
    ],
)
def test_a_mistake_ends_with_its_code_and_leaves_nothing(tmp_path, arguments, expected, words):
    code, _, told = said(tmp_path, *arguments)

    assert code == expected
    assert words in told and "Traceback" not in told
    assert not (tmp_path / ".ray").exists()


@pytest.mark.parametrize("option", ["--port", "--dashboard-port"])
def test_a_head_on_a_port_that_is_taken_ends_at_once(tmp_path, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, told = said(tmp_path, "head", "--address", "127.0.0.1", "--port", free_port(), option, port)

    assert code == 4
    assert f"port {port} is in use" in told and f"{option} takes another" in told and "Traceback" not in told
    assert not (tmp_path / ".ray").exists()


def test_nodes_of_no_cluster_say_how_to_have_one(tmp_path):
    code, told, _ = said(tmp_path, "nodes", "--cluster", f"127.0.0.1:{free_port()}", "--json")

    assert code == 4
    assert "Start one with `orchestrator head`" in json.loads(told)["error"]


def test_earlier_lives_of_a_node_that_came_back_are_not_shown():
    def row(name, state, slots):
        return {"name": name, "state": state, "slots": slots}

    found = [row("b", "lost", 0), row("a", "alive", 1), row("b", "alive", 2), row("b", "lost", 0), row("c", "lost", 0)]

    assert _latest(found) == [row("a", "alive", 1), row("b", "alive", 2), row("c", "lost", 0)]
