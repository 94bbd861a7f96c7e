"""A search folder -> the blocks of its report."""

from __future__ import annotations

from typing import Any

from clusters.safe.masking import masked
from clusters.units import format_bytes, format_s
from orchestrator.job.job_file import Job
from orchestrator.job.space import phrase
from orchestrator.report import plots
from orchestrator.report.blocks import Block, Code, Facts, Figure, Paragraph, Report, Table
from orchestrator.report.costs import command, money_text, notes_on_cost
from orchestrator.report.translations import Word, words
from orchestrator.runs.search_folder import SearchFolder, Trial
from orchestrator.views.search import common


def report_of_search(folder: SearchFolder, job: Job, lang: str) -> Report:
    """What was tried, what came of it, and what to submit."""
    w = words(lang)
    summary, trials = folder.summary(), folder.trials()
    outcomes: list[dict[str, Any]] = summary.get("outcomes", [])
    by_number = {trial.number: trial for trial in trials}
    report = Report(job.spec.name, f"{w('Search report')} · {folder.run_id}", lang)
    report.section(w("Recommendation"), *_recommended(w, folder, summary))
    report.section(w("Before the trials"), _before(w, folder.advice(), trials))
    report.section(w("Trials"), _table(w, summary, outcomes, by_number), *_figures(w, summary, outcomes, trials))
    report.section(w("Cost"), *_cost(w, job, folder, summary))
    report.section(w("Reproduce"), Code(command("search", folder, folder.document)), Code(masked(job.text.strip())))
    return report


def _recommended(w: Word, folder: SearchFolder, summary: dict[str, Any]) -> list[Block]:
    chosen = summary.get("recommended")
    if not chosen:
        return [Paragraph(summary.get("why", folder.state()))]
    facts = [
        (w("time"), format_s(chosen["total_s"])),
        (w("peak memory"), format_bytes(chosen["peak_bytes"])),
        (w("held-out loss"), f"{chosen['eval_loss']:.4f}"),
        *([(w("cost"), money_text(chosen["cost"], chosen["currency"]))] if chosen["cost"] is not None else []),
    ]
    rows = [(key, str(value)) for key, value in chosen["point"].items()]
    return [
        Facts(facts),
        Paragraph(summary["why"]),
        Table((w("setting"), w("value")), rows),
        Code(command("submit", folder, "recommended.yaml")),
    ]


def _before(w: Word, advice: dict[str, Any] | None, trials: list[Trial]) -> Block | None:
    if advice is None:
        return None
    return Facts(
        [
            (w("combinations"), str(advice["combinations"])),
            (w("cannot run"), str(sum(advice["impossible"].values()))),
            (w("cannot win"), str(len(advice["dominated"]))),
            (w("worth a trial"), str(len(advice["worth"]))),
            (w("tried"), str(len(trials))),
        ]
    )


def _table(w: Word, summary: dict[str, Any], outcomes: list[dict[str, Any]], by_number: dict[int, Trial]) -> Table:
    head = (
        w("trial"),
        w("combination"),
        f"{w('step')} ({w('predicted')})",
        w("held-out loss"),
        w("whole job"),
        w("memory"),
        w("cost"),
        w("note"),
    )
    same, front = common(list(by_number.values())), set(summary.get("front", []))
    recommended = (summary.get("recommended") or {}).get("trial")
    rows, marked = [], []
    for outcome in outcomes:
        trial = by_number[outcome["trial"]]
        notes = [w("recommended")] if trial.number == recommended else []
        notes += [w("on the front")] if trial.number in front else []
        notes += [w("stopped early")] if trial.status == "stopped" else []
        if trial.number == recommended:
            marked.append(len(rows))
        rows.append(
            (
                str(trial.number),
                trial.name or phrase(trial.point, same),
                f"{format_s(trial.step_s or 0.0)} ({format_s(trial.predicted_step_s or 0.0)})",
                f"{outcome['eval_loss']:.4f}",
                format_s(outcome["total_s"]),
                format_bytes(outcome["peak_bytes"]),
                money_text(outcome["cost"], outcome["currency"]),
                ", ".join(notes),
            )
        )
    for trial in by_number.values():
        if not trial.measured:
            what = trial.name or phrase(trial.point, same)
            rows.append((str(trial.number), what, "-", "-", "-", "-", "-", f"{w('failed')}: {trial.reason}"))
    return Table(head, rows, tuple(marked))


def _figures(w: Word, summary: dict[str, Any], outcomes: list[dict[str, Any]], trials: list[Trial]) -> list[Block]:
    if len(outcomes) < 2:
        return []
    front, chosen = set(summary["front"]), (summary.get("recommended") or {}).get("trial")

    def series(y: str, scale: float) -> dict[str, list[tuple[float, float, str]]]:
        found: dict[str, list[tuple[float, float, str]]] = {
            w("other trials"): [], w("on the front"): [], w("recommended"): []
        }  # fmt: skip
        for one in outcomes:
            kind = (
                "recommended" if one["trial"] == chosen else "on the front" if one["trial"] in front else "other trials"
            )
            label = str(one["trial"]) if kind != "other trials" else ""
            found[w(kind)].append((one["total_s"] / 60, one[y] / scale, label))
        return {name: points for name, points in found.items() if points}

    def staircase(y: str, scale: float) -> list[tuple[float, float]]:
        best: list[tuple[float, float]] = []
        for one in sorted((o for o in outcomes if o["status"] == "finished"), key=lambda o: (o["total_s"], o[y])):
            if not best or one[y] / scale < best[-1][1]:
                best.append((one["total_s"] / 60, one[y] / scale))
        return best

    memory = plots.scatter(
        series("peak_bytes", 2**30), f"{w('whole job')}, {w('minutes')}", f"{w('memory')}, {w('GiB')}",
        staircase("peak_bytes", 2**30),
    )  # fmt: skip
    quality = plots.scatter(
        series("lack", 1.0), f"{w('whole job')}, {w('minutes')}", w("held-out loss"), staircase("lack", 1.0)
    )
    pairs = [(t.predicted_step_s, t.step_s, "") for t in trials if t.step_s and t.predicted_step_s]
    both = plots.scatter(
        {w("trial"): pairs}, f"{w('predicted')}, {w('seconds')}", f"{w('measured')}, {w('seconds')}", diagonal=True
    )
    curves = {str(t.number): t.curve for t in trials if len(t.curve) > 1}
    blocks: list[Block] = [
        Figure(
            "pareto-memory",
            memory,
            w("Each trial scaled to the whole job; the dashed line joins those that nothing beats in time and memory."),
        ),
        Figure("pareto-quality", quality, w("Each trial scaled to the whole job: time and the quality it reached.")),
        Figure("predicted", both, w("Seconds of a step, predicted and measured; on the dashed line they are equal.")),
    ]
    if 1 < len(curves) <= 21:
        svg = plots.curves(curves, w("step"), w("held-out loss"))
        blocks.append(Figure("curves", svg, w("Held-out loss of each trial while it trained.")))
    return blocks


def _cost(w: Word, job: Job, folder: SearchFolder, summary: dict[str, Any]) -> list[Block]:
    chosen = summary.get("recommended")
    facts = [(w("time"), format_s(summary.get("trial_seconds", 0.0)))]
    plan = folder.plan()
    if plan.price.total is not None:
        rate = plan.price.total / plan.whole_s  # of the machines the job would use
        currency = plan.price.currency
        facts += [
            (w("cost"), money_text(rate * summary.get("trial_seconds", 0.0), currency)),
            (w("of failed trials"), money_text(rate * summary.get("wasted_seconds", 0.0), currency)),
        ]
        if chosen and chosen["cost"] is not None:
            each = chosen["cost"] * job.spec.cost.retrainings_per_year
            facts += [(w("a run"), money_text(chosen["cost"], currency)), (w("a year"), money_text(each, currency))]
        return [Facts(facts), Paragraph(notes_on_cost(w))]
    keys = "cost.power_w, cost.nodes.NAME.purchase"
    return [Facts(facts), Paragraph(f"{w('not priced')}; {w('set')}: {keys}")]
