"""What breaks readers: numbers, texts, paths, YAML, and mutations of values and of texts."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

MARKUP = "[/nope]"
HUGE = 10**400
NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, HUGE, -HUGE),
    *(0.0, -0.0, 1e-320, 5e-324, 1e-300, 1e-12, 0.5, 1e12, 1e300, 1.7e308, float("inf"), float("-inf"), float("nan")),
]
TEXTS = [
    *("", " ", "\n", "\0", "a\0b", "\ud800", "x\udfffy", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\r"),
    *("[/nope]", "[red]", "[/]", "[link=x]", "\\[", "$x$ ${HOME} $(id)", "{}", "{0.__class__}", "%s%n", "\u202eabc"),
    *("None", "null", "nan", "NaN", ".inf", "auto", "true", "~", "..", ".", "/", "//", "-", "--help", "--", "*", "?"),
    *("\u3042\u3044", "e\u0301", "\U0001f600", "\ufeffx", "\u2028", "x" * 300, "x" * 5000, "/" * 3000, "1" * 5000),
    *("lora", "../../etc/passwd", "/etc/shadow", "~root/x", "~nobody-there/x", "file:///etc/passwd", "s3://b/k"),
    *("http://[::1", "http://x:99999", "hf://a/b", "a:b", "C:\\x", "CON", "a b", "a\tb", "(a+)+$", "(", "[", "*a"),
]
PATHS = [
    *(
        "a\0b",
        "a" * 300,
        "a/" * 3000,
        "~nosuchuser/x",
        "~",
        "",
        " ",
        ".",
        "..",
        "/",
        "/dev/zero",
        "/dev/null",
        "/dev/full",
    ),
    *("/dev/stdin", "/dev/tty", "/proc/self/mem", "/proc/self/environ", "/proc/kmsg", "/root", "/etc/passwd", "\ud800"),
    *("x\ud800.jsonl", "\udcff", "no/such/file", "train.jsonl/x", "train.jsonl/", "loop", "loop/x", "fifo", "folder"),
    *("folder/x", "zero", "socket", "unreadable", "//x", "file://train.jsonl", "\x1b[2J", "[/nope]", "[red]x.jsonl"),
    *("train.jsonl\n", "$HOME", "~/x", "~root", "*", "s3://b/k", "x.parquet", "/sys/kernel/mm", "/dev/fd/0", "-"),
]
SPECIALS = {"loop": "loop", "fifo": "fifo", "folder": "folder", "zero": "zero", "socket": "socket",
            "unreadable": "unreadable"}  # fmt: skip
ESCAPES = ("\x1b", "\x9b", "\x07", "\x08", "\x7f", "\x00")  # what no terminal may be sent out of a user's text


_PIECES = (b"{", b"}", b"[", b"]", b":", b"\n", b"\t", b"&a ", b"*a", b"!!x ", b"'", b'"', b"%", b"- ", b"\xff",
b"\xc3",
           b"\xef\xbb\xbf")  # fmt: skip
_WHOLES = (b"", b"\n", b"null", b"[]", b"{}", b"0", b'""', b"\xff\xfe", b"\x00" * 64, b"[" * 3000)


def number(rng: Random) -> Any:
    return rng.choice(NUMBERS)


def text(rng: Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(TEXTS)
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000))))
                   for _ in range(rng.randrange(12)))  # fmt: skip


def deep(rng: Random) -> Any:
    """Nested far beyond what anybody writes."""
    value: Any = 1
    for _ in range(rng.choice((20, 90, 120, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def value(rng: Random, depth: int = 2) -> Any:
    """Anything that JSON or YAML can hold."""
    kind = rng.randrange(11)
    if kind < 3:
        return number(rng)
    if kind < 6:
        return text(rng)
    if kind < 8:
        return rng.choice((None, True, False, [], {}, [[]], {"": ""}))
    if kind == 8 and rng.random() < 0.2:
        return deep(rng)
    if depth == 0:
        return rng.choice((0, "x"))
    if kind == 9:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(3))}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, child in items for found in ((*path, key), *places(child, (*path, key)))]


def mutated(rng: Random, tree: Any, times: int | None = None) -> Any:
    """A tree with some values replaced, removed, doubled or added."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        found = places(tree)
        if not found:
            return value(rng)
        *way, last = rng.choice(found)
        parent = tree
        for step in way:
            parent = parent[step]
        action = rng.randrange(10)
        if action < 6:
            parent[last] = value(rng)
        elif action == 6:
            del parent[last]
        elif action == 7 and isinstance(parent, dict):
            parent[text(rng)] = parent[last]
        elif action == 8 and isinstance(parent, dict):
            parent[str(last) + rng.choice(("s", "_", " ", "x"))] = parent.pop(last)
        elif isinstance(parent, list):
            parent.extend([parent[last]] * rng.choice((1, 2, 50)))
        else:
            parent[last] = [parent[last]]
    return tree


def mangled(rng: Random, content: bytes) -> bytes:
    """Bytes with some flipped, cut, doubled, or put in."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(content) + 1)
        action = rng.randrange(7)
        if action == 0:
            content = content[:place]
        elif action == 1:
            content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        elif action == 2:
            content = content[:place] + text(rng).encode("utf-8", "surrogatepass") + content[place:]
        elif action == 3:
            end = min(len(content), place + rng.randrange(40))
            content = content[:place] + content[end:]
        elif action == 4:
            end = min(len(content), place + rng.randrange(40))
            content = content[:end] + content[place:end] * rng.choice((1, 3, 200)) + content[end:]
        elif action == 5:
            content = content[:place] + rng.choice(_PIECES) + content[place:]
        else:
            content = rng.choice(_WHOLES)
    return content


def as_yaml(tree: Any) -> str:
    """Flow YAML that says exactly this, half surrogates included (as escapes)."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{as_yaml(str(key))}: {as_yaml(child)}" for key, child in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(as_yaml, tree)) + "]"
    if isinstance(tree, float) and (tree != tree or tree in (float("inf"), float("-inf"))):
        return ".nan" if tree != tree else ".inf" if tree > 0 else "-.inf"
    if isinstance(tree, int) and not isinstance(tree, bool) and abs(tree) > 10**300:
        return "-" * (tree < 0) + "9" * 400
    return json.dumps(tree)


def as_json(tree: Any) -> str:
    """JSON as Python writes it, with NaN, Infinity and numbers of any length."""
    return json.dumps(tree)


def yaml_trick(rng: Random) -> str:
    """A value as YAML writes it and hardly anybody reads: tags, dates, sexagesimals, aliases, merges."""
    levels = rng.choice((3, 5, 7, 8, 9))
    bomb = ", ".join([f"&a0 [{', '.join('x' * 10)}]"] + [
        f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)])  # fmt: skip
    return rng.choice((
        '!!bool "maybe"', "!!int x", "!!float []", "!!timestamp 2001-99-99", "2001-13-45",
        "2001-12-14t21:59:43.10-05:00",
        "!!binary '###'", "!!python/object/apply:os.system ['true']", "!!python/name:os.system ''", "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]", "!x y", "!!null x", "!!map []", "!!seq {}", "!!str {}", "!!merge x", "1:59:59",
        "1" + ":59" * 2000,
        "0x" + "f" * 4000, "0b" + "1" * 9000, "0o777", "0777", "1_000", "9" * 6000, "1e400", "-.INF", ".nan", "=",
        "<<", "{<<: 1}",
        "{<<: [1]}", "{<<: &m {a: 1}, b: 2}", "{? [a]: b}", "{? {a: b}: c}", "{1: 2, true: 3, ~: 4}", "*unknown",
        "&a [*a]",
        "&a {a: *a}", "[" * 500 + "]" * 500, "{a: " * 300 + "1" + "}" * 300, f"[{bomb}]", "|\n  a\n b", "'\ud83d'",
        '"\\ud800"', '"\\0"', '"\\x1b[31m"', "@x", "`x", "%x", "\t", "a: b: c", "{a", "[a", "'a", '"a',
        "--- a\n--- b", "...",
        "!!bool", "!!int", "!!float", "!!timestamp", "!<tag:yaml.org,2002:int> z", "!<x> y", "~", "yes", "no", "on",
        "off", "y",
        "+1", "0.", ".5", "1e5", "1E+5", "-", "--", "0x", "0b", "1__0", "_1",
    ))  # fmt: skip
