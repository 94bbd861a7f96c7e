"""Divides a prepared training among workers as its techniques say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from strategies.train_setup import TrainSettings, TrainSetup

if TYPE_CHECKING:
    import torch

    from strategies.engines.deepspeed_zero import DeepSpeedOptions


def shard(
    setup: TrainSetup,
    settings: TrainSettings,
    device: torch.device,
    state_shares: Sequence[float] = (),
    options: DeepSpeedOptions | None = None,
    wire: torch.device | None = None,
) -> TrainSetup:
    """`setup` divided by DeepSpeed, by memory, or not at all; its notes say what did not come as planned.

    `state_shares` are all workers' parts of the optimizer's state, by rank, where they differ by memory; `wire` is
    where tensors must lie to be sent.  Needs the default process group.  Raises CannotOffload.
    """
    techniques = settings.techniques
    if techniques.uses_engine:
        from strategies.engines.deepspeed_zero import DeepSpeedOptions, shard_by_deepspeed

        return shard_by_deepspeed(setup, settings, options or DeepSpeedOptions({}), device)
    if techniques.state_share is not None:
        from strategies.engines.uneven_zero import shard_by_memory

        return shard_by_memory(setup, state_shares, wire or device)
    return setup
