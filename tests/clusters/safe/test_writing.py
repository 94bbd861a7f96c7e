"""Files that are there whole or not at all."""

import os

import pytest

from clusters.safe.writing import new_folder, write_whole


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask, mode, wanted", [(0o022, 0o666, 0o644), (0o002, 0o666, 0o664), (0o022, 0o600, 0o600)])
def test_others_can_read_it_as_the_umask_says_and_nobody_a_secret(tmp_path, umask, mask, mode, wanted):
    umask(mask)

    write_whole(tmp_path / "a.json", "{}", mode)

    assert (tmp_path / "a.json").stat().st_mode & 0o777 == wanted


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_whole(file, "old")

    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new\ud800")

    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    write_whole(file, "new")
    assert file.read_text() == "new"


def test_a_temporary_file_of_a_killed_process_is_in_nobodys_way(tmp_path):
    (tmp_path / f".a.txt.{os.getpid()}.tmp").write_text("half")

    write_whole(tmp_path / "a.txt", "whole")

    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_new_folder_has_its_name_once_it_is_whole(tmp_path):
    place = tmp_path / "deep" / "made"

    with new_folder(place) as folder:
        (folder / "file").write_text("x")
        assert not place.exists()

    assert (place / "file").read_text() == "x"
    assert list(place.parent.iterdir()) == [place]


def test_a_new_folder_that_fails_leaves_nothing_and_what_was_there_stays(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/old").touch()

    with pytest.raises(RuntimeError), new_folder(tmp_path / "made", replaces=True) as folder:
        (folder / "half").touch()
        raise RuntimeError

    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["made", "made/old"]


def test_what_was_there_returns_where_the_new_folder_cannot_take_its_name(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/old").touch()

    with pytest.raises(OSError), new_folder(tmp_path / "made", replaces=True) as folder:
        folder.rmdir()  # as a program that clears what it does not know does

    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["made", "made/old"]


def test_a_folder_that_lies_there_is_replaced_only_where_it_is_asked_for(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/old").touch()

    with pytest.raises(FileExistsError, match="choose a new folder"), new_folder(tmp_path / "made"):
        pass
    with new_folder(tmp_path / "made", replaces=True) as folder:
        (folder / "new").touch()

    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
