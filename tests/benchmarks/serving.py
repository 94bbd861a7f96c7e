"""What serving adds to a finished run on the packaged model, and whether llama.cpp gives the same answers.

    python tests/benchmarks/serving.py answers RUN [--rows 80]
    python tests/benchmarks/serving.py latency RUN [--requests 50]

`answers` compares greedy answers to the held-out rows of a run of SmolLM2: llama.cpp on the packaged Q4_1 file, and on
the same weights written out in fp32, beside transformers on these weights; with the run's adapter and without it.
`latency` is what the server adds to the engine's process that it speaks to (the same request to both, in turn), the
time to an adapter's first token before and after it was loaded, and until an addition to a served bank is listed.
Quiet machines only.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from orchestrator.data.prepare import datasets
from orchestrator.export.check import llama_cpp
from orchestrator.job import model_files
from orchestrator.job.model_files import read_config
from orchestrator.runs.condition import Finished, require_finished
from orchestrator.runs.model_card import ends_of
from orchestrator.runs.run_folder import RunFolder
from orchestrator.serving.catalog import open_catalog
from orchestrator.serving.engines.process import ProcessEngine
from orchestrator.serving.engines.protocol import Query
from orchestrator.serving.server import Address, serving
from strategies.adapter_bank import gguf_adapter
from strategies.adapter_bank.card import AdapterCard
from strategies.adapter_bank.folders import base_digest
from strategies.adapter_bank.store import Bank
from tests.strategies.adapter_bank.gguf_files import expanded


@dataclass(frozen=True)
class Held:
    """Held-out prompts as tokens, with the answers that are right."""

    prompts: list[list[int]]
    references: list[str]


def held_out(finished: Finished, count: int) -> tuple[Any, Held, list[int]]:
    """The rows that have a reference, at most `count`."""
    data = datasets(finished.data)[1]
    if data is None:
        raise SystemExit(f"{finished.run.run_id} has no held-out rows")
    rows = [row for row in range(len(data)) if data.prompt(row)[1] is not None][:count]
    prompts = [data.prompt(row) for row in rows]
    return data, Held([[int(token) for token in ids] for ids, _ in prompts], [str(text) for _, text in prompts]), rows


def by_transformers(finished: Finished, adapter: Path | None, count: int) -> list[str]:
    """Greedy answers in fp32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.training.evaluate import Generation, generate_answers

    data, _, rows = held_out(finished, count)
    model: Any = AutoModelForCausalLM.from_pretrained(finished.data.model, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(finished.data.model)
    how = Generation(finished.plan.max_new_tokens, "float32")
    return [answer.generated for answer in generate_answers(model.eval(), tokenizer, data, rows, how)]


def by_llama_cpp(finished: Finished, held: Held, base: Path, adapter: Path | None) -> list[str]:
    """Greedy answers on a GGUF file."""
    ask, most = llama_cpp(base, adapter), finished.plan.max_new_tokens
    ends = ends_of(finished.exported)
    return [ask({"prompt": ids, "max_tokens": most, "stop": ends})["text"].strip() for ids in held.prompts]


def answers(finished: Finished, count: int) -> None:
    _, held, _ = held_out(finished, count)
    packaged = model_files.packaged_file(finished.job.spec.model.model_name_or_path)
    if packaged is None:
        raise SystemExit(f"{finished.job.spec.model.model_name_or_path} is no packaged model")
    with tempfile.TemporaryDirectory() as place:
        adapter = Path(place) / gguf_adapter.FILE
        in_fp32 = expanded(packaged, Path(place) / "expanded.gguf")
        gguf_adapter.write(finished.exported, read_config(Path(finished.data.model)), "smollm2", adapter)
        for name, tuned in (("tuned", finished.exported), ("untuned", None)):
            wanted = by_transformers(finished, tuned, count)
            print(f"{name}: transformers, exact match {_right(wanted, held):.1%}")
            for file, base in (("packaged Q4_1", packaged), ("the same in fp32", in_fp32)):
                found = by_llama_cpp(finished, held, base, adapter if tuned else None)
                equal = [a == b for a, b in zip(found, wanted, strict=True)]
                print(
                    f"{name}: llama.cpp on {file}, {sum(equal)} of {len(equal)} answers equal"
                    f" ({statistics.mean(equal):.1%}), exact match {_right(found, held):.1%}"
                )
                for place_of, same in enumerate(equal):
                    if not same and place_of < 12:
                        print(f"    {wanted[place_of]!r}\n    {found[place_of]!r}")


def _right(found: Sequence[str], held: Held) -> float:
    return statistics.mean(a.strip() == b.strip() for a, b in zip(found, held.references, strict=True))


class Client:
    """One connection to a server, kept open."""

    def __init__(self, address: Address) -> None:
        self._connection = http.client.HTTPConnection(address.host, address.port, timeout=600)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {address.api_key}"}

    def models(self) -> list[str]:
        self._connection.request("GET", "/v1/models", headers=self._headers)
        return [model["id"] for model in json.loads(self._connection.getresponse().read())["data"]]

    def seconds(self, model: str, tokens: Sequence[int], streams: bool = False) -> float:
        """Until the first token, where it streams, else until the whole answer of one token."""
        body = {"model": model, "prompt": list(tokens), "max_tokens": 2 if streams else 1, "stream": streams}
        began = time.perf_counter()
        self._connection.request("POST", "/v1/completions", json.dumps(body).encode(), self._headers)
        reply = self._connection.getresponse()
        if reply.status != 200:
            raise SystemExit(reply.read().decode())
        reply.readline()
        spent = time.perf_counter() - began
        reply.read()
        return spent


def latency(finished: Finished, num_requests: int) -> None:
    """The server beside its engine, and a cold adapter beside a warm one."""
    _, held, _ = held_out(finished, num_requests)
    with tempfile.TemporaryDirectory() as place:
        copies = [shutil.copytree(finished.exported, Path(place) / f"copy-{number}") for number in range(8)]
        for copy in copies:  # a run's base is where the run found it
            _name_base(copy, finished.data.model)
        catalog = open_catalog([str(copy) for copy in copies], finished.run.path.parent, None, print)
        made: list[tuple[asyncio.AbstractEventLoop, ProcessEngine]] = []

        def build(base: Any) -> ProcessEngine:
            engine = ProcessEngine({"base": base.folder, "run": str(finished.run.path), "max_adapters": 4})
            made.append((asyncio.get_running_loop(), engine))
            return engine

        with serving(catalog, build) as address:
            client, (loop, engine) = Client(address), made[0]
            model = catalog.models["copy-0"]

            async def ask(ids: list[int]) -> float:
                began = time.perf_counter()
                async for _ in engine.generate(Query(model, tokens=ids, max_tokens=1)):
                    pass
                return time.perf_counter() - began

            short = held.prompts[0][:8]
            for _ in range(5):
                client.seconds("copy-0", short)
            added = []
            for _ in range(num_requests):
                direct = asyncio.run_coroutine_threadsafe(ask(short), loop).result()
                added.append(client.seconds("copy-0", short) - direct)
            print(
                f"the server adds {statistics.median(added) * 1e3:.2f} ms to a request (median of {num_requests};"
                f" 95th percentile {sorted(added)[int(0.95 * num_requests)] * 1e3:.2f} ms)"
            )
            cold = [client.seconds(f"copy-{number}", held.prompts[0], True) for number in range(1, 8)]
            warm = [client.seconds("copy-7", held.prompts[0], True) for _ in range(7)]
            print(
                f"first token of {len(held.prompts[0])} prompt tokens: not loaded {max(cold):.2f} s (worst of 7),"
                f" loaded {max(warm):.2f} s (worst of 7)"
            )


def additions(finished: Finished, count: int) -> None:
    """Seconds until an adapter that comes into a served bank is listed."""
    base = Path(finished.data.model)
    card = partial(AdapterCard, base_name=str(base), base_digest=base_digest(base))
    with tempfile.TemporaryDirectory() as place:
        bank = Bank(Path(place) / "bank", create=True)
        bank.add(_scaled(finished.exported, Path(place) / "first", 1.0), card("first"))
        catalog, spent = open_catalog([], Path(place), bank, print), []
        with serving(catalog, lambda base: ProcessEngine({"base": base.folder, "max_adapters": 4})) as address:
            client = Client(address)
            for number in range(count):
                folder = _scaled(finished.exported, Path(place) / f"more-{number}", 1.0 + (number + 1) / 100)
                began = time.perf_counter()
                bank.add(folder, card(f"more-{number}"))
                while f"more-{number}" not in client.models():
                    time.sleep(0.02)
                spent.append(time.perf_counter() - began)
                time.sleep(number / count)  # at another moment of the server's look at the bank
    median_s, most_s = statistics.median(spent), max(spent)
    print(f"a new adapter of the bank is served after {median_s:.2f} s (median of {count}; at most {most_s:.2f})")


def _scaled(adapter: Path, folder: Path, factor: float) -> Path:
    """A copy with other values, which a bank takes as another adapter."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file)
    return folder


def _name_base(adapter: Path, base: str) -> None:
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": base}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "latency"))
    parser.add_argument("run")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--requests", type=int, default=50)
    options = parser.parse_args()
    finished = require_finished(RunFolder.find(options.run, options.runs))
    if options.what == "answers":
        answers(finished, options.rows)
    else:
        latency(finished, options.requests)
        additions(finished, 10)


if __name__ == "__main__":
    main()
