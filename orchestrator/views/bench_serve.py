"""Renders a benchmark of serving: latencies and rates by engine, model and concurrency."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clusters.units import format_s
from orchestrator.language.catalogue import tr
from orchestrator.serving.bench.result import Latency, ServeResult
from orchestrator.views.screen import new_table

_NUMBERS = ("first_token_s", "first_token_p95_s", "next_token_s", "next_token_p95_s", "tokens_per_s")
_HEADS = ("clients", "1st token", "p95", "per token", "p95", "tokens/s")


def serve_view(result: ServeResult) -> RenderableType:
    """One result."""
    lines: list[RenderableType] = [Text(tr(headline(result))), Text(tr(f"weights: {weights_of(result)}"))]
    lines.append(_models(result))
    if result.adapters:
        lines += [Text(), _adapters(result)]
    if result.not_measured:
        lines.append(Text())
    lines += [Text(tr(f"not measured: {text}"), style="yellow") for text in reasons(result)]
    return Group(*lines)


def headline(result: ServeResult) -> str:
    """What was measured where, in one line."""
    many = f"{result.num_prompts} {result.prompts}" if result.num_prompts else result.prompts
    length = statistics.mean(row.prompt_tokens for row in result.rows)
    asked = f"{many} ({length:.0f} tokens), {result.new_tokens} new ones, greedy, {result.repeats} repeats"
    return f"{result.model} on {result.device}, {result.threads} threads: {asked}"


def weights_of(result: ServeResult) -> str:
    """How each engine holds each model's weights."""
    found = {(row.engine, row.model): row.weights for row in result.rows}
    kinds = {engine: {weights for (one, _), weights in found.items() if one == engine} for engine, _ in found}
    same = [f"{engine}: {next(iter(weights))}" for engine, weights in kinds.items() if len(weights) == 1]
    own = [f"{engine}, {model}: {kept}" for (engine, model), kept in found.items() if len(kinds[engine]) > 1]
    return "; ".join(same + own)


def reasons(result: ServeResult) -> Iterator[str]:
    """What was not measured, engine by engine, models of one reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in result.not_measured:
        groups.setdefault((one.engine, one.reason), []).append(one.model)
    for (engine, reason), models in groups.items():
        yield f"{engine} ({', '.join(models)}): {reason}"


def latency_cells(row: Latency) -> tuple[str, ...]:
    """Median and 95th percentile to the first token and of each further one, and the rate."""
    seconds = (row.first_token_s, row.first_token_p95_s, row.next_token_s, row.next_token_p95_s)
    shown = ("-" if value is None else latency_text(value) for value in seconds)
    refused = f" ({row.refused} refused)" if row.refused else ""
    return *shown, f"{row.tokens_per_s:.1f}{refused}"


def latency_text(seconds: float) -> str:
    """Seconds as `0.88 ms`, `48 ms` or `1.2 s`."""
    if seconds >= 1:
        return format_s(seconds)
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.0995 else f"{1000 * seconds:.2g} ms"


def flat(result: ServeResult) -> dict[str, float]:
    """The numbers that two results have in common, by name."""
    named = {f"{row.engine} {row.model} x{row.concurrency}": row for row in result.rows}
    named |= {f"{row.num_adapters} adapters {row.order} x{row.concurrency}": row for row in result.adapters}
    values = ((f"{name} {key}", getattr(row, key)) for name, row in named.items() for key in _NUMBERS)
    return {name: value for name, value in values if value is not None}


def _models(result: ServeResult) -> Table:
    table = new_table("engine", "model", *_HEADS)
    for row in result.rows:
        table.add_row(row.engine, row.model, str(row.concurrency), *latency_cells(row))
    return table


def _adapters(result: ServeResult) -> Table:
    table = new_table("adapters", "order", *_HEADS)
    for row in result.adapters:
        table.add_row(str(row.num_adapters), row.order, str(row.concurrency), *latency_cells(row))
    return table
