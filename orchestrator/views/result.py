"""Renders results, runs and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clusters.safe.reading import printable
from clusters.units import format_bytes, format_count, format_s
from orchestrator.runs.checkpoints import ChosenStep
from orchestrator.runs.condition import exported_damage
from orchestrator.runs.events import ErrorReport, Event, StateChange
from orchestrator.runs.json_files import HandedBack, Quality, RunResult, Sample, StepTimes
from orchestrator.runs.phases import measured_phases
from orchestrator.runs.run_folder import RunFolder, utc
from orchestrator.views.screen import new_table
from strategies.cost.phases import Phases


def result_view(run: RunFolder) -> RenderableType:
    """Quality before and after, sample outputs, cost, and where things are."""
    result = run.result()
    if result is None:
        return Text("no result yet")
    parts: list[RenderableType] = []
    if after := result.after:
        before = result.before or Quality(None)
        table = new_table("held-out", "before", "after")
        for key, value in after.scores.items():
            table.add_row(_text(key), score(key, before.scores.get(key)), score(key, value))
        old = {sample.prompt: sample.generated for sample in before.samples}
        parts += [table, Text(), *(_sample(sample, old.get(sample.prompt)) for sample in after.samples)]
        parts += _how_compared(after)
    if text := handed_back_text(result.handed_back):
        parts.append(Text(text, style="yellow"))
    parts.append(Text(_cost_sentence(result)))
    if (measured := measured_phases(run.events()[0])).total_s:
        parts.append(Text(phases_text(measured, run.plan().phases)))
    exported = run.exported()
    if exported:
        parts.append(_text(f"{exported.name}: {exported}"))
    if damage := exported_damage(run, result):
        parts.append(Text(printable(f"damaged: {damage}"), style="red"))
    elif result.check:
        parts.append(_text(f"checked: {result.check}"))
    return Group(*parts)


def handed_back_text(handed: HandedBack | None) -> str | None:
    """Why other weights than the best were handed back; None when the best were."""
    if not handed or not handed.reason:
        return None
    return ChosenStep(handed.step, handed.eval_loss, handed.instead_of, handed.reason).text


def _cost_sentence(result: RunResult) -> str:
    """Work, time and memory, the predicted beside the measured."""
    times, memory = result.time or StepTimes(), result.memory
    predicted_s, step_s = times.predicted_step_s, times.measured_step_s
    step = f"; step {format_s(step_s)} (predicted {format_s(predicted_s)})" if predicted_s and step_s else ""
    computed = f" ({format_count(result.computed_tokens)} computed)" if result.computed_tokens else ""
    seconds = format_s(max(result.train_seconds, 1e-9))
    return (
        f"{result.steps} steps, {format_count(result.tokens)} tokens{computed} in {seconds}"
        f" ({result.tokens_per_s:.0f} tokens/s){step}; peak memory {format_bytes(memory.measured_peak_bytes)}"
        f" (predicted {format_bytes(memory.predicted_bytes)})"
    )


def phases_text(measured: Phases, predicted: Phases) -> str:
    """Seconds of each phase, the predicted beside the measured; preparing the data comes before a run begins."""
    planned = {name: seconds for name, seconds in predicted.parts.items() if name != "preparation"}
    if not sum(planned.values()):  # a plan of an earlier version
        return f"in all {format_s(measured.total_s)}: {measured.text}"
    words = [
        f"{name} {format_s(seconds)} ({format_s(planned[name])})"
        for name, seconds in measured.parts.items()
        if name in planned and seconds + planned[name] >= 0.005 * measured.total_s
    ]
    return f"in all {format_s(measured.total_s)} (predicted {format_s(sum(planned.values()))}): {', '.join(words)}"


def scores_view(quality: Quality) -> RenderableType:
    """The numbers of one evaluation and its samples."""
    lines = [_text(f"{key:<14}{score(key, value)}") for key, value in quality.scores.items()]
    samples = (_sample(sample, None) for sample in quality.samples)
    return Group(*lines, *_how_compared(quality), Text(), *samples)


def _how_compared(quality: Quality) -> list[RenderableType]:
    """The unit of text of each metric, and how many prompts left no room for an answer."""
    notes = [f"{key}: {how}" for key, how in quality.compared.items()]
    if quality.without_room:
        notes.append(f"{quality.without_room} prompts fill the model's context: their answers are empty")
    return [Text(printable("; ".join(notes)), style="dim")] if notes else []


def _text(text: str) -> Text:
    """One line as it is: no markup, no control characters."""
    return Text(printable(text))


def _sample(sample: Sample, old: str | None) -> RenderableType:
    prompt = printable(" ".join(sample.prompt.split()))
    right = sample.generated.strip() == sample.reference.strip()
    lines = Text()
    lines.append(f"prompt  …{prompt[-150:]}\n" if len(prompt) > 150 else f"prompt  {prompt}\n", style="dim")
    if old is not None:
        lines.append(f"before  {_start(old)}\n")
    lines.append(f"after   {_start(sample.generated)}\n", style="green" if right else "yellow")
    if not right:
        lines.append(f"wanted  {_start(sample.reference)}\n", style="dim")
    return lines


def _start(text: str) -> str:
    return printable(" ".join(text.split()))[:150]


def score(key: str, value: float | None) -> str:
    """A metric in percent, a loss as it is."""
    if value is None:
        return "not measured"
    return f"{value:.4f}" if key == "eval_loss" else f"{value:.1%}"


def damaged_row(run: RunFolder, wrong: Sequence[str]) -> dict[str, Any]:
    """The row of a run with damaged files: what is wrong with them instead of what they say."""
    row = dict.fromkeys(("step", "num_steps", "loss", "tokens_per_s", "started"))
    return {"run": run.run_id, "state": "damaged", **row, "path": str(run.path), "damage": list(wrong)}


def run_row(run: RunFolder) -> dict[str, Any]:
    """The state of a run as one flat record."""
    steps = run.steps()
    num_steps = run.plan().num_steps if (run.path / "plan.json").exists() else None
    result = run.result()
    last = steps[max(steps)] if steps else None
    events = run.events()[0]
    errors = [event.text for event in events if isinstance(event, ErrorReport | StateChange) and event.text]
    state = run.state()
    row: dict[str, Any] = {
        "run": run.run_id,
        "state": state,
        "step": last.step if last else 0,
        "num_steps": num_steps,
        "loss": last.loss if last else None,
        "tokens_per_s": last.tokens_per_s if last else None,
        **({"loss_scale": last.loss_scale} if last and last.loss_scale is not None else {}),
        "started": utc(events[0].time) if events else None,
        "path": str(run.path),
    }
    if state == "running" and last and num_steps:
        row["eta_s"] = round((num_steps - last.step) * last.seconds)
    row |= result.after.scores if result and result.after else {}
    if state == "failed" and errors:
        row["error"] = errors[-1]
    exported = run.exported()
    if exported:
        row["exported"] = str(exported)
    return row


def runs_table(rows: list[dict[str, Any]]) -> Table:
    """The table of `list`."""
    table = new_table("run", "state", "step", "loss", "started")
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        steps = "" if row["step"] is None else f"{row['step']}/{row['num_steps']}"
        table.add_row(*(_text(str(cell)) for cell in (row["run"], row["state"], steps, loss, row["started"] or "")))
    return table


def event_line(event: Event) -> str:
    """An event in one line."""
    hidden = ("event", "time", "traceback", "samples", "stages")
    rest = " ".join(f"{key}={value}" for key, value in event.to_json().items() if key not in hidden)
    return f"{utc(event.time)} {event.kind:<10} {rest}"
