"""vLLM, and Ray Serve LLM on a cluster, beside transformers: greedy answers of the base and two adapters.

Each needs what no other test has, and is skipped without it:

VLLM_PYTHON=~/vllm/bin/python pytest -m gpu tests/orchestrator/serving                      or vllm on PATH
RAY_CLUSTER=http://HOST:8265 ADAPTER_STORE=s3://BUCKET/FOLDER pytest -m gpu tests/orchestrator/serving
                            a cluster with GPUs, whose nodes have this machine's folders, and reach the store

vLLM's kernels for adapters compute in 16 bits, so all do here. Sums in another order may turn a token that is nearly as
likely as another: of twelve answers two may differ (transformers in 16 beside 32 bits on a CPU: none). An adapter that
is left out or taken for another changes three or more.
"""

import asyncio
import os
import shutil
from itertools import combinations
from pathlib import Path

import pytest

from orchestrator.job.model_files import locate
from orchestrator.serving.catalog import ServedBase
from orchestrator.serving.engine_choice import EngineOptions, engine_of
from orchestrator.serving.engines.protocol import Query, Refused, ServedModel
from tests.conftest import needs_smollm2
from tests.orchestrator.serving.conftest import write_adapter

pytestmark = [pytest.mark.gpu, needs_smollm2]
PROMPTS = ("The capital of France is", "def add(a, b):", "Once upon a time", "Water boils at")
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The packaged model with two adapters, small enough to leave it sense and large enough to change what it says."""
    base = str(locate(MODEL, Path()))
    place = tmp_path_factory.mktemp("adapters")
    folders = [write_adapter(base, place / name, seed, std=0.06) for seed, name in enumerate(("one", "two"))]
    return [ServedModel("base", base), *(ServedModel(folder.name, base, str(folder)) for folder in folders)]


@pytest.fixture(scope="module")
def vllm():
    import torch

    python = os.environ.get("VLLM_PYTHON")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not python and not shutil.which("vllm"):
        pytest.skip("needs vllm on PATH, or VLLM_PYTHON, the python of an environment that has it")
    return EngineOptions("vllm", dtype="float16", vllm_python=python and Path(python))


@pytest.fixture(scope="module")
def ray_serve():
    cluster, store = os.environ.get("RAY_CLUSTER"), os.environ.get("ADAPTER_STORE")
    if not cluster or not store:
        pytest.skip("needs RAY_CLUSTER, a dashboard's address, and ADAPTER_STORE, an object store's")
    return EngineOptions(cluster=cluster, adapter_store=store, dtype="float16")


def with_engine(models, options, talk):
    async def run():
        engine = engine_of(ServedBase(models[0].base, MODEL), models, options, print)
        await engine.start()
        try:
            return await talk(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


async def text_of(engine, model, prompt):
    return "".join([piece.text async for piece in engine.generate(Query(model, prompt=prompt, max_tokens=12))])


async def answers(engine, models):
    """All at once, so that adapters are computed beside each other."""
    asked = [text_of(engine, model, prompt) for model in models for prompt in PROMPTS]
    return await asyncio.gather(*asked)


@pytest.fixture(scope="module")
def expected(models):
    found = with_engine(models, EngineOptions("transformers", dtype="float16"), lambda one: answers(one, models))
    of_model = [found[start : start + len(PROMPTS)] for start in range(0, len(found), len(PROMPTS))]
    for one, other in combinations(of_model, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 3, (
            "adapters that change too little prove nothing"
        )
    return found


@pytest.mark.parametrize("kind", ["vllm", "ray_serve"])
def test_greedy_answers_are_those_of_transformers_also_after_an_adapter_was_unloaded(kind, request):
    options, models, expected = map(request.getfixturevalue, (kind, "models", "expected"))

    async def talk(engine):
        first = await answers(engine, models)
        await engine.unload(models[1])
        return first, await text_of(engine, models[1], PROMPTS[0]), engine.state

    found, again, state = with_engine(models, options, talk)

    differing = [(mine, theirs) for mine, theirs in zip(found, expected, strict=True) if mine != theirs]
    assert len(differing) <= 2, differing
    assert again == found[len(PROMPTS)] and state.is_ready
    assert state.counts["adapter_loads"] == 3


@pytest.mark.parametrize("kind", ["vllm", "ray_serve"])
def test_what_it_does_not_compute_is_refused_and_the_base_answers(kind, request, tmp_path):
    options, models = map(request.getfixturevalue, (kind, "models"))
    odd = ServedModel("odd", models[0].base, str(write_adapter(models[0].base, tmp_path / "odd", 3, use_dora=True)))

    async def talk(engine):
        with pytest.raises(Refused, match="orchestrator merge"):
            await text_of(engine, odd, PROMPTS[0])
        return await text_of(engine, models[0], PROMPTS[0])

    assert with_engine(models, options, talk)
