"""Memory that runs out on one stage of a pipeline: all stages answer together.

Neighbours wait for the message of every pass, so a stage without memory hands on zeros instead; what came of them is
computed again by all stages, in less, or given up by all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from clusters.safe.reading import first_line
from strategies.step.out_of_memory import catch_out_of_memory, is_out_of_memory, release_cache

T = TypeVar("T")


class Guard:
    """Computes until memory runs out, and nothing after that; then it lets go of what `free` frees."""

    def __init__(self, free: Callable[[], object] = lambda: None) -> None:
        self.shortage: MemoryError | None = None
        self._free = free

    def __call__(self, compute: Callable[[], T]) -> T | None:
        """What was computed; None once memory has run out."""
        if self.shortage is not None:
            return None
        try:
            return compute()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._free()
            self.shortage = MemoryError(first_line(error))  # holds no tensor of the failed pass
            return None

    @property
    def reason(self) -> str | None:
        return None if self.shortage is None else str(self.shortage)

    def check(self) -> None:
        """Raises MemoryError where memory has run out: to be called when no neighbour waits any more."""
        if self.shortage is not None:
            raise self.shortage


def in_rounds(
    batches: Sequence[list[T]],
    call: Callable[[list[T]], None],
    agree: Callable[[Mapping[int, str]], Mapping[int, str]],
) -> tuple[list[T], str | None]:
    """Call `call` with every batch; in the next round with the halves of those that ran out of memory on any stage.

    `agree` makes, of this stage's reasons by the batch's number, those of all stages: once a round, so that batches
    follow each other through the stages.  Returns what does not fit even alone and the first reason.
    """
    waiting, unfit, reason = list(batches), list[T](), None
    while waiting:
        short = agree(_reasons(waiting, call))
        if short:
            release_cache()  # here, where no traceback holds the tensors of a failed pass
        reason = reason or next(iter(short.values()), None)
        failed = [waiting[number] for number in short]
        unfit += [item for batch in failed if len(batch) == 1 for item in batch]
        waiting = [half for batch in failed if len(batch) > 1 for half in _halves(batch)]
    return unfit, reason


def _reasons(batches: Sequence[list[T]], call: Callable[[list[T]], None]) -> dict[int, str]:
    """Why memory ran out here, by the number of the batch."""
    found: dict[int, str] = {}
    for number, batch in enumerate(batches):
        with catch_out_of_memory() as shortage:
            call(batch)
        if shortage.reason is not None:
            found[number] = shortage.reason
    return found


def _halves(batch: list[T]) -> tuple[list[T], list[T]]:
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]
