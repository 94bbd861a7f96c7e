"""Queries as requests of the OpenAI API, and its streams as pieces: what vLLM and Ray Serve LLM have in common."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from clusters.safe.reading import BadInput, read_json
from orchestrator.serving.engines.kinds import kind_of_adapter
from orchestrator.serving.engines.protocol import Piece, Query, Refused, ServedModel
from strategies.registry import owner_of

BASE = "base"  # what the server calls the model that was not tuned
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank takes
# What vLLM's PEFTHelper reads past: a module's own scale would be that of all the others.
_READ_PAST = ("rank_pattern", "alpha_pattern", "lora_bias")
_PASSED_ON = (400, 404, 422)


def rank_limit(most_rank: int) -> int:
    """The smallest max_lora_rank that holds adapters of this rank, or the largest there is."""
    return next((rank for rank in _RANKS if rank >= most_rank), _RANKS[-1])


def lora_limits(most_rank: int, max_adapters: int) -> dict[str, int]:
    """vLLM's options for adapters: their rank, how many of them in a batch, and how many in memory."""
    return {"max_lora_rank": rank_limit(most_rank), "max_loras": min(max_adapters, 8), "max_cpu_loras": max_adapters}


def check_adapter(model: ServedModel, most_rank: int) -> None:
    """Raises Refused for what is trained, but no adapter that vLLM computes as it was trained."""
    folder = Path(model.folder or "")
    if not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        message = f"{model.name} is a whole model, not an adapter of its base: serve its folder {folder} instead"
        raise Refused(400, message, "engine_cannot", "model")
    try:
        kind, settings = kind_of_adapter(folder), read_json(folder / "adapter_config.json")
    except BadInput as error:
        raise Refused(500, f"{model.name} cannot be loaded: {error}", "model_damaged", "model") from None
    if owner := owner_of(folder):
        message = f"{model.name} is {owner.own_format}, which vLLM does not know; --engine transformers serves it"
        raise Refused(400, message, "engine_cannot", "model")
    if kind != "shared" or any(settings.get(key) for key in _READ_PAST):
        message = (
            f"{model.name}: vLLM takes pairs of A and B of one rank and scale alone. `orchestrator merge` makes a plain"
            " model of it; --engine transformers serves it as it is"
        )
        raise Refused(400, message, "engine_cannot", "model")
    if isinstance(rank := settings.get("r"), int) and rank > most_rank:
        message = f"{model.name}: its rank {rank} is above {most_rank}, the highest that vLLM was started for"
        raise Refused(400, f"{message}. Start the server again with it", "engine_cannot", "model")


def request_of(name: str, query: Query) -> tuple[str, dict[str, Any]]:
    """The path and the body that ask the model `name`.  Raises Refused."""
    body: dict[str, Any] = {"model": name, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"temperature": query.temperature, "top_p": query.top_p, "stop": list(query.stop)}
    body |= {key: value for key, value in (("max_tokens", query.max_tokens), ("seed", query.seed)) if value is not None}
    if query.ignore_eos:
        body["ignore_eos"] = True
    if query.logprobs is not None:
        raise Refused(400, "logprobs: not passed on to vLLM; --engine transformers gives them", param="logprobs")
    if query.messages is None:
        return "/v1/completions", body | {"prompt": query.tokens if query.tokens is not None else query.prompt}
    system = query.model.system
    has_own = not system or any(message["role"] == "system" for message in query.messages)
    first = [] if has_own else [{"role": "system", "content": system}]
    return "/v1/chat/completions", body | {"messages": [*first, *query.messages]}


@contextlib.asynccontextmanager
async def post(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], engine: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Raises Refused with what the server says, aiohttp.ClientError where it does not answer."""
    async with session.post(url, json=body) as reply:
        if reply.status >= 400:
            text = (await reply.content.read(1 << 16)).decode("utf-8", "replace")
            status = reply.status if reply.status in _PASSED_ON else 503
            raise Refused(status, f"{engine}: {_message_in(text)}", "engine_refused")
        yield reply


async def pieces_of(reply: aiohttp.ClientResponse, is_chat: bool, engine: str) -> AsyncIterator[Piece]:
    """A stream as pieces; the last one has the counts.  Raises Refused, also where the stream breaks off."""
    finish, counts = "", (0, 0)
    async for line in reply.content:
        kind, _, data = line.strip().partition(b":")
        if kind != b"data" or data.strip() == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise Refused(500, f"{engine}: {_message_in(json.dumps(chunk))}", "engine_failed")
        for choice in chunk.get("choices", ()):
            finish = choice.get("finish_reason") or finish
            if text := choice["delta"].get("content") if is_chat else choice.get("text"):
                yield Piece(text)
        if usage := chunk.get("usage"):
            counts = usage["prompt_tokens"], usage["completion_tokens"]
    if not finish:
        raise Refused(503, f"{engine} broke off its answer", "engine_failed")
    yield Piece("", [], finish, *counts)


def _message_in(text: str) -> str:
    """The message of an error's body; of what Ray wraps, the error itself."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        body = json.loads(text)
        text = str(body.get("message") or body["error"]["message"]).rpartition("original exception: ")[2]
    return text.strip()[:500]
