"""Losses of a bank's tasks, each by adapters made of the others; kept task by task, so that what is stopped resumes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, read_json
from clusters.safe.writing import write_whole
from strategies.adapter_bank.card import AdapterCard

Losses = dict[str, float]  # of one task, by the way its adapter was made
Say = Callable[[str], None]


def names_of(cards: Sequence[AdapterCard], places: Sequence[int]) -> dict[int, str]:
    """A name for each task; of adapters with one name the first characters of their digests follow."""
    count = Counter(cards[place].name for place in places)
    return {
        place: cards[place].name if count[cards[place].name] == 1 else f"{cards[place].name} {cards[place].digest[:8]}"
        for place in places
    }


def spread(places: Sequence[int], most: int | None) -> list[int]:
    """At most so many of the places, at even distances; all without a limit.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 2, 4]
    """
    if most is None or len(places) <= most:
        return list(places)
    return [places[number * len(places) // most] for number in range(most)]


def measure_each(
    file: Path,
    question: Mapping[str, Any],
    names: Mapping[int, str],
    measure: Callable[[int], Losses],
    say: Say,
    shown: Sequence[str] | None = None,
) -> dict[str, Losses]:
    """Losses of each task by name, kept in `file` until the last is there.

    What the file holds of the same `question` (all that decides the losses) is not measured again.
    """
    asked = json.loads(json.dumps(question))
    known = _known(file, asked)
    if found := [name for name in names.values() if name in known]:
        say(f"{len(found)} of {len(names)} tasks were measured before this was stopped: {file}")
    losses: dict[str, Losses] = {}
    began, num_measured, num_left = time.perf_counter(), 0, len(names) - len(found)
    for place, name in names.items():
        if name in known:
            losses[name] = known[name]
            continue
        losses[name] = known[name] = measure(place)
        num_measured += 1
        left_s = (time.perf_counter() - began) / num_measured * (num_left - num_measured)
        text = ", ".join(f"{way} {losses[name][way]:.3f}" for way in shown or losses[name])
        say(f"{len(losses)}/{len(names)} {name}: {text}" + (f" ({left_s / 60:.0f} min left)" if left_s > 60 else ""))
        write_whole(file, json.dumps({"question": asked, "tasks": known}))
    file.unlink(missing_ok=True)
    return losses


def _known(file: Path, asked: Any) -> dict[str, Losses]:
    """What is there of the same question; a damaged file holds nothing."""
    try:
        values = read_json(file) if file.exists() else {}
    except BadInput:
        return {}
    same = isinstance(values, dict) and values.get("question") == asked and isinstance(values.get("tasks"), dict)
    return dict(values["tasks"]) if same else {}
