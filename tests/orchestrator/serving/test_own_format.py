"""An adapter in a format of this program's own: served by the engine that is its own, refused by the others."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.serving.catalog import Catalog
from orchestrator.serving.engine_choice import EngineOptions, why_not
from orchestrator.serving.engines.kinds import kind_of_adapter
from orchestrator.serving.engines.openai_client import check_adapter
from orchestrator.serving.engines.prompts import prompt_tokens
from orchestrator.serving.engines.protocol import Refused
from orchestrator.serving.engines.transformers_engine import TransformersEngine
from orchestrator.serving.engines.weights import EngineSettings
from strategies.mixture.method import MixLora
from strategies.registry import owner_of
from strategies.sparse_memory.method import SparseMemory
from tests.orchestrator.serving.test_engine import Answers, asked
from tests.strategies.mixture.test_experts import shaken
from tests.strategies.test_contract import settings

METHODS = {"mixture": MixLora(num_experts=4, lora_r=4), "memory": SparseMemory(memory_rows=256, rows_per_token=4)}


@pytest.fixture(scope="module", params=list(METHODS))
def experts(request, model_folder, tmp_path_factory):
    """A folder of experts, or of a memory, and the model that they were written from."""
    folder = tmp_path_factory.mktemp("adapters") / "experts"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    setup = shaken(METHODS[request.param].setup(model, settings()), size=0.1 if request.param == "mixture" else 1.0)
    setup.export(folder, None)
    values = json.loads((folder / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(model_folder)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder, setup.model.eval()


def test_the_transformers_engine_answers_as_the_trained_model_does_beside_the_base(model_folder, experts):
    folder, trained = experts
    catalog, answers = Catalog(None, pytest.fail), Answers()
    catalog.add(str(folder), Path())
    engine = TransformersEngine(EngineSettings(str(model_folder)), answers)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    models = catalog.models
    queries = [asked(models[name], number) for number, name in enumerate(["experts", "base", "experts"])]

    for number, query in enumerate(queries):
        engine.submit(number, query)
    while engine.is_busy:
        engine.step()

    assert not answers.refusals and kind_of_adapter(folder) == "alone"
    for number in (0, 2):
        prompt = torch.tensor([prompt_tokens(tokenizer, queries[number])])
        output = trained.generate(
            input_ids=prompt, max_new_tokens=6 + number, do_sample=False, attention_mask=torch.ones_like(prompt)
        )
        written = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        assert answers.text(number).strip() == written.strip()
    assert answers.text(1) != answers.text(0)


def test_vllm_and_llama_cpp_are_refused_with_a_sentence(experts):
    catalog = Catalog(None, pytest.fail)
    catalog.add(str(experts[0]), Path())
    model = catalog.models["experts"]

    own = owner_of(experts[0]).own_format
    with pytest.raises(Refused, match=f"experts is {own}, which vLLM does not know; --engine transformers serves it"):
        check_adapter(model, 512)
    options = EngineOptions(gguf=Path(__file__), vllm_python=Path("/bin/true"))
    for engine in ("vllm", *(["llama.cpp"] if importlib.util.find_spec("xllamacpp") else [])):
        assert "takes pairs of A and B alone" in why_not(engine, catalog.base_of(model), [model], options)
