"""What a technique changes in a choice where switches alone do not say it: rows of a micro-batch, lengths, shards."""

from __future__ import annotations

from dataclasses import replace

from strategies.techniques.technique import Choice


def all_rows(choice: Choice) -> Choice:
    """The rows of the whole step in one micro-batch."""
    tokens = choice.workload.share * choice.workload.tokens_per_step
    length = choice.techniques.max_length if choice.techniques.packing else choice.workload.mean_length
    return choice.with_(per_device_train_batch_size=max(2, round(tokens / length)))


def one_row(choice: Choice) -> Choice:
    """One sample at a time: a packed row as long as an average sample."""
    if choice.techniques.packing:
        return choice.with_(per_device_train_batch_size=1, max_length=max(8, round(choice.workload.mean_length)))
    return choice.with_(per_device_train_batch_size=1)


def grouped_rows(choice: Choice) -> Choice:
    """Padded rows of similar length."""
    return choice.with_(packing=False, attn_implementation="sdpa", per_device_train_batch_size=8)


def mixed_rows(choice: Choice) -> Choice:
    """Rows of any length side by side: each is padded to the longest sample."""
    longest = choice.workload.longest_sample / choice.workload.mean_length
    mixed = replace(choice.workload, padded_ratio={1: 1.0, 2: max(1.0, 0.8 * longest), 8: max(1.0, longest)})
    return replace(grouped_rows(choice), workload=mixed)


def half_length(choice: Choice) -> Choice:
    """Every sample cut to half its tokens."""
    work = choice.workload
    cut = replace(
        work,
        num_tokens=max(1, work.num_tokens // 2),
        num_supervised_tokens=max(1, work.num_supervised_tokens // 2),
        longest_sample=max(8, work.longest_sample // 2),
        mean_square_length=None if work.mean_square_length is None else work.mean_square_length / 4,
    )
    return replace(choice.with_(max_length=max(8, choice.techniques.max_length // 2)), workload=cut)


def shard(stage: int, choice: Choice) -> Choice:
    """ZeRO of this stage over the choice's devices, two at least (Rajbhandari et al., arXiv 1910.02054)."""
    return choice.with_(zero_stage=stage, num_shards=max(2, choice.techniques.num_shards))
