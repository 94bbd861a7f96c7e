"""How many samples go through the model together: micro-batch, accumulation, grouping by length."""

from __future__ import annotations

from dataclasses import replace

from strategies.techniques.technique import Choice, Technique


def _rows(choice: Choice) -> int:
    """Rows of the whole step in one micro-batch."""
    tokens = choice.workload.share * choice.workload.tokens_per_step
    length = choice.techniques.max_length if choice.techniques.packing else choice.workload.mean_length
    return max(2, round(tokens / length))


def _one_row(choice: Choice) -> Choice:
    """One sample at a time: a packed row as long as an average sample."""
    if choice.techniques.packing:
        return choice.with_(per_device_train_batch_size=1, max_length=max(8, round(choice.workload.mean_length)))
    return choice.with_(per_device_train_batch_size=1)


def _ungrouped(choice: Choice) -> Choice:
    """Rows of any length side by side: each is padded to the longest sample."""
    longest = choice.workload.longest_sample / choice.workload.mean_length
    mixed = replace(choice.workload, padded_ratio={1: 1.0, 2: max(1.0, 0.8 * longest), 8: max(1.0, longest)})
    return replace(_padded(choice), workload=mixed)


def _padded(choice: Choice) -> Choice:
    return choice.with_(packing=False, attn_implementation="sdpa", per_device_train_batch_size=8)


MICRO_BATCH = Technique(
    name="larger micro-batch",
    about="more rows in one forward pass: fewer, fuller matrix products",
    switch="train.per_device_train_batch_size: 8",
    on=lambda choice: choice.with_(per_device_train_batch_size=_rows(choice)),
    off=_one_row,
)
ACCUMULATION = Technique(
    name="gradient accumulation",
    about="a step's samples in several micro-batches whose gradients add up",
    switch="train.gradient_accumulation_steps: 8",
    on=_one_row,
    off=lambda choice: choice.with_(per_device_train_batch_size=_rows(choice)),
    saves_first="memory",
)
LENGTH_GROUPING = Technique(
    name="grouping by length",
    about="rows of similar length share a micro-batch (always on inside a step), so less padding is computed",
    switch="data.packing: false",
    on=_padded,
    off=_ungrouped,
)
