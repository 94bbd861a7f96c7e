"""Serving in a run's report: latencies and rates as `bench RUN --serve` measured them, and what tokens cost so."""

from __future__ import annotations

import os
from collections.abc import Sequence

from clusters.safe.reading import BadInput
from clusters.units import format_s
from orchestrator.job.job_file import Job
from orchestrator.language.catalogue import Translator
from orchestrator.planning import price
from orchestrator.planning.plan import Plan
from orchestrator.report import plots
from orchestrator.report.blocks import Block, Facts, Figure, Paragraph, Table
from orchestrator.report.costs import energy_text, money_text
from orchestrator.runs.run_folder import RunFolder, utc
from orchestrator.serving.bench.result import FILE, AdaptersRow, Latency, ServeResult, ServeRow, read
from orchestrator.views.bench_serve import latency_cells, latency_text, weights_of

_NAMES = ("base", "adapter", "tuned", "merged", "one", "mixed", "grouped")  # that have a translation
_COPIES = "The adapters are copies of the run's own: speed does not depend on their values."
_MILLION = 1_000_000


def serving_blocks(w: Translator, run: RunFolder, job: Job, plan: Plan) -> list[Block]:
    """What was measured of serving; none where nothing was."""
    file = run.path / FILE
    if not os.path.lexists(file):
        return []
    try:
        result = read(file)
    except BadInput as error:
        text = w("The measurements of serving cannot be read; `bench --serve` takes them again.")
        return [Paragraph(f"{text} {w(str(error))}")]
    blocks: list[Block] = [_facts(w, result), _figure(w, result), _rows(w, result), *_adapters(w, result.adapters)]
    blocks += _not_measured(w, result)
    return [*blocks, *_costs(w, run, job, plan, result), _settings(w, result)]


def _facts(w: Translator, result: ServeResult) -> Block:
    quick = min((row for row in result.rows if row.first_token_s is not None), key=_first_token_s, default=None)
    best = max(result.rows, key=lambda row: row.tokens_per_s)
    facts = [(f"{w('tokens/s')}: {_place(w, best)}", f"{best.tokens_per_s:.1f}")]
    if quick and quick.first_token_s is not None:
        facts.append((f"{w('first token')}: {_place(w, quick)}", latency_text(quick.first_token_s)))
    return Facts(facts)


def _first_token_s(row: ServeRow) -> float:
    return row.first_token_s or 0.0


def _place(w: Translator, row: ServeRow) -> str:
    return f"{_series(w, row)}, {w('{count} at a time').format(count=row.concurrency)}"


def _series(w: Translator, row: ServeRow) -> str:
    return f"{row.engine}, {_named(w, row.model)}"


def _named(w: Translator, name: str) -> str:
    return w(name) if name in _NAMES else name


def _figure(w: Translator, result: ServeResult) -> Block:
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in result.rows:
        point = row.concurrency, row.tokens_per_s, row.tokens_per_s_low, row.tokens_per_s_high
        series.setdefault(_series(w, row), []).append(point)
    caption = w(
        "New tokens a second of all answers together, against the requests on their way; bars reach from the lowest to"
        " the highest repeat."
    )
    return Figure("serving", plots.rates(series, w("requests at a time"), w("tokens/s")), caption)


def _rows(w: Translator, result: ServeResult) -> Block:
    head = (w("engine"), w("model"), w("at a time"), *_heads(w))
    rows = [(row.engine, _named(w, row.model), str(row.concurrency), *_cells(row)) for row in result.rows]
    best = [place for place, row in enumerate(result.rows) if row in result.best]
    return Table(head, rows, best)


def _heads(w: Translator) -> tuple[str, ...]:
    return w("first token"), w("p95"), w("per token"), w("p95"), w("tokens/s"), w("low to high")


def _cells(row: Latency) -> tuple[str, ...]:
    return *latency_cells(row), f"{row.tokens_per_s_low:.1f} - {row.tokens_per_s_high:.1f}"


def _adapters(w: Translator, rows: Sequence[AdaptersRow]) -> list[Block]:
    """Several adapters in one batch beside one after the other."""
    if not rows:
        return []
    rates = {row.order: f"{row.tokens_per_s:.1f}" for row in rows}
    most = max(row.num_adapters for row in rows)
    blocks: list[Block] = []
    if {"one", "mixed", "grouped"} <= rates.keys():
        text = w(
            "Requests for {adapters} adapters, {concurrency} at a time: {mixed} tokens/s mixed in one batch, {grouped}"
            " tokens/s one adapter after the other; {one} tokens/s where all are for one adapter."
        ).format(adapters=most, concurrency=rows[0].concurrency, **rates)
        blocks.append(Paragraph(f"{text} {w(_COPIES)}"))
    cells = [(_named(w, row.order), str(row.num_adapters), str(row.concurrency), *_cells(row)) for row in rows]
    return [*blocks, Table((w("order"), w("adapters"), w("at a time"), *_heads(w)), cells)]


def _not_measured(w: Translator, result: ServeResult) -> list[Block]:
    rows = [(one.engine, _named(w, one.model), one.reason) for one in result.not_measured]
    return [Table((f"{w('not measured')}: {w('engine')}", w("model"), w("reason")), rows)] if rows else []


def _costs(w: Translator, run: RunFolder, job: Job, plan: Plan, result: ServeResult) -> list[Block]:
    """What a million generated tokens cost at each model's best rate, on the machine that the run's plan has first."""
    part, spec = plan.nodes[0], job.spec
    cluster = price.priced(spec, run.capability())
    node = next((one for one in cluster.nodes if one.name == part.node), None)
    device = next((one for one in node.devices if one.name == part.device), None) if node else None
    if node is None or device is None:
        return []
    rows = []
    for row in result.best:
        seconds = _MILLION / row.tokens_per_s
        cost = price.price_of_device(spec, node, device, seconds)
        keys = {"cost.nodes": cost.machines, "cost.power_w": cost.electricity}
        missing = [key for key, known in keys.items() if known is None]
        note = f"{w('not priced')}; {w('set')}: {', '.join(missing)}" if missing else ""
        energy = "-" if cost.energy_wh is None else f"{energy_text(cost.energy_wh)} ({w('declared')})"
        money = money_text(cost.total, cost.currency)
        rows.append((_place(w, row), f"{row.tokens_per_s:.1f}", format_s(seconds), energy, money, note))
    head = ("", w("tokens/s"), w("time of 1M tokens"), w("energy"), w("1M tokens"), w("note"))
    text = w(
        "Cost of a million generated tokens, computed from the highest measured rate and the prices of {node}, which is"
        " busy all that time."
    ).format(node=node.name)
    return [Paragraph(text), Table(head, rows)]


def _settings(w: Translator, result: ServeResult) -> Block:
    own = f"{result.num_prompts} {w('held-out prompts of the run')}"
    lengths = sorted({round(row.prompt_tokens) for row in result.rows})
    rows = [
        (w("device"), f"{result.device}, {result.threads} {w('threads')}"),
        (w("weights"), weights_of(result)),
        (w("prompts"), own if result.num_prompts else w("random tokens")),
        (w("tokens of a prompt"), " - ".join(map(str, dict.fromkeys((lengths[0], lengths[-1]))))),
        (w("new tokens of an answer"), str(result.new_tokens)),
        (w("repeats"), str(result.repeats)),
        (w("when"), utc(result.time)),
        (w("version"), f"torch {result.torch}, transformers {result.transformers}, Python {result.python}"),
    ]
    return Table((w("setting"), w("value")), rows)
