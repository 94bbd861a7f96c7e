"""The next token of a row: the most likely one, or one drawn with temperature and top_p."""

from __future__ import annotations

import torch

from orchestrator.serving.engines.protocol import Query, TokenScore


class TokenSampler:
    """Draws the tokens of one row; a seed makes them the same in every batch and every run."""

    def __init__(self, query: Query) -> None:
        self._temperature, self._top_p = query.temperature, query.top_p
        self._generator: torch.Generator | None = None
        if self._temperature > 0:
            self._generator = torch.Generator()  # on the CPU: a row's luck does not depend on its device
            self._generator.seed() if query.seed is None else self._generator.manual_seed(query.seed)

    def pick(self, logits_V: torch.Tensor) -> int:
        """A token of float32 logits."""
        if self._generator is None:
            return int(logits_V.argmax())
        probabilities_V = torch.softmax(logits_V.cpu() / self._temperature, 0)
        if self._top_p < 1:
            sorted_V, tokens_V = probabilities_V.sort(descending=True)
            is_kept_V = sorted_V.cumsum(0) - sorted_V < self._top_p  # the most likely one always is
            probabilities_V = torch.zeros_like(sorted_V).scatter(0, tokens_V, sorted_V * is_kept_V)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))


def score(tokenizer: object, logits_V: torch.Tensor, token: int, num_top: int) -> TokenScore:
    """The log-probability of a token, before temperature and top_p, and of the most likely ones."""
    logprobs_V = torch.log_softmax(logits_V, 0)
    top = logprobs_V.topk(min(num_top, len(logprobs_V))).indices.tolist()
    found = [_named(tokenizer, other, float(logprobs_V[other])) for other in top]
    named = _named(tokenizer, token, float(logprobs_V[token]))
    return TokenScore(named.token, named.bytes, named.logprob, found)


def _named(tokenizer: object, token: int, logprob: float) -> TokenScore:
    text = tokenizer.decode([token])  # type: ignore[attr-defined]
    return TokenScore(text, list(text.encode()), logprob)
