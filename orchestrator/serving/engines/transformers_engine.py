"""The engine for everything that this program trains: transformers and PEFT, rows joining and leaving at every token.

A step gives waiting queries their seats, computes the prompts of those that got one, and a token of every other row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch

from clusters.safe.reading import first_line
from orchestrator.planning.evaluation import CACHE_BYTES, cache_bytes_per_token
from orchestrator.serving.engines.adapters import Lane, Seat, Seats
from orchestrator.serving.engines.batch import AnswerRow, RowBatch, can_stack
from orchestrator.serving.engines.prompts import prompt_tokens
from orchestrator.serving.engines.protocol import Piece, Query, Refused
from orchestrator.serving.engines.sampling import TokenSampler, score
from orchestrator.serving.engines.text import AnswerText
from orchestrator.serving.engines.weights import EngineSettings, Weights
from orchestrator.training.evaluate import context_of
from orchestrator.training.model.agreement import free_bytes
from strategies.shape import ModelShape
from strategies.step.out_of_memory import is_out_of_memory, release_cache
from strategies.step.supervised_logits import inner_model

_PROMPT_TOKENS = 4096  # that are computed in one step: running answers wait for them
_UNKNOWN_CONTEXT = 4096

Send = Callable[[int, Piece | Refused | None], None]  # None: its computation has begun


class TransformersEngine:
    """Queries by number; each gets pieces through `send`, the last with a `finish`, or a refusal."""

    def __init__(self, settings: EngineSettings, send: Send) -> None:
        weights = Weights(settings)
        self._seats = Seats(weights, settings.max_adapters)
        self._send, self._max_rows = send, settings.max_rows
        self._waiting: dict[int, Query] = {}  # for a seat, in the order they came
        self._seated: list[AnswerRow] = []  # for room in the cache
        self._batches: dict[Lane, list[RowBatch]] = defaultdict(list)
        config = inner_model(self._seats.base.lane.model).config
        self._context = context_of(inner_model(self._seats.base.lane.model)) or _UNKNOWN_CONTEXT
        per_token = cache_bytes_per_token(
            ModelShape.from_config(config.to_dict()), getattr(torch, weights.dtype).itemsize
        )
        free = free_bytes(weights.device) or 0  # beside the model; the other half is for adapters and activations
        self._most_tokens = max(CACHE_BYTES, free // 2) // per_token

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._seated or self._rows)

    @property
    def counts(self) -> dict[str, float]:
        loaded = {"adapters_loaded": self._seats.num_loaded}
        return {
            **self._seats.counts,
            **loaded,
            "rows": len(self._rows),
            "waiting": len(self._waiting) + len(self._seated),
        }

    @property
    def _rows(self) -> list[AnswerRow]:
        return [row for batches in self._batches.values() for batch in batches for row in batch.rows]

    def submit(self, number: int, query: Query) -> None:
        self._waiting[number] = query

    def cancel(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        self._waiting.pop(number, None)
        self._seated = [row for row in self._seated if row.number != number]
        for batches in self._batches.values():
            for batch in batches:
                if any(row.number == number for row in batch.rows):
                    batch.keep([row for row in batch.rows if row.number != number])
        self._forget_empty()

    def forget(self, folder: str) -> None:
        self._seats.forget(folder)

    def step(self) -> None:
        """One token of every row, and the prompts of those that join."""
        for batch in [batch for batches in self._batches.values() for batch in batches]:
            self._guarded(batch, batch.rows, batch.step)
        self._seat()
        for lane, rows in self._admit().items():
            for batch, members in self._places(lane, rows):
                self._guarded(batch, members, partial(batch.join, members))
        self._forget_empty()

    def _seat(self) -> None:
        """Load what waiting queries need, as far as there are seats."""
        for number, query in list(self._waiting.items()):
            rows = [*self._rows, *self._seated]
            if len(rows) >= self._max_rows:
                return
            try:
                if seat := self._seats.take(query.model, {row.seat for row in rows}):
                    del self._waiting[number]
                    self._seated.append(self._row(number, query, seat))
                    self._send(number, None)
            except Refused as refusal:
                self._waiting.pop(number, None)
                self._send(number, refusal)

    def _admit(self) -> dict[Lane, list[AnswerRow]]:
        """Rows whose prompts are computed now, by lane: as many as there is room for, in their order."""
        found: dict[Lane, list[AnswerRow]] = defaultdict(list)
        running, new = self._rows, 0
        while self._seated and new < _PROMPT_TOKENS and self._has_room(self._seated[0], running):
            row = self._seated.pop(0)
            new += len(row.prompt)
            running.append(row)
            found[row.seat.lane].append(row)
        return found

    def _row(self, number: int, query: Query, seat: Seat) -> AnswerRow:
        prompt = prompt_tokens(seat.tokenizer, query)
        room = self._context - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens, and this model's context ends at {self._context}"
            raise Refused(400, message, "context_length_exceeded", "messages" if query.messages else "prompt")
        stops = (*query.stop, seat.stops.text) if seat.stops.text and not query.ignore_eos else query.stop
        limit = min(query.max_tokens or room, room)
        return AnswerRow(number, query, seat, prompt, limit, TokenSampler(query), AnswerText(seat.tokenizer, stops))

    def _has_room(self, row: AnswerRow, rows: Sequence[AnswerRow]) -> bool:
        """Whether all fit in the cache at their longest; a row alone always does."""
        longest = max(len(one.prompt) + one.limit for one in (*rows, row))
        return not rows or longest * (len(rows) + 1) <= self._most_tokens

    def _places(self, lane: Lane, rows: list[AnswerRow]) -> list[tuple[RowBatch, list[AnswerRow]]]:
        """The batch that each row joins: the lane's, or its own where caches cannot be joined."""
        if not can_stack(lane.model):
            made = [(RowBatch(), [row]) for row in rows]
        else:
            made = [(next(iter(self._batches[lane]), RowBatch()), rows)]
        self._batches[lane] = list(dict.fromkeys([*self._batches[lane], *(batch for batch, _ in made)]))
        return made

    def _guarded(self, batch: RowBatch, rows: list[AnswerRow], compute: Callable[[], torch.Tensor]) -> None:
        """Compute and send a token of each row; what fails ends these rows and no others."""
        try:
            logits_BV = compute()
        except Exception as error:  # whatever a model's code raises
            for row in list(rows):
                if is_out_of_memory(error):
                    refusal = Refused(503, "the memory is full; ask for less at a time", "out_of_memory")
                else:
                    refusal = Refused(500, f"the model failed: {first_line(error)}", "engine_failed")
                self._send(row.number, refusal)
            batch.keep([row for row in batch.rows if row not in rows])
            release_cache()
            return
        ended = []
        for row, logits_V in zip(list(rows), logits_BV, strict=True):
            try:
                has_ended = self._next(row, logits_V)
            except Exception as error:  # of this row's numbers or its text
                self._send(row.number, Refused(500, f"the model failed: {first_line(error)}", "engine_failed"))
                has_ended = True
            if has_ended:
                ended.append(row)
        if ended:
            batch.keep([row for row in batch.rows if row not in ended])

    def _next(self, row: AnswerRow, logits_V: torch.Tensor) -> bool:
        """Choose and send a row's next token; whether it was its last."""
        token = row.last = row.sampler.pick(logits_V)
        row.num_new += 1
        wanted = row.query.logprobs
        scores = [] if wanted is None else [score(row.seat.tokenizer, logits_V, token, wanted)]
        is_end = token in row.seat.stops.ids and not row.query.ignore_eos
        text = "" if is_end else row.text.add(token)
        finish = "stop" if is_end or row.text.is_stopped else "length" if row.num_new >= row.limit else None
        if finish:
            text += row.text.rest()
            finish = "stop" if row.text.is_stopped else finish
        if text or scores or finish:
            counted = (len(row.prompt), row.num_new) if finish else (0, 0)
            self._send(row.number, Piece(text, [] if is_end else scores, finish, *counted))
        return finish is not None

    def _forget_empty(self) -> None:
        for lane, batches in list(self._batches.items()):
            if filled := [batch for batch in batches if batch.rows]:
                self._batches[lane] = filled
            else:
                del self._batches[lane]
