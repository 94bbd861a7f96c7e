"""Answers generated for held-out prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data.dataset import Dataset
from orchestrator.training.parallel import Group, even_passes
from orchestrator.training.stops import Stops, stops_of
from strategies.shape import ModelShape
from strategies.techniques.precision import autocast

_CACHE_BYTES, _MOST_PROMPTS = 2**30, 128  # of a batch of prompts: what keys and values may take, and rows


@dataclass(frozen=True)
class Answer:
    """A generated text beside the one that was wanted."""

    prompt: str
    reference: str
    generated: str


@dataclass(frozen=True)
class _Prompt:
    index: int
    ids: list[int]
    reference: str
    new_tokens: int  # that its answer may take; 0 where the prompt fills the model's context


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

    An answer ends at the latest where the model's context does, so a prompt that fills it has an empty answer.  Workers
    that divide the weights must generate `together`: as many passes everywhere.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompts = _prompts(inner, tokenizer, data, indices, max_new_tokens)
    stops = stops_of(inner, tokenizer)
    texts: dict[int, str] = {prompt.index: "" for prompt in prompts}
    batches = _batches(inner, [prompt for prompt in prompts if prompt.new_tokens], max_new_tokens)
    listed = [prompt for batch in batches for prompt in batch]
    places = iter(range(len(listed)))
    numbers = [[next(places) for _ in batch] for batch in batches]
    with _generating(model, inner):
        for members in even_passes(together, numbers) if together else numbers:
            batch = [listed[place] for place in members]
            asked = [prompt.ids for prompt in batch] or [[_start_token(tokenizer)]]
            new_tokens = min((prompt.new_tokens for prompt in batch), default=1)
            with autocast(model.device.type, dtype):
                answered = _generate(model, tokenizer, asked, new_tokens, stops, together is not None)
            texts |= {prompt.index: text for prompt, text in zip(batch, answered, strict=False)}
    return [
        Answer(tokenizer.decode(prompt.ids, skip_special_tokens=True), prompt.reference, texts[prompt.index])
        for prompt in sorted(prompts, key=lambda prompt: prompt.index)
    ]


def num_without_room(model: Any, data: Dataset, indices: Sequence[int]) -> int:
    """How many prompts with a reference fill the model's context, so that no answer to them can be generated."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    limit = context_of(inner)
    found = (data.prompt(index) for index in indices)
    return sum(limit is not None and reference is not None and len(ids) >= limit for ids, reference in found)


def context_of(model: Any) -> int | None:
    """Positions that a model knows; None where its config does not say."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _prompts(model: Any, tokenizer: Any, data: Dataset, indices: Sequence[int], max_new_tokens: int) -> list[_Prompt]:
    """The prompts that have a reference, shortest first; one without a token starts as the tokenizer starts a text."""
    limit, found = context_of(model), []
    for index in indices:
        ids, reference = data.prompt(index)
        if reference is not None:
            own = [int(token) for token in ids] or [_start_token(tokenizer)]
            room = max_new_tokens if limit is None else max(0, min(max_new_tokens, limit - len(own)))
            found.append(_Prompt(index, own, reference, room))
    return sorted(found, key=lambda prompt: len(prompt.ids))


def _batches(model: Any, prompts: list[_Prompt], max_new_tokens: int) -> list[list[_Prompt]]:
    """Prompts that are generated in one go: as many as the cache may hold, all with as much room for their answers."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0) + max_new_tokens
    rows = max(1, min(_MOST_PROMPTS, _CACHE_BYTES // (longest * _cache_bytes_per_token(model))))
    roomy = [prompt for prompt in prompts if prompt.new_tokens == max_new_tokens]
    whole = [roomy[start : start + rows] for start in range(0, len(roomy), rows)]
    return [*whole, *([prompt] for prompt in prompts if prompt.new_tokens < max_new_tokens)]


@contextlib.contextmanager
def _generating(model: Any, inner: Any) -> Iterator[None]:
    """The model as generation needs it; afterwards as it was."""
    trained_with, was_training = inner.config._attn_implementation, model.training
    inner.set_attn_implementation("sdpa")  # prompts are padded here: the training kernel may not know padding
    # transformers hands the output matrix a strided slice, for which torch copies the matrix once a row: 4 GiB here.
    output = inner.get_output_embeddings()
    unslice = output.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    model.eval()
    try:
        yield
    finally:
        unslice.remove()
        inner.set_attn_implementation(trained_with)
        model.train(was_training)


def _start_token(tokenizer: Any) -> int:
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in known if token is not None), 0)


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Stops,
    together: bool = False,
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
        eos_token_id=list(stops.ids) or None,
        stopping_criteria=stops.criterion(tokenizer, width),
        use_cache=True,
        synced_gpus=together,
    )
    answers = (stops.before(row[width:].tolist()) for row in output)
    return [stops.cut(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]


def _cache_bytes_per_token(model: Any) -> int:
    """Keys and values of one token in every layer."""
    shape = ModelShape.from_config(model.config.to_dict())
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * model.dtype.itemsize
