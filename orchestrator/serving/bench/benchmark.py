"""Measures how fast servers of ours answer: engines side by side, a run's base, its adapter and the two merged.

Each engine serves in this process's thread, as `serve` would, and is asked through its HTTP door by `load`; what
computes is a process of its own.  One server is up at a time, so that none takes the other's memory or cores.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from clusters.safe.reading import read_json
from orchestrator.errors import ClusterError, JobError
from orchestrator.runs.condition import Finished, require_finished
from orchestrator.runs.run_folder import RunFolder
from orchestrator.serving.bench.load import Load, LoadRequest, LoadRound, joined, latency, send
from orchestrator.serving.bench.options import ServeBench
from orchestrator.serving.bench.prompts import BenchPrompts, choose_prompts
from orchestrator.serving.bench.result import KIND, AdaptersRow, Latency, NotMeasured, ServeResult, ServeRow
from orchestrator.serving.catalog import BASE, Catalog
from orchestrator.serving.engine_choice import engine_of, gguf_of, why_not
from orchestrator.serving.engines.kinds import kind_of_adapter
from orchestrator.serving.server import Address, serving
from orchestrator.training.model import merged
from orchestrator.training.model.devices import gpu_in_use

_TRANSFORMERS = "transformers"
_MERGED = "merged"
_LEAST_REQUESTS = 4  # of one sending
_WARM_UP_TOKENS = 8
_WHOLE = "all weights were trained: the result is a whole model"


@dataclass(frozen=True)
class _Served:
    """What one server serves."""

    catalog: Catalog
    models: dict[str, str]  # base, adapter or tuned, merged -> its name in the API
    copies: list[str] = field(default_factory=list)  # the adapter under other names


class _Findings:
    """Measures, and collects what was found and what was not."""

    def __init__(self, run: Finished, wish: ServeBench, prompts: BenchPrompts, say: Callable[[str], None]) -> None:
        self.run, self.wish, self.say = run, wish, say
        self.rows: list[ServeRow] = []
        self.adapters: list[AdaptersRow] = []
        self.not_measured: list[NotMeasured] = []
        self._prompts, self._seeds = prompts, itertools.count()

    def measure(self, engine: str, served: _Served) -> None:
        """One engine with what it serves; of what it cannot, the reason."""
        (base,) = served.catalog.bases.values()
        models, kinds = list(served.catalog.models.values()), dict(served.models)
        if reason := why_not(engine, base, [], self.wish.options):
            self._leave_out(engine, kinds, reason)
            return
        if reason := why_not(engine, base, models, self.wish.options):
            self._leave_out(engine, [kind for kind in kinds if kind != "base"], reason)
            kinds = {kind: name for kind, name in kinds.items() if kind == "base"}
        if not kinds:
            return
        weights = self._weights(engine, gguf_of(base, self.wish.options), as_trained=base.run is not None)
        try:
            options = replace(self.wish.options, engine=engine, max_adapters=1 + len(served.copies))
            with serving(served.catalog, lambda base: engine_of(base, models, options, self.say)) as address:
                self._measure_models(address, engine, kinds, weights)
                if served.copies:
                    self._measure_adapters(address, next(reversed(served.models.values())), served.copies)
        except (ClusterError, JobError) as error:
            self._leave_out(engine, kinds, str(error))

    def _measure_models(self, address: Address, engine: str, models: Mapping[str, str], weights: str) -> None:
        left = dict(models)
        rows: list[ServeRow] = []
        for concurrency in self.wish.concurrency:
            if not left:
                break
            self.say(f"{engine}, {' and '.join(left)}: {concurrency} at a time ...")
            count = max(_LEAST_REQUESTS, 2 * concurrency)
            found = self._times(address, concurrency, {kind: [[name] * count] for kind, name in left.items()})
            for kind, times in found.items():
                if isinstance(times, str):
                    del left[kind]
                    self.not_measured.append(NotMeasured(engine, kind, f"{concurrency} at a time: {times}"))
                    continue
                rows.append(ServeRow(**asdict(times), engine=engine, model=kind, weights=weights,
                                     concurrency=concurrency, requests=count))  # fmt: skip
        self.rows += sorted(rows, key=lambda row: list(models).index(row.model))

    def _measure_adapters(self, address: Address, name: str, copies: list[str]) -> None:
        """The same number of requests for one adapter, and for several in two orders."""
        concurrency, count = max(self.wish.concurrency), len(copies)
        each = math.ceil(2 * concurrency / count)
        orders = {
            "one": [[name] * count * each],
            "mixed": [copies * each],
            "grouped": [[copy] * each for copy in copies],
        }
        self.say(f"{_TRANSFORMERS}, one adapter, {count} mixed and {count} grouped: {concurrency} at a time ...")
        for order, times in self._times(address, concurrency, orders).items():
            if isinstance(times, str):
                self.not_measured.append(NotMeasured(_TRANSFORMERS, f"adapters, {order}", times))
                continue
            asked = 1 if order == "one" else count
            self.adapters.append(AdaptersRow(**asdict(times), order=order, num_adapters=asked,
                                             concurrency=concurrency, requests=count * each))  # fmt: skip

    def _times(
        self, address: Address, concurrency: int, rivals: Mapping[str, Sequence[Sequence[str]]]
    ) -> dict[str, Latency | str]:
        """Of each rival the models of its requests, in groups that are sent one after the other.

        Rivals take turns, so that a machine that becomes slower is so for all.  A refusal where one got no answer.
        """
        seed = next(self._seeds)
        prompts = {name: self._prompts.begin(f"{seed} {name}") for name in rivals}

        def sent(name: str, models: Sequence[str], new_tokens: int) -> LoadRound:
            requests = [LoadRequest(model, next(prompts[name])) for model in models]
            url = f"http://{address.host}:{address.port}"
            return send(url, address.api_key, Load(concurrency, requests, new_tokens))

        for name, groups in rivals.items():
            models = list(dict.fromkeys(model for group in groups for model in group))
            warm_up = list(itertools.islice(itertools.cycle(models), max(concurrency, len(models))))
            sent(name, warm_up, min(_WARM_UP_TOKENS, self.wish.new_tokens))
        rounds: dict[str, list[LoadRound]] = {name: [] for name in rivals}
        for _ in range(self.wish.repeats):
            for name, groups in rivals.items():
                rounds[name].append(joined([sent(name, group, self.wish.new_tokens) for group in groups]))
        return {name: _latency_or_refusal(found) for name, found in rounds.items()}

    def _weights(self, engine: str, gguf: Path | None, as_trained: bool) -> str:
        """How an engine holds a model; one that is not loaded as a run trained it has the engine's own precision."""
        if engine == "llama.cpp":
            return f"GGUF {gguf.name}" if gguf else "GGUF"
        plan = self.run.plan
        if engine != _TRANSFORMERS:
            return "as vLLM loads them"
        if not as_trained:
            return self.wish.options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        dtype = self.wish.options.dtype or plan.techniques.dtype
        return f"{dtype}, quantised as trained" if plan.build_method().is_quantised else dtype

    def _leave_out(self, engine: str, kinds: Iterable[str], reason: str) -> None:
        done = {row.model for row in self.rows if row.engine == engine}
        self.not_measured += [NotMeasured(engine, kind, reason) for kind in kinds if kind not in done]


def _latency_or_refusal(rounds: Sequence[LoadRound]) -> Latency | str:
    refused = next((one.refusals[0] for one in rounds if not one.answers), None)
    return refused or latency(rounds)


def bench_serving(run: RunFolder, wish: ServeBench, say: Callable[[str], None]) -> ServeResult:
    """Latencies and rates of what a finished run made, as servers of ours answer.

    Raises JobError for a run that is not finished, ClusterError where nothing at all could be measured.
    """
    finished = require_finished(run)
    prompts = choose_prompts(finished, wish.prompt_tokens, wish.new_tokens)
    say(f"prompts: {prompts.what}")
    found = _Findings(finished, wish, prompts, say)
    # In the run's folder: a merged model is as large as the base, and /tmp is often memory.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=run.path) as place:
        copies = _copies(finished, wish, Path(place), found)
        for engine in wish.engines if set(wish.models) - {_MERGED} else ():
            found.measure(engine, _own(finished, wish, copies if engine == _TRANSFORMERS else [], say))
        if _MERGED in wish.models:
            _measure_merged(found, Path(place) / _MERGED)
    if not found.rows:
        reasons = [f"{one.engine}, {one.model}: {one.reason}" for one in found.not_measured]
        raise ClusterError("\n".join(["nothing could be measured", *reasons]))
    return _result(found, prompts)


def _own(run: Finished, wish: ServeBench, copies: Sequence[Path], say: Callable[[str], None]) -> _Served:
    """The base, and what was made of it."""
    catalog = Catalog(None, say)
    for path in (run.run.path, *copies):
        catalog.add(str(path), run.run.path.parent)
    names = {"base": ("base", BASE), "tuned": ("adapter" if run.is_adapter else "tuned", run.run.run_id)}
    models = dict(names[model] for model in ("base", "tuned") if model in wish.models)
    return _Served(catalog, models, [copy.name for copy in copies])


def _copies(run: Finished, wish: ServeBench, place: Path, found: _Findings) -> list[Path]:
    """The run's adapter under other names: speed does not depend on the values."""
    if not wish.num_adapters or "tuned" not in wish.models:
        return []
    reason = None
    if not run.is_adapter:
        reason = _WHOLE
    elif _TRANSFORMERS not in wish.engines:
        reason = f"they are mixed by the engine {_TRANSFORMERS}"
    elif max(wish.concurrency) < 2:
        reason = "one request at a time mixes nothing"
    elif kind_of_adapter(run.exported) == "alone":
        reason = "each needs a model of its own, and one is held at a time; `orchestrator merge` makes plain models"
    if reason:
        found.not_measured.append(NotMeasured(_TRANSFORMERS, f"{wish.num_adapters} adapters", reason))
        return []
    made = [place / f"{run.run.run_id}-copy-{number}" for number in range(1, wish.num_adapters + 1)]
    for folder in made:
        shutil.copytree(run.exported, folder)
        file = folder / "adapter_config.json"
        settings = read_json(file) | {"base_model_name_or_path": run.data.model, "revision": None}
        file.write_text(json.dumps(settings), encoding="utf-8")
    return made


def _measure_merged(found: _Findings, folder: Path) -> None:
    """The base and the adapter as one plain model, on each engine that takes a folder."""
    run, wish = found.run, found.wish
    if not run.is_adapter:
        found.not_measured += [NotMeasured(engine, _MERGED, _WHOLE) for engine in wish.engines]
        return
    engines = [engine for engine in wish.engines if engine != "llama.cpp"]
    if "llama.cpp" in wish.engines:
        text = "llama.cpp reads GGUF files; `orchestrator export RUN --gguf --merged` writes one for it"
        found.not_measured.append(NotMeasured("llama.cpp", _MERGED, text))
    if not engines:
        return
    found.say("merging ...")
    try:
        merged.stream(run.exported, Path(run.data.model), folder)
    except (merged.NotStreamable, OSError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"it cannot be merged tensor by tensor: {text or error}"
        found.not_measured += [NotMeasured(engine, _MERGED, reason) for engine in engines]
        return
    for engine in engines:
        catalog = Catalog(None, found.say)
        catalog.add(str(folder), folder.parent)
        if not run.plan.build_method().is_quantised:  # what is merged is not
            for base in catalog.bases.values():
                base.run = str(run.run.path.absolute())
        found.measure(engine, _Served(catalog, {_MERGED: folder.name}))


def _result(found: _Findings, prompts: BenchPrompts) -> ServeResult:
    import transformers

    run, part = found.run, found.run.plan.nodes[0]
    device = torch.device("cuda" if part.torch_device != "cpu" and torch.cuda.is_available() else "cpu")
    return ServeResult(
        kind=KIND,
        name=run.job.spec.name,
        run=run.run.run_id,
        model=run.job.spec.model.model_name_or_path,
        model_folder=run.data.model,
        device=part.device if device.type == part.torch_device == "cpu" else gpu_in_use(part, device)[0],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        time=time.time(),
        prompts=prompts.what,
        num_prompts=len(prompts.held_out),
        new_tokens=found.wish.new_tokens,
        repeats=found.wish.repeats,
        rows=found.rows,
        adapters=found.adapters,
        not_measured=found.not_measured,
    )
