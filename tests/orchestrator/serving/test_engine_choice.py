"""Which engine is taken, and the sentence that says why."""

import importlib.util

import pytest

from orchestrator.errors import JobError, MissingExtra
from orchestrator.serving.catalog import ServedBase
from orchestrator.serving.engine_choice import EngineOptions, engine_of, why_not
from orchestrator.serving.engines.protocol import ServedModel

has_llama_cpp = importlib.util.find_spec("xllamacpp") is not None


def choice(tmp_path, files=("adapter.gguf",), **options):
    said, adapter = [], tmp_path / "adapter"
    adapter.mkdir(exist_ok=True)
    for name in files:
        (adapter / name).touch()
    models = [ServedModel("base", str(tmp_path)), ServedModel("tuned", str(tmp_path), str(adapter))]
    engine = engine_of(ServedBase(str(tmp_path), "some-model"), models, EngineOptions(**options), said.append)
    return engine.state.engine, said


def test_without_a_gguf_file_transformers_serves_and_says_why(tmp_path):
    engine, (said,) = choice(tmp_path)

    assert engine == "transformers"
    assert said.startswith("some-model is served by transformers: ")
    assert ("gguf" in said.lower()) if has_llama_cpp else ("not installed" in said)


@pytest.mark.skipif(not has_llama_cpp, reason="needs xllamacpp")
@pytest.mark.parametrize(("files", "engine"), [(("adapter.gguf",), "llama.cpp"), ((), "transformers")])
def test_llama_cpp_is_taken_where_every_adapter_is_gguf(tmp_path, files, engine):
    (tmp_path / "model.gguf").touch()

    found, said = choice(tmp_path, files, gguf=tmp_path / "model.gguf")

    assert found == engine
    assert said == (
        [] if files else ["some-model is served by transformers: tuned: llama.cpp takes pairs of A and B alone"]
    )


def test_what_is_asked_for_is_taken_without_a_word(tmp_path):
    assert choice(tmp_path, engine="transformers") == ("transformers", [])


@pytest.mark.parametrize(
    ("engine", "adapter", "reason"),
    [
        ("transformers", '{"peft_type": "SHIRA"}', None),
        ("vllm", '{"peft_type": "LORA"}', None),
        ("vllm", '{"peft_type": "LORA", "use_dora": true}', "tuned: vLLM takes pairs of A and B alone"),
        ("vllm", None, "there is no vllm on PATH (--vllm-python PYTHON)"),
        ("llama.cpp", '{"peft_type": "LORA"}', None if has_llama_cpp else "xllamacpp (llama.cpp) is not installed"),
    ],
)
def test_an_engine_that_cannot_serve_what_there_is_says_why(engine, adapter, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(adapter or "{}")
    models = [ServedModel("base", "/base"), ServedModel("tuned", "/base", str(tmp_path))]
    options = EngineOptions(gguf=tmp_path, vllm_python=tmp_path if adapter else None)

    assert why_not(engine, ServedBase("/base", "some-model"), models, options) == reason


@pytest.mark.skipif(has_llama_cpp, reason="it is installed")
def test_an_engine_that_is_not_installed_is_named_with_its_pip_line():
    with pytest.raises(MissingExtra, match=r"pip install 'finetune-orchestrator\[serve\]'"):
        EngineOptions("llama.cpp")


@pytest.mark.parametrize("options", [{"engine": "tgi"}, {"dtype": "int3"}])
def test_unknown_words_are_refused(options):
    with pytest.raises(JobError, match="one of"):
        EngineOptions(**options)
