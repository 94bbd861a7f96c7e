"""The user's cache folder: what is kept there can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`$XDG_CACHE_HOME` or `~/.cache`, then our folder and `parts`.  Raises RuntimeError where there is no home folder.

    The XDG base directory specification ignores a relative `$XDG_CACHE_HOME`.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = stated if stated.is_absolute() else Path.home() / ".cache"
    return base.joinpath("finetune-orchestrator", *parts)
