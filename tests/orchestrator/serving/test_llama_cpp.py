"""The llama.cpp engine over the packaged model: adapters by request, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")

import gguf
import numpy

from orchestrator.job.model_files import PACKAGED, locate
from orchestrator.serving.engines.llama_cpp import LlamaCppEngine
from orchestrator.serving.engines.protocol import Query, ServedModel
from orchestrator.serving.engines.weights import EngineSettings
from tests.adapters import write_adapter
from tests.conftest import needs_smollm2
from tests.orchestrator.serving.test_engine import Answers, run

pytestmark = [needs_smollm2, pytest.mark.slow]
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def base():
    package, file, _ = PACKAGED[NAME]
    places = importlib.util.find_spec(package).submodule_search_locations
    return str(locate(NAME, Path())), str(Path(places[0]) / file)


def write_gguf(folder, scale):
    """Random corrections of every value map: llama.cpp stores those as PEFT does."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "adapter.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    draw = numpy.random.default_rng(0)
    for layer in range(30):
        for side, shape in (("a", (4, 576)), ("b", (192, 4))):
            tensor = draw.standard_normal(shape).astype(numpy.float32) * scale
            writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_{side}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def asked(base, folder=None, **options):
    model = ServedModel(folder.name if folder else "base", base[0], folder and str(folder))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return Query(model, messages=messages, **{"max_tokens": 12, **options})


@pytest.fixture
def engine(base):
    answers = Answers()
    return LlamaCppEngine(EngineSettings(base[0], max_adapters=2, engine="llama.cpp", gguf=base[1]), answers), answers


def test_each_request_has_its_adapter(engine, base, tmp_path):
    served, answers = engine
    strong, none = write_gguf(tmp_path / "strong", 0.3), write_gguf(tmp_path / "none", 0.0)

    for number, folder in enumerate((None, strong, None, none, strong)):
        served.submit(number, asked(base, folder))
    run(served)

    assert not answers.refusals
    assert len(answers.text(0)) > 3
    assert answers.text(0) == answers.text(2) == answers.text(3)
    assert answers.text(1) == answers.text(4) != answers.text(0)
    assert answers.pieces[0][-1].finish in ("stop", "length") and answers.pieces[0][-1].prompt_tokens > 5
    assert served.counts["adapter_loads"] == 2 and served.counts["adapter_hits"] == 1


def test_what_it_cannot_is_refused_with_the_way_out(engine, base, tmp_path):
    served, answers = engine
    (tmp_path / "dora").mkdir()
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter.gguf").write_bytes(b"GGUF and nothing else")

    served.submit(0, asked(base, tmp_path / "dora"))
    served.submit(1, asked(base, tmp_path / "broken"))
    served.submit(2, asked(base, logprobs=2))
    served.submit(3, asked(base))
    run(served)

    assert sorted(answers.refusals) == [0, 1, 2] and answers.text(3)
    assert "orchestrator merge" in answers.refusals[0].message
    assert answers.refusals[1].message.startswith("broken")
    assert answers.refusals[2].param == "logprobs"


def test_an_answer_that_nobody_waits_for_ends(engine, base):
    served, answers = engine
    served.submit(0, asked(base, max_tokens=2000))
    served.step()

    served.cancel(0)
    run(served)

    assert not answers.pieces.get(0) or answers.pieces[0][-1].finish is None


def test_an_adapter_of_peft_is_written_for_it(engine, base, tmp_path):
    served, answers = engine
    tuned = write_adapter(tmp_path / "tuned", base[0])

    for number, folder in enumerate((None, tuned)):
        served.submit(number, asked(base, folder))
    run(served)

    assert not answers.refusals and answers.text(1)
    assert served.counts["adapter_loads"] == 1
