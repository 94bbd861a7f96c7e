"""Renders a plan: the choice for each device, where memory and time go, the price, the alternatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clusters.units import format_bytes, format_count, format_s
from orchestrator.job.job_file import Job
from orchestrator.language.catalogue import tr
from orchestrator.planning.goal import LONG_S
from orchestrator.planning.plan import NodePlan, Plan, in_bank_sentence, settings_of
from orchestrator.views.screen import label, new_table
from strategies.cost.phases import Phases

_BAR = 30  # characters
_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "white")
_FILLS = "█▓▒░▞▚▄"  # parts stay apart without colour


def plan_view(job: Job, plan: Plan, statistics: Mapping[str, Any], full: bool = True) -> RenderableType:
    """Everything `plan` prints; `submit` prints it without the other ways."""
    parts: list[RenderableType] = [
        _head(job, plan),
        Text(data_sentence(statistics)),
        *([Text(tr(in_bank_sentence(plan.in_bank)), "green")] if plan.in_bank else []),
        *(Text(tr(note), "yellow") for note in plan.notes),
        Text(),
        _nodes_table(plan),
        Text(),
    ]
    for part in _kinds(plan):
        parts += [_bars(part, plan.sync_s), Text()]
    parts += [_group(plan)] if plan.sync.options or plan.left_out else []
    parts += [_totals(plan), *_if_installed(plan), Text(), settings_table(plan)]
    if full and plan.alternatives:
        parts += [Text(), alternatives_table(plan)]
    if full and plan.rejected:
        parts += [Text(), _rejections(plan)]
    return Group(*parts)


def _head(job: Job, plan: Plan) -> Text:
    is_long = plan.whole_s > LONG_S
    return Text.assemble(
        (tr(f"This takes {format_s(plan.whole_s)}, as goal.max_hours allows.\n") if is_long else "", "bold red"),
        (tr("{0} on {1}").format(plan.method["type"], job.spec.model.model_name_or_path), "bold"),
        (_by_objective(plan), "bold"),
        tr(
            f": {format_count(plan.num_trainable_parameters)} trained parameters, {plan.num_steps} steps of"
            f" {plan.global_batch_size} samples"
        ),
    )


def _by_objective(plan: Plan) -> str:
    return f" ({plan.objective['type']})" if plan.build_objective().is_by_document else ""


def data_sentence(statistics: Mapping[str, Any]) -> str:
    """Counts of the training rows in one line."""
    if statistics.get("rough"):
        return tr(f"data: {statistics['rough']} (estimated; `plan --exact` and `submit` prepare every row)")
    train = statistics.get("train")
    if not train:
        return ""
    formats = ", ".join(f"{name}: {count}" for name, count in train["formats"].items())
    odd = [f"{train[key]} {tr(key)}" for key in ("truncated", "dropped", "rejected") if train[key]]
    share = train["supervised_tokens"] / max(1, train["tokens"])
    counts = (
        f"data: {train['samples']} samples ({formats}), {format_count(train['tokens'])} tokens, {share:.0%} supervised,"
        f" longest {train['longest']}"
    )
    return tr(counts) + (f"; {', '.join(odd)}" if odd else "")


def _nodes_table(plan: Plan) -> Table:
    what = "layers" if plan.techniques.stage else "share"
    names = ("node", "device", what, "precision", "attention", "micro-batch", "extras", "memory", "step")
    table = new_table(*names, fold=True, dispensable=("attention", "extras", "precision", "micro-batch"))
    for part in plan.nodes:
        memory, room = format_bytes(part.memory.total_bytes), part.memory_usable_bytes
        rows, length = part.techniques.per_device_train_batch_size, part.techniques.max_length
        table.add_row(
            part.node,
            part.device,
            part.share_text.removeprefix("layers "),
            part.techniques.dtype,
            part.techniques.attn_implementation,
            f"{rows} x {length}",
            ", ".join(_extras(part)) or "-",
            memory if room is None else tr("{0} of {1}").format(memory, format_bytes(room)),
            format_s(part.time.step_s),
        )
    return table


def _extras(part: NodePlan) -> list[str]:
    t = part.techniques
    named = {
        "packing": t.packing,
        "checkpointing": t.gradient_checkpointing,
        t.loss_type: t.loss_type != "nll",
        "8-bit optimizer": t.optim == "adamw_bnb_8bit",
        f"{t.offload} offload": t.offload != "none",
        f"ZeRO-{t.zero_stage}": t.zero_stage > 0,
        "torch.compile": t.torch_compile,
        "Liger's kernels": t.liger_kernel,
    }
    return [tr(name) for name, is_on in named.items() if is_on]


def _kinds(plan: Plan) -> list[NodePlan]:
    """One part for each kind of device with its settings: like devices share their bars."""
    return list({(part.node, part.device, part.techniques): part for part in plan.nodes}.values())


def _bars(part: NodePlan, sync_s: float) -> RenderableType:
    memory, room = part.memory, part.memory_usable_bytes
    between = f"{format_bytes(memory.low_bytes)} .. {format_bytes(memory.high_bytes)}"
    sizes = f"{format_bytes(memory.total_bytes)} of {format_bytes(room or 0)} usable, likely {between}"
    if room is None:
        sizes = f"{format_bytes(memory.total_bytes)}, likely {between}"
    seconds = {**part.time.parts, "sync": sync_s}
    total_s = sum(seconds.values())
    lines = [
        Text(f"{part.device} ({part.node})", style="bold"),
        Text(f"{label('memory')}{tr(sizes)}"),
        _bar(memory.parts, room or memory.total_bytes, format_bytes),
        Text(f"{label('step')}{format_s(total_s)}"),
        _bar(seconds, total_s, format_s),
    ]
    if memory.host_bytes:
        lines.append(Text(label("host") + tr(f"{format_bytes(memory.host_bytes)} of the node's memory")))
    return Group(*lines)


def _bar(parts: Mapping[str, float], whole: float, shown: Any) -> Text:
    """A bar of the parts over the whole, and beside it what each is."""
    line, words = Text(label("")), []
    used = 0
    for (name, value), colour, fill in zip(parts.items(), _COLOURS, _FILLS, strict=False):
        width = round(_BAR * value / whole) if whole else 0
        used += width
        line.append(fill * width, style=colour)
        if value >= 0.005 * whole:
            words.append((f"{fill} {tr(name)} {shown(value)}", colour))
    line.append("·" * max(0, _BAR - used) + "  ")
    for index, (word, colour) in enumerate(words):
        line.append(("  " if index else "") + word, style=colour)
    return line


def _group(plan: Plan) -> Text:
    """How the workers synchronise, and which nodes are not used."""
    lines = []
    if plan.sync.options:
        ways = ", ".join(f"{way} {format_s(seconds)}" for way, seconds in plan.sync.options.items())
        lines.append(label("sync") + tr(f"{plan.sync.dtype} gradients; a step waits: {ways}"))
    lines += [tr(f"{node} is not used: {why}") for node, why in plan.left_out.items()]
    return Text("\n".join(lines) + "\n")


def _totals(plan: Plan) -> Text:
    price = plan.price
    text = Text.assemble(
        (f"{tr('training')} ", "bold"),
        tr("{0} at {1} tokens/s").format(format_s(plan.total_s), f"{plan.tokens_per_s:.0f}"),
        tr(f", {1 - plan.computed_part:.0%} of the tokens not computed") if plan.computed_part < 1 else "",
        tr(f"; checkpoints of {format_bytes(plan.checkpoint_bytes)}"),
    )
    if price.total is None:
        text.append(tr("; price unknown (set cost.power_w, or a hardware file with power and price)"))
    else:
        energy = "" if price.energy_wh is None else f", {price.energy_wh / 1000:.2g} kWh"
        text.append(f"; {price.total:.2f} {price.currency}{energy}")
        if price.machines is None:
            text.append(tr(" (electricity only: the machine's price is unknown)"))
        elif price.without_price:
            text.append(tr(f" (without {', '.join(price.without_price)}: the price is unknown)"))
        if price.electricity is None:
            text.append(tr(" (without electricity: the draw is unknown)"))
        elif price.without_draw:
            text.append(tr(f" (without electricity of {', '.join(price.without_draw)}: the draw is unknown)"))
    if plan.is_guess:
        text.append(
            tr("\nA figure of these machines is unknown; a typical one is used instead, so times are rough."),
            style="yellow",
        )
    if plan.calibration != 1.0:
        calibrated = f"\nTimes are {plan.calibration:.2f}x the formulas' estimate, calibrated by finished runs here."
        text.append(tr(calibrated))
    if plan.phases.total_s:
        text.append(f"\n{label('in all')} ", style="bold")
        text.append(whole_text(plan.phases))
    prior = plan.quality_prior
    expected = (
        f" (a prior, not a prediction): {prior['score']:.3f} +- {prior['uncertainty']:.3f} ({prior['source']})"
        if prior
        else ": no prior, since no published run of this method is of a model of this size and this kind of task"
    )
    text.append(tr(f"\nexpected quality{expected}"), style="dim")
    return text


def _if_installed(plan: Plan) -> list[Text]:
    """What libraries would bring that are not installed, a line each."""
    return [
        Text(tr(f"with {library.replace('_', '-')}, which is not installed: {gain}"), style="cyan")
        for library, gain in plan.if_installed.items()
    ]


def settings_table(plan: Plan) -> Table:
    """What was decided and why; settings of the job file need no reason."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column(tr("setting"), no_wrap=True)
    table.add_column(tr("value"), no_wrap=True)
    table.add_column(tr("why"), overflow="fold")
    for key, value in settings_of(plan).items():
        table.add_row(key, shown(value), Text(tr(plan.reasons.get(key, "as the job says")), style="dim"))
    return table


def alternatives_table(plan: Plan) -> Table:
    """The other ways: those on the Pareto front are marked."""
    table = new_table("other ways (* on the Pareto front)", "time", "memory", "why not", fold=True)
    for way in plan.alternatives:
        mark = "* " if way.on_front else "  "
        table.add_row(mark + way.what, format_s(way.total_s), format_bytes(way.peak_bytes), tr(way.why_not))
    return table


def whole_text(phases: Phases) -> str:
    """How long a job takes and with what, in one line; figures that no machine here gave are called guesses."""
    shown = [name for name in phases.guesses if phases.parts[name] >= 0.005 * phases.total_s]
    guesses = tr("({0}: a guess)").format(", ".join(map(tr, shown))) if shown else ""
    return f"{format_s(phases.total_s)}: {tr(phases.text)} {guesses}".rstrip()


def _rejections(plan: Plan) -> RenderableType:
    """Why combinations are impossible, one line per reason."""
    by_reason: dict[str, list[str]] = {}
    for what, reason in plan.rejected.items():
        by_reason.setdefault(reason, []).append(what)
    lines = [Text(tr("not possible here"), style="bold")]
    for reason, which in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:12]:
        more = " " + tr("and {0} more").format(len(which) - 1) if len(which) > 1 else ""
        lines.append(Text(f"{which[0]}{more}: {tr(reason)}", style="dim"))
    if len(by_reason) > 12:
        lines.append(Text(tr(f"... and {len(by_reason) - 12} other reasons (--json lists all)"), style="dim"))
    return Group(*lines)


def shown(value: Any) -> str:
    """A setting as it is written in a job file."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
