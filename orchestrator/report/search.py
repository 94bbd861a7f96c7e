"""A search folder -> the blocks of its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clusters.safe.masking import masked
from clusters.units import format_bytes, format_s
from orchestrator.job.job_file import Job
from orchestrator.job.space import phrase
from orchestrator.language.catalogue import Translator, translator
from orchestrator.report import plots
from orchestrator.report.blocks import Block, Code, Facts, Figure, Paragraph, Report, Table
from orchestrator.report.costs import command, money_text, notes_on_cost
from orchestrator.runs.search_folder import Advised, Concluded, SearchFolder, Summary, Trial
from orchestrator.views.search import common


def report_of_search(folder: SearchFolder, job: Job, lang: str) -> Report:
    """What was tried, what came of it, and what to submit."""
    w = translator(lang)
    summary, trials = folder.summary() or Summary(folder.state()), folder.trials()
    by_number = {trial.number: trial for trial in trials}
    report = Report(job.spec.name, f"{w('Search report')} · {folder.run_id}", lang)
    report.section(w("Recommendation"), *_recommended(w, folder, summary))
    report.section(w("Before the trials"), _before(w, folder.advice(), trials))
    report.section(w("Trials"), _table(w, summary, by_number), *_figures(w, summary, trials))
    report.section(w("Cost"), *_cost(w, job, folder, summary))
    report.section(w("Reproduce"), Code(command("search", folder, folder.document)), Code(masked(job.text.strip())))
    return report


def _recommended(w: Translator, folder: SearchFolder, summary: Summary) -> list[Block]:
    chosen = summary.recommended
    if not chosen:
        return [Paragraph(w(summary.why))]
    facts = [
        (w("time"), format_s(chosen.total_s)),
        (w("peak memory"), format_bytes(chosen.peak_bytes)),
        (w("held-out loss"), f"{chosen.eval_loss:.4f}"),
        *([(w("cost"), money_text(chosen.cost, chosen.currency))] if chosen.cost is not None else []),
    ]
    rows = [(key, str(value)) for key, value in chosen.point.items()]
    return [
        Facts(facts),
        Paragraph(w(summary.why)),
        Table((w("setting"), w("value")), rows),
        Code(command("submit", folder, "recommended.yaml")),
    ]


def _before(w: Translator, advice: Advised | None, trials: list[Trial]) -> Block | None:
    if advice is None:
        return None
    return Facts(
        [
            (w("combinations"), str(advice.combinations)),
            (w("cannot run"), str(sum(advice.impossible.values()))),
            (w("cannot win"), str(len(advice.dominated))),
            (w("worth a trial"), str(len(advice.worth))),
            (w("tried"), str(len(trials))),
        ]
    )


def _table(w: Translator, summary: Summary, by_number: dict[int, Trial]) -> Table:
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
    same = common(list(by_number.values()))
    rows, marked = [], []
    for outcome in summary.outcomes:
        trial = by_number[outcome.trial]
        notes = [w("recommended")] if trial.number == summary.best_trial else []
        notes += [w("on the front")] if trial.number in summary.front else []
        notes += [w("stopped early")] if trial.status == "stopped" else []
        notes += [] if trial.predicted_step_s else [w("shared passes")]
        if trial.number == summary.best_trial:
            marked.append(len(rows))
        rows.append(
            (
                str(trial.number),
                trial.name or phrase(trial.point, same),
                _step(trial),
                f"{outcome.eval_loss:.4f}",
                format_s(outcome.total_s),
                format_bytes(outcome.peak_bytes),
                money_text(outcome.cost, outcome.currency),
                ", ".join(notes),
            )
        )
    for trial in by_number.values():
        if not trial.measured:
            what = trial.name or phrase(trial.point, same)
            why = f"{w('failed')}: {w(trial.reason or '')}"
            rows.append((str(trial.number), what, "-", "-", "-", "-", "-", why))
    return Table(head, rows, tuple(marked))


def _step(trial: Trial) -> str:
    """Measured and, of a trial by itself, predicted."""
    measured = format_s(trial.step_s or 0.0)
    return f"{measured} ({format_s(trial.predicted_step_s)})" if trial.predicted_step_s else measured


def _figures(w: Translator, summary: Summary, trials: list[Trial]) -> list[Block]:
    if len(summary.outcomes) < 2:
        return []

    def against_time(cost: Callable[[Concluded], float], label: str) -> str:
        minutes = f"{w('whole job')}, {w('minutes')}"
        return plots.scatter(_points(w, summary, cost), minutes, label, _staircase(summary.outcomes, cost))

    memory = against_time(lambda one: one.peak_bytes / 2**30, f"{w('memory')}, {w('GiB')}")
    quality = against_time(lambda one: one.lack, w("held-out loss"))
    pairs = [(t.predicted_step_s, t.step_s, "") for t in trials if t.step_s and t.predicted_step_s]
    axes = f"{w('predicted')}, {w('seconds')}", f"{w('measured')}, {w('seconds')}"
    curves = {str(t.number): t.curve for t in trials if len(t.curve) > 1}
    blocks: list[Block] = [
        Figure(
            "pareto-memory",
            memory,
            w("Each trial scaled to the whole job; the dashed line joins those that nothing beats in time and memory."),
        ),
        Figure("pareto-quality", quality, w("Each trial scaled to the whole job: time and the quality it reached.")),
    ]
    if pairs:  # none where all trials shared passes
        both = plots.scatter({w("trial"): pairs}, *axes, diagonal=True)
        text = w("Seconds of a step, predicted and measured; on the dashed line they are equal.")
        blocks.append(Figure("predicted", both, text))
    if 1 < len(curves) <= 21:
        svg = plots.curves(curves, w("step"), w("held-out loss"))
        blocks.append(Figure("curves", svg, w("Held-out loss of each trial while it trained.")))
    return blocks


def _points(
    w: Translator, summary: Summary, cost: Callable[[Concluded], float]
) -> dict[str, list[tuple[float, float, str]]]:
    """Each trial as (minutes of the whole job, its cost, its number where it stands out), by what is known of it."""
    found: dict[str, list[tuple[float, float, str]]] = {"other trials": [], "on the front": [], "recommended": []}
    for one in summary.outcomes:
        kind = "on the front" if one.trial in summary.front else "other trials"
        kind = "recommended" if one.trial == summary.best_trial else kind
        label = str(one.trial) if kind != "other trials" else ""
        found[kind].append((one.total_s / 60, cost(one), label))
    return {w(kind): points for kind, points in found.items() if points}


def _staircase(outcomes: Sequence[Concluded], cost: Callable[[Concluded], float]) -> list[tuple[float, float]]:
    """The trials that trained to their end and that nothing beats in both time and cost, in minutes."""
    best: list[tuple[float, float]] = []
    whole = (one for one in outcomes if one.status == "finished")
    for one in sorted(whole, key=lambda one: (one.total_s, cost(one))):
        if not best or cost(one) < best[-1][1]:
            best.append((one.total_s / 60, cost(one)))
    return best


def _cost(w: Translator, job: Job, folder: SearchFolder, summary: Summary) -> list[Block]:
    chosen = summary.recommended
    facts = [(w("time"), format_s(summary.trial_seconds))]
    plan = folder.plan()
    if plan.price.total is not None:
        rate = plan.price.total / plan.whole_s  # of the machines the job would use
        currency = plan.price.currency
        facts += [
            (w("cost"), money_text(rate * summary.trial_seconds, currency)),
            (w("of failed trials"), money_text(rate * summary.wasted_seconds, currency)),
        ]
        if chosen and chosen.cost is not None:
            each = chosen.cost * job.spec.cost.retrainings_per_year
            facts += [(w("a run"), money_text(chosen.cost, currency)), (w("a year"), money_text(each, currency))]
        return [Facts(facts), Paragraph(notes_on_cost(w))]
    keys = "cost.power_w, cost.nodes.NAME.purchase"
    return [Facts(facts), Paragraph(f"{w('not priced')}; {w('set')}: {keys}")]
