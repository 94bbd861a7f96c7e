"""vLLM through a double at its HTTP door: adapters loaded and unloaded, refusals, and its death."""

import asyncio
import contextlib
import http.client
import json
import sys
from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.serving.catalog import ServedBase, open_catalog
from orchestrator.serving.engine_choice import EngineOptions, engine_of
from orchestrator.serving.engines.protocol import Query, Refused, ServedModel
from orchestrator.serving.engines.vllm import VllmEngine
from orchestrator.serving.server import serving
from tests.orchestrator.serving.conftest import adapter, answer, question

FAKE = Path(__file__).with_name("fake_vllm.py")
BASE = ServedModel("base", "/models/base")


def with_engine(talk, max_adapters=2, command=None):
    """What `talk` gives with an engine that runs."""

    async def run():
        engine = VllmEngine("/models/base", command or [sys.executable, str(FAKE), "serve"], max_adapters, 16)
        await engine.start()
        try:
            return await talk(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


def test_base_and_adapters_answer_by_their_names(tmp_path):
    one = adapter(tmp_path / "one")

    async def talk(engine):
        plain = Query(one, prompt="a text")
        return [await answer(engine, query) for query in (question(BASE), question(one), plain)]

    texts, lasts = zip(*with_engine(talk), strict=True)
    assert texts == ("base: hello", "one: hello", "one: a text")
    assert {(last.finish, last.prompt_tokens, last.completion_tokens) for last in lasts} == {("stop", 4, 3)}


def test_an_answer_goes_past_its_end_where_a_query_says_so():
    async def talk(engine):
        return await answer(engine, question(BASE, max_tokens=7, ignore_eos=True))

    text, last = with_engine(talk)
    assert text == 7 * "x " and last.completion_tokens == 7


def test_a_server_that_ends_lets_go_of_answers_whose_clients_are_gone(model_folder, capfd):
    catalog = open_catalog([str(model_folder)], Path("runs"), None, print)
    (name,) = catalog.models
    with serving(catalog, lambda base: VllmEngine(base.folder, [sys.executable, str(FAKE), "serve"], 1, 8)) as address:
        client = http.client.HTTPConnection(address.host, address.port)
        body = json.dumps({"model": name, "prompt": "wait", "stream": True})
        client.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {address.api_key}"})
        answer = client.getresponse()
        first = answer.readline()
        answer.close()
        client.close()

    assert b"a while" in first
    assert capfd.readouterr().err == ""


def test_the_least_recently_used_adapter_makes_room(tmp_path):
    models = [adapter(tmp_path / name) for name in ("one", "two", "three")]

    async def talk(engine):
        for place in (0, 1, 0, 2, 0, 1):
            assert (await answer(engine, question(models[place])))[0] == f"{models[place].name}: hello"
        return engine.state.counts

    counts = with_engine(talk)
    found = {name: counts[f"adapter_{name}"] for name in ("loads", "hits", "evictions")}
    assert found == {"loads": 4, "hits": 2, "evictions": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "orchestrator merge"),
        ({"bias": "all"}, "orchestrator merge"),
        ({"rank": 64}, "rank 64 is above 16"),
    ],
)
def test_what_it_does_not_load_is_refused_and_the_others_go_on(settings, message, tmp_path):
    odd = adapter(tmp_path / "odd", **settings)

    async def talk(engine):
        with pytest.raises(Refused) as caught:
            await answer(engine, question(odd))
        return caught.value, (await answer(engine, question(BASE)))[0]

    refusal, text = with_engine(talk)
    assert refusal.status == 400 and message in refusal.message and text == "base: hello"


def test_one_that_dies_is_started_again_with_what_it_said(tmp_path):
    one = adapter(tmp_path / "one")

    async def talk(engine):
        await answer(engine, question(one))
        with pytest.raises(Refused) as caught:
            await answer(engine, question(one, "die"))
        while engine.state.is_ready:
            with contextlib.suppress(Refused):
                await answer(engine, question(BASE))
            await asyncio.sleep(0.05)
        reason = engine.state.reason
        return caught.value.status, reason, (await answer(engine, question(one)))[0], engine.state.restarts

    status, reason, text, restarts = with_engine(talk)
    assert (status, text, restarts) == (503, "one: hello", 1)
    assert reason == "vLLM ended (exit code 3): out of memory"


def test_one_that_does_not_start_says_why(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no GPU was found')")

    with pytest.raises(Refused, match=r"vLLM ended \(exit code 1\): no GPU was found"):
        with_engine(None, command=[sys.executable, str(broken)])


def test_without_vllm_the_way_to_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(JobError, match="--vllm-python"):
        engine_of(ServedBase("/models/base", "base"), [], EngineOptions("vllm"), print)
