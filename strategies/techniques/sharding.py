"""ZeRO: devices keep parts of what each would otherwise keep whole (Rajbhandari et al., arXiv 1910.02054)."""

from __future__ import annotations

from collections.abc import Callable

from strategies.techniques.room import Choice, Technique


def _stage(stage: int) -> Callable[[Choice], Choice]:
    return lambda choice: choice.with_(zero_stage=stage, num_shards=max(2, choice.techniques.num_shards))


def _room(stage: int, about: str) -> Technique:
    return Technique(
        name=f"ZeRO-{stage}",
        about=about,
        switch=f"strategy.mode: zero{stage}",
        on=_stage(stage),
        off=lambda choice: choice.with_(zero_stage=0),
        needs_devices=2,
        runs=False,
        saves_first="memory",
    )


ZERO_1 = _room(1, "the optimizer's state is divided among the devices")
ZERO_2 = _room(2, "gradients too")
ZERO_3 = _room(3, "weights too: each layer is gathered when it is needed, over the network")
