"""Renders a benchmark, or two side by side."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clusters.safe.reading import BadInput, read_json, record
from clusters.units import format_bytes, format_s
from orchestrator.errors import JobError
from orchestrator.job.paths import resolve_path
from orchestrator.language.catalogue import tr
from orchestrator.serving.bench.result import KIND as SERVE
from orchestrator.serving.bench.result import ServeResult
from orchestrator.views import bench_serve
from orchestrator.views.screen import new_table

_BAR = 40


@dataclass(frozen=True)
class _Result:
    """What is read of every result."""

    model: str
    device: str
    threads: int
    torch: str
    transformers: str


@dataclass(frozen=True)
class _Timed(_Result):
    """What is read of a result of a training step."""

    step_s: float
    throughput: dict[str, float]
    phases: dict[str, float]
    parts: dict[str, float]
    memory: dict[str, float]


@dataclass(frozen=True)
class _Row:
    """One measurement of a model that generates."""

    model: str
    batch_size: int
    prompt_tokens: int
    first_token_s: float
    next_token_s: float
    tokens_per_s: float
    peak_bytes: float


@dataclass(frozen=True)
class _Generated(_Result):
    """What is read of a result of a model that generates."""

    rows: list[_Row]


_KINDS = {"train": _Timed, "generate": _Generated, SERVE: ServeResult}


def read(file: Path) -> dict[str, Any]:
    """A result of `bench`.  Raises JobError for any other file."""
    path = resolve_path(file, "--compare", kind="file")
    try:
        found = read_json(path)
        kind = _KINDS.get(str(found.get("kind"))) if isinstance(found, dict) else None
        if kind is None:
            raise BadInput(f"{path}: is not a result of `orchestrator bench`")
        record(kind, found, str(path))
        if kind is _Timed and "peak" not in found["memory"]:
            raise BadInput(f"{path}: memory.peak is missing")
    except BadInput as error:
        raise JobError(f"--compare: {error}. `orchestrator bench JOB` writes such files") from None
    return found


def bench_view(result: dict[str, Any]) -> RenderableType:
    """One result."""
    if result["kind"] == SERVE:
        return bench_serve.serve_view(record(ServeResult, result, "the result"))
    return _generation(result) if result["kind"] == "generate" else _training(result)


def _training(result: dict[str, Any]) -> RenderableType:
    rate, phases, parts = result["throughput"], result["phases"], result["parts"]
    of_ceiling = result["of_ceiling"]
    lines: list[RenderableType] = [
        Text(
            tr(
                f"{result['model']} on {result['device']}: {rate['tokens_per_s']:.0f} tokens/s,"
                f" {rate['supervised_tokens_per_s']:.0f} supervised tokens/s, {rate['samples_per_s']:.2f} samples/s;"
                f" step {format_s(result['step_s'])} (predicted {format_s(result['predicted_step_s'])})"
            )
        )
    ]
    if of_ceiling is not None:
        lines.append(
            Text(
                tr(
                    f"{result['flops_per_s'] / 1e9:.0f} GFLOP/s useful, {of_ceiling:.0%} of the"
                    f" {result['ceiling_flops_per_s'] / 1e9:.0f} that the probe's best matrix product reaches"
                )
            )
        )
    lines += [
        Text(),
        _shares(tr("step by phase"), phases, format_s),
        Text(),
        _shares(tr("profiled step by part"), parts, format_s),
    ]
    memory = {key: value for key, value in result["memory"].items() if key != "peak"}
    peak = tr(f"tensors at the peak, {format_bytes(result['memory']['peak'])}")
    lines += [Text(), _shares(peak, memory, format_bytes)]
    table = new_table("operator", "time", "of the step", "calls")
    whole = sum(parts.values()) or 1.0
    for row in result["operators"]:
        share = f"{row['seconds'] / whole:.0%}"
        table.add_row(row["name"], format_s(row["seconds"]), share, str(row["calls"]))
    return Group(*lines, Text(), table)


def _shares(title: str, values: dict[str, float], shown: Any) -> Table:
    whole = sum(values.values()) or 1.0
    table = new_table(title, "", "", "")
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        share = value / whole
        table.add_row(name, shown(value), f"{share:.0%}", "█" * round(_BAR * share))
    return table


def _generation(result: dict[str, Any]) -> RenderableType:
    table = new_table("model", "batch", "prompt", "first token", "per token", "tokens/s", "weights", "peak")
    for row in result["rows"]:
        table.add_row(
            row["model"],
            str(row["batch_size"]),
            str(row["prompt_tokens"]),
            format_s(row["first_token_s"]),
            format_s(row["next_token_s"]),
            f"{row['tokens_per_s']:.1f}",
            format_bytes(row["weights_bytes"]),
            format_bytes(row["peak_bytes"]),
        )
    title = f"{result['model']} on {result['device']}, {result['new_tokens']} new tokens, greedy"
    return Group(Text(tr(title)), table)


def comparison_view(first: dict[str, Any], second: dict[str, Any]) -> RenderableType:
    """B over A, number by number.  Raises JobError for benchmarks of different kinds."""
    if first["kind"] != second["kind"]:
        raise JobError(f"a {first['kind']} and a {second['kind']} benchmark cannot be compared")
    table = new_table("", "A", "B", "B / A")
    theirs = flat(second)
    for key, value in flat(first).items():
        other = theirs.get(key)
        if other is not None:
            table.add_row(key, f"{value:.4g}", f"{other:.4g}", f"x{other / value:.2f}" if value else "")
    differs = [one.name for one in fields(_Result) if first[one.name] != second[one.name]]
    notes = [Text(f"{key}: {first[key]} and {second[key]}", style="yellow") for key in differs]
    return Group(table, *notes)


def flat(result: dict[str, Any]) -> dict[str, float]:
    """The numbers that two results have in common, by name."""
    if result["kind"] == SERVE:
        return bench_serve.flat(record(ServeResult, result, "the result"))
    if result["kind"] == "generate":
        return {
            f"{row['model']} {row['batch_size']} x {row['prompt_tokens']} {key}": row[key]
            for row in result["rows"]
            for key in ("first_token_s", "next_token_s", "tokens_per_s", "peak_bytes")
        }
    found = {"step_s": result["step_s"], **result["throughput"], "peak_bytes": result["memory"]["peak"]}
    for group in ("phases", "parts"):
        found |= {f"{group}.{key}": value for key, value in result[group].items()}
    return found
