"""Renders results, runs and evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from clusters.safe.reading import printable
from clusters.units import format_bytes, format_count, format_s
from orchestrator.language.catalogue import tr
from orchestrator.runs.checkpoints import ChosenStep
from orchestrator.runs.condition import exported_damage
from orchestrator.runs.events import Event
from orchestrator.runs.json_files import HandedBack, Quality, RunResult, Sample, StepTimes, is_share
from orchestrator.runs.run_folder import RunFolder, state_without_driver, utc
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.facts import RunFacts, facts_of, facts_of_whole_run
from orchestrator.runs.summary.summary_file import summary_of
from orchestrator.runs.summary.time_left import TimeLeft, time_left
from orchestrator.views.screen import label, new_table
from strategies.cost.phases import Phases


def result_view(run: RunFolder, summary: EventSummary) -> RenderableType:
    """Quality before and after, sample outputs, cost, and where things are."""
    result = run.result()
    if result is None:
        return Text(tr("no result yet"))
    parts: list[RenderableType] = []
    if after := result.after:
        before = result.before or Quality(None)
        table = new_table("held-out", "before", "after")
        for key, value in after.scores.items():
            table.add_row(_text(key), score(key, before.scores.get(key)), score(key, value))
        old = {sample.prompt: sample.generated for sample in before.samples}
        parts += [table, Text(), *(_sample(sample, old.get(sample.prompt)) for sample in after.samples)]
        parts += [_text(tr(f"{key}: {gain.text}")) for key, gain in result.gains.items()]
        parts += _how_compared(after)
    if text := handed_back_text(result.handed_back):
        parts.append(Text(tr(text), style="yellow"))
    parts.append(Text(tr(_cost_sentence(result))))
    if (measured := summary.phases).total_s:
        parts.append(Text(tr(phases_text(measured, run.plan().phases))))
    exported = run.exported()
    if exported:
        parts.append(_text(f"{exported.name}: {exported}"))
    if damage := exported_damage(run, result):
        parts.append(Text(printable(tr(f"damaged: {damage}")), style="red"))
    elif result.check:
        parts.append(_text(tr(f"checked: {result.check}")))
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
    width = max((len(key) + 1 for key in quality.scores), default=0)
    lines = [_text(f"{key:<{max(14, width)}}{score(key, value)}") for key, value in quality.scores.items()]
    samples = (_sample(sample, None) for sample in quality.samples)
    return Group(*lines, *_how_compared(quality), Text(), *samples)


def _how_compared(quality: Quality) -> list[RenderableType]:
    """The unit of text of each metric, and how many prompts left no room for an answer."""
    notes = [f"{key}: {tr(how)}" for key, how in quality.compared.items()]
    if quality.without_room:
        notes.append(tr(f"{quality.without_room} prompts fill the model's context: their answers are empty"))
    if quality.no_answer:
        notes.append(tr(f"eval.answer_pattern finds no answer in {quality.no_answer} of {quality.answers} texts"))
    return [Text(printable("; ".join(notes)), style="dim")] if notes else []


def _text(text: str) -> Text:
    """One line as it is: no markup, no control characters."""
    return Text(printable(text))


def _sample(sample: Sample, old: str | None) -> RenderableType:
    prompt = printable(" ".join(sample.prompt.split()))
    right = sample.generated.strip() == sample.reference.strip()
    lines = Text()
    lines.append(f"{label('prompt')}{'…' if len(prompt) > 150 else ''}{prompt[-150:]}\n", style="dim")
    if old is not None:
        lines.append(f"{label('before')}{_start(old)}\n")
    lines.append(f"{label('after')}{_start(sample.generated)}\n", style="green" if right else "yellow")
    if not right:
        lines.append(f"{label('wanted')}{_start(sample.reference)}\n", style="dim")
    return lines


def _start(text: str) -> str:
    return printable(" ".join(text.split()))[:150]


def score(key: str, value: float | None) -> str:
    """A metric in percent, a loss as it is."""
    if value is None:
        return tr("not measured")
    return f"{value:.1%}" if is_share(key) else f"{value:.4f}"


def damaged_row(run: RunFolder, wrong: Sequence[str]) -> dict[str, Any]:
    """The row of a run with damaged files: what is wrong with them instead of what they say."""
    row = dict.fromkeys(("step", "num_steps", "loss", "tokens_per_s", "started"))
    return {"run": run.run_id, "state": "damaged", **row, "path": str(run.path), "damage": list(wrong)}


def run_row(run: RunFolder, summary: EventSummary) -> dict[str, Any]:
    """The state of a run as one flat record.  Raises JobError."""
    facts, state = facts_of(run, summary), run.state(summary.state_by_events)
    is_known = state == "running" and (run.path / "plan.json").exists()
    return _row(run, facts, state, time_left(summary, run.plan()) if is_known else None)


def listed_row(run: RunFolder) -> dict[str, Any]:
    """The same for a table of many runs.  Raises JobError with all that can be seen to be wrong with one."""
    if run.is_locked():  # the process that holds the lock may be writing: nothing is damaged
        return run_row(run, summary_of(run))
    facts = facts_of_whole_run(run)
    return _row(run, facts, state_without_driver(facts.state))


def _row(run: RunFolder, facts: RunFacts, state: str, left: TimeLeft | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": run.run_id,
        "state": state,
        "step": facts.step,
        "num_steps": facts.num_steps,
        "loss": facts.loss,
        "tokens_per_s": facts.tokens_per_s,
        **({"loss_scale": facts.loss_scale} if facts.loss_scale is not None else {}),
        "started": None if facts.started is None else utc(facts.started),
        "path": str(run.path),
    }
    if left is not None:
        row |= {"eta_s": round(left.seconds), "eta_is_measured": left.is_measured}
    row |= facts.scores
    if state == "failed" and facts.error:
        row["error"] = facts.error
    if facts.exported:
        row["exported"] = str(run.path / facts.exported)
    return row


def status_lines(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines of `status`, names and values as people read them: of a run at work with percent and time left."""
    hidden = {"step", "num_steps", "eta_s", "eta_is_measured"}
    lines = [(key, _value_text(key, value)) for key, value in row.items() if value is not None and key not in hidden]
    if row.get("step") is not None:
        share = f" ({row['step'] / row['num_steps']:.0%})" if row.get("num_steps") else ""
        lines.insert(2, ("step", f"{row['step']}/{row['num_steps'] or '?'}{share}"))
    if row.get("eta_s") is not None:
        left = TimeLeft(row["eta_s"], row["eta_is_measured"])
        lines.insert(3, ("time left", tr(left.text)))
    return lines


def _value_text(key: str, value: Any) -> str:
    if key == "state":
        return tr(value)
    if not isinstance(value, float):
        return str(value)
    if key == "loss":
        return f"{value:.4f}"
    return f"{value:,.0f}" if key in ("tokens_per_s", "loss_scale") else score(key, value)


RUN_HEAD = ("run", "state", "step", "loss", "started")


def run_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table of `list`."""
    loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
    steps = "" if row["step"] is None else f"{row['step']}/{row['num_steps']}"
    return row["run"], tr(row["state"]), steps, loss, row["started"] or ""


def event_line(event: Event) -> str:
    """An event in one line."""
    hidden = ("event", "time", "traceback", "samples", "stages")
    rest = " ".join(f"{key}={value}" for key, value in event.to_json().items() if key not in hidden)
    return f"{utc(event.time)} {event.kind:<10} {rest}"
