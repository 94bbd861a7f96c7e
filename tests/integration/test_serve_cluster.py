"""Serving through a real Ray head with a token: its REST API of Serve, its proxy, what it says of a missing ray[llm].

The GPU is only named, and a small application stands for Ray Serve LLM.
"""

import asyncio
import json
import os
import urllib.request

import pytest

from orchestrator.serving.engines.protocol import Query, Refused, ServedModel
from orchestrator.serving.engines.ray_serve import LlmApplication, RayServeEngine
from tests.processes import ROOT, end, free_port, listens, start_python, wait_for

pytest.importorskip("grpc_reflection", reason="Ray Serve needs grpcio-reflection, an extra of `dev`")
TOKEN = "5f0c2d9e" * 8
MODEL = ServedModel("base", "/models/base")
# Loaded by every process of the cluster: the module that ray[llm] fills is the stand-in, once the file is there.
SITE = """
import importlib.abc, importlib.util, os, sys

class StandIn(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "ray.serve.llm" and os.path.exists(os.environ["HAS_LLM"]):
            return importlib.util.spec_from_file_location(name, os.environ["STAND_IN"])

sys.meta_path.insert(0, StandIn())
"""


class Cluster:
    """A Ray head, and an application of somebody else on it."""

    def __init__(self, folder, port):
        self.folder, self.address = folder, f"http://127.0.0.1:{port}"

    def call(self, method, body=None):
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        sent = body and json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/api/serve/applications/", sent, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.read()

    def replicas(self):
        """Of each application that runs."""
        found = json.loads(self.call("GET"))["applications"]
        return {
            name: [one["replica_id"] for part in app["deployments"].values() for one in part["replicas"]]
            for name, app in found.items()
            if app["status"] == "RUNNING"
        }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "sitecustomize.py").write_text(SITE)
    dashboard = free_port()
    own = {"HAS_LLM": folder / "has_llm", "ENDED": folder / "ended", "HOME": folder}
    own["STAND_IN"] = ROOT / "tests" / "integration" / "stand_in_llm.py"
    environment = {name: str(path) for name, path in own.items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    options = ["--head", "--block", f"--port={free_port()}", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    options += ["--num-gpus=1", "--include-dashboard=true", f"--dashboard-port={dashboard}"]
    options += ["--object-store-memory=100000000"]
    process = start_python(
        "-m", "ray.scripts.scripts", "start", *options, cwd=folder, output=folder / "head.log", **environment
    )
    wait_for(lambda: listens(dashboard), process)
    made = Cluster(folder, dashboard)
    other = {"name": "other", "route_prefix": "/other", "import_path": "tests.integration.stand_in_llm:other_app"}
    options = {"host": "127.0.0.1", "port": free_port()}
    made.call("PUT", {"applications": [other], "http_options": options})
    wait_for(lambda: "other" in made.replicas(), process)
    yield made
    end(process)


@pytest.fixture
def engine(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    said = []
    made = RayServeEngine(cluster.address, LlmApplication(MODEL.base, MODEL.base), None, said.append, 0.5)
    return made, said


def asked(text):
    return Query(MODEL, messages=[{"role": "user", "content": text}])


async def answer(engine, text):
    return "".join([piece.text async for piece in engine.generate(asked(text))])


@pytest.mark.slow
def test_a_cluster_without_ray_llm_says_so_and_keeps_what_it_runs(cluster, engine):
    before = cluster.replicas()

    with pytest.raises(Refused, match=r"Neither vLLM nor SGLang.* pip install 'ray\[llm\]==2\.60\.\d+' on every node"):
        asyncio.run(engine[0].start())

    assert set(before) == {"other"} and cluster.replicas() == before


@pytest.mark.slow
def test_it_is_deployed_asked_started_again_and_removed_beside_another(cluster, engine):
    engine, said = engine
    (cluster.folder / "has_llm").touch()
    before, ended = cluster.replicas(), cluster.folder / "ended"

    async def run():
        await engine.start()
        try:
            assert len(cluster.replicas()) == 2 and await answer(engine, "hello") == "base: hello"
            pieces = engine.generate(asked("for ever"))
            assert [(await anext(pieces)).text for _ in range(5)] == ["base", ": ", "for ever", ".", "."]
            await pieces.aclose()
            while "for ever" not in ended.read_text():
                await asyncio.sleep(0.1)
            with pytest.raises(Refused) as caught:
                await answer(engine, "die")
            while True:  # until Ray has started it again
                try:
                    return caught.value.status, await answer(engine, "hello")
                except Refused as refusal:
                    assert refusal.status == 503
                    await asyncio.sleep(0.5)
        finally:
            await engine.stop()

    assert asyncio.run(run()) == (503, "base: hello")
    assert cluster.replicas() == before and any("answers at http://127.0.0.1:" in line for line in said)
