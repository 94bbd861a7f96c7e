"""Paths that a person names: what must lie there, and what an error says of it."""

import os
from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.job.paths import read_text_file, resolve_path, write_text_file


@pytest.fixture
def place(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def test_a_relative_path_starts_at_the_jobs_folder_and_a_tilde_is_home(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))

    assert resolve_path("rows.jsonl", "data.train", place, "file") == place / "rows.jsonl"
    assert resolve_path("model/../rows.jsonl", "data.train", place) == place / "rows.jsonl"
    assert resolve_path("~/model", "model", Path("/"), "folder") == place / "model"


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("gone.jsonl", "file", r"data.train: .*/gone.jsonl does not exist. Relative paths start at /"),
        ("rows.jsonl/x", "any", "does not exist"),
        ("model", "file", "is a folder; give a file"),
        ("rows.jsonl", "folder", "is a file; give a folder"),
        ("rows.jsonl", "new folder", "is a file; give a folder"),
        ("fifo", "any", "is a FIFO; give a file or a folder"),
        ("fifo", "new file", "is a FIFO; give a file"),
        (" ", "any", "data.train: an empty text is not a path"),
        ("a\0b", "new file", "NUL"),
        ("x" * 300, "new file", "too long for a path"),
    ],
)
def test_what_may_not_be_there_is_named_with_its_key(place, value, kind, says):
    with pytest.raises(JobError, match=says) as refused:
        resolve_path(value, "data.train", place, kind)

    assert str(refused.value).startswith("data.train: ")


@pytest.mark.parametrize("kind", ["new file", "new folder"])
def test_what_will_be_written_need_not_be_there(place, kind):
    assert resolve_path("later/out", "--out", place, kind) == place / "later" / "out"


def test_a_text_that_cannot_be_written_leaves_the_old_one(place):
    write_text_file(place / "out.md", "old", "--out")

    with pytest.raises(JobError, match=r"--out: .*/none/out.md cannot be written: No such file"):
        write_text_file(place / "none" / "out.md", "new", "--out")
    with pytest.raises(JobError, match=r"--out: .* cannot be written: Is a directory"):
        write_text_file(place / "model", "new", "--out")

    assert read_text_file("out.md", "--out", place) == "old"
    assert {path.name for path in place.iterdir()} == {"rows.jsonl", "model", "fifo", "out.md"}


def test_a_text_of_another_encoding_is_refused_by_its_key(place):
    (place / "latin.txt").write_bytes("é".encode("latin-1"))

    with pytest.raises(JobError, match=r"data.system_prompt: .*latin.txt: is not UTF-8 text \(byte 0\)"):
        read_text_file("latin.txt", "data.system_prompt", place)
