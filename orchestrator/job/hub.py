"""Models of the Hugging Face hub: which of a repository's files a model needs, and fetching those.

`wanted_files` is a pure function of a listing; the hub's client is called only by `fetch_model` and `fetch_config`, and
only where the hub can be reached: its own retries would take half a minute to fail.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import io
import os
import re
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from clusters.safe.reading import first_line, load_yaml, printable, read_text
from orchestrator.errors import JobError
from orchestrator.progress.updates import ProgressUpdate, listener

_KEY = "model.model_name_or_path"
_REACH_S = 5.0
_ALIKE = 0.9  # of two names, so that one may be the other misspelt
_PARTS_ALIKE = 0.7  # of the parts of two names
_MOVING = ("main", "master", "head", "refs/heads/main")  # branches: what they name changes
_SMALL = (  # configuration, tokenizers of every kind, templates
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab"),
    *("additional_chat_templates/*.jinja", "tokenizer*"),
)
_NOT_NEEDED = ("*.index.*.json", "onnx*", "*trainer_state.json", "flax_model*", "tf_model*", "rust_model*")
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SNAPSHOT = re.compile(r"/models--([\w.-]+)/snapshots/([0-9a-f]{40})/?$", re.ASCII)
_BIN = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")


def wanted_files(listing: Sequence[str], with_code: bool = False) -> list[str]:
    """`needed_files` of a repository.  Raises JobError for one without weights that can be trained."""
    if any(_SAFETENSORS.fullmatch(name) or _BIN.fullmatch(name) for name in listing):
        return needed_files(listing, with_code)
    kinds = sorted({Path(name).suffix for name in listing if name.endswith((".gguf", ".safetensors", ".bin", ".pth"))})
    held = f"it holds only {', '.join(kinds)} files of other kinds" if kinds else "it holds no weights"
    raise JobError(
        f"{_KEY}: {held}; a model with model.safetensors or pytorch_model.bin is needed (adapters and GGUF files"
        " have a base model: give that one)"
    )


def needed_files(listing: Sequence[str], with_code: bool = False) -> list[str]:
    """Those of a model's files that training needs: one kind of weights, safetensors where there are some.

    Python files are among them only where the job trusts them.
    """
    weights = [name for name in listing if _SAFETENSORS.fullmatch(name)]
    other_index = "pytorch_model.bin.index.json"
    if not weights:
        weights = [name for name in listing if _BIN.fullmatch(name)]
        other_index = "model.safetensors.index.json"
    small = [
        name
        for name in listing
        if any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL if "/" in pattern or "/" not in name)
        and not any(fnmatch.fnmatch(name, pattern) for pattern in _NOT_NEEDED)
        and not name.endswith((".safetensors", ".bin"))
        and name != other_index
    ]
    code = [name for name in listing if name.endswith(".py")] if with_code else []
    return sorted({*weights, *small, *code})


def check_trust(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raises JobError where code of a repository would run that may be another tomorrow."""
    if trust_remote_code and (revision is None or revision.lower() in _MOVING):
        raise JobError(
            f"model.trust_remote_code runs Python code of {printable(name)}, which its owner can change at any time:"
            " state the commit that you have read as model.model_revision"
        )


def fetch_model(name: str, revision: str | None, trust_remote_code: bool = False) -> Path:
    """The folder of a hub model in the hub's cache, fetched where it is not there.  Raises JobError."""
    check_trust(name, revision, trust_remote_code)
    from huggingface_hub import HfApi, snapshot_download

    def download() -> str:
        listed = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
        wanted = wanted_files([one.rfilename for one in listed], trust_remote_code)
        num_bytes = sum(one.size or 0 for one in listed if one.rfilename in wanted)
        return snapshot_download(name, revision=revision, allow_patterns=wanted, tqdm_class=_bar_of(num_bytes))

    return Path(_ask(name, download, partial(snapshot_download, name, revision=revision, local_files_only=True)))


def _bar_of(num_bytes: int) -> type | None:
    """The hub client's bar, which it updates in threads of its own, told to who listens; None where nobody does."""
    from huggingface_hub.utils import tqdm

    listen = listener()
    if listen is None:
        return None
    most = 0.0

    class Bar(tqdm):
        """Draws nothing.  Of the client's bars one counts files, one what came, one what was written, in bytes.

        Counts by itself: where bars are switched off, the client's do not.
        """

        def __init__(self, *values: Any, **options: Any) -> None:
            self._is_bytes, self._came = options.get("unit") == "B", options.get("initial") or 0
            super().__init__(*values, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal most
            drawn = super().update(n)
            self._came += n or 0
            if self._is_bytes and self._came > most:
                most = self._came
                listen(ProgressUpdate("download", most, max(most, num_bytes), "bytes"))
            return drawn

    return Bar


def fetch_config(name: str, revision: str | None) -> Path:
    """The folder that holds a hub model's config.json, that one file alone.  Raises JobError."""
    from huggingface_hub import hf_hub_download

    download = partial(hf_hub_download, name, "config.json", revision=revision)
    return Path(_ask(name, download, partial(download, local_files_only=True))).parent


def name_in_cache(folder: Path) -> tuple[str, str] | None:
    """Name and commit of a hub model by its folder in a hub's cache; None for any other folder."""
    if (found := _SNAPSHOT.search(folder.as_posix())) is None:
        return None
    return found[1].replace("--", "/", 1), found[2]


def metadata_of(name: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model") -> dict[str, Any]:
    """The head of a repository's card; empty where the hub does not answer or has none."""
    if why_unreachable():
        return {}
    from huggingface_hub import HfApi

    try:
        card = getattr(HfApi().repo_info(name, revision=revision, repo_type=kind), "card_data", None)
    except Exception:  # the hub's client raises many types; what is not known is said as such
        return {}
    return card.to_dict() if card else {}


def find_similar(name: str) -> str | None:
    """A model of the hub's cache on this machine whose name is spelt almost like this one, its numbers the same."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_dir() or not os.access(cache, os.R_OK):
        return None
    cached = [folder.name.removeprefix("models--").replace("--", "/") for folder in cache.glob("models--*")]
    alike = [one for one in cached if one != name and re.findall(r"\d+", one) == re.findall(r"\d+", name)]
    return next(iter(difflib.get_close_matches(name, alike, n=1, cutoff=_ALIKE)), None)


def known_model_like(name: str) -> str | None:
    """The well-known model of the hub that `name` is misspelt of; None for any other name.

    Parts between dashes are compared one by one and numbers must be the same: a model made of a known one has a name
    of its own.
    """
    known = load_yaml(read_text(Path(__file__).with_name("known_models.yaml")))
    if name.lower() in {one.lower() for one in known}:
        return None
    parts = re.split(r"[-/]", name.lower())
    for one in known:
        others = re.split(r"[-/]", one.lower())
        if len(parts) == len(others) and all(map(_is_misspelt, parts, others)):
            return one
    return None


def _is_misspelt(part: str, other: str) -> bool:
    same_numbers = re.findall(r"\d+", part) == re.findall(r"\d+", other)
    return part == other or (
        len(other) > 3 and same_numbers and difflib.SequenceMatcher(None, part, other).ratio() >= _PARTS_ALIKE
    )


def _ask(name: str, download: Callable[[], str], find_cached: Callable[[], str]) -> str:
    """What the hub gives or, where it cannot be reached, its cache.  Raises JobError."""
    trouble = why_unreachable()
    try:
        return find_cached() if trouble else download()
    except JobError:
        raise
    except Exception as error:  # the hub's client raises many types; each ends in this one sentence
        reason = trouble or first_line(error)
        near = find_similar(name)
        raise JobError(
            f"{_KEY}: {printable(name)!r} is neither a folder here nor a model on the hub ({printable(reason)})"
            + (f"; did you mean {printable(near)}, which is in the hub's cache?" if near else "")
        ) from None


def why_unreachable() -> str | None:
    """Why the hub cannot be reached; None where it can.

    The hub's client repeats a request to an address that it cannot reach for half a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and it is not in the hub's cache"
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None  # who is behind a proxy reaches nothing directly
    url = urlsplit(constants.ENDPOINT)
    address: Any = (url.hostname, url.port or (80 if url.scheme == "http" else 443))
    try:
        socket.create_connection(address, _REACH_S).close()
    except OSError as error:
        return f"{url.hostname} cannot be reached: {error.strerror or error}"
    return None
