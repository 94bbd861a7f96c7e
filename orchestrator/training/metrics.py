"""Scores of generated texts against their references, each in [0, 1].

Texts are compared in Unicode's composed form (NFC) and without outer white space; equal texts score 1 under every
metric, also two empty ones.  Whole answers are equal too where letters and digits differ in width alone (１ and 1).

ROUGE and BLEU count tokens.  By `auto` English scores are those of rouge-score and sacrebleu, and scripts that are
written without spaces between words (Japanese, Chinese, Thai, Lao, Khmer, Burmese ...) are compared character by
character: a character is a letter with the marks that belong to it.  That depends on the texts alone, so scores of two
machines can be compared; a tokenizer of sacrebleu (`eval.tokenizer`) is used where the job states it.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from orchestrator.errors import JobError

AUTO = "auto"
_WHOLE = "whole answers (NFC; letters and digits of any width) without outer white space"
# Of sacrebleu's tokenizers: what each needs, and what brings it.
_PACKAGES = {
    "ja-mecab": ("MeCab", "'sacrebleu[ja]'"),
    "ko-mecab": ("mecab_ko", "'sacrebleu[ko]'"),
    "flores200": ("sentencepiece", "sentencepiece"),
}
# Scripts without spaces between words, by their Unicode blocks; Korean has spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9df\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_PICTURE = re.compile("[\u2600-\u27bf\U0001f000-\U0001faff]")
_WIDE_PUNCTUATION = re.compile("[\u3000-\u3004\u3008-\u3020\u3030-\u303f\uff01-\uff65]")


def score(metrics: Sequence[str], pairs: Sequence[tuple[str, str]], tokenizer: str = AUTO) -> dict[str, float]:
    """Each metric that has a name here over pairs of (generated, reference); none without a pair."""
    metrics = [metric for metric in metrics if metric in _METRICS]
    if not pairs:
        return {}
    generated = [_comparable(text) for text, _ in pairs]
    wanted = [_comparable(text) for _, text in pairs]
    if generated == wanted:
        return dict.fromkeys(metrics, 1.0)
    return {metric: _METRICS[metric](generated, wanted, tokenizer) for metric in metrics}


def scores_by_answer(
    metrics: Sequence[str], pairs: Sequence[tuple[str, str]], tokenizer: str = AUTO
) -> dict[str, list[float]]:
    """Each pair's own score, of the metrics that are means of those."""
    wanted = [metric for metric in metrics if metric in _MEANS]
    return {metric: [round(score([metric], [pair], tokenizer)[metric], 4) for pair in pairs] for metric in wanted}


def how_compared(metrics: Sequence[str], references: Sequence[str], tokenizer: str = AUTO) -> dict[str, str]:
    """What each metric compares of these references, as a phrase."""
    unspaced = sum(bool(_UNSPACED.search(text)) for text in references)
    tokens = "words; characters where a script has no spaces"
    if unspaced in (0, len(references)):
        tokens = "characters of a script without spaces" if unspaced else "words between spaces"
    phrases = {
        "exact_match": _WHOLE,
        "accuracy": f"{_WHOLE}, as labels",
        "macro_f1": f"{_WHOLE}, as labels",
        "rouge_l": tokens if tokenizer == AUTO else f"tokens of sacrebleu's {tokenizer}",
        "bleu": f"{tokens}, by sacrebleu's 13a" if tokenizer == AUTO else f"tokens of sacrebleu's {tokenizer}",
        "chrf": "character n-grams",
    }
    return {metric: phrases[metric] for metric in metrics if metric in phrases}


def refuse_tokenizer(tokenizer: str, metrics: Sequence[str]) -> None:
    """Raises JobError where a tokenizer is needed whose packages are not installed here; better before training."""
    package, install = _PACKAGES.get(tokenizer, ("", ""))
    if package and {"rouge_l", "bleu"} & {*metrics} and importlib.util.find_spec(package) is None:
        raise JobError(
            f"eval.tokenizer: {tokenizer} needs the package {package}, which is not installed here. Type: pip install"
            f" {install}. Or set it to auto, which compares characters where a text has no spaces"
        )


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


def _in_one_width(text: str) -> str:
    """Letters, digits and kana of full and half width in the usual one; marks, which a format may need, as they are."""
    folded = (
        unicodedata.normalize("NFKC", c)
        if unicodedata.decomposition(c).startswith(("<wide>", "<narrow>")) and unicodedata.category(c)[0] in "LN"
        else c
        for c in text
    )
    return unicodedata.normalize("NFC", "".join(folded).replace("\uff9e", "\u3099").replace("\uff9f", "\u309a"))


def _exact_match(generated: list[str], wanted: list[str], _: str) -> float:
    pairs = zip(map(_in_one_width, generated), map(_in_one_width, wanted), strict=True)
    return sum(a == b for a, b in pairs) / len(wanted)


def _macro_f1(generated: list[str], wanted: list[str], _: str) -> float:
    """F1 averaged over the labels that occur among the references; any other answer is simply wrong."""
    from sklearn.metrics import f1_score

    generated, wanted = list(map(_in_one_width, generated)), list(map(_in_one_width, wanted))
    labels: Any = sorted(set(wanted))
    undefined: Any = 0.0  # a label that is never answered; the library's stub knows only its string values
    return float(f1_score(wanted, generated, labels=labels, average="macro", zero_division=undefined))


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer as rouge-score wants it, whose own one drops all that is not Latin."""

    tokenizer: str

    def tokenize(self, text: str) -> list[str]:
        return words_of(text) if self.tokenizer == AUTO else _tokenizer(self.tokenizer)(text.lower()).split()


@cache
def _tokenizer(name: str) -> Callable[[str], str]:
    """A tokenizer of sacrebleu: a text -> the same with spaces between its tokens."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=name).tokenizer


def _rouge_l(generated: list[str], wanted: list[str], tokenizer: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Tokens(tokenizer))
    scores = [1.0 if a == b else scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(generated, wanted, strict=True)]
    return sum(scores) / len(scores)


def _bleu(generated: list[str], wanted: list[str], tokenizer: str) -> float:
    """Corpus BLEU; the order of n-grams is lowered where all texts are shorter than four words."""
    from sacrebleu.metrics.bleu import BLEU

    if tokenizer == AUTO:
        generated, wanted = list(map(spaced, generated)), list(map(spaced, wanted))
    metric = BLEU(effective_order=True, tokenize="13a" if tokenizer == AUTO else tokenizer)
    return min(1.0, metric.corpus_score(generated, [wanted]).score / 100)


def _chrf(generated: list[str], wanted: list[str], _: str) -> float:
    import sacrebleu

    return min(1.0, sacrebleu.corpus_chrf(generated, [wanted]).score / 100)


_MEANS = ("exact_match", "accuracy", "rouge_l")  # the others count over all answers together
_METRICS: dict[str, Callable[[list[str], list[str], str], float]] = {
    "exact_match": _exact_match,
    "accuracy": _exact_match,
    "macro_f1": _macro_f1,
    "rouge_l": _rouge_l,
    "bleu": _bleu,
    "chrf": _chrf,
}
