"""Input from outside is data until it was checked."""

import os
import time
from dataclasses import dataclass, field

import pytest

from clusters.safe.reading import (
    BadInput,
    checked_path,
    depth_of,
    first_line,
    load_json,
    load_yaml,
    matches,
    name_mistake,
    printable,
    read_text,
    record,
)

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, word",
    [
        ("a: !!bool maybe", "line 1"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !!timestamp x", "tag"),
        (BOMB, "aliases"),
        ("[" * 101 + "]" * 101, "nested"),
        ("a: &x [*x]", "contains itself"),
        ("a: [", "not YAML"),
        ("a: \x00", "not YAML"),
        ("- x\n" * 500_001, "values"),
    ],
    ids=["bool", "object", "tag", "bomb", "deep", "loop", "cut", "NUL", "long"],
)
def test_yaml_that_hangs_or_lies_is_refused_in_seconds(text, word):
    started = time.process_time()

    with pytest.raises(BadInput, match=word):
        load_yaml(text)

    assert time.process_time() - started < 10


def test_yaml_reads_plain_values_and_small_aliases():
    assert load_yaml("a: &b {c: 1}\nd: *b\ne: !!str 5") == {"a": {"c": 1}, "d": {"c": 1}, "e": "5"}
    assert load_yaml("") is None


@pytest.mark.parametrize(
    "text, word",
    [("NaN", "NaN"), ("[" * 101 + "]" * 101, "nested"), (b"\xff\xfe", "UTF-8")],
    ids=["NaN", "deep", "bytes"],
)
def test_json_is_finite_and_shallow(text, word):
    with pytest.raises(BadInput, match=word):
        load_json(text)


def test_json_nested_beyond_the_interpreters_stack_is_refused():
    with pytest.raises(BadInput, match="nested"):
        load_json("[" * 100_000 + "]" * 100_000)


def test_depth_counts_levels():
    assert [depth_of(value) for value in (1, [], {"a": [1]}, [[[]]])] == [0, 1, 2, 3]


@dataclass(frozen=True)
class Sheet:
    name: str
    rate: float
    tags: tuple[str, ...] = ()
    more: dict[str, int] = field(default_factory=dict)


def test_a_record_has_its_types():
    assert record(Sheet, {"name": "a", "rate": 1, "tags": ["x"], "new": 3}, "f") == Sheet("a", 1.0, ("x",))


@pytest.mark.parametrize(
    "values",
    [[], {"name": 1, "rate": 1}, {"name": "a"}, {"name": "a", "rate": float("nan")}, {"name": "a", "rate": "1"}],
)
def test_a_record_of_other_types_is_refused_by_field(values):
    with pytest.raises(BadInput, match=r"card\.json"):
        record(Sheet, values, "card.json")


@pytest.mark.parametrize(
    "value", ["", "a\0b", "\ud800", "~nobody-of-this-name/x", "x" * 5000], ids=["empty", "NUL", "half", "user", "long"]
)
def test_text_that_no_path_can_be(value, tmp_path):
    with pytest.raises(BadInput):
        read_text(checked_path(value, tmp_path))


def test_only_regular_files_of_a_sane_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "good").write_text("\ufeffyes", encoding="utf-8")

    assert read_text(tmp_path / "good") == "yes"
    for name, word in (("pipe", "FIFO"), ("", "folder"), ("missing", "not exist"), ("/dev/zero", "device")):
        with pytest.raises(BadInput, match=word):
            read_text(tmp_path / name)
    with pytest.raises(BadInput, match="loop"):
        checked_path("loop", tmp_path)
    with pytest.raises(BadInput, match="larger"):
        read_text(tmp_path / "good", max_bytes=0)


def test_names_allow_letters_of_any_script_and_no_paths():
    assert all(name_mistake(good) is None for good in ("run-1", "契約書", "a.b_c", "9"))
    assert all(name_mistake(bad) for bad in ("", ".", "..", "a/b", "a b", "-x", "x" * 64, "a\n", "契" * 63 + "約"))


def test_what_is_printed_is_one_line_without_control_characters():
    assert printable("a\x1b[31m\n\ud800\u202eb契") == "a\\x1b[31m\\n\\ud800\\u202eb契"


@pytest.mark.parametrize("pattern", ["a{999999999}", "((a{1000}){1000}){1000}", "a{0,99999999999999999999}"])
def test_a_pattern_that_would_fill_the_memory_is_refused_before_it_is_read(pattern):
    with pytest.raises(BadInput, match="repeats a part more than 10,000 times"):
        matches(pattern, "model.layers.10.q_proj", "target_modules")


def test_counts_of_patterns_that_people_write_are_matched():
    assert matches(r"model\.layers\.\d{1,2}\.q_proj", "model.layers.10.q_proj", "target_modules")


@pytest.mark.parametrize(
    "error, wanted",
    [
        (ValueError("a\nb"), "a"),
        (ValueError("\n a \nb"), "a"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 900), "x" * 500),
    ],
)
def test_an_error_is_its_first_line_or_its_type(error, wanted):
    assert first_line(error) == wanted
