"""Which encoding a text that is no UTF-8 is in, and the command that converts it."""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import JobError

_FALLBACK = "WINDOWS-1252"  # any bytes are text in it
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def check_encoding(head: bytes, file: str) -> None:
    """Raise JobError, naming encoding and command, where the beginning of a file is no UTF-8 text on the whole.

    A few such lines in a file are broken rows, which its reader finds.
    """
    name = _wide(head) or ("ISO-2022-JP" if re.search(rb"\x1b\$[@B]", head) else None)
    if name is None:
        lines = [line for line in head.splitlines() if line.strip()]
        if 2 * sum(not _is_utf8(line) for line in lines) < max(1, len(lines)):
            return
        name = guess(head)
    raise JobError(f"{file}: is not UTF-8 text; {conversion(name, file)}")


def conversion(name: str, file: str) -> str:
    """What a file is taken for and the command that converts it."""
    path = Path(file)
    converted = path.with_name(f"{path.stem}-utf8{path.suffix}")
    taken_for = f"it reads as {name}" if name != _FALLBACK else f"it may be {name} (look at what the command makes)"
    return f"{taken_for}. Convert it: iconv -f {name} -t UTF-8 {shlex.quote(file)} > {shlex.quote(str(converted))}"


def guess(sample: bytes) -> str:
    """The most likely encoding of a text that is no UTF-8, by iconv's name."""
    sample = sample[: sample.rfind(b"\n") + 1] or sample  # no half character at the end
    for name, codec, looks_right in _CANDIDATES:
        try:
            text = sample.decode(codec)
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if ord(character) > 127]
        if foreign and looks_right(foreign, text):
            return name
    return _FALLBACK


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the byte-order mark or by where the zero bytes lie."""
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    if (even + odd) * 50 < max(len(head), 1) or max(even, odd) < 0.8 * (even + odd):  # ASCII has one zero of two bytes
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _share(low: str, high: str, text: list[str]) -> float:
    return sum(low <= character <= high for character in text) / len(text)


def _whole_words(foreign: list[str], text: str) -> bool:
    """Whether foreign letters stand together, as in Cyrillic; Western texts have an accent here and there."""
    return sum(map(len, re.findall(r"[^\x00-\x7f]{2,}", text))) > 0.7 * len(foreign)


_Test = Callable[[list[str], str], bool]
# Kana, Hangul and Cyrillic identify an encoding.  Chinese ones come later: they decode nearly any bytes.
_CANDIDATES: tuple[tuple[str, str, _Test], ...] = (
    ("CP932", "cp932", lambda f, _: _share("\u3040", "\u30ff", f) > 0.1 and _share("\uff61", "\uff9f", f) < 0.2),
    ("EUC-JP", "euc_jp", lambda f, _: _share("\u3040", "\u30ff", f) > 0.1),
    ("CP949", "cp949", lambda f, _: _share("\uac00", "\ud7a3", f) > 0.9),
    ("GB18030", "gb2312", lambda f, _: _share("\u4e00", "\u9fff", f) > 0.3),
    ("BIG5", "big5", lambda f, _: _share("\u4e00", "\u9fff", f) > 0.3),
    ("GB18030", "gb18030", lambda f, _: _share("\u4e00", "\u9fff", f) > 0.7),
    ("WINDOWS-1251", "cp1251", lambda f, text: _share("\u0400", "\u04ff", f) > 0.8 and _whole_words(f, text)),
)
