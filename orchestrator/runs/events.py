"""The lines of events.jsonl: what happened in a run, one JSON object a line, of the types that readers rely on.

A line that a power cut left half written, or that was damaged later, is passed over; `faults` names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]

_NUMBER = (int, float)
_OR_NONE = (int, float, type(None))
# What readers take out of an event by name, with its type; other fields are free.
_FIELDS: dict[str, dict[str, Any]] = {
    "state": {"state": str},
    "note": {"text": str},
    "error": {"text": str},
    "failure": {"text": str},
    "preflight": {"text": str},
    "tracking": {"text": str, "ok": bool},
    "ready": {"seconds": _NUMBER},
    "quality": {"when": str},
    "eval": {"step": int, "eval_loss": _NUMBER},
    "group": {"members": list},
    "shares": {"shares": list},
    "killed": {"rank": int},
    "prediction": dict.fromkeys(
        ("predicted_step_s", "measured_step_s", "predicted_bytes", "measured_peak_bytes"), _NUMBER
    ),
    "step": {
        "step": int,
        "loss": _NUMBER,
        "grad_norm": _NUMBER,
        "learning_rate": _NUMBER,
        "epoch": _NUMBER,
        "tokens": _NUMBER,
        "supervised_tokens": _NUMBER,
        "seconds": _NUMBER,
        "tokens_per_s": _NUMBER,
        "peak_bytes": _NUMBER,
    },
}
# Of every event, where it has them.
_OPTIONAL: dict[str, Any] = {
    "step": int,
    "eval_loss": _NUMBER,
    "text": str,
    "node": (str, type(None)),
    "again": bool,
    "lane_s": dict,
    "bus_down_bytes": _NUMBER,
    "bus_up_bytes": _NUMBER,
}
_OF_WORKERS = {
    "worker_tokens": list,
    "worker_s": list,
    "worker_peak_bytes": list,
    "step_bytes_sent": _OR_NONE,
    "slowest": int,
}


def parse_lines(content: bytes) -> list[Event]:
    """The events of complete lines; damaged ones are passed over."""
    return [event for event, _ in _parsed(content) if event is not None]


def faults(content: bytes) -> list[str]:
    """What is wrong with each damaged line, as `line N: ...`."""
    return [f"line {number}: {fault}" for number, (_, fault) in enumerate(_parsed(content), start=1) if fault]


def _parsed(content: bytes) -> Iterator[tuple[Event | None, str | None]]:
    whole = content.rpartition(b"\n")[0]  # what follows is being written
    for line in whole.split(b"\n") if whole else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            yield None, "is not JSON"
            continue
        fault = _fault(event)
        yield (None, fault) if fault else (event, None)


def _fault(event: Any) -> str | None:
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return "is no event"
    if not _is(event.get("time"), _NUMBER):
        return "its time is no number"
    wanted = {name: kind for name, kind in _OPTIONAL.items() if name in event} | _FIELDS.get(event["event"], {})
    if event["event"] == "step" and "worker_s" in event:
        wanted = wanted | _OF_WORKERS
    for name, kind in wanted.items():
        if name not in event or not _is(event[name], kind):
            return f"{event['event']}: {name} is {json.dumps(event.get(name))[:40]}"
    if not all(_is(seconds, _NUMBER) for seconds in event.get("lane_s", {}).values()):
        return f"{event['event']}: lane_s is {json.dumps(event['lane_s'])[:40]}"
    members = event.get("members", ())
    if not all(isinstance(one, dict) and isinstance(one.get("node"), str) and "device" in one for one in members):
        return "group: a member without node and device"
    return None


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind)
