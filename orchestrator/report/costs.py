"""Costs as a table: a run's or a job's own, and those of other machines beside it."""

from __future__ import annotations

import shlex
from pathlib import Path

from clusters.units import format_s
from orchestrator.data.data_files import DataFiles
from orchestrator.data.prefixes import tree_ratios
from orchestrator.data.prepare import datasets
from orchestrator.job import model_files
from orchestrator.job.job_file import Job, spec_with
from orchestrator.language.catalogue import Translator, translator
from orchestrator.lifecycle.machines import declared
from orchestrator.lifecycle.prepare import Ready, sizes_of
from orchestrator.planning import workload
from orchestrator.planning.evaluation import HeldOutCounts
from orchestrator.planning.plan import Plan
from orchestrator.planning.planner import make_plan
from orchestrator.report import tco
from orchestrator.report.blocks import Table
from orchestrator.runs.run_folder import RunFolder
from strategies.workload import Workload


def alternatives_of(job: Job, plan: Plan, files: DataFiles, num_tokens: float) -> list[tco.Cost]:
    """The same job on each machine of `cost.alternatives`, alone; none where the tokenised data is gone."""
    if not Path(files.train).is_dir() or not Path(files.model).is_dir():
        return []
    spec, config = job.spec, model_files.read_config(Path(files.model))
    data, held_out = datasets(files)
    counts = sizes_of(data, held_out).held_out
    same = spec_with(spec, {"train.global_batch_size": plan.global_batch_size})
    lengths, num_supervised = data.document_lengths.tolist(), int(data.num_supervised.sum())
    work, _, _ = workload.describe(same, workload.model_shape(config), lengths, num_supervised, 1, tree_ratios(data))
    return price_alternatives(job, work, counts, Path(spec.cost.alternatives or ""), plan.max_length, num_tokens)


def price_alternatives(
    job: Job, work: Workload, held_out: HeldOutCounts | None, file: Path, max_length: int, num_tokens: float
) -> list[tco.Cost]:
    """The work on each machine of a hardware file, alone, with the job's own evaluation."""
    inside = job.path(str(file))
    found = declared(inside if inside.exists() else file)
    alone = {"strategy.mode": "auto"} if job.spec.strategy.mode == "ddp" else {}  # whose machine may have one device
    spec = spec_with(job.spec, {"cluster.num_workers": "auto", "cost.nodes": {}, **alone})
    return tco.alternatives(
        spec, found, lambda cluster: make_plan(spec, work, cluster, max_length, held_out, {}), num_tokens
    )


def cost_table(w: Translator, currency: str, costs: list[tco.Cost]) -> Table:
    """The ways side by side; the cheapest stands out."""
    head = (w("way"), w("time"), w("energy"), w("a run"), w("1M tokens"), w("a year"), w("purchase"), w("note"))
    best = tco.cheapest(costs)
    rows = []
    for cost in costs:
        energy = "-" if cost.energy_wh is None else f"{energy_text(cost.energy_wh)} ({_source(w, cost.energy_source)})"
        notes = [w(cost.note)] if cost.note else []
        if cost.missing and cost.seconds is not None:
            notes.append(f"{w('not priced')}; {w('set')}: {', '.join(cost.missing)}")
        rows.append(
            (
                cost.what,
                "-" if cost.seconds is None else format_s(cost.seconds),
                energy,
                money_text(cost.per_run, currency),
                money_text(cost.per_million_tokens, currency),
                money_text(cost.per_year, currency),
                money_text(cost.purchase, currency),
                "; ".join(notes),
            )
        )
    return Table(head, rows, tuple(place for place, cost in enumerate(costs) if cost is best))


def energy_text(wh: float) -> str:
    return f"{wh / 1000:.3g} kWh" if wh >= 1000 else f"{wh:.3g} Wh"


def _source(w: Translator, source: str) -> str:
    return w("declared") if source == "declared" else f"{w('measured')}: {source}"


def notes_on_cost(w: Translator) -> str:
    return (
        w("Prices are the job's own; unknown ones stay unknown.")
        + " "
        + w("Measured energy comes from hardware counters, declared from stated watts.")
    )


def money_text(value: float | None, currency: str) -> str:
    return "-" if value is None else f"{value:,.2f} {currency}" if value >= 0.1 else f"{value:.3g} {currency}"


def tco_of_job(job: Job, ready: Ready, against: Path | None, lang: str) -> tuple[list[tco.Cost], Table]:
    """`tco JOB`: before anything runs."""
    w, plan, work = translator(lang), ready.plan, ready.work
    tokens = work.tokens_per_step * work.num_steps
    costs = [tco.of_plan(job.spec, w("this job"), plan, tokens)]
    file = against or (Path(job.spec.cost.alternatives) if job.spec.cost.alternatives else None)
    if file is not None:
        costs += price_alternatives(job, work, ready.held_out, file, plan.max_length, tokens)
    return costs, cost_table(w, job.spec.cost.currency, costs)


def command(verb: str, folder: RunFolder, file: str) -> str:
    """The command that does the same again, from any folder of this machine."""
    return f"python -m orchestrator {verb} {shlex.quote(str(folder.path.absolute() / file))}"
