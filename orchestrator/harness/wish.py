"""Which tasks are to be measured, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskWish:
    """What is to be measured."""

    tasks: tuple[str, ...]
    include_path: str | None = None  # a folder of task files
    limit: int | None = None  # rows a task
    chat: bool = False  # prompts are written by the chat template
