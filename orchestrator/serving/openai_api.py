"""The OpenAI API as values: requests checked field by field, answers and errors in its form.

https://platform.openai.com/docs/api-reference: chat completions and completions.  What it has and this server has not
is refused where a request asks for it, and passed over where it is given its neutral value.  `ignore_eos` is vLLM's and
llama.cpp's own field.
"""

from __future__ import annotations

import difflib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.serving.engines.protocol import Piece, Query, Refused, ServedModel, TokenScore

_MOST_STOPS, _MOST_TOP = 16, 20
_ROLES = ("system", "developer", "user", "assistant")
_READ = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "ignore_eos", "logprobs"}
_READ |= {"stream", "stream_options"}
_READ_OF_CHATS, _READ_OF_TEXTS = {"messages", "max_completion_tokens", "top_logprobs"}, {"prompt"}
_NOT_OF_ANSWERS = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
# Fields that this server does not have, and the values that ask for nothing; from top_k on vLLM's and llama.cpp's own.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
}


@dataclass(frozen=True)
class ApiRequest:
    """A request that was understood."""

    query: Query
    is_chat: bool
    streams: bool
    with_usage: bool  # of a stream: a last chunk with the counts


@dataclass(frozen=True)
class ApiError:
    """Every error's fields."""

    message: str
    type: str
    param: str | None
    code: str | None


def parse_request(text: bytes, is_chat: bool, resolve: Callable[[str], ServedModel]) -> ApiRequest:
    """Raises Refused, naming the field that is wrong."""
    body = _json_object(text)
    _refuse_others(body, _READ | (_READ_OF_CHATS if is_chat else _READ_OF_TEXTS))
    fields = _Fields(body)
    model = resolve(fields.text("model") or "")
    limit = fields.whole("max_completion_tokens", 1) if is_chat else None
    options = {
        "max_tokens": limit or fields.whole("max_tokens", 1),
        "temperature": fields.number("temperature", 0, 2) or 0.0,
        "top_p": fields.number("top_p", 0, 1, 1.0),
        "seed": fields.whole("seed", -(2**63), 2**63 - 1),
        "stop": fields.stops(),
        "ignore_eos": fields.flag("ignore_eos"),
        "logprobs": _num_logprobs(fields, is_chat),
    }
    asked = {"messages": fields.messages()} if is_chat else fields.prompt()
    streams = fields.flag("stream")
    more = fields.values.get("stream_options") or {}
    if not isinstance(more, dict):
        raise Refused(400, "stream_options: give an object", param="stream_options")
    if more.get("include_usage") and not streams:
        raise Refused(400, "stream_options needs stream: true", param="stream_options")
    return ApiRequest(Query(model, **asked, **options), is_chat, streams, bool(more.get("include_usage")))


def _refuse_others(body: Mapping[str, Any], read: set[str]) -> None:
    """Raise Refused for the first field that asks for something and is not read."""
    for name, value in body.items():
        if name in read | _NOT_OF_ANSWERS or value is None:
            continue
        neutral = (one for one in _NEUTRAL.get(name, ()) if isinstance(one, bool) == isinstance(value, bool))
        if value not in neutral:
            meant = difflib.get_close_matches(name, read, 1)
            hint = f"; did you mean {meant[0]}?" if meant and name not in _NEUTRAL else ""
            raise Refused(400, f"{name} is not supported by this server{hint}", "unsupported_parameter", name)


def error_body(refusal: Refused, translate: Callable[[str], str]) -> dict[str, Any]:
    """The body of an error, its message in the language of who asks; type, parameter and code are for programs."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": asdict(ApiError(translate(refusal.message), kind, refusal.param, refusal.code))}


def models_body(models: list[ServedModel]) -> dict[str, Any]:
    return {"object": "list", "data": [model_body(model) for model in models]}


def model_body(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "orchestrator"}


class Answer:
    """The bodies of one answer."""

    def __init__(self, request: ApiRequest) -> None:
        self._request, self._created = request, int(time.time())
        self._id = ("chatcmpl-" if request.is_chat else "cmpl-") + uuid.uuid4().hex
        self._offset = 0  # characters before the next token, for completions' logprobs

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        scores = self._scores([score for piece in pieces for score in piece.scores])
        shown = {"message": {"role": "assistant", "content": text}} if self._request.is_chat else {"text": text}
        choice = {"index": 0, **shown, "logprobs": scores, "finish_reason": last.finish}
        kind = "chat.completion" if self._request.is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": _usage(last)}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""}, None, None)] if self._request.is_chat else []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece as parts of a stream."""
        scores = self._scores(piece.scores)
        if not self._request.is_chat:
            found = [self._chunk(piece.text, scores, piece.finish)]
        else:
            found = [self._chunk({"content": piece.text}, scores, None)] if piece.text or scores else []
            found += [self._chunk({}, None, piece.finish)] if piece.finish else []
        if piece.finish and self._request.with_usage:
            found.append({**self._head(self._chunk_kind), "choices": [], "usage": _usage(piece)})
        return found

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._request.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.query.model.name}

    def _chunk(self, content: Any, scores: Any, finish: str | None) -> dict[str, Any]:
        shown = {"delta": content} if self._request.is_chat else {"text": content}
        choice = {"index": 0, **shown, "logprobs": scores, "finish_reason": finish}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _scores(self, scores: list[TokenScore]) -> dict[str, Any] | None:
        if self._request.query.logprobs is None or not scores:
            return None
        if self._request.is_chat:
            entries = [{**_score(one), "top_logprobs": [_score(other) for other in one.top]} for one in scores]
            return {"content": entries}
        offsets = []
        for one in scores:
            offsets.append(self._offset)
            self._offset += sum(byte & 0xC0 != 0x80 for byte in one.bytes)  # that begin a character
        return {
            "tokens": [one.token for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": [{other.token: other.logprob for other in one.top} for one in scores],
            "text_offset": offsets,
        }


class _Fields:
    """The fields of a request, each of its type.  Every method raises Refused."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise Refused(400, f"{name}: give a text", param=name)
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise Refused(400, f"{name}: give true or false", param=name)
        return bool(value)

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float | None:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise Refused(400, f"{name}: give a number from {least} to {most}", param=name)
        return float(value)

    def whole(self, name: str, least: int, most: int = 2**31) -> int | None:
        value = self.values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise Refused(400, f"{name}: give a whole number from {least} to {most}", param=name)
        return value

    def stops(self) -> tuple[str, ...]:
        value = self.values.get("stop")
        found = [value] if isinstance(value, str) else value if value is not None else []
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            raise Refused(400, "stop: give a text or a list of texts", param="stop")
        if len(found) > _MOST_STOPS:
            raise Refused(400, f"stop: at most {_MOST_STOPS} texts", param="stop")
        return tuple(found)

    def messages(self) -> list[dict[str, str]]:
        value = self.values.get("messages")
        if not isinstance(value, list) or not value:
            raise Refused(400, "messages: give a list of at least one message", param="messages")
        return [_message(place, one) for place, one in enumerate(value)]

    def prompt(self) -> dict[str, Any]:
        value = self.values.get("prompt")
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            value = value[0]
        if isinstance(value, str):
            return {"prompt": value}
        if isinstance(value, list) and value and all(type(one) is int and one >= 0 for one in value):
            return {"tokens": value}
        if isinstance(value, list) and len(value) > 1:
            raise Refused(400, "prompt: send one request for each prompt; they are computed together", param="prompt")
        raise Refused(400, "prompt: give a text or a list of token numbers", param="prompt")


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text.decode("utf-8"), parse_constant=_no_number)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object", "invalid_json")
    return body


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _message(place: int, value: Any) -> dict[str, str]:
    where = f"messages[{place}]"
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise Refused(400, f"{where}: give an object whose role is one of {', '.join(_ROLES)}", param="messages")
    if value.get("tool_calls") or value.get("function_call"):
        raise Refused(400, f"{where}: this server reads no calls of tools", param="messages")
    content = value.get("content")
    if isinstance(content, list):
        if not content or not all(map(_is_text, content)):
            raise Refused(400, f"{where}.content: this server reads parts of text only", param="messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content: give a text", param="messages")
    return {"role": "system" if value["role"] == "developer" else value["role"], "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _num_logprobs(fields: _Fields, is_chat: bool) -> int | None:
    if not is_chat:
        return fields.whole("logprobs", 0, _MOST_TOP)
    count = fields.whole("top_logprobs", 0, _MOST_TOP)
    if not fields.flag("logprobs"):
        if count:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return None
    return count or 0


def _score(one: TokenScore) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": one.bytes}


def _usage(last: Piece) -> dict[str, int]:
    total = last.prompt_tokens + last.completion_tokens
    counts = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens}
    return {**counts, "total_tokens": total}
