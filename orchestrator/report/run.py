"""A run folder -> the blocks of its report."""

from __future__ import annotations

from clusters.safe.masking import masked
from clusters.units import format_bytes, format_count, format_s
from orchestrator.job.job_file import Job
from orchestrator.language.catalogue import Translator, translator
from orchestrator.planning import price
from orchestrator.planning.plan import Plan, settings_of
from orchestrator.report import plots, tco
from orchestrator.report.blocks import Block, Code, Facts, Figure, Paragraph, Report, SampleOutput, Table
from orchestrator.report.costs import alternatives_of, command, cost_table, notes_on_cost
from orchestrator.report.proofs import proof_blocks
from orchestrator.report.serving import serving_blocks
from orchestrator.report.stages import stage_blocks
from orchestrator.report.tasks import task_blocks
from orchestrator.runs.events import Event
from orchestrator.runs.json_files import RunResult, is_share
from orchestrator.runs.run_folder import RunFolder, utc
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.summary_file import summary_of
from orchestrator.runs.worker_stats import WorkerStats, stages_of_run, stats_of_run
from orchestrator.views.plan import shown
from orchestrator.views.result import score


def report_of_run(run: RunFolder, job: Job, lang: str) -> Report:
    """The job, the plan, the result and its cost.  Sections without data yet are omitted."""
    w = translator(lang)
    plan = run.plan()
    result, events = run.result(), summary_of(run)
    report = Report(job.spec.name, f"{w('Run report')} · {run.run_id}", lang)
    report.section(w("Result"), _facts(w, run, plan, result, events), _checked(w, result))
    report.section(w("The job"), _job(w, job))
    notes = [Paragraph(w(note)) for note in plan.notes]
    report.section(w("What was chosen, and why"), *notes, _chosen(w, plan), *_alternatives(w, plan))
    report.section(w("Quality"), *_quality(w, result))
    report.section(w("Public tasks"), *task_blocks(w, run))
    report.section(w("Verified"), *proof_blocks(w, run))
    report.section(w("Training"), _losses(w, events), _beside_loss(w, events), _over_bus(w, events))
    report.section(w("Memory"), _memory(w, plan, result, events.group_events))
    report.section(w("Time of a step"), _step_time(w, plan, result))
    report.section(w("Stages"), *stage_blocks(w, plan, events.group_events))
    report.section(w("Machines"), *_machines(w, plan, events.group_events))
    report.section(w("Faults and recoveries"), _faults(w, events.faults))
    report.section(w("Sample outputs"), *_samples(result))
    report.section(w("Serving"), *serving_blocks(w, run, job, plan))
    report.section(w("Cost"), *_costs(w, run, job, plan, result, events))
    report.section(w("Reproduce"), *_reproduce(w, job, run, plan, result))
    return report


def _facts(w: Translator, run: RunFolder, plan: Plan, result: RunResult | None, events: EventSummary) -> Block:
    state = run.state(events.state_by_events)
    facts = [(w("state"), w(state)), (w("steps"), f"{len(events.steps)} / {plan.num_steps}")]
    if result:
        facts += [(key, score(key, value)) for key, value in (result.after.scores if result.after else {}).items()]
        facts += [
            (w("training time"), format_s(result.train_seconds)),
            (w("tokens/s"), f"{result.tokens_per_s:.0f}"),
            (w("peak memory"), format_bytes(result.memory.measured_peak_bytes)),
        ]
    return Facts(facts)


def _checked(w: Translator, result: RunResult | None) -> Block | None:
    """How what was handed back was held against what was trained."""
    return Paragraph(w(result.check)) if result and result.check else None


def _job(w: Translator, job: Job) -> Block:
    spec, train = job.spec, job.spec.data.train
    listed = train if isinstance(train, list) else [train]
    goal = ", ".join(f"{key}: {value}" for key, value in spec.goal.model_dump().items() if value is not None)
    rows = [
        (w("model"), spec.model.model_name_or_path),
        (w("data"), ", ".join(one if isinstance(one, str) else one.path for one in listed)),
        (w("method"), spec.method.type),
        *([(w("objective"), spec.objective.type)] if spec.build_objective().is_by_document else []),
        (w("goal"), goal),
    ]
    return Table((w("setting"), w("value")), rows)


def _chosen(w: Translator, plan: Plan) -> Block:
    rows = [
        (key, shown(value), w(plan.reasons.get(key) or "as the job says")) for key, value in settings_of(plan).items()
    ]
    return Table((w("setting"), w("value"), w("why")), rows)


def _alternatives(w: Translator, plan: Plan) -> list[Block]:
    if not plan.alternatives:
        return []
    rows = [(a.what, format_s(a.total_s), format_bytes(a.peak_bytes), w(a.why_not)) for a in plan.alternatives]
    return [Table((w("way"), w("time"), w("memory"), w("why")), rows)]


def _quality(w: Translator, result: RunResult | None) -> list[Block]:
    if not result or not result.after:
        return []
    before, after = _scores(result)
    rows = [(key, score(key, before.get(key)), score(key, value)) for key, value in after.items()]
    blocks: list[Block] = [Table(("", w("before"), w("after")), rows)]
    blocks += [Paragraph(w(f"{key}: {gain.text}")) for key, gain in result.gains.items()]
    if compared := result.after.compared:
        blocks.append(Paragraph("; ".join(f"{key}: {w(how)}" for key, how in compared.items())))
    scores = [key for key in after if is_share(key)]
    drawn = scores or list(after)
    groups = {
        key: {w(when): values[key] for when, values in (("before", before), ("after", after)) if key in values}
        for key in drawn
    }
    svg = plots.bars(groups, w("value"), percent=bool(scores))
    return [*blocks, Figure("quality", svg, w("Held-out rows before and after training."))]


def _losses(w: Translator, events: EventSummary) -> Block | None:
    losses = events.losses
    if not events.last_step:
        return None
    series = {w("training loss"): losses.points()}
    if held := events.held_out_losses():
        series[w("held-out loss")] = held
    positive = all(y > 0 for points in series.values() for _, y in points)
    svg = plots.curves(series, w("step"), w("loss"), (w("held-out loss"),), log=positive)
    caption = w("The loss of every step; dots are the held-out loss.")
    if losses.width > 1:
        caption = w("The lowest and the highest loss of every {width} steps; dots are the held-out loss.")
    return Figure("loss", svg, caption.format(width=losses.width))


def _beside_loss(w: Translator, events: EventSummary) -> Block | None:
    """What a method's loss beside the tokens' came to at the last step."""
    found = events.last_step.extra_loss if events.last_step else None
    if not found:
        return None
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
    return Paragraph(f"{w('Beside the loss, at the last step')}: {numbers}")


def _over_bus(w: Translator, events: EventSummary) -> Block | None:
    """What an optimizer that streams moved at the last step."""
    last = events.last_step
    if last is None or last.bus_down_bytes is None or last.bus_up_bytes is None:
        return None
    down, up = format_bytes(last.bus_down_bytes), format_bytes(last.bus_up_bytes)
    text = w("Over the bus, at the last step: to the host {down}, to the device {up}").format(down=down, up=up)
    rows = f"; {w('rows moved')}: {last.rows_moved:.0f}" if last.rows_moved is not None else ""
    return Paragraph(text + rows)


def _memory(w: Translator, plan: Plan, result: RunResult | None, events: list[Event]) -> Block:
    names = _names(w, plan)
    rows = {
        name: {w(key): value / 2**30 for key, value in part.memory.parts.items() if value}
        for name, part in zip(names, plan.nodes, strict=True)
    }
    marks = {names[0]: result.memory.measured_peak_bytes / 2**30} if result else {}
    peaks = [stage.peak_bytes for stage in stages_of_run(plan, events)]
    marks |= {name: peak / 2**30 for name, peak in zip(names, peaks, strict=False) if peak}
    caption = w("Bytes at the peak of a step by part, as predicted; the line is what was measured.")
    return Figure("memory", plots.stacked(rows, w("GiB"), marks), caption)


def _names(w: Translator, plan: Plan) -> list[str]:
    """Of each worker: its device and node, and its stage where it has one."""
    places = {rank: row.place for rank, row in enumerate(stages_of_run(plan, []))}
    names = [f"{part.device} ({part.node})" for part in plan.nodes]
    return [f"{w('stage')} {places[rank]}: {name}" if rank in places else name for rank, name in enumerate(names)]


def _step_time(w: Translator, plan: Plan, result: RunResult | None) -> Block:
    rows, marks = {}, {}
    for name, part in zip(_names(w, plan), plan.nodes, strict=True):
        waits = {"waits": plan.step_s - part.time.step_s} if part.techniques.stage else {"sync": plan.sync_s}
        parts = {**part.time.parts, **waits}
        rows[name] = {w(key): value for key, value in parts.items() if value}
    if result and result.measured_step_s:
        marks = dict.fromkeys(rows, result.measured_step_s)
    caption = w("Seconds of a step by what is waited for, as predicted; the line is what was measured.")
    return Figure("step-time", plots.stacked(rows, w("seconds"), marks), caption)


def _machines(w: Translator, plan: Plan, events: list[Event]) -> list[Block]:
    measured = [row for row in stats_of_run(events) if isinstance(row, WorkerStats)]
    if not measured:
        rows = [(part.node, part.device, part.share_text, "", "", "") for part in plan.nodes]
    else:
        rows = [
            (
                row.node,
                row.device,
                f"{row.share:.0%}",
                format_s(row.seconds),
                format_s(row.wait_s),
                "-" if row.bytes_sent is None else format_bytes(row.bytes_sent),
            )
            for row in measured
        ]
    head = (w("node"), w("device"), w("share"), w("computes"), w("waits"), w("sent a step"))
    blocks: list[Block] = [Table(head, rows)]
    if len(measured) > 1:
        shares = {
            f"{row.node} ({row.device})": {w("computes"): row.seconds, w("waits"): row.wait_s} for row in measured
        }
        caption = w("What each machine does of a step, in seconds.")
        blocks.append(Figure("machines", plots.stacked(shares, w("seconds")), caption))
    blocks += [Paragraph(f"{node}: {w(why)}") for node, why in plan.left_out.items()]
    return blocks


def _faults(w: Translator, faults: list[Event]) -> Block:
    if not faults:
        return Paragraph(w("No fault happened."))
    rows = [(utc(one.time), one.kind, getattr(one, "text", None) or ", ".join(_fields(one))) for one in faults]
    return Table((w("when"), "", w("what happened")), rows)


def _fields(event: Event) -> list[str]:
    return [f"{key} {value}" for key, value in event.to_json().items() if key not in ("event", "time", "traceback")]


def _samples(result: RunResult | None) -> list[Block]:
    if not result or not result.after:
        return []
    before = {one.prompt: one.generated for one in result.before.samples} if result.before else {}
    return [
        SampleOutput(one.prompt, before.get(one.prompt), one.generated, one.reference) for one in result.after.samples
    ]


def _costs(
    w: Translator, run: RunFolder, job: Job, plan: Plan, result: RunResult | None, events: EventSummary
) -> list[Block]:
    if not result or not result.tokens:
        return []
    spec, tokens = job.spec, result.tokens
    capability = run.capability()
    trained_s, again_s = events.trained_s, events.repeated_s
    spent_s, planned_s = events.phases.total_s, plan.phases.total_s - plan.phases.preparation_s
    scale = spent_s / planned_s if planned_s else trained_s / plan.total_s  # a plan of an earlier version has no phases
    cost = tco.of_plan(spec, w("this run"), plan, tokens, scale)
    if (energy := result.energy) and events.num_sittings == 1:  # the counters saw the last sitting only
        owned = all(node.price_per_hour is None for node in price.priced(spec, capability).nodes)
        cost = tco.measured(spec, cost, energy.wh, energy.source, tokens, owned)
    others = []
    if spec.cost.alternatives:
        others = alternatives_of(job, plan, run.data(), tokens)
    blocks: list[Block] = [cost_table(w, spec.cost.currency, [cost, *others])]
    facts = _points(w, spec.cost.currency, cost, result)
    if again_s and cost.per_run is not None:
        wasted = cost.per_run * again_s / trained_s
        facts.append((w("of steps trained again"), f"{wasted:.3g} {spec.cost.currency}"))
    return [*([Facts(facts)] if facts else []), *blocks, Paragraph(notes_on_cost(w))]


def _points(w: Translator, currency: str, cost: tco.Cost, result: RunResult) -> list[tuple[str, str]]:
    """The cost of a run over what it gained: of the first metric a hundredth, else a tenth of a nat."""
    if cost.per_run is None:
        return []
    before, after = _scores(result)
    for key in after:
        gained = 100 * (after[key] - before[key]) if is_share(key) and key in before else 0.0
        if gained > 0:
            return [(f"{w('a quality point')} ({key})", f"{cost.per_run / gained:.3g} {currency}")]
    first, last = (quality.eval_loss if quality else None for quality in (result.before, result.after))
    if first is not None and last is not None and first > last:
        return [(f"{w('a quality point')} (0.1 eval_loss)", f"{cost.per_run / (10 * (first - last)):.3g} {currency}")]
    return []


def _scores(result: RunResult) -> tuple[dict[str, float], dict[str, float]]:
    """Before and after training; none where it was not measured."""
    before, after = (quality.scores if quality else {} for quality in (result.before, result.after))
    return before, after


def _reproduce(w: Translator, job: Job, run: RunFolder, plan: Plan, result: RunResult | None) -> list[Block]:
    rows = [
        ("plan", plan.hash),
        ("data", str(result.data_digest) if result else "-"),
        ("seed", str(job.spec.train.seed)),
        (w("tokens"), format_count(result.tokens) if result else "-"),
        *((package, version) for package, version in ((result and result.versions) or {}).items()),
    ]
    return [
        Paragraph(w("The same data, plan and versions give the same numbers on the same machine.")),
        Code(command("submit", run, run.document)),
        Table(("", w("version")), rows),
        Code(masked(job.text.strip())),
    ]
