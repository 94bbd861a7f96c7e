"""Loads what was written with the program it is for, and compares its answers to held-out rows with the run's own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data.dataset import Dataset
from orchestrator.errors import RunFailed
from orchestrator.export import converter, ollama
from orchestrator.job import model_files
from orchestrator.runs.condition import Finished
from orchestrator.runs.json_files import Sample
from strategies.adapter_bank import gguf_adapter
from strategies.registry import load_adapter, owner_of

_LLAMA_CPP = "xllamacpp"
_MOST_ANSWERS = 8


@dataclass(frozen=True)
class CheckReport:
    """How many answers were equal, or why none were compared."""

    engine: str
    equal: int = 0
    compared: int = 0
    differ: list[dict[str, str]] = field(default_factory=list)  # prompt, the run's answer, this one's
    reason: str | None = None

    @property
    def text(self) -> str:
        if self.reason:
            return f"not checked with {self.engine}: {self.reason}"
        return f"{self.engine} loads it and gives {self.equal} of {self.compared} answers as the run did"


def check(finished: Finished, folder: Path, base: str | None) -> CheckReport:
    """Raises RunFailed where not one answer is the run's."""
    files = {file.name for file in folder.iterdir()}
    if files & {gguf_adapter.FILE, converter.FILE}:
        report = _with_llama_cpp(finished, folder, base)
    elif "Modelfile" in files:
        model = folder / "model"
        report = _with_transformers(finished, model if model.is_dir() else folder)
    else:
        report = _with_transformers(finished, folder)
    if report.compared and not report.equal:
        raise RunFailed(f"{report.text}. The first: {report.differ[0]}")
    return report


def _with_transformers(finished: Finished, folder: Path) -> CheckReport:
    """Plain transformers or PEFT, in the precision that the run computed in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.training.evaluate import Generation, generate_answers, sampling_of

    wanted, data, rows = _held_out(finished)
    remote, dtype = finished.job.spec.model.trust_remote_code, finished.plan.techniques.dtype

    def load(place: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), trust_remote_code=remote)

    is_adapter = (folder / "adapter_config.json").is_file()
    engine = "this program" if owner_of(folder) else "PEFT" if is_adapter else "transformers"
    if not wanted:
        return CheckReport(engine, reason="the run generated no answers to compare with")
    if is_adapter:
        model: Any = load_adapter(load(finished.data.model), folder)
    else:
        model = load(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    generation = Generation(finished.plan.max_new_tokens, dtype, sampling=sampling_of(finished.job.spec))
    found = generate_answers(model.eval(), tokenizer, data, rows, generation)
    return _compared(engine, wanted, [answer.generated for answer in found])


def _with_llama_cpp(finished: Finished, folder: Path, base: str | None) -> CheckReport:
    """xllamacpp in this process, on the base's GGUF file where there is one."""
    if importlib.util.find_spec(_LLAMA_CPP) is None:
        return CheckReport("llama.cpp", reason=f"pip install --no-deps {_LLAMA_CPP} brings it")
    origin = base_file(finished, folder, base)
    if origin is None:
        return CheckReport("llama.cpp", reason="the base as GGUF is not here; --base FILE.gguf names it")
    wanted, data, rows = _held_out(finished)
    if not wanted:
        return CheckReport("llama.cpp", reason="the run generated no answers to compare with")
    if finished.job.spec.eval.temperature:
        return CheckReport("llama.cpp", reason="the run drew its answers (eval.temperature), and it would draw others")
    adapter = folder / gguf_adapter.FILE
    ask = llama_cpp(origin, adapter if adapter.is_file() else None)
    stops = list(_stops(finished))
    answers = []
    for row in rows:
        ids = [int(token) for token in data.prompt(row)[0]]
        choice = ask({"prompt": ids, "max_tokens": finished.plan.max_new_tokens, "stop": stops})
        answers.append(choice["text"].strip())
    return _compared("llama.cpp", wanted, answers)


def base_file(finished: Finished, folder: Path, base: str | None) -> Path | None:
    """The GGUF file that llama.cpp loads: a whole model, the base beside it, the one that was given or is packaged."""
    given = Path(base).expanduser() if base else model_files.packaged_file(finished.job.spec.model.model_name_or_path)
    known = [folder / converter.FILE, folder / ollama.BASE, *([given] if given else [])]
    return next((file for file in known if file.is_file()), None)


def llama_cpp(base: Path, adapter: Path | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A call that completes a prompt, greedy, by llama.cpp with this base and adapter: a choice in OpenAI's form."""
    xllamacpp: Any = importlib.import_module(_LLAMA_CPP)  # a C++ extension without types
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(base), 4096, 1, False
    params.special, params.verbosity = True, -1  # a stop that is a special token is found in the text
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        answer = server.handle_completions({"temperature": 0.0, "cache_prompt": False, **request})
        if "error" in answer:
            raise RunFailed(f"llama.cpp: {answer['error']}")
        return answer["choices"][0]

    return ask


def _stops(finished: Finished) -> Sequence[str]:
    from orchestrator.runs.model_card import ends_of

    return [text for text in ends_of(finished.exported) if not text.startswith("token ")]


def _held_out(finished: Finished) -> tuple[list[Sample], Dataset, list[int]]:
    """The run's own answers, and the held-out rows they answer."""
    from orchestrator.data.prepare import datasets

    after, data = finished.result.after, datasets(finished.data)[1]
    samples = after.samples[:_MOST_ANSWERS] if after else []
    if data is None or not samples:
        return [], data, []  # type: ignore[return-value]  # nobody reads it
    with_reference = [row for row in range(len(data)) if data.prompt(row)[1] is not None]
    return samples, data, with_reference[: len(samples)]


def _compared(engine: str, wanted: Sequence[Sample], found: Sequence[str]) -> CheckReport:
    pairs = list(zip(wanted, found, strict=False))
    differ = [
        {"prompt": sample.prompt, "run": sample.generated, "found": text}
        for sample, text in pairs
        if sample.generated != text
    ]
    return CheckReport(engine, len(pairs) - len(differ), len(pairs), differ)
