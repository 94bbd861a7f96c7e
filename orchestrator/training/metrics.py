"""Scores of generated texts against their references, each in [0, 1].

Texts are compared in Unicode's composed form (NFC) and without outer white space; equal texts score 1 under every
metric, also two empty ones.  English scores are those of rouge-score and sacrebleu.  Scripts that are written without
spaces between words (Japanese, Chinese, Thai, Lao, Khmer, Burmese ...) are compared character by character: a character
is a letter with the marks that belong to it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

# Scripts without spaces between words, by their Unicode blocks; Korean has spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9df\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_PICTURE = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")
_WIDE_PUNCTUATION = re.compile("[\u3000-\u3004\u3008-\u3020\u3030-\u303f\uff01-\uff65]")


def score(metrics: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Each metric over pairs of (generated, reference); none without a pair."""
    if not pairs:
        return {}
    generated = [_comparable(text) for text, _ in pairs]
    wanted = [_comparable(text) for _, text in pairs]
    if generated == wanted:
        return dict.fromkeys(metrics, 1.0)
    return {metric: _METRICS[metric][0](generated, wanted) for metric in metrics}


def scores_by_answer(metrics: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """Each pair's own score, of the metrics that are means of those."""
    wanted = [metric for metric in metrics if metric in _MEANS]
    return {metric: [round(score([metric], [pair])[metric], 4) for pair in pairs] for metric in wanted}


def how_compared(metrics: Sequence[str]) -> dict[str, str]:
    """What each metric compares, as a phrase."""
    return {metric: _METRICS[metric][1] for metric in metrics}


def words_of(text: str) -> list[str]:
    """Words in lower case; of scripts without spaces, and of emoji, each character; of bare punctuation its signs.

    ASCII text gives what rouge-score's own tokenizer gives.
    """
    words, current = list[str](), ""
    for character in text.lower():
        kind = unicodedata.category(character)[0]
        if kind == "M" and (current or words):
            current, words = (current + character, words) if current else ("", [*words[:-1], words[-1] + character])
            continue
        alone = _UNSPACED.match(character) if kind in "LN" else _PICTURE.match(character)
        if kind in "LN" and not alone:
            current += character
            continue
        words += [current] if current else []
        words += [character] if alone else []
        current = ""
    return [*words, *([current] if current else [])] or [c for c in text if not c.isspace()]


def spaced(text: str) -> str:
    """The text with spaces around each character of scripts that have none between words, and around wide marks."""
    apart = ""
    for character in text:
        if unicodedata.category(character)[0] == "M":
            apart = apart.removesuffix(" ") + character + (" " if apart.endswith(" ") else "")
        elif _UNSPACED.match(character) or _WIDE_PUNCTUATION.match(character):
            apart += f" {character} "
        else:
            apart += character
    return apart


def _comparable(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _exact_match(generated: list[str], wanted: list[str]) -> float:
    return sum(a == b for a, b in zip(generated, wanted, strict=True)) / len(wanted)


def _macro_f1(generated: list[str], wanted: list[str]) -> float:
    """F1 averaged over the labels that occur among the references; any other answer is simply wrong."""
    from sklearn.metrics import f1_score

    labels: Any = sorted(set(wanted))
    undefined: Any = 0.0  # a label that is never answered; the library's stub knows only its string values
    return float(f1_score(wanted, generated, labels=labels, average="macro", zero_division=undefined))


class _Words:
    """`words_of` as rouge-score wants it."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


def _rouge_l(generated: list[str], wanted: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [1.0 if a == b else scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(generated, wanted, strict=True)]
    return sum(scores) / len(scores)


def _bleu(generated: list[str], wanted: list[str]) -> float:
    """Corpus BLEU; the order of n-grams is lowered where all texts are shorter than four words."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    return min(1.0, metric.corpus_score(list(map(spaced, generated)), [list(map(spaced, wanted))]).score / 100)


def _chrf(generated: list[str], wanted: list[str]) -> float:
    import sacrebleu

    return min(1.0, sacrebleu.corpus_chrf(generated, [wanted]).score / 100)


_MEANS = ("exact_match", "accuracy", "rouge_l")  # the others count over all answers together
_WHOLE = "whole answers (NFC) without outer white space"
_METRICS: dict[str, tuple[Callable[[list[str], list[str]], float], str]] = {
    "exact_match": (_exact_match, _WHOLE),
    "accuracy": (_exact_match, f"{_WHOLE}, as labels"),
    "macro_f1": (_macro_f1, f"{_WHOLE}, as labels"),
    "rouge_l": (_rouge_l, "words; characters where a script has no spaces"),
    "bleu": (_bleu, "sacrebleu 13a words; characters where a script has no spaces"),
    "chrf": (_chrf, "character n-grams"),
}
