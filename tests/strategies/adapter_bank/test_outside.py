"""Nothing outside a bank is removed, followed or believed."""

import os
from pathlib import Path

import pytest

from strategies.adapter_bank.adapter import WEIGHTS
from strategies.adapter_bank.card import BankError
from strategies.adapter_bank.store import Bank
from tests.strategies.adapter_bank.parts import lies


@pytest.mark.parametrize(
    "digest", ["..", "../../precious", "{precious}", "", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "/"]
)
def test_a_digest_that_is_a_path_removes_nothing(bank, precious, digest):
    folder = lies(bank, digest=digest.format(precious=precious))

    (damaged,) = bank.contents().damaged
    bank.remove(damaged)

    assert (precious / "thesis.txt").exists() and not folder.exists()
    assert [card.name for card in bank.cards()] == ["task-1"]
    with pytest.raises(BankError, match="is no digest"):
        bank.folder(digest.format(precious=precious))


def test_a_card_of_another_adapter_is_not_believed(bank):
    other = bank.find("task-1").digest
    lies(bank, digest=other)

    (damaged,) = bank.contents().damaged

    assert "its card is that of another adapter" in damaged.reason
    bank.remove(damaged)
    assert bank.adapter(bank.find("task-1"))


@pytest.mark.parametrize("what", ["adapter", "file", "shard"])
def test_of_a_link_the_link_alone_is_removed(bank, precious, what):
    folder = bank.folder(bank.find("task-0").digest)
    moved = precious / "moved"
    if what == "adapter":
        folder.rename(moved)
        folder.symlink_to(moved)
    elif what == "shard":
        folder.parent.rename(moved)
        folder.parent.symlink_to(moved)
    else:
        (folder / WEIGHTS).rename(moved)
        (folder / WEIGHTS).symlink_to(moved)

    (damaged,) = bank.contents().damaged
    bank.remove(damaged)

    assert "link" in damaged.reason or "named by its digest" in damaged.reason
    assert moved.exists() and (precious / "thesis.txt").exists()
    assert not os.path.lexists(damaged.path) and bank.verify() == []


def test_what_is_put_aside_or_cleared_away_is_never_followed(bank, precious):
    (bank.path / "objects" / "zz").symlink_to(precious)
    (bank.path / "objects" / ".under-way-new-1").symlink_to(precious)
    (bank.path / "objects" / ".under-way-import-2").mkdir()

    assert len(bank.verify(repair=True)) == 1

    assert (precious / "thesis.txt").exists() and bank.verify() == []
    assert not list((bank.path / "objects").glob(".*"))


def test_a_bank_whose_objects_are_a_link_is_refused(bank, precious):
    (bank.path / "objects").rename(precious / "objects")
    (bank.path / "objects").symlink_to(precious / "objects")

    with pytest.raises(BankError, match="is a link"):
        Bank(bank.path)


@pytest.mark.parametrize("kind", ["file", "fifo", "objects-file", "objects-fifo", "nul", "loop"])
def test_a_path_that_is_no_bank_is_told(tmp_path, kind):
    path = tmp_path / "odd"
    place = path / "objects" if "objects" in kind else path
    place.parent.mkdir(exist_ok=True)
    if "fifo" in kind:
        os.mkfifo(place)
    elif kind == "loop":
        place.symlink_to(place)
    elif "file" in kind:
        place.write_text("x")

    with pytest.raises(BankError):
        Bank(Path("a\0b") if kind == "nul" else path, create=True)
