"""A model's tokenizer, loaded by transformers without torch, which takes seconds to import and tokenises nothing.

transformers imports torch beside its tokenizers (for rotary embeddings) and to build the model's configuration, of
which a tokenizer takes the model's type.  So torch stays out while it is imported, and the configuration is the plain
one that transformers itself falls back to.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_BEYOND_THE_TYPE = "auto_map"  # code of the model's own decides


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> Any:
    """As `AutoTokenizer.from_pretrained`, which raises a dozen types of errors."""
    with without_torch():
        from transformers import AutoTokenizer

        config = _plain_config(Path(folder))
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)


def _plain_config(folder: Path) -> Any:
    """A configuration with the model's type, where the tokenizer's files name its class; None where they do not."""
    from transformers.configuration_utils import PreTrainedConfig

    tokenizer, model = _read(folder / "tokenizer_config.json"), _read(folder / "config.json")
    is_named = isinstance(tokenizer.get("tokenizer_class"), str) and isinstance(model.get("model_type"), str)
    if not is_named or _BEYOND_THE_TYPE in tokenizer or _BEYOND_THE_TYPE in model:
        return None
    names = {key: model[key] for key in ("model_name", "tokenizer_class") if isinstance(model.get(key), str)}
    plain: Any = PreTrainedConfig
    config = plain(name_or_path=str(folder), **names)
    config.model_type = model["model_type"]
    return config


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none: what is wrong with the file is transformers' to say."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


class _NotYet(ModuleType):
    """Stands for a module until a name of it is asked for, which imports it."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        for holder in list(sys.modules.values()):  # those that imported this in its place
            for key, value in list(getattr(holder, "__dict__", {}).items()):
                if value is self:
                    setattr(holder, key, module)
        return getattr(module, name)


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Inside the block `import torch` imports nothing until a name of it is asked for, then and later."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None:
        yield
        return
    stand_in = _NotYet("torch")
    stand_in.__spec__ = spec
    sys.modules["torch"] = stand_in
    try:
        yield
    finally:
        if sys.modules.get("torch") is stand_in:
            del sys.modules["torch"]
