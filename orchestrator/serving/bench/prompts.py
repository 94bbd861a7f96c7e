"""The prompts of a serving benchmark: a run's own held-out ones, or random tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.dataset import DamagedCache
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.model_files import read_config
from orchestrator.planning.workload import max_positions
from orchestrator.runs.condition import Finished
from orchestrator.training.model.loading import load_tokenizer

_RANDOM_LENGTH = 64  # where there are no held-out prompts and no length is given
_MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class BenchPrompts:
    """Prompts as tokens: those of `held_out` again and again, or where there are none random ones, each another."""

    what: str  # for people
    held_out: Sequence[Sequence[int]] = ()
    vocabulary: Sequence[int] = ()
    length: int = 0  # tokens of a random one

    def begin(self, seed: str) -> Iterator[Sequence[int]]:
        """The same held-out prompts at each call; random ones that no other seed gives."""
        if self.held_out:
            return itertools.cycle(self.held_out)
        draw = random.Random(seed)
        return (draw.choices(self.vocabulary, k=self.length) for _ in itertools.count())


def choose_prompts(run: Finished, num_tokens: int | None, new_tokens: int) -> BenchPrompts:
    """Random prompts of `num_tokens`; without a number the held-out ones that leave room for `new_tokens`.

    Raises JobError where the model's context has no room.
    """
    context = max_positions(read_config(Path(run.data.model)))
    room = None if context is None else context - new_tokens
    if room is not None and room < (num_tokens or 1):
        raise JobError(
            f"{num_tokens or 1} tokens of a prompt and {new_tokens} new ones do not fit: the context of"
            f" {run.job.spec.model.model_name_or_path} ends at {context}. Lower --prompt-lengths or --new-tokens"
        )
    if num_tokens is None:
        try:
            held_out, why = _held_out(run, room), "there are no held-out prompts"
        except DamagedCache:
            held_out, why = [], "the tokenised held-out rows are gone"
        if held_out:
            return BenchPrompts("held-out prompts of the run", held_out)
        num_tokens = _RANDOM_LENGTH if room is None else min(_RANDOM_LENGTH, room)
        what = f"random tokens, {num_tokens} a prompt: {why}"
    else:
        what = f"random tokens, {num_tokens} a prompt"
    tokenizer = load_tokenizer(str(run.exported), run.job)
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(len(tokenizer)) if token not in special]
    return BenchPrompts(what, vocabulary=vocabulary, length=num_tokens)


def _held_out(run: Finished, room: int | None) -> list[list[int]]:
    """Different prompts with an answer after them, as they were tokenised.  Raises DamagedCache."""
    held_out = datasets(run.data)[1]
    if not held_out:
        return []
    found: dict[tuple[int, ...], None] = {}
    for index in range(min(len(held_out), _MOST_HELD_OUT)):
        tokens, reference = held_out.prompt(index)
        if reference is not None and 0 < len(tokens) <= (room or len(tokens)):
            found[tuple(map(int, tokens))] = None
    return [list(tokens) for tokens in found]
