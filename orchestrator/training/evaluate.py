"""Held-out rows: the loss of their supervised tokens, and answers generated for their prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from orchestrator.data.batches import collate, collate_mismatched
from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import split_by_share
from orchestrator.errors import NothingFits
from orchestrator.job.spec import JobSpec
from orchestrator.planning.evaluation import CACHE_BYTES, MOST_PROMPTS, cache_bytes_per_token
from orchestrator.progress.updates import report
from orchestrator.training.feed import micro_batches_of, mismatched_batches_of
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.stops import Stops, stops_of
from strategies.model.heads import masked_kernel
from strategies.model.sampling import Sampling
from strategies.shape import ModelShape
from strategies.step.optimizers import evaluated_weights
from strategies.step.out_of_memory import run_in_halves
from strategies.step.passes import generate as generate_with
from strategies.step.passes import passes_of
from strategies.step.supervised_logits import Batch, inner_model, places_of_samples, token_losses
from strategies.techniques.precision import autocast
from strategies.train_setup import Passes, TrainSetup
from strategies.workload import Dtype, Techniques


@dataclass(frozen=True)
class GeneratedAnswer:
    """A generated text beside its reference."""

    prompt: str
    reference: str
    generated: str


@dataclass(frozen=True)
class _Prompt:
    index: int
    ids: list[int]
    reference: str
    new_tokens: int  # that its answer may take; 0 where the prompt fills the model's context


@dataclass(frozen=True)
class HeldOutLoss:
    """What the model makes of held-out rows."""

    loss: float  # mean, in nats a supervised token; of a sample under an objective over documents
    rewards: dict[str, float] = field(default_factory=dict)  # of such an objective


@torch.no_grad()
def evaluate_rows(
    setup: TrainSetup, data: Dataset, techniques: Techniques, group: ProcessGroup, shares: Sequence[float] | None = None
) -> HeldOutLoss:
    """Mean loss of `data`, and what an objective says of it, by the weights that would be handed back.

    A batch that runs out of memory is halved.  Raises NothingFits, on every worker, where one row does not fit on one
    of them.
    """
    with evaluated_weights(setup):
        return _evaluate_rows(setup, data, techniques, group, shares)


def _evaluate_rows(
    setup: TrainSetup, data: Dataset, techniques: Techniques, group: ProcessGroup, shares: Sequence[float] | None
) -> HeldOutLoss:
    shares, objective = shares or [1.0 / group.num_replicas] * group.num_replicas, setup.objective
    was_training = setup.model.training
    setup.model.eval()
    everything = list(range(len(data)))
    num_counted = data.num_counted(everything)
    mine = split_by_share(data.lengths.tolist(), shares)[group.replica]
    divergence, short = divergence_of(setup, data, mine, len(data), techniques, group)
    batches = micro_batches_of(data, mine, techniques)
    measured: set[int] = set()
    sums: dict[int | None, list[float]] = {}  # by the first member: what is repeated in halves replaces the whole

    def run(members: list[int]) -> None:
        if objective:
            objective.begin(num_counted, data.num_chosen_tokens(everything), divergence)
        sums[next(iter(members), None)] = _sums_of(setup, data, members, techniques)
        measured.update(members)
        report("evaluation", len(measured), len(mine))

    unfit, reason = passes_of(setup).each(batches, run)
    error = short or (reason if unfit else None)
    setup.model.train(was_training)
    width = 1 + (objective.num_totals if objective else 0)
    own = [sum(column) for column in zip(*sums.values(), strict=True)] or [0.0] * width
    failed, total, *totals = group.sum([error is not None, *own])
    if failed:
        reason = next(reason for reason in group.gather(error) if reason)
        raise NothingFits(f"not even one held-out row at a time fits: {reason}")
    return HeldOutLoss(total / num_counted, objective.metrics_of(totals) if objective else {})


@torch.no_grad()
def divergence_of(
    setup: TrainSetup, data: Dataset, mine: Sequence[int], count: int, techniques: Techniques, group: ProcessGroup
) -> tuple[float, str | None]:
    """Mean log ratio of model and reference over answers to other questions, of `count` rows of all workers.

    Beside it why this worker had no memory for a row, where it had none.  0 where the objective does not ask for it,
    else collective.
    """
    objective, sums = setup.objective, dict[int, float]()
    if objective is None or not objective.needs_divergence:
        return 0.0, None

    def run(members: list[int]) -> None:
        batch = collate_mismatched(data, members, techniques.packing).to(setup.device)
        with autocast(setup.device.type, techniques.dtype):
            reference_D = objective.reference_logps(setup.model, batch, techniques.loss_type)
            own_D = objective.answer_logps(setup.model, batch, techniques.loss_type)
        sums[members[0]] = (own_D - reference_D).sum().item()

    unfit, reason = run_in_halves(mismatched_batches_of(data, mine, techniques), run)
    return group.sum([sum(sums.values())])[0] / count, reason if unfit else None


@torch.no_grad()
def sample_losses(
    setup: TrainSetup, data: Dataset, techniques: Techniques, group: ProcessGroup, shares: Sequence[float]
) -> torch.Tensor:
    """The summed loss of each sample (N,) in fp64, without dropout; rows without shared beginnings.

    Collective.  Raises NothingFits, on every worker, where one row does not fit on one of them.
    """
    was_training, found = setup.model.training, dict[int, float]()
    setup.model.eval()

    def run(members: list[int]) -> None:
        batch = collate(data, members, techniques.packing).to(setup.device)
        with autocast(setup.device.type, techniques.dtype):
            losses_S = token_losses(setup.model, batch, techniques.loss_type).double()
        sums = losses_S.new_zeros(len(members)).index_add(0, places_of_samples(batch), losses_S)
        found.update(zip(members, sums.tolist(), strict=True))

    mine = split_by_share(data.lengths.tolist(), shares)[group.replica]
    unfit, reason = passes_of(setup).each(micro_batches_of(data, mine, techniques), run)
    setup.model.train(was_training)
    failed, *sums = group.sum([bool(unfit), *(found.get(index, 0.0) for index in range(len(data)))])
    if failed:
        raise NothingFits(f"not even one training row at a time fits: {next(filter(None, group.gather(reason)))}")
    return torch.tensor(sums, dtype=torch.float64)


@torch.no_grad()
def observe_rows(setup: TrainSetup, data: Dataset, techniques: Techniques) -> None:
    """Let the setup's observer look at all rows of `data`, on a worker that trains alone.

    A batch that runs out of memory is halved.  Raises NothingFits where one row does not fit.
    """
    observer, passes, was_training = setup.held_out_observer, passes_of(setup), setup.model.training
    assert observer is not None
    setup.model.eval()

    def run(members: list[int]) -> None:
        batch = collate(data, members, techniques.packing).to(setup.device)
        with observer.over(batch):
            passes.loss_sum(batch, techniques)

    unfit, reason = passes.each(micro_batches_of(data, list(range(len(data))), techniques), run)
    setup.model.train(was_training)
    if unfit:
        raise NothingFits(f"not even one held-out row at a time fits: {reason}")


def look_at(setup: TrainSetup, data: Dataset, batch: Batch, techniques: Techniques) -> None:
    """A pass over some rows that counts for nothing."""
    if setup.objective:
        ids = list(batch.sample_ids)
        setup.objective.begin(data.num_counted(ids), data.num_chosen_tokens(ids))
    passes_of(setup).loss_sum(batch, techniques)
    if setup.objective:
        setup.objective.take()


def evaluate_loss(
    setup: TrainSetup, data: Dataset, techniques: Techniques, group: ProcessGroup, shares: Sequence[float] | None = None
) -> float:
    """The loss alone; as `evaluate_rows`."""
    return evaluate_rows(setup, data, techniques, group, shares).loss


def _sums_of(setup: TrainSetup, data: Dataset, sample_ids: list[int], techniques: Techniques) -> list[float]:
    """Summed loss of some samples, an objective's totals; a pass without samples takes any and counts for nothing."""
    batch = collate(data, sample_ids or [0], techniques.packing, techniques.share_prefixes)
    loss = passes_of(setup).loss_sum(batch, techniques).item()
    totals = setup.objective.take() if setup.objective else []
    return [loss, *totals] if sample_ids else [0.0] * (1 + len(totals))


@dataclass(frozen=True)
class Generation:
    """How answers are generated."""

    max_new_tokens: int
    dtype: Dtype  # that the model computes in
    passes: Passes | None = None  # of a training whose model is shared with other workers
    cache_bytes: float = CACHE_BYTES  # that keys and values may take
    sampling: Sampling | None = None  # None: the likeliest tokens

    def processors(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What draws tokens for the prompts of these rows of the data, as `generate` takes it."""
        if self.sampling is None:
            return {}
        return {"logits_processor": [self.sampling.processor(rows, max(map(len, prompts)))]}


def sampling_of(spec: JobSpec) -> Sampling | None:
    """How a job's answers are drawn; None where the likeliest tokens are taken."""
    if not spec.eval.temperature:
        return None
    return Sampling(spec.eval.temperature, spec.eval.top_p, spec.train.seed)


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, data: Dataset, indices: Sequence[int], how: Generation
) -> list[GeneratedAnswer]:
    """Answers to the prompts of the samples at `indices` that have a reference; prompts padded on the left.

    An answer ends at the latest where the model's context does, so a prompt that fills it has an empty answer.  A batch
    that runs out of memory is halved; a prompt that does not fit even alone has no answer.
    """
    inner = inner_model(model)
    prompts = _prompts(inner, tokenizer, data, indices, how.max_new_tokens)
    stops = stops_of(inner, tokenizer)
    texts: dict[int, str] = {prompt.index: "" for prompt in prompts}
    answered: set[int] = set()
    generate = how.passes.generate if how.passes else partial(generate_with, model)

    def answer(batch: Sequence[_Prompt]) -> None:
        ids = [prompt.ids for prompt in batch] or [[_start_token(tokenizer)]]
        rows = [prompt.index for prompt in batch] or [0]
        new_tokens = min((prompt.new_tokens for prompt in batch), default=1)
        with autocast(model.device.type, how.dtype):
            generated = _generate(partial(generate, **how.processors(rows, ids)), tokenizer, ids, new_tokens, stops)
        texts.update({prompt.index: text for prompt, text in zip(batch, generated, strict=False)})
        answered.update(prompt.index for prompt in batch)
        report("answers", len(answered), len(prompts), "prompts")

    batches = _batches(inner, [prompt for prompt in prompts if prompt.new_tokens], how)
    with _generating(model):
        unfit, _ = (how.passes.each if how.passes else run_in_halves)(batches, answer)
    failed = {prompt.index for prompt in unfit}
    return [
        GeneratedAnswer(tokenizer.decode(prompt.ids, skip_special_tokens=True), prompt.reference, texts[prompt.index])
        for prompt in sorted(prompts, key=lambda prompt: prompt.index)
        if prompt.index not in failed
    ]


def num_without_room(model: Any, data: Dataset, indices: Sequence[int]) -> int:
    """How many prompts with a reference fill the model's context and leave no room for an answer."""
    limit = context_of(inner_model(model))
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


def _batches(model: Any, prompts: list[_Prompt], how: Generation) -> list[list[_Prompt]]:
    """Prompts generated together: as many as the cache may hold, all with as much room for their answers."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0) + how.max_new_tokens
    shape = ModelShape.from_config(model.config.to_dict())
    dtype = model.config.dtype or model.dtype  # not a stage's own weights': all stages generate as many together
    if isinstance(dtype, str):  # `save_pretrained` leaves its name there
        dtype = getattr(torch, dtype)
    needed_bytes = longest * cache_bytes_per_token(shape, dtype.itemsize)
    rows = max(1, int(min(MOST_PROMPTS, how.cache_bytes // needed_bytes)))
    roomy = [prompt for prompt in prompts if prompt.new_tokens == how.max_new_tokens]
    whole = [roomy[start : start + rows] for start in range(0, len(roomy), rows)]
    return [*whole, *([prompt] for prompt in prompts if prompt.new_tokens < how.max_new_tokens)]


@contextlib.contextmanager
def evaluating(model: Any, attention: str) -> Iterator[Any]:
    """Without dropout and with this attention kernel inside the block; yields the model without its adapter.

    A model without `sdpa` takes `eager` in its place.
    """
    inner = inner_model(model)
    trained_with, was_training = inner.config._attn_implementation, model.training
    inner.set_attn_implementation(masked_kernel(model) if attention == "sdpa" else attention)
    model.eval()
    try:
        yield inner
    finally:
        inner.set_attn_implementation(trained_with)
        model.train(was_training)


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """The model as generation needs it; afterwards as it was."""
    with evaluating(model, "sdpa") as inner:  # prompts are padded here: the training kernel may not know padding
        # transformers hands the output matrix a strided slice, for which torch copies the matrix once a row: 4 GiB.
        output = inner.get_output_embeddings()
        unslice = output.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        try:
            yield
        finally:
            unslice.remove()


def _start_token(tokenizer: Any) -> int:
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in known if token is not None), 0)


def _generate(
    generate: Callable[..., torch.Tensor],
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Stops,
) -> list[str]:
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask[row, width - len(ids) :] = 1
    output = generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=list(stops.ids) or None,
        stopping_criteria=stops.criterion(tokenizer, width),
        use_cache=True,
    )
    answers = (stops.before(row[width:].tolist()) for row in output)
    return [stops.cut(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
