"""Answers generated for held-out prompts, and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.training.parallel import Group, even_passes
from strategies.shape import ModelShape
from strategies.techniques.precision import autocast

_CACHE_BYTES, _MOST_PROMPTS = 2**30, 128  # of a batch of prompts: what keys and values may take, and rows


@dataclass(frozen=True)
class Answer:
    """A generated text beside the one that was wanted."""

    prompt: str
    reference: str
    generated: str


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    data: Dataset,
    indices: Sequence[int],
    max_new_tokens: int,
    dtype: Any,
    together: Group | None = None,
) -> list[Answer]:
    """Greedy answers to the prompts of the samples at `indices` that have a reference; prompts padded on the left.

    Workers that divide the weights must generate `together`: as many passes everywhere.
    """
    prompts = [(index, *data.prompt(index)) for index in indices]
    usable = [(index, ids, reference) for index, ids, reference in prompts if reference is not None and len(ids)]
    usable.sort(key=lambda item: len(item[1]))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained_with = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa")  # prompts are padded here: the training kernel may not know padding
    # transformers hands the output matrix a strided slice, for which torch copies the matrix once a row: 4 GiB here.
    output = inner.get_output_embeddings()
    unslice = output.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    was_training = model.training
    model.eval()
    answers: dict[int, Answer] = {}
    longest = max((len(ids) for _, ids, _ in usable), default=0) + max_new_tokens
    rows = max(1, min(_MOST_PROMPTS, _CACHE_BYTES // (longest * _cache_bytes_per_token(inner))))
    try:
        batches = [list(range(start, min(start + rows, len(usable)))) for start in range(0, len(usable), rows)]
        for members in even_passes(together, batches) if together else batches:
            batch = [usable[i] for i in members]
            asked = [ids for _, ids, _ in batch] or [[tokenizer.eos_token_id or 0]]
            with autocast(model.device.type, dtype):
                texts = _generate(model, tokenizer, asked, max_new_tokens, together is not None)[: len(batch)]
            for (index, ids, reference), text in zip(batch, texts, strict=True):
                answers[index] = Answer(tokenizer.decode(ids, skip_special_tokens=True), reference, text)
    finally:
        unslice.remove()
        inner.set_attn_implementation(trained_with)
        model.train(was_training)
    return [answers[index] for index in sorted(answers)]


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int, together: bool = False
) -> list[str]:
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask[row, width - len(ids) :] = 1
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
        synced_gpus=together,
    )
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in output]


def _cache_bytes_per_token(model: Any) -> int:
    """Keys and values of one token in every layer."""
    shape = ModelShape.from_config(model.config.to_dict())
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * model.dtype.itemsize


def score(metrics: Sequence[str], answers: Sequence[Answer]) -> dict[str, float]:
    """Each metric over the answers, in [0, 1]."""
    scores: dict[str, float] = {}
    if not answers:
        return scores
    generated = [answer.generated.strip() for answer in answers]
    wanted = [answer.reference.strip() for answer in answers]
    for metric in metrics:
        scores[metric] = _METRICS[metric](generated, wanted)
    return scores


def _exact_match(generated: list[str], wanted: list[str]) -> float:
    return sum(a == b for a, b in zip(generated, wanted, strict=True)) / len(wanted)


def _macro_f1(generated: list[str], wanted: list[str]) -> float:
    """F1 averaged over the labels that occur among the references; any other answer is simply wrong."""
    from sklearn.metrics import f1_score

    labels: Any = sorted(set(wanted))
    undefined: Any = 0.0  # a label that is never answered; the library's stub knows only its string values
    return float(f1_score(wanted, generated, labels=labels, average="macro", zero_division=undefined))


def _rouge_l(generated: list[str], wanted: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return sum(scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(generated, wanted, strict=True)) / len(wanted)


def _bleu(generated: list[str], wanted: list[str]) -> float:
    import sacrebleu

    return sacrebleu.corpus_bleu(generated, [wanted]).score / 100


def _chrf(generated: list[str], wanted: list[str]) -> float:
    import sacrebleu

    return sacrebleu.corpus_chrf(generated, [wanted]).score / 100


_METRICS = {
    "exact_match": _exact_match,
    "accuracy": _exact_match,  # of a label word
    "macro_f1": _macro_f1,
    "rouge_l": _rouge_l,
    "bleu": _bleu,
    "chrf": _chrf,
}
