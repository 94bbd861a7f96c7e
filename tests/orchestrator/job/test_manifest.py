"""Folders that are whole or not there."""

import json
import os
import subprocess
import sys

import pytest

from orchestrator.job import manifest


@pytest.fixture
def whole(tmp_path):
    """A published folder of two files."""
    return publish(tmp_path / "made", {"a.bin": "aaaa", "b.bin": "bb"})


def publish(final, files):
    with manifest.temporary_folder(final) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)
        manifest.publish(temporary, final, files)
    return final


def listed(folder):
    return {path.name for path in folder.iterdir()}


def test_a_published_folder_verifies_and_nothing_else_is_left(whole, tmp_path):
    assert manifest.damage(whole, ["a.bin"]) is None
    assert listed(whole) == {"a.bin", "b.bin", "manifest.json"}
    assert listed(tmp_path) == {"made", ".lock"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "a.bin").write_text("aaab"), "a.bin has changed"),
        (lambda folder: (folder / "b.bin").write_text("b"), "b.bin has changed"),
        (lambda folder: (folder / "a.bin").unlink(), "a.bin: does not exist"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: does not exist"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"../x": {}}}'), "lists no files"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "does not list a.bin"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "lists no files"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
    ],
)
def test_damage_names_the_file(whole, change, says):
    change(whole)

    assert says in manifest.damage(whole, ["a.bin"])


def test_a_whole_folder_stays_and_a_damaged_one_is_replaced(whole):
    publish(whole, {"a.bin": "other", "b.bin": "other"})
    assert (whole / "a.bin").read_text() == "aaaa"

    (whole / "a.bin").write_text("aaab")
    publish(whole, {"a.bin": "other", "b.bin": "other"})

    assert (whole / "a.bin").read_text() == "other" and manifest.damage(whole, ["b.bin"]) is None


def test_what_fails_while_it_is_filled_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), manifest.temporary_folder(tmp_path / "made") as temporary:
        (temporary / "a.bin").write_text("a")
        raise OSError("full")

    assert listed(tmp_path) == {".lock"}


def test_a_folder_that_is_listed_without_its_facts_has_none_and_with_them_keeps_them(tmp_path):
    (tmp_path / "a.bin").write_text("a")

    manifest.write(tmp_path, step=7)

    assert json.loads((tmp_path / "manifest.json").read_text())["step"] == 7
    assert manifest.damage(tmp_path) is None


def test_only_the_temporary_folders_of_dead_processes_are_removed(tmp_path):
    script = f"""
import os
from pathlib import Path
from orchestrator.job import manifest
with manifest.temporary_folder(Path({str(tmp_path / "dead")!r})) as temporary:
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    (tmp_path / "link.tmp-1").symlink_to(tmp_path)
    with manifest.temporary_folder(tmp_path / "living") as living:
        assert manifest.remove_leftovers(tmp_path) == 1
        assert living.is_dir()

    assert listed(tmp_path) == {".lock", "link.tmp-1"}


def test_a_link_is_removed_and_what_it_points_to_stays(whole, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(whole)

    manifest.remove(link)
    manifest.remove(tmp_path / "none")

    assert manifest.damage(whole) is None and not os.path.lexists(link)
