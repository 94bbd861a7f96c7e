"""What is fed: packing without padding, and a limit on length."""

from __future__ import annotations

from dataclasses import replace

from strategies.techniques.technique import Choice, Technique


def _half_length(choice: Choice) -> Choice:
    """Every sample cut to half its tokens."""
    work = choice.workload
    limit = max(8, work.longest_sample // 2)
    cut = replace(
        work,
        num_tokens=max(1, work.num_tokens // 2),
        num_supervised_tokens=max(1, work.num_supervised_tokens // 2),
        longest_sample=limit,
        mean_square_length=None if work.mean_square_length is None else work.mean_square_length / 4,
    )
    return replace(choice.with_(max_length=max(8, choice.techniques.max_length // 2)), workload=cut)


PACKING = Technique(
    name="packing",
    about="documents end to end without padding, each seeing only itself",
    switch="data.packing: true",
    on=lambda choice: choice.with_(packing=True, attn_implementation="document"),
    off=lambda choice: choice.with_(packing=False, attn_implementation="sdpa"),
)
LENGTH_LIMIT = Technique(
    name="half the length",
    about="cuts every sample to half its tokens",
    switch="data.max_length: 512",
    on=_half_length,
    off=lambda choice: choice,
    quality="what is cut is not learnt",
)
