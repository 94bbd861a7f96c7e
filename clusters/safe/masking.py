"""Passwords and tokens in URLs, masked wherever a text is shown, sent or written down again."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# User info of a URL.  The second form is a password with a slash in it: what follows the colon is no port.
_USER_INFO = re.compile(
    r"""(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{0,30}://)
        ([^\s/?\#"]{1,1000}@ | [^\s/?\#@:"]{0,200}:(?!\d{1,5}(?:[/?\#\s"]|$))[^\s"]{1,300}@)""",
    re.IGNORECASE | re.VERBOSE,
)
_PARAMETER = re.compile(
    r"""([?&;\#][\w.-]{0,60}(?:token|passw(?:or)?d|passphrase|pwd|secret|key|signature|sig|credential)[\w.-]{0,20}=)
        ([^\s&;\#"'<>]+)""",
    re.IGNORECASE | re.VERBOSE,
)
_NAMED = re.compile(r"\$\{[A-Za-z_]\w*\}")  # stands for the value of an environment variable
_MASK = "***"
_LOCK = threading.Lock()
_APART: dict[str, tuple[tuple[bool, int], list[logging.Handler]]] = {}  # loggers apart: how they were, and their files
_TOKEN_LENGTH = 16  # of user info without a password: what is longer is an access token, not a name


def masked(text: str) -> str:
    """The text with user info of URLs and secret parameters of their queries as ***; what `${NAME}` names stays."""
    if "://" not in text and "=" not in text:
        return text
    text = _USER_INFO.sub(lambda found: f"{found[1]}{found[2] if _names_password(found[2]) else _MASK + '@'}", text)
    return _PARAMETER.sub(lambda found: f"{found[1]}{_MASK if _written_out(found[2]) else found[2]}", text)


class MaskedFormatter(logging.Formatter):
    """Lines of a log, masked."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def masked_values(value: Any) -> Any:
    """A JSON value with every text in it masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {masked_values(key): masked_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(item) for item in value]
    return value


def holds_secret(text: str) -> bool:
    """Whether a URL in the text has a password or an access token written out."""
    for found in _USER_INFO.finditer(text):
        user, _, password = _written_out(found[2][:-1]).partition(":")
        if password.strip("*") or len(user) >= _TOKEN_LENGTH:
            return True
    return any(_written_out(found[2]).strip("*") for found in _PARAMETER.finditer(text))


def _written_out(text: str) -> str:
    return _NAMED.sub("", text)


def _names_password(user_info: str) -> bool:
    return "${" in user_info and not _written_out(user_info[:-1]).partition(":")[2]


def masked_log(file: Path) -> logging.Handler:
    """A handler that appends to a file, whose folder it makes.  Raises OSError."""
    file.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(MaskedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


@contextlib.contextmanager
def log_apart(name: str, file: Path) -> Iterator[None]:
    """Inside the block a logger's lines go to a file and nowhere else, masked.

    Blocks of several threads may overlap: each file then gets the lines of all.
    """
    logger, handler = logging.getLogger(name), masked_log(file)
    with _LOCK:
        before, _ = _APART.setdefault(name, ((logger.propagate, logger.level), []))
        _APART[name][1].append(handler)
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        with _LOCK:
            logger.removeHandler(handler)
            handler.close()
            _APART[name][1].remove(handler)
            if not _APART[name][1]:
                del _APART[name]
                logger.propagate = before[0]
                logger.setLevel(before[1])
