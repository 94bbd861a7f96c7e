"""What each worker of a run does: its pace, its waiting, its memory, what it sent.  Read from the run's events."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from clusters.units import format_bytes, format_s

_LAST_STEPS = 10  # that the numbers speak of


def of_step(members: Sequence[dict[str, Any]], step: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers of one step, a row a worker; `members` as the workers told each other (event `group`)."""
    rows = []
    for rank, (member, tokens, seconds, peak) in enumerate(
        zip(members, step["worker_tokens"], step["worker_s"], step["worker_peak_bytes"], strict=True)
    ):
        rows.append(
            {
                "node": member["node"] or f"worker {rank}",
                "device": member["device"],
                "tokens": tokens,
                "tokens_per_s": tokens / seconds if seconds else 0.0,
                "seconds": seconds,
                "wait_s": max(0.0, step["seconds"] - seconds),
                "peak_bytes": peak,
                "bytes_sent": step["step_bytes_sent"],
                "is_slowest": rank == step["slowest"],
            }
        )
    return rows


def of_run(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the last steps of the group that runs or ran last; nothing where one worker did it all."""
    at = max((index for index, event in enumerate(events) if event["event"] == "group"), default=None)
    if at is None:
        return []
    members = events[at]["members"]
    steps = [event for event in events[at:] if event["event"] == "step" and "worker_s" in event][-_LAST_STEPS:]
    told = [of_step(members, step) for step in steps]
    rows = []
    for rank, member in enumerate(members):
        mine = [step[rank] for step in told]
        row: dict[str, Any] = {"node": member["node"] or f"worker {rank}", "device": member["device"]}
        if mine:
            total = sum(sum(step["worker_tokens"]) for step in steps)
            row["share"] = sum(step["worker_tokens"][rank] for step in steps) / total if total else 0.0
            for key in ("tokens_per_s", "seconds", "wait_s"):
                row[key] = statistics.median(step[key] for step in mine)
            counted = [step["bytes_sent"] for step in mine if step["bytes_sent"] is not None]
            row["bytes_sent"] = statistics.median(counted) if counted else None
            row["peak_bytes"] = max(step["peak_bytes"] for step in mine)
            row["is_slowest"] = sum(step["is_slowest"] for step in mine) > len(mine) / 2
        rows.append(row)
    return rows


def view(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, pad_edge=False)
    table.add_column("worker")
    for name in ("share", "tokens/s", "computes", "waits", "memory", "sent a step"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        if "tokens_per_s" not in row:
            table.add_row(f"{row['node']} ({row['device']})", *["-"] * 6, "has made no step yet")
            continue
        table.add_row(
            f"{row['node']} ({row['device']})",
            f"{row['share']:.0%}",
            f"{row['tokens_per_s']:.0f}",
            format_s(row["seconds"]),
            format_s(row["wait_s"]),
            format_bytes(row["peak_bytes"]),
            "-" if row["bytes_sent"] is None else format_bytes(row["bytes_sent"]),
            "the others wait for it" if row["is_slowest"] else "",
        )
    return table


def metrics(members: Sequence[dict[str, Any]], step: dict[str, Any]) -> dict[str, float]:
    """The numbers of one step as flat metrics, `worker.NODE.NAME`; a node's second device is NODE.1."""
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for row in of_step(members, step):
        index = seen.get(row["node"], 0)
        seen[row["node"]] = index + 1
        name = f"{row['node']}.{index}" if index else row["node"]
        for key in ("tokens_per_s", "wait_s", "peak_bytes", "bytes_sent"):
            if row[key] is not None:
                found[f"worker.{name}.{key}"] = float(row[key])
    return found
