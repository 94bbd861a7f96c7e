"""Which encoding a text that is no UTF-8 is in, and such a text as UTF-8."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import JobError

_FALLBACK = "WINDOWS-1252"  # any bytes are text in it
_CHUNK = 2**18
_WORD = 6  # foreign bytes, fewer of which among many plain lines are damage and no language
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def find_encoding(head: bytes) -> str | None:
    """The encoding, by iconv's name, of a file that begins with `head`; None for UTF-8 text on the whole.

    A few of many foreign lines that are no UTF-8 are broken rows, which its reader finds.
    """
    name = _wide(head) or ("ISO-2022-JP" if re.search(rb"\x1b\$[@B]", head) else None)
    if name is not None:
        return name
    lines = [line for line in head[: head.rfind(b"\n") + 1 or None].splitlines() if line.strip()]
    foreign = [line for line in lines if not line.isascii()]
    wrong = [line for line in foreign if not _is_utf8(line)]
    if 2 * len(wrong) < max(1, len(foreign)):
        return None
    bytes_of_wrong = b"\n".join(wrong)
    count = len(re.findall(rb"[\x80-\xff]", bytes_of_wrong))
    is_damage = 2 * len(wrong) < len(lines) and count < _WORD and not _stands_alone(bytes_of_wrong)
    return None if is_damage else guess(head)


def describe(name: str) -> str:
    """How a text of a detected encoding was read."""
    if name == _FALLBACK:
        return f"read as {name}, which may be wrong (look with `inspect`; `encoding` states another)"
    return f"read as {name}, as detected (`encoding` states another)"


def conversion(name: str, file: str) -> str:
    """What a text is taken for and how it is read."""
    taken_for = f"it reads as {name}" if name != _FALLBACK else f"it may be {name}"
    return f"{taken_for}. State it: data.train: {{path: {Path(file).name}, encoding: {name.lower()}}}"


class Recoded(io.RawIOBase):
    """The bytes of a text in UTF-8.  Raises JobError where it is not text of the encoding."""

    def __init__(self, stream: BinaryIO, encoding: str, file: str) -> None:
        self._stream, self._encoding, self._file = stream, encoding, file
        self._decode = codecs.getincrementaldecoder(encoding)().decode
        self._ready, self._count, self._ended = b"", 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            read = self._stream.read(_CHUNK)
            self._ended = not read
            try:
                self._ready = self._decode(read, self._ended).encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise JobError(
                    f"{self._file}: is not {self._encoding} text at byte {self._count + error.start:,} or so. State"
                    f" another `encoding`: data.train: {{path: {Path(self._file).name}, encoding: ...}}"
                ) from None
            self._count += len(read)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def guess(sample: bytes) -> str:
    """The most likely encoding of a text that is no UTF-8, by iconv's name."""
    sample = sample[: sample.rfind(b"\n") + 1] or sample  # no half character at the end
    for name, codec, looks_right in _CANDIDATES:
        if name in _OF_PAIRS and _stands_alone(sample):
            continue
        try:
            text = sample.decode(codec)
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if ord(character) > 127]
        if foreign and looks_right(foreign, text):
            return name
    return _FALLBACK


def _stands_alone(sample: bytes) -> bool:
    """Whether foreign bytes stand singly among Latin letters, as accents do: two make a Chinese character."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", sample)]
    return runs.count(1) > 0.8 * sum(runs)


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


def _common_kanji(text: list[str]) -> float:
    """The share of kanji of the first level, nearly all of what is written; bytes of other languages make rare ones."""
    kanji = [one for one in text if "\u4e00" <= one <= "\u9fff" and one.encode("cp932")[0] < 0x99]
    return len(kanji) / len(text)


_OF_PAIRS = ("GB18030", "BIG5")
_Test = Callable[[list[str], str], bool]
# Kana, Hangul and Cyrillic identify an encoding.  Chinese ones come later: they decode nearly any bytes.
_CANDIDATES: tuple[tuple[str, str, _Test], ...] = (
    ("CP932", "cp932", lambda f, _: _share("\u3040", "\u30ff", f) > 0.1 and _share("\uff61", "\uff9f", f) < 0.2),
    ("EUC-JP", "euc_jp", lambda f, _: _share("\u3040", "\u30ff", f) > 0.1),
    ("CP932", "cp932", lambda f, _: _common_kanji(f) > 0.9),  # names and addresses, which need no kana
    ("CP949", "cp949", lambda f, _: _share("\uac00", "\ud7a3", f) > 0.9),
    ("GB18030", "gb2312", lambda f, _: _share("\u4e00", "\u9fff", f) > 0.3),
    ("BIG5", "big5", lambda f, _: _share("\u4e00", "\u9fff", f) > 0.3),
    ("GB18030", "gb18030", lambda f, _: _share("\u4e00", "\u9fff", f) > 0.7),
    ("WINDOWS-1251", "cp1251", lambda f, text: _share("\u0400", "\u04ff", f) > 0.8 and _whole_words(f, text)),
)
