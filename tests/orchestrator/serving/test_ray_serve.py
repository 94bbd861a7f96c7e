"""Ray Serve LLM through a double at its HTTP doors: deployed, asked, watched and removed; others' applications kept."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from clusters.ray.serve_dashboard import DashboardRefuses, others_than
from orchestrator.errors import JobError
from orchestrator.serving.catalog import ServedBase
from orchestrator.serving.engine_choice import EngineOptions, engine_of
from orchestrator.serving.engines.protocol import Query, Refused, ServedModel
from orchestrator.serving.engines.ray_serve import LlmApplication, RayServeEngine
from strategies.adapter_bank.object_store import ObjectStore
from tests.conftest import SMALL_MODEL
from tests.orchestrator.serving.conftest import adapter, answer, question
from tests.orchestrator.serving.fake_ray_serve import FakeApplication, FakeCluster
from tests.processes import outcome, start, wait_for

BASE = ServedModel("base", "/models/base")
APPLICATION = LlmApplication("/models/base", "/models/base", most_rank=16, max_adapters=4)
OTHER = {
    "name": "search",
    "route_prefix": "/search",
    "import_path": "search.app:build",
    "args": {"shards": 3},
    "runtime_env": {"env_vars": {"KEY": "value"}},
    "deployments": [{"name": "Index", "num_replicas": 2}],
}


@pytest.fixture
def cluster(tmp_path):
    made = FakeCluster(tmp_path / "store")
    yield made
    made.stop()


@pytest.fixture
def store(tmp_path):
    """A folder of this disk that behaves as an object store: a file's folders come with it."""
    files = fs.PyFileSystem(fs.FSSpecHandler(LocalFileSystem(auto_mkdir=True)))
    return ObjectStore("s3://models/adapters", files, str(tmp_path / "store"))


async def refused(engine, query):
    with pytest.raises(Refused) as caught:
        await answer(engine, query)
    return caught.value


def with_engine(cluster, talk, store=None, application=APPLICATION, say=lambda text: None):
    """What `talk` gives with an engine that runs on the cluster."""

    async def run():
        engine = RayServeEngine(cluster.address, application, store, say, 0.02)
        await engine.start()
        try:
            return await talk(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


def test_base_and_adapters_answer_by_their_names_and_all_is_removed(cluster, store, tmp_path):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two words", content=b"others")
    said = []

    async def talk(engine):
        found = [await answer(engine, query) for query in (question(BASE), question(one), Query(two, prompt="a text"))]
        return found, engine.state

    found, state = with_engine(cluster, talk, store, say=said.append)

    texts = [text for text, _ in found]
    assert texts[0] == "base: hello"
    assert texts[1].startswith("base:one-") and texts[1].endswith(": hello")
    assert texts[2].startswith("base:two-words-") and texts[2].endswith(": a text")
    assert {(last.finish, last.prompt_tokens, last.completion_tokens) for _, last in found} == {("stop", 4, 3)}
    assert (state.engine, state.is_ready, state.counts["adapter_loads"]) == ("ray-serve", True, 2)
    assert cluster.applications == {} and any("deploying, LLMServer:base 0 of 1 running" in line for line in said)


def test_a_stream_comes_piece_by_piece_and_ends_when_its_reader_leaves(cluster):
    async def talk(engine):
        pieces = engine.generate(question(BASE, "for ever"))
        found = [(await anext(pieces)).text for _ in range(6)]
        await pieces.aclose()
        return found, await asyncio.to_thread(cluster.left.wait, 10)

    assert with_engine(cluster, talk) == (["base", ": ", "for ever", ".", ".", "."], True)


def test_other_applications_are_kept_as_they_were(cluster):
    cluster.apply({"applications": [OTHER], "target_capacity": 50.0})
    cluster.applications["notebook"] = FakeApplication(None, "imperative")
    before = cluster.applications["search"]

    async def talk(engine):
        assert len(cluster.applications) == 3

    with_engine(cluster, talk)

    assert set(cluster.applications) == {"search", "notebook"} and cluster.applications["search"] is before
    assert [body["applications"][0] for body in cluster.puts] == [OTHER] * 3
    assert {body["target_capacity"] for body in cluster.puts} == {50.0}


@pytest.mark.parametrize(
    "found",
    [
        {"status": "RUNNING", "source": "declarative"},
        {"status": "RUNNING", "deployed_app_config": {"runtime_env": {"env_vars": {"KEY": "<redacted>"}}}},
    ],
)
def test_what_could_not_be_kept_is_not_touched(found):
    with pytest.raises(DashboardRefuses, match=r"does not show \(theirs\)"):
        others_than("ours", {"applications": {"theirs": found}})


def test_an_adapter_is_copied_once_and_again_when_it_changes(cluster, store, tmp_path):
    first = adapter(tmp_path / "one")
    (tmp_path / "new").mkdir()
    changed = adapter(tmp_path / "new" / "one", content=b"new weights")

    async def talk(engine):
        before = [(await answer(engine, question(first)))[0] for _ in range(2)]
        (copied,) = (tmp_path / "store").glob("*/one-*/adapter_model.safetensors")
        stamp = copied.stat().st_mtime_ns
        await engine.unload(first)
        again = (await answer(engine, question(first)))[0]
        same = copied.stat().st_mtime_ns == stamp
        await engine.unload(first)
        return before, again, same, (await answer(engine, question(changed)))[0], engine.state.counts

    before, again, same, other, counts = with_engine(cluster, talk, store)
    assert same and {*before, again} == {before[0]} and other != again
    assert (counts["adapter_hits"], counts["adapter_loads"], counts["adapters_loaded"]) == (1, 3, 1)
    assert {path.read_bytes() for path in (tmp_path / "store").glob("*/*/*.safetensors")} == {
        b"weights",
        b"new weights",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "orchestrator merge"),
        ({"bias": "all"}, "orchestrator merge"),
        ({"modules_to_save": ["norm"]}, "orchestrator merge"),
        ({"alpha_pattern": {"q_proj": 4}}, "of one rank and scale"),
        ({"rank": 64}, "rank 64 is above 16"),
    ],
)
def test_what_vllm_does_not_compute_is_refused_and_the_others_answer(settings, message, cluster, store, tmp_path):
    odd = adapter(tmp_path / "odd", **settings)

    async def talk(engine):
        return await refused(engine, question(odd)), (await answer(engine, question(BASE)))[0]

    refusal, text = with_engine(cluster, talk, store)
    assert refusal.status == 400 and message in refusal.message and text == "base: hello"
    assert not (tmp_path / "store").exists()


def test_without_a_store_adapters_are_refused_with_the_ways_out(cluster, tmp_path):
    one = adapter(tmp_path / "one")
    options = EngineOptions(cluster=cluster.address)

    with pytest.raises(JobError, match=r"--adapter-store s3://BUCKET/FOLDER.*orchestrator merge"):
        engine_of(ServedBase("/models/base", "base"), [BASE, one], options, print)


def test_what_the_application_refuses_is_passed_on(cluster):
    async def talk(engine):
        return await refused(engine, question(BASE, "too long")), await refused(engine, question(BASE, "break off"))

    long, broken = with_engine(cluster, talk)
    assert (long.status, long.message) == (400, "Ray Serve: This model's maximum context length is 2048 tokens")
    assert (broken.status, broken.message) == (503, "Ray Serve broke off its answer")


def test_one_that_dies_is_not_ready_until_ray_has_started_it_again(cluster):
    async def talk(engine):
        refusal = await refused(engine, question(BASE, "die"))
        state = engine.state
        (one,) = cluster.applications.values()
        one.state, one.message, one.part_message = "RUNNING", "", ""
        while not engine.state.is_ready:
            await asyncio.sleep(0.02)
        return refusal, state, (await answer(engine, question(BASE)))[0], engine.state.restarts

    refusal, state, text, restarts = with_engine(cluster, talk)
    assert refusal.status == 503 and refusal.message.endswith(": RuntimeError: out of memory")
    assert not state.is_ready and state.reason == refusal.message and (text, restarts) == ("base: hello", 1)


def test_one_that_others_removed_says_so(cluster):
    async def talk(engine):
        cluster.apply({"applications": []})
        cluster.details(), cluster.details()
        return await refused(engine, question(BASE))

    refusal = with_engine(cluster, talk)
    assert refusal.status == 503 and "was removed from the cluster" in refusal.message


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            (
                "Deploying app 'x' failed with exception:\n  File x\nImportError: Neither vLLM nor SGLang is",
                "",
            ),
            r"ImportError: Neither vLLM.* pip install 'ray\[llm\]==2.60.0'",
        ),
        (("", "Error:\n  trace\nImportError: boto3 and botocore are required for S3"), r"pip install boto3"),
        (
            ("", "ValueError: Failed to load Hugging Face config for model_id='/models/base'"),
            r"needs the model in /models",
        ),
        (
            ("Failed to update the deployments", "Error:\n\x1b[36mray::X\n  trace\nRuntimeError: out of memory"),
            r"of memory$",
        ),
    ],
)
def test_one_that_cannot_be_deployed_says_why_and_is_removed(failure, message, cluster):
    cluster.apply({"applications": [OTHER]})
    cluster.details(), cluster.details()
    cluster.fails_with = failure

    with pytest.raises(Refused, match=message):
        with_engine(cluster, None)

    assert set(cluster.applications) == {"search"}


def test_a_start_that_is_cancelled_leaves_nothing(cluster):
    async def run():
        engine = RayServeEngine(cluster.address, APPLICATION, poll_s=0.02)
        starting = asyncio.create_task(engine.start())
        while not cluster.applications:
            await asyncio.sleep(0.005)
        next(iter(cluster.applications.values())).looks_left = 10**6
        await asyncio.sleep(0.05)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting

    asyncio.run(run())
    assert cluster.applications == {} and len(cluster.puts) == 2


def test_what_a_killed_server_left_is_removed_and_what_runs_is_not(cluster):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname().lower().replace(".", "-")
    names = [f"orchestrator-{host}-{number}-base" for number in (gone.pid, os.getpid())]
    cluster.apply({"applications": [{**OTHER, "name": name, "route_prefix": f"/{name}"} for name in names]})

    async def talk(engine):
        return set(cluster.applications)

    found = with_engine(cluster, talk)
    assert names[0] not in found and names[1] in found and names[1] in cluster.applications


def test_a_cluster_without_gpus_is_refused_before_anything_is_deployed(cluster):
    cluster.nodes = cluster.nodes[:1]

    with pytest.raises(Refused, match="the cluster has 0 GPUs on its 1 nodes"):
        with_engine(cluster, None)

    assert cluster.puts == []


def test_a_cluster_without_ray_serve_is_named_with_its_pip_line(cluster):
    cluster.has_serve = False

    with pytest.raises(Refused, match=r"Ray Serve is not installed .* pip install 'ray\[llm\]==2.60.0' on every node"):
        with_engine(cluster, None)


def test_an_address_without_a_cluster_is_named():
    engine = RayServeEngine("http://127.0.0.1:9", APPLICATION)

    with pytest.raises(Refused, match=r"--cluster http://127.0.0.1:9: no Ray dashboard"):
        asyncio.run(engine.start())


@pytest.mark.parametrize("held", [None, "secret", "other"])
def test_a_token_is_shown_where_it_is_asked_for(held, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if held:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(f"{held}\n")
    cluster = FakeCluster(tmp_path, token="secret")

    async def talk(engine):
        return (await answer(engine, question(BASE)))[0]

    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(cluster.stop)
        if held == "secret":
            assert with_engine(cluster, talk) == "base: hello"
        else:
            with pytest.raises(Refused, match="requires its token, and this machine has"):
                with_engine(cluster, talk)


def test_a_server_as_a_user_starts_it_answers_by_the_cluster_and_removes_what_it_deployed(cluster, tmp_path):
    printed = tmp_path / "printed"
    cluster.apply({"applications": [OTHER]})

    process = start("serve", SMALL_MODEL, "--cluster", cluster.address, "--port", 0, cwd=tmp_path, output=printed)
    url = wait_for(lambda: re.search(r"chat page: (\S+)/", printed.read_text()), process)[1]
    body = json.dumps({"model": "model", "messages": [{"role": "user", "content": "hello"}]}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"}), timeout=60
    ) as reply:
        text = json.load(reply)["choices"][0]["message"]["content"]
    process.send_signal(signal.SIGTERM)
    outcome(process)

    assert text == "base: hello" and set(cluster.applications) == {"search"}
    assert f"is served by Ray Serve LLM on {cluster.address}: --cluster" in printed.read_text()
    assert cluster.applications["search"].config == OTHER


def test_options_that_do_not_belong_together_are_refused():
    for options, message in (
        ({"cluster": "head:6379"}, "dashboard, e.g. http://"),
        ({"cluster": "http://head:8265", "engine": "vllm"}, "--engine: is of engines on this machine"),
        ({"cluster": "http://head:8265", "adapter_store": "/mnt/adapters"}, "give s3://BUCKET/FOLDER"),
        ({"cluster": "http://head:8265", "adapter_store": "s3://KEY:SECRET@bucket"}, "give s3://BUCKET/FOLDER"),
        ({"adapter_store": "s3://bucket/folder"}, "belongs to --cluster"),
        ({"replicas": 2}, "belongs to --cluster"),
    ):
        with pytest.raises(JobError, match=message):
            EngineOptions(**options)


def test_a_base_from_the_hub_is_loaded_by_its_name_and_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    said = []
    folder = tmp_path / "models--org--model" / "snapshots" / commit

    engine = engine_of(ServedBase(str(folder), "org/model"), [], EngineOptions(cluster="http://head:8265"), said.append)

    assert engine._application.source == "org/model" and engine._application.revision == commit
    assert said == ["org/model is served by Ray Serve LLM on http://head:8265: --cluster"]


@pytest.mark.slow  # Ray's module loads torch and transformers
@pytest.mark.filterwarnings("ignore")  # of Ray's own modules
def test_the_configuration_is_one_of_ray_serve_llm(monkeypatch):
    """By Ray's own LLMConfig, as `build_openai_app` reads it."""
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    made = LlmApplication("/models/base", "org/model", "c0ffee", "bfloat16", 20, 12, 3, 2)

    config = made.config("ours", "s3://models/adapters/base")

    found = LLMConfig.model_validate(config["args"]["llm_configs"][0])
    assert found.model_id == "base" and found.model_loading_config.model_source == "org/model"
    assert found.engine_kwargs == {
        "tensor_parallel_size": 2,
        "dtype": "bfloat16",
        "revision": "c0ffee",
        "tokenizer_revision": "c0ffee",
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 8,
        "max_cpu_loras": 12,
    }
    assert found.lora_config.dynamic_lora_loading_path == "s3://models/adapters/base"
    assert found.multiplex_config().max_num_models_per_replica == 12
    assert found.deployment_config["autoscaling_config"]["max_replicas"] == 3
    assert config["runtime_env"] == {"env_vars": {"AWS_ENDPOINT_URL": "http://store:9000"}}
