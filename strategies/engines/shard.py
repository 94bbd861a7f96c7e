"""Hands a prepared training to those who divide it among the workers, as its techniques say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from strategies.contract import TrainSettings, TrainSetup

if TYPE_CHECKING:
    import torch

    from strategies.engines.deepspeed_zero import Options


def shard(
    setup: TrainSetup,
    settings: TrainSettings,
    device: torch.device,
    state_shares: Sequence[float],
    note: Callable[[str], None],
    options: Options | None = None,
    wire: torch.device | None = None,
) -> TrainSetup:
    """`setup` as its techniques divide it: by DeepSpeed, by memory, or not at all.

    `state_shares` are all workers' parts of the optimizer's state, by rank, where they differ by memory; `wire` is
    where tensors must lie to be sent.  Needs the default process group.  Raises CannotOffload.
    """
    techniques = settings.techniques
    if techniques.uses_engine:
        from strategies.engines.deepspeed_zero import Options, handed_over

        return handed_over(setup, settings, options or Options({}), device, note)
    if techniques.state_share is not None:
        from strategies.engines.uneven_zero import divided

        return divided(setup, state_shares, wire or device)
    return setup
