"""Reading what comes from outside: paths, text, YAML and JSON are data until they were checked here.

A FIFO blocks the process that opens it, `/dev/zero` never ends, a YAML file of one kilobyte may stand for a billion
values, a JSON number may be NaN.  Every reader of a file that another person or program wrote goes through this
module: it refuses what is no regular file, is too large, nested too deeply or of the wrong type, with a sentence that
names it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

if TYPE_CHECKING:  # pydantic waits for a verb that checks a file
    from pydantic import TypeAdapter

MAX_BYTES = 16 * 2**20  # of a text file: job, card, configuration, template, index of weights
MAX_DEPTH = 100
MAX_NODES = 500_000  # values of a YAML file; more take minutes to read and are no job
MAX_ALIASED_NODES = 10_000  # values that a YAML file has through its aliases alone
MAX_DIGITS = 300  # of a whole number; what is longer overflows a float, and Python refuses to print it
# Never waits for a FIFO, is no child's; Windows has only the last, without which it changes bytes.
READ_ONLY = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_MAX_PATH_BYTES, _MAX_PART_BYTES = 4096, 255  # PATH_MAX and NAME_MAX of Linux

NAME_RULE = "a name has 1 to 63 letters, digits, dots, dashes and underscores, and begins with a letter, a digit or _"
NAME_PATTERN = r"^\w[\w.-]{0,62}$"
_MAX_PATTERN = 1000
_MAX_REPEATS = 10_000  # of a pattern: the product of its counts {n} and {n,m}
_COUNTED = re.compile(r"\{\d*,?\d*\}")
_MAX_NAME_BYTES = 200  # of UTF-8: a file name has 255, and a moment or an ending is added

_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")} | {"!"}
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
T = TypeVar("T")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class BadInput(ValueError):
    """Input from outside that cannot be used; the text begins with its path or label and says why."""


# --- paths and files


def checked_path(value: str | os.PathLike[str], folder: Path = Path()) -> Path:
    """The absolute path that `value` names, relative to `folder`, with `~` expanded; it need not exist.

    Raises BadInput for text that no path can be: a NUL, half a surrogate pair, an unknown user, a loop of links.
    """
    text = os.fspath(value)
    if not text.strip():
        raise BadInput("an empty text is not a path")
    if "\0" in text:
        raise BadInput(f"{printable(text)}: a path cannot contain a NUL character")
    try:
        text.encode("utf-8")
        path = (folder / Path(text).expanduser()).resolve()
    except UnicodeEncodeError:
        raise BadInput(f"{printable(text)}: is not UTF-8 text (half a surrogate pair), so it names no file") from None
    except RuntimeError as error:  # expanduser: no such user; resolve: a loop of links
        raise BadInput(f"{printable(text)}: {_lower_first(str(error))}") from None
    except OSError as error:
        raise BadInput(f"{printable(text[:80])}: {_reason(error)}") from None
    if len(os.fsencode(path)) >= _MAX_PATH_BYTES or any(len(os.fsencode(p)) > _MAX_PART_BYTES for p in path.parts):
        raise BadInput(f"{printable(text[:80])}...: is too long for a path")
    return path


def kind_of(path: Path) -> str | None:
    """file, folder, FIFO, device or socket; None where nothing is.  Raises BadInput where that cannot be found out."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"{_short(path)}: {_reason(error)}") from None
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))
    return next((name for test, name in kinds if test(mode)), "device")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without ever waiting for a FIFO or reading a device.  Raises BadInput."""
    kind = kind_of(path)
    if kind is None:
        raise BadInput(f"{_short(path)}: does not exist")
    if kind != "file":
        raise BadInput(f"{_short(path)}: is a {kind}, not a file")
    try:
        descriptor = os.open(path, READ_ONLY)
    except OSError as error:
        raise BadInput(f"{_short(path)}: cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it changed since it was looked at
        os.close(descriptor)
        raise BadInput(f"{_short(path)}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """All of a regular file of at most `max_bytes`.  Raises BadInput."""
    with open_regular(path) as stream:
        try:
            content = stream.read(max_bytes + 1) or b""  # None where the kernel has nothing to say yet, as in /proc
        except OSError as error:
            raise BadInput(f"{_short(path)}: cannot be read: {_reason(error)}") from None
    if len(content) > max_bytes:
        raise BadInput(f"{_short(path)}: is larger than {max_bytes / 2**20:.0f} MiB, which no such file needs")
    return content


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """All of a regular UTF-8 text file, without a byte-order mark.  Raises BadInput."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{_short(path)}: is not UTF-8 text (byte {error.start})") from None


# --- YAML


def compose_yaml(text: str, label: str = "the text", max_nodes: int = MAX_NODES) -> yaml.Node | None:
    """The node tree of one YAML document, None for an empty one.

    Raises BadInput beyond MAX_BYTES, MAX_DEPTH, `max_nodes` and MAX_ALIASED_NODES, for tags other than those of plain
    values, and for text that is not YAML.
    """
    if len(text) > MAX_BYTES:
        raise BadInput(f"{label}: is larger than {MAX_BYTES / 2**20:.0f} MiB")
    try:
        _check_events(text, label, max_nodes)
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadInput(f"{label}: {line}is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{label}: is not YAML: {first_line(error)}") from None
    except (UnicodeError, RecursionError) as error:
        raise BadInput(f"{label}: is not YAML: {error}") from None


def load_yaml(text: str, label: str = "the text") -> Any:
    """The plain values of one YAML document; of repeated keys the last counts.  Raises BadInput."""
    node = compose_yaml(text, label)
    return None if node is None else yaml_value(node, label)


def yaml_value(node: yaml.Node, label: str = "the text") -> Any:
    """The plain value of a node that `compose_yaml` gave.  Raises BadInput for a value that is not of its tag."""
    try:
        return _PlainValues("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadInput(f"{label}: {line}{error.problem or error.context}") from None
    except RecursionError:
        raise BadInput(f"{label}: is nested too deeply") from None


class _PlainValues(yaml.SafeLoader):
    """Builds plain values; one that is not of its tag is named with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:  # parts of 1:59:59 are multiplied one by one
                raise ValueError
            value = super().construct_object(node, deep)  # type: ignore[no-untyped-call]
            if type(value) is str and not value.isascii():
                value.encode("utf-8")  # raises for half a surrogate pair
            return value
        except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            shown = printable(node.value[:40]) if isinstance(node, yaml.ScalarNode) else f"of {len(node.value)} parts"
            problem = f"{shown!r} cannot be read as {kind}" if shown else f"an empty {kind}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def _check_events(text: str, label: str, max_nodes: int) -> None:
    """Sizes by the parser's events alone, before a single value is built."""
    count, aliased = 0, 0
    sizes: dict[str, int] = {}  # anchor -> values below it, aliases expanded
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, aliased + count when it began)
    for event in yaml.parse(text, Loader=_Loader):
        where = f"{label}: line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise BadInput(f"{where}: is not YAML: an anchor that contains itself (*{event.anchor})")
            aliased += sizes.get(event.anchor, 1)
            if aliased > MAX_ALIASED_NODES:
                raise BadInput(f"{where}: its aliases stand for more than {MAX_ALIASED_NODES:,} values")
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if count > max_nodes:
                raise BadInput(f"{where}: holds more than {max_nodes:,} values")
            tag = getattr(event, "tag", None)
            if tag is not None and tag not in _TAGS:
                raise BadInput(f"{where}: the tag {printable(tag)} is not known; plain values need none")
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count + aliased - 1))
                if len(open_nodes) > MAX_DEPTH:
                    raise BadInput(f"{where}: is nested too deeply (more than {MAX_DEPTH} levels)")
            elif event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, began = open_nodes.pop()
            if anchor:
                sizes[anchor] = count + aliased - began


# --- JSON and records


def load_json(text: str | bytes, label: str = "the text", allow_nan: bool = False) -> Any:
    """The values of a JSON text.

    Raises BadInput: no JSON, nested beyond MAX_DEPTH, NaN or Infinity unless allowed, numbers beyond a float's range.
    """

    def constant(name: str) -> float:
        if not allow_nan:
            raise ValueError(f"{name} is not a number")
        return float(name.replace("Infinity", "inf"))

    def number(digits: str) -> int | float:
        whole = digits.lstrip("-").isdigit()
        if (whole and len(digits) > MAX_DIGITS) or (not whole and math.isinf(float(digits))):
            raise ValueError(f"{digits[:20]}... is larger than any number here")
        return int(digits) if whole else float(digits)

    try:
        content = text if isinstance(text, str) else text.decode("utf-8-sig")
        values = json.loads(content, parse_constant=constant, parse_int=number, parse_float=number)
    except UnicodeDecodeError:
        raise BadInput(f"{label}: is not UTF-8 text") from None
    except RecursionError:
        raise BadInput(f"{label}: is nested too deeply") from None
    except ValueError as error:
        raise BadInput(f"{label}: is not JSON: {error}") from None
    if depth_of(values) > MAX_DEPTH:
        raise BadInput(f"{label}: is nested too deeply (more than {MAX_DEPTH} levels)")
    return values


def read_json(path: Path, max_bytes: int = MAX_BYTES, allow_nan: bool = False) -> Any:
    """The values of a JSON file.  Raises BadInput."""
    return load_json(read_bytes(path, max_bytes), _short(path), allow_nan)


def depth_of(values: Any) -> int:
    """Levels of nesting of lists and mappings, 0 for a plain value; counted without recursion, up to MAX_DEPTH + 1."""
    level, depth = [values], 0
    while (level := [value for value in level if isinstance(value, dict | list)]) and depth <= MAX_DEPTH:
        depth += 1
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
    return depth


def record(kind: type[T], values: Any, label: str) -> T:
    """`values`, as JSON gave them, as the dataclass `kind`, each field of its stated type; other fields are ignored.

    Raises BadInput naming every field that is missing or of another type.  NaN and infinities are no numbers.
    """
    if not isinstance(values, dict):
        raise BadInput(f"{label}: holds a {type(values).__name__}, not an object with named fields")
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(values, allow_nan=False), strict=True)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(str(part) for part in item['loc'])} {_lower_first(item['msg'])}"
            for item in error.errors(include_url=False)[:5]
        ]
        raise BadInput(f"{label}: {printable('; '.join(wrong))}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{label}: {error}") from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


# --- names, patterns and printing


def name_mistake(name: str) -> str | None:
    """What is wrong with the name of a run, a bank or an adapter; None for a good one."""
    if re.fullmatch(NAME_PATTERN[1:-1], name) and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES:
        return None
    return f"{printable(name[:80])!r}: {NAME_RULE}"


def matches(pattern: str, text: str, label: str, seconds: float = 1.0) -> bool:
    """Whether a pattern from a file fits the whole text, as `re.fullmatch` would say.

    Raises BadInput for a pattern that does not compile, has more than 1,000 characters, repeats a part more than 10,000
    times or takes longer than `seconds`.
    """
    if re.fullmatch(r"[\w-]*", pattern):
        return pattern == text
    import regex  # has a time limit, which re has not

    try:
        if len(pattern) > _MAX_PATTERN:
            raise ValueError(f"it has {len(pattern)} characters, more than {_MAX_PATTERN}")
        counts = [int(digits[:9]) for digits in re.findall(r"\d+", "".join(_COUNTED.findall(pattern)))]
        if math.prod(count for count in counts if count) > _MAX_REPEATS:  # they are written out, in memory
            raise ValueError(f"it repeats a part more than {_MAX_REPEATS:,} times")
        re.compile(pattern)  # regex allows more than re, by which others read the same pattern
        return regex.fullmatch(pattern, text, timeout=max(seconds, 1e-9)) is not None
    except TimeoutError:
        raise BadInput(f"{label}: the pattern {printable(pattern[:80])!r} takes too long to match") from None
    except (re.error, regex.error, ValueError, ArithmeticError, RuntimeError, LookupError, TypeError) as error:
        raise BadInput(f"{label}: the pattern {printable(pattern[:80])!r} cannot be used: {error}") from None


def printable(text: str) -> str:
    """The text with control characters, line breaks and half surrogate pairs written as escapes: one safe line."""
    if text.isprintable():  # the usual case, at once
        return text
    return "".join(
        _escaped(c) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI else c for c in text
    )


def first_line(error: BaseException | str, longest: int = 500) -> str:
    """What an error says, in one line of at most `longest` characters; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0].strip()[:longest] if text else type(error).__name__


def printable_lines(text: str) -> str:
    """`printable` of each line; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn around the order of what is shown


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _short(path: Path) -> str:
    text = printable(str(path))
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def _reason(error: Exception) -> str:
    return _lower_first((error.strerror if isinstance(error, OSError) else None) or str(error))


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
