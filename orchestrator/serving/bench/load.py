"""Sends a load to a server of the OpenAI API as clients do, and times what comes back.

A client sends its next request when its last answer has ended (a closed loop), so `concurrency` requests are on their
way at a time.  Requests are streamed completions of token prompts, greedy, all of the same number of new tokens:
`ignore_eos` keeps a model that would end its answers early from looking fast.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from orchestrator.serving.bench.result import Latency

_LINE_BYTES = 2**20


@dataclass(frozen=True)
class LoadRequest:
    """One request: the model's name in the API, and its prompt."""

    model: str
    prompt: Sequence[int]  # tokens


@dataclass(frozen=True)
class Load:
    """Requests in the order they are sent, by so many clients."""

    concurrency: int
    requests: Sequence[LoadRequest]
    new_tokens: int  # of an answer


@dataclass(frozen=True)
class AnswerTimes:
    """One answer: seconds from its request on, and tokens as the server counts them."""

    first_s: float | None  # to the first text: a token whose text is not certain yet sends none; None: no text came
    whole_s: float
    prompt_tokens: int
    new_tokens: int

    @property
    def next_s(self) -> float | None:
        """Seconds of each token after the first; None of an answer of one token, or without a text."""
        if self.first_s is None or self.new_tokens < 2:
            return None
        return (self.whole_s - self.first_s) / (self.new_tokens - 1)


@dataclass(frozen=True)
class LoadRound:
    """A load that was sent once."""

    seconds: float  # from the first request to the end of the last answer
    answers: list[AnswerTimes]
    refusals: list[str]  # the messages of requests that were refused or broke off

    @property
    def tokens_per_s(self) -> float:
        return sum(one.new_tokens for one in self.answers) / self.seconds


def send(url: str, api_key: str | None, load: Load) -> LoadRound:
    """Send a load to the server at `url` (without /v1) and wait for its last answer."""
    return asyncio.run(_send(url, api_key, load))


def joined(rounds: Sequence[LoadRound]) -> LoadRound:
    """Rounds that were sent one after the other, as one."""
    return LoadRound(
        sum(one.seconds for one in rounds),
        [answer for one in rounds for answer in one.answers],
        [refusal for one in rounds for refusal in one.refusals],
    )


def latency(rounds: Sequence[LoadRound]) -> Latency:
    """The statistics of sendings of one load, each of which has an answer."""
    answers = [answer for one in rounds for answer in one.answers]
    first = [answer.first_s for answer in answers if answer.first_s is not None]
    further = [answer.next_s for answer in answers if answer.next_s is not None]
    rates = [one.tokens_per_s for one in rounds]
    return Latency(
        *_median_and_p95(first),
        *_median_and_p95(further),
        tokens_per_s=statistics.median(rates),
        tokens_per_s_low=min(rates),
        tokens_per_s_high=max(rates),
        answers=len(answers),
        refused=sum(len(one.refusals) for one in rounds),
        prompt_tokens=statistics.mean(answer.prompt_tokens for answer in answers),
        new_tokens=statistics.mean(answer.new_tokens for answer in answers),
    )


def _median_and_p95(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95th percentile is interpolated between its neighbours; of few values it is near the largest."""
    if not values:
        return None, None
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return statistics.median(values), p95


class _Refusal(Exception):
    """What the server says in place of an answer."""


async def _send(url: str, api_key: str | None, load: Load) -> LoadRound:
    waiting, answers, refusals = deque(load.requests), [], []
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, read_bufsize=_LINE_BYTES
    ) as session:

        async def client() -> None:
            while waiting:
                request = waiting.popleft()
                try:
                    answers.append(await _answer(session, f"{url}/v1/completions", request, load.new_tokens))
                except _Refusal as refusal:
                    refusals.append(str(refusal))
                except (aiohttp.ClientError, OSError, ValueError) as error:
                    refusals.append(f"the connection broke off: {str(error) or type(error).__name__}")

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(load.concurrency)))
        return LoadRound(time.perf_counter() - begun, answers, refusals)


async def _answer(session: aiohttp.ClientSession, url: str, request: LoadRequest, new_tokens: int) -> AnswerTimes:
    """Raises _Refusal, and what aiohttp and JSON raise."""
    body = {
        "model": request.model,
        "prompt": list(request.prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first_s, usage, begun = None, None, time.perf_counter()
    async with session.post(url, json=body) as reply:
        if reply.status != 200:
            raise _Refusal(_message_in(await reply.content.read(_LINE_BYTES)))
        async for line in reply.content:
            kind, _, data = line.partition(b":")
            if kind != b"data" or data.strip() == b"[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise _Refusal(_message_in(data))
            if first_s is None and any(choice.get("text") for choice in chunk["choices"]):
                first_s = time.perf_counter() - begun
            usage = chunk.get("usage") or usage
    whole_s = time.perf_counter() - begun
    if usage is None:
        raise _Refusal("the answer broke off before its end")
    return AnswerTimes(first_s, whole_s, usage["prompt_tokens"], usage["completion_tokens"])


def _message_in(body: bytes) -> str:
    """The message of an error's body."""
    try:
        found: Any = json.loads(body)
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace").strip()[:500] or "an empty answer"
