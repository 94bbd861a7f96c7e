"""The next token of a row: the most likely one, or one drawn with temperature and top_p."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from orchestrator.serving.engines.protocol import Query, TokenScore

_COLD = 1e-5  # below this temperature the most likely token is taken
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACED = "\N{REPLACEMENT CHARACTER}"


class TokenSampler:
    """Draws the tokens of one row; a seed makes them the same in every batch and every run."""

    def __init__(self, query: Query) -> None:
        self._temperature, self._top_p = query.temperature, query.top_p
        self._generator: torch.Generator | None = None
        if self._temperature >= _COLD and self._top_p > 0:
            self._generator = torch.Generator()  # on the CPU: a row's luck does not depend on its device
            self._generator.seed() if query.seed is None else self._generator.manual_seed(query.seed)

    def pick(self, logits_V: torch.Tensor) -> int:
        """A token of float32 logits.  Raises ValueError where they are no numbers."""
        if self._generator is None:
            token = int(logits_V.argmax())  # of a NaN, where there is one
            _refuse_nan(logits_V[token])
            return token
        probabilities_V = torch.softmax(logits_V.cpu() / self._temperature, 0)
        _refuse_nan(probabilities_V[0])  # one NaN makes all of them NaN
        if self._top_p < 1:
            sorted_V, tokens_V = probabilities_V.sort(descending=True)
            is_kept_V = sorted_V.cumsum(0) - sorted_V < self._top_p
            is_kept_V[0] = True  # also where it is as likely as all of top_p
            probabilities_V = torch.zeros_like(sorted_V).scatter(0, tokens_V, sorted_V * is_kept_V)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))


def _refuse_nan(number: torch.Tensor) -> None:
    if number.isnan():
        raise ValueError("the logits are no numbers")


def score(tokenizer: Any, logits_V: torch.Tensor, token: int, num_top: int) -> TokenScore:
    """The log-probability of a token, before temperature and top_p, and of the most likely ones."""
    logprobs_V = torch.log_softmax(logits_V, 0)
    top = logprobs_V.topk(min(num_top, len(logprobs_V))).indices.tolist()
    found = [_named(tokenizer, other, float(logprobs_V[other])) for other in top]
    named = _named(tokenizer, token, float(logprobs_V[token]))
    return TokenScore(named.token, named.bytes, named.logprob, found)


def _named(tokenizer: Any, token: int, logprob: float) -> TokenScore:
    """A token whose bytes are a part of a character is named by them, as OpenAI's and vLLM's servers name it."""
    text = tokenizer.decode([token])
    raw = text.encode() if _REPLACED not in text else bytes_of(tokenizer.convert_ids_to_tokens(token)) or text.encode()
    try:
        return TokenScore(raw.decode(), list(raw), logprob)
    except UnicodeDecodeError:
        return TokenScore("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw), logprob)


def bytes_of(piece: str) -> bytes | None:
    """The bytes of a token as vocabularies write it: byte by byte as GPT-2's, or <0xE6>; None of another one."""
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    known = _byte_alphabet()
    return bytes(known[character] for character in piece) if all(one in known for one in piece) else None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}
