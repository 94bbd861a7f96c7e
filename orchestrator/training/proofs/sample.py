"""Which rows are tried, cut to what fits into the time; pure arithmetic on lengths and predicted speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.data.packing import micro_batches
from orchestrator.planning.plan import Plan
from strategies.workload import Techniques

BUDGET_S = 120.0  # of a whole verification
_LEAST_S = 15.0  # that is left for steps, however long the start takes
NUM_STEPS = 4  # of a training; it is interrupted in the middle
_MOST_ROWS = 8  # a step
_TRAININGS = 6.5  # two in one batch, pieces, row by row (twice as slow), half of one again, unequal workers
_SLOWEST_SHARE, _QUICKEST_SHARE = 0.3, 0.7


@dataclass(frozen=True)
class ProofSample:
    """The rows of some short trainings, and how they are divided."""

    rows: tuple[int, ...]  # of the training rows
    rows_a_step: int
    num_tokens: int
    expected_s: float  # all trainings, start and writing included
    num_steps: int = NUM_STEPS


def choose_sample(lengths: Sequence[int], order: Sequence[int], plan: Plan, budget_s: float = BUDGET_S) -> ProofSample:
    """Rows in the order of `order` whose trainings fit into the time; the shortest ones where those are too long.

    A step's rows fit into one planned micro-batch, so that they may be one batch in the memory that was planned.
    """
    start_s = plan.phases.start_s + plan.phases.saving_s
    left_s = max(_LEAST_S, budget_s - start_s)
    # A micro-batch's tokens may go through the model at once in the memory that was planned.
    most_tokens = plan.techniques.micro_batch_tokens
    step_tokens = min(left_s * plan.tokens_per_s / (_TRAININGS * NUM_STEPS), most_tokens)
    rows_a_step = max(2, min(_MOST_ROWS, plan.global_batch_size, len(lengths)))
    while rows_a_step > 2 and _number_up_to(lengths, step_tokens / rows_a_step) < rows_a_step * NUM_STEPS:
        rows_a_step //= 2
    wanted = min(len(lengths), rows_a_step * NUM_STEPS)
    longest = step_tokens / rows_a_step
    chosen = [row for row in order if lengths[row] <= longest][:wanted]
    if len(chosen) < min(wanted, rows_a_step):
        chosen = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))[:wanted]
    num_tokens = sum(lengths[row] for row in chosen) * rows_a_step * NUM_STEPS // max(1, len(chosen))
    expected_s = start_s + _TRAININGS * num_tokens / plan.tokens_per_s
    return ProofSample(tuple(chosen), rows_a_step, num_tokens, expected_s)


def _number_up_to(lengths: Sequence[int], longest: float) -> int:
    return sum(length <= longest for length in lengths)


def uneven_shares(planned: Sequence[float]) -> tuple[float, ...]:
    """Shares of the replicas: as planned where they are unequal, else the first does most."""
    if max(planned) > 1.1 * min(planned):
        return tuple(planned)
    rest = _SLOWEST_SHARE / max(1, len(planned) - 1)
    return (_QUICKEST_SHARE, *[rest] * (len(planned) - 1))


@dataclass(frozen=True)
class Layouts:
    """One step's rows through the model in three ways."""

    whole: Techniques  # as planned, all in one micro-batch
    pieces: Techniques  # as planned, in several
    apart: Techniques | None  # row by row; None where rows are padded, and pieces are rows
    num_pieces: int  # at least, of the first step


def layouts_of(techniques: Techniques, lengths: Sequence[Sequence[int]]) -> Layouts:
    """Of planned techniques, for the lengths of each step's rows."""
    longest, most = max(map(max, lengths)), max(map(len, lengths))
    if not techniques.packing:
        whole = _with(techniques, most, techniques.max_length)
        return Layouts(whole, _with(techniques, 1, techniques.max_length), None, len(lengths[0]))
    whole = _with(techniques, 1, max(map(sum, lengths)))
    apart = _with(techniques, 1, longest, packing=False, share_prefixes=False, attn_implementation="sdpa")
    pieces = _with(techniques, 1, max(longest, -(-sum(lengths[0]) // 2)))
    return Layouts(whole, pieces, apart, len(micro_batches(lengths[0], 1, pieces.max_length, True)))


def _with(techniques: Techniques, rows: int, max_length: int, **changes: object) -> Techniques:
    return replace(techniques, per_device_train_batch_size=rows, max_length=max_length, **changes)  # type: ignore[arg-type]
