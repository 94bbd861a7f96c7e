"""Adapters in a format of this program's own: whose they are, and how they come onto their base model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, read_json
from strategies.contract import Method
from strategies.registry import METHODS

_CONFIG = "adapter_config.json"


def owner_of(folder: Path) -> type[Method] | None:
    """The method whose own format an adapter's folder has; None where PEFT or another program knows it."""
    try:
        settings = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else None
    except BadInput:
        return None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    return next((method for method in METHODS.values() if kind and method.own_format == kind), None)


def load_adapter(base: Any, folder: Path) -> Any:
    """The base model with an adapter of a folder: by the method whose format it has, else by PEFT.

    Raises ValueError and what PEFT raises.
    """
    if owner := owner_of(folder):
        return owner.load(base, folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder))
