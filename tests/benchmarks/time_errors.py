"""Predicted beside published step times, a line a table: errors, order, and what a rule of thumb makes of the same.

    python tests/benchmarks/time_errors.py [--table FILE.csv] [--worst 20] [--leave-out]

Errors are of seconds.  *6PT* is the rule of thumb: six FLOPs a weight and token at 40 % of the card's peak.  With
--leave-out (minutes) *left out* is the median error of a table's rows when the fitted constants are fitted anew on all
other tables.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from clusters.hardware import datasheet
from strategies.cost import kernels, time
from strategies.shape import ModelShape
from tests.benchmarks.published import Published, config, from_columns, read
from tests.benchmarks.stacks import predict_time, processed_length

TABLES = Path(__file__).resolve().parents[3] / "shared/tables"
_NAIVE_UTILISATION = 0.4
# What was fitted on these rows; every other figure of the formulas has a source or is counted.
FITTED = ((time, "_OF_DATASHEET"), (time, "_GPU_OP_S"), (time, "_FETCH_S"), (kernels, "_LARGE_CACHE_SHARE"))


@dataclass(frozen=True)
class Compared:
    """A published step beside two predictions of it, in seconds."""

    row: Published
    measured_s: float
    predicted_s: float
    naive_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class Quality:
    """How well predictions meet measurements."""

    num_rows: int
    median: float  # of the errors' sizes
    p95: float
    signed: float
    tau: float  # Kendall's, of the order; nan for one row

    @classmethod
    def of(cls, measured: Sequence[float], predicted: Sequence[float]) -> Quality:
        from scipy.stats import kendalltau

        errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
        sizes = sorted(map(abs, errors))
        order: Any = kendalltau(predicted, measured) if len(errors) > 1 else None
        tau = order.statistic if order else math.nan
        return cls(len(errors), statistics.median(sizes), _p95(sizes), statistics.median(errors), float(tau))

    def __str__(self) -> str:
        return f"{self.median:6.1%} {self.p95:7.1%} {self.signed:+7.1%} {self.tau:6.3f}"


def _p95(sizes: Sequence[float]) -> float:
    """Of ascending values, the one that 95 % do not exceed."""
    return sizes[math.ceil(0.95 * len(sizes)) - 1]


def compare(row: Published) -> Compared:
    """Seconds of one micro-batch on one GPU with its part of the update."""
    predicted = predict_time(row)
    if row.metric == "step_s":
        return Compared(row, row.value, predicted, naive_s(row))
    tokens = row.num_gpus * row.micro_batch * (row.mean_length or row.length)
    return Compared(row, tokens / row.value, tokens / predicted, naive_s(row))


def naive_s(row: Published) -> float:
    """6 P T at 40 % of the peak."""
    card = datasheet.find("A100 80GB" if row.gpu.startswith("A800") else row.gpu)
    assert card is not None, row.gpu
    peak = card.flops_per_s[row.compute_dtype] or card.flops_per_s["float16"]
    assert peak is not None, row.gpu
    shape = ModelShape.from_config(config(row.model))
    tokens = row.micro_batch * processed_length(row)
    return 6 * shape.num_parameters * tokens / (_NAIVE_UTILISATION * peak)


def usable(rows: Sequence[Published]) -> list[Published]:
    """Measured step times without offload."""
    return [row for row in rows if row.kind == "measured" and row.metric != "memory_bytes" and not row.offload]


def by_table(rows: Sequence[Published]) -> dict[str, list[Published]]:
    tables: dict[str, list[Published]] = defaultdict(list)
    for row in rows:
        tables[row.source.split(".csv")[0]].append(row)
    return dict(tables)


def left_out(rows: Sequence[Published]) -> dict[str, list[Compared]]:
    """The rows of each table as predicted by constants that were fitted on all other tables."""
    tables = by_table(rows)
    found = {}
    for name, own in tables.items():
        with_fit = _Constants()
        with_fit.fit([row for other, rows in tables.items() if other != name for row in rows])
        found[name] = [compare(row) for row in own]
        with_fit.restore()
    return found


class _Constants:
    """The fitted constants, as they are now."""

    def __init__(self) -> None:
        self._before = self._values()

    def _values(self) -> list[float]:
        return [getattr(module, name) for module, name in FITTED]

    def restore(self) -> None:
        for (module, name), value in zip(FITTED, self._before, strict=True):
            setattr(module, name, value)

    def fit(self, rows: Sequence[Published]) -> None:
        """Coordinate descent on the mean size of the logarithmic error, tables weighted by their rows' square root."""
        tables = by_table(rows)
        best = _loss(tables)
        for step in (0.16, 0.08, 0.04):
            moved = True
            while moved:
                moved = False
                for module, name in FITTED:
                    value = getattr(module, name)
                    for factor in (1 - step, 1 + step):
                        setattr(module, name, value * factor)
                        loss = _loss(tables)
                        if loss < best - 1e-5:
                            best, moved = loss, True
                            break
                        setattr(module, name, value)


def _loss(tables: dict[str, list[Published]]) -> float:
    total = weights = 0.0
    for rows in tables.values():
        weight = math.sqrt(len(rows))
        sizes = [abs(math.log(found.predicted_s / found.measured_s)) for found in map(compare, rows)]
        total += weight * statistics.mean(sizes)
        weights += weight
    return total / weights


def report(rows: Sequence[Published], worst: int, leave_out: bool = False) -> None:
    """Print a line a table, and the rows that are met worst."""
    chosen = usable(rows)
    if not chosen:
        return
    found = [compare(row) for row in chosen]
    alone = left_out(chosen) if leave_out and len(by_table(chosen)) > 1 else {}
    print("\nTime of a step, rows with offload not used")
    print(f"{'':<32} rows  median     p95  signed    tau  left out | 6PT median     p95  signed    tau")
    _line("all", found, [one for some in alone.values() for one in some])
    for name, some in by_table(chosen).items():
        _line(name, [one for one in found if one.row in some], alone.get(name, []))
    print("worst:")
    for one in sorted(found, key=lambda one: -abs(one.error))[:worst]:
        print(f"{one.error:+6.1%} {one.measured_s:8.4g} s, predicted {one.predicted_s:8.4g}  {_described(one.row)}")


def _line(name: str, found: Sequence[Compared], alone: Sequence[Compared]) -> None:
    measured = [one.measured_s for one in found]
    own = Quality.of(measured, [one.predicted_s for one in found])
    naive = Quality.of(measured, [one.naive_s for one in found])
    other = f"{statistics.median(abs(one.error) for one in alone):8.1%}" if alone else "       -"
    print(f"{name:<32} {own.num_rows:4} {own}  {other} |     {naive}")


def _described(row: Published) -> str:
    return (
        f"{row.stack} {row.model} {row.method} {row.quantization or ''} b{row.micro_batch} x {row.length}"
        f" ck={int(row.gradient_checkpointing)} {row.attention} z{row.zero_stage} n{row.num_gpus} {row.gpu}"
        f"{' compiled' if row.torch_compile else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--worst", type=int, default=20)
    parser.add_argument("--leave-out", action="store_true")
    options = parser.parse_args()
    if not options.table and not TABLES.is_dir():
        sys.exit("the published tables are not on this machine; give --table FILE.csv")
    report((from_columns(options.table) if options.table else read(TABLES))[0], options.worst, options.leave_out)


if __name__ == "__main__":
    main()
