"""How wrong the memory formulas are on published peaks, and what the planner's decision makes of it.

Errors: expected over measured - 1.  A row lies inside where low <= measured <= high.

Decisions.  For every row, every size of memory that a card of the datasheet leaves to a job and that lies between half
of the measured peak and twice it.  The measured run fits where its peak is no larger; a peak read from torch's
allocator has the process's context added.  The planner accepts where `memory_fit.needed_bytes` of the predicted peak,
which the context is added to as well, is no larger than that size without the job file's default safety margin.
A wrong accept is a card accepted that the run does not fit into, counted among those it does not fit into; a wrong
refusal is a card refused although it fits, counted among those it fits into.  `nearest` counts the two sizes next to
the peak alone, of every row: the hardest ones.

Left out: every constant that was fitted (`Gaps` and the range) is fitted again, by least absolute error, on the tables
but one, and tried on that one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from clusters.capability import CONTEXT_BYTES
from clusters.hardware import datasheet
from orchestrator.job.sections.machines import StrategySection
from orchestrator.planning.memory_fit import needed_bytes
from strategies.cost import reserved
from strategies.cost.reserved import GAPS, Gaps
from tests.benchmarks.published import Published
from tests.benchmarks.stacks import predict_peak

CANNOT = {"trained-embeddings", "activation-offload", "norm-head"}  # what the formulas do not describe
SIZES = sorted({card.usable_bytes for card in datasheet.CARDS})
_GRID = {
    "steady": [0.01 * step for step in range(7)],
    "moving": [0.05 * step for step in range(7)],
    "changing": [0.1 * step for step in range(4, 17)],
}


@dataclass(frozen=True)
class Range:
    low: float = reserved.LOW
    high: float = reserved.HIGH


@dataclass(frozen=True)
class Decision:
    """Whether a measured run fits into a size of memory, and whether the planner would accept it."""

    fits: bool
    is_accepted: bool
    is_nearest: bool


def usable(rows: Sequence[Published]) -> list[Published]:
    """The measured peaks that the formulas describe."""
    peaks = [row for row in rows if row.kind == "measured" and row.metric == "memory_bytes"]
    return [row for row in peaks if not (CANNOT & set(row.extras) or row.offload)]


def error(row: Published, gaps: Gaps = GAPS) -> float:
    """Expected over measured - 1."""
    return predict_peak(row).expected_bytes(gaps) / row.value - 1


def is_inside(row: Published, gaps: Gaps = GAPS, at: Range = Range()) -> bool:
    """Whether the measured peak lies in the predicted range."""
    return at.low <= 1 / (1 + error(row, gaps)) <= at.high


def decisions(row: Published, gaps: Gaps = GAPS, at: Range = Range()) -> Iterator[Decision]:
    """The planner's decision for every size of memory near a row's peak."""
    context = 0.0 if row.measured_as == "nvidia-smi" else CONTEXT_BYTES
    tensors = predict_peak(row).tensors
    expected = predict_peak(row).expected_bytes(gaps) + context
    whole = replace(tensors, framework_bytes=expected - tensors.tensors_bytes)
    needed = needed_bytes(reserved.with_range(whole, at.low, at.high), "cuda")
    peak = row.value + context
    near = [size for size in SIZES if peak / 2 <= size <= 2 * peak]
    smaller = [size for size in near if size < peak]
    nearest = {max(smaller, default=0), min((size for size in near if size >= peak), default=0)}
    for size in near:
        yield Decision(peak <= size, needed <= size * (1 - _margin()), size in nearest)


def _margin() -> float:
    return StrategySection().memory_safety


def fit(rows: Sequence[Published]) -> tuple[Gaps, Range]:
    """The gaps of least mean absolute error, and the narrowest range with 95 % of the rows in it."""
    gaps = GAPS
    for name, values in 3 * list(_GRID.items()):
        tried = [replace(gaps, **{name: value}) for value in values]
        gaps = min(tried, key=lambda each: sum(abs(error(row, each)) for row in rows))
    ratios = sorted(1 / (1 + error(row, gaps)) for row in rows)
    inside = -(-95 * len(ratios) // 100)
    spans = [(ratios[first + inside - 1] / ratios[first], first) for first in range(len(ratios) - inside + 1)]
    _, first = min(spans)
    return gaps, Range(ratios[first], ratios[first + inside - 1])


def report(rows: Sequence[Published], worst: int) -> None:
    """Print the errors of every table and in all, beside those of constants fitted without the table."""
    rows = usable(rows)
    tables = sorted({_table(row) for row in rows})
    print("Memory of a GPU")
    print(_line("all", rows))
    print(_line("exact lengths", [row for row in rows if row.length_is_exact]))
    for table in tables:
        inside = [row for row in rows if _table(row) == table]
        print(_line(table, inside))
        if len(tables) > 1:
            print(_line("  fitted without", inside, *fit([row for row in rows if row not in set(inside)])))
    print("worst:")
    for row in sorted(rows, key=lambda row: -abs(error(row)))[:worst]:
        print(_described(row))


def _table(row: Published) -> str:
    return row.source.split(":")[0].removesuffix(".csv")[:28]


def _line(name: str, rows: Sequence[Published], gaps: Gaps = GAPS, at: Range = Range()) -> str:
    errors = [error(row, gaps) for row in rows]
    sizes = sorted(abs(each) for each in errors)
    inside = sum(is_inside(row, gaps, at) for row in rows)
    found = [decision for row in rows for decision in decisions(row, gaps, at)]
    nearest = [decision for decision in found if decision.is_nearest]
    return (
        f"{name:<28} {len(rows):4} rows  |error| median {statistics.median(sizes):5.1%}"
        f"  p95 {sizes[int(0.95 * (len(sizes) - 1))]:5.1%}  signed {statistics.median(errors):+5.1%}"
        f"  inside {inside / len(rows):4.0%}  high/low {at.high / at.low:.2f}"
        f"  wrong accepts {wrong_accepts(found):5.1%}  refusals {wrong_refusals(found):5.1%}"
        f"  nearest {wrong_accepts(nearest):4.0%} {wrong_refusals(nearest):4.0%}"
    )


def wrong_accepts(found: Sequence[Decision]) -> float:
    """Of the sizes that a run does not fit into, the part that the planner would accept."""
    too_small = [decision.is_accepted for decision in found if not decision.fits]
    return statistics.mean(too_small) if too_small else 0.0


def wrong_refusals(found: Sequence[Decision]) -> float:
    """Of the sizes that a run fits into, the part that the planner would refuse."""
    large_enough = [not decision.is_accepted for decision in found if decision.fits]
    return statistics.mean(large_enough) if large_enough else 0.0


def _described(row: Published) -> str:
    gib = 2**30
    return (
        f"{error(row):+6.1%} {'in ' if is_inside(row) else 'OUT'} {row.value / gib:6.2f} GiB, predicted"
        f" {predict_peak(row).expected_bytes() / gib:6.2f}  {row.stack} {row.model} {row.method}"
        f" {row.quantization or ''} b{row.micro_batch} x {row.length}{'' if row.length_is_exact else ' max'}"
        f" ck={int(row.gradient_checkpointing)} {row.attention} z{row.zero_stage} n{row.num_gpus}"
        f" {row.trained_dtype} {row.measured_as} {','.join(row.extras)}"
    )
