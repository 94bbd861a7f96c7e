"""One damaged adapter is named in a sentence and stops no other."""

import json
import os
from contextlib import nullcontext

import numpy
import pytest

from strategies.adapter_bank.adapter import CONFIG, WEIGHTS
from strategies.adapter_bank.card import CARD, AdapterCard, BankError
from strategies.adapter_bank.evidence import gather
from strategies.adapter_bank.exchange import export
from strategies.adapter_bank.folders import EVIDENCE
from tests.strategies.adapter_bank.parts import an_adapter, lies, some_evidence


def break_it(folder, how):
    target = folder / {"weights": WEIGHTS, "config": CONFIG, "evidence": EVIDENCE}.get(how.partition("-")[0], CARD)
    what = how.partition("-")[2]
    if what == "gone":
        target.unlink()
    elif what == "fifo":
        target.unlink()
        os.mkfifo(target)
    elif what == "folder":
        target.unlink()
        target.mkdir()
    elif what == "empty":
        target.write_bytes(b"")
    elif what == "half":
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    elif what == "bytes":
        target.write_bytes(b"\xff\xfe\x00" * 50)
    elif what == "deep":
        target.write_text("[" * 100_000)
    elif what == "list":
        target.write_text("[1]")


BREAKS = [
    f"{file}-{what}"
    for file in ("card", "config", "weights", "evidence")
    for what in ("gone", "fifo", "folder", "empty", "half", "bytes", "deep", "list")
]


@pytest.mark.parametrize("how", BREAKS)
def test_a_damaged_adapter_is_named_and_the_other_one_stays_of_use(bank, tmp_path, how):
    break_it(bank.folder(bank.find("task-0").digest), how)
    an_adapter(tmp_path / "new", 9)

    contents = bank.contents()
    (wrong,) = bank.verify()
    exported = export(bank, tmp_path / "out.tar", contents.cards)
    bank.add(tmp_path / "new", AdapterCard("new", "tiny", "b" * 64))

    assert wrong.reason and len(contents.damaged) == (1 if how.startswith("card") else 0)
    assert [card.name for card in exported.cards] == ["task-1"]
    assert bank.adapter(bank.find("task-1")).corrections()
    assert len(bank.verify(repair=True)) == 1 and bank.verify() == []
    assert [card.name for card in bank.cards()] == ["task-1", "new"]
    assert bank.add(tmp_path / "source-0", AdapterCard("task-0", "tiny", "b" * 64)) and bank.verify() == []


@pytest.mark.parametrize("how", ["weights-half", "evidence-half", "card-half"])
def test_adding_what_is_damaged_again_makes_it_whole(bank, tmp_path, how):
    break_it(bank.folder(bank.find("task-0").digest), how)

    card = bank.add(tmp_path / "source-0", AdapterCard("task-0", "tiny", "b" * 64))

    assert (bank.evidence(card) is not None) == (how == "weights-half")
    assert bank.verify() == [] and len(list((bank.path / "broken").iterdir())) == 1


def test_other_evidence_takes_the_place_of_the_former(bank, tmp_path, monkeypatch):
    from strategies.adapter_bank import store

    card, other = bank.find("task-0"), gather([(numpy.arange(3), numpy.arange(3) > 1)], numpy.ones((20, 4), "f4"))
    again = bank.add(tmp_path / "source-0", AdapterCard("task-0", "tiny", "b" * 64), other)
    assert bank.evidence(again).digest == other.digest != card.evidence_digest and bank.verify() == []

    for renames in range(5):  # that are done before the writer is killed: four are needed
        bank.add(tmp_path / "source-0", AdapterCard("task-0", "tiny", "b" * 64), other)
        left = iter(range(renames))

        def replace(*paths, left=left):
            if next(left, None) is None:
                raise SystemExit
            os.rename(*paths)

        monkeypatch.setattr(store.os, "replace", replace)
        with pytest.raises(SystemExit) if renames < 4 else nullcontext():
            bank.add(tmp_path / "source-0", AdapterCard("task-0", "tiny", "b" * 64), some_evidence())
        monkeypatch.undo()
        assert bank.verify() == [] and bank.find("task-0").digest == card.digest


def test_two_adapters_of_one_name_are_both_known(bank, tmp_path):
    lies(bank, name="task-1")

    (damaged,) = bank.contents().damaged

    assert "is called task-1 too" in damaged.reason and len(bank.cards()) == 1
    bank.remove(bank.find_all(damaged.path.name[:12]))
    assert len(bank.cards()) == 1 and bank.contents().damaged == []


def test_fields_of_another_version_are_kept(bank, tmp_path):
    lies(bank, colour="blue", unknown="also one")

    card = bank.add(tmp_path / "source-0", AdapterCard("task-0", "tiny", "b" * 64, licence="MIT"))

    assert card.unknown == {"colour": "blue", "unknown": "also one"}
    assert json.loads((bank.folder(card.digest) / CARD).read_text())["colour"] == "blue"


def test_things_that_are_no_adapters_are_told_and_hidden_ones_passed_over(bank):
    (bank.path / "objects" / ".DS_Store").write_text("x")
    (bank.path / "objects" / "ab").mkdir(exist_ok=True)
    (bank.path / "objects" / "ab" / "notes").mkdir()
    (bank.path / "objects" / "README").write_text("x")
    (bank.path / "objects" / "cd").mkdir()
    (bank.path / "objects" / "cd" / ("ab" + "0" * 62)).mkdir()
    (bank.path / "index.sqlite").mkdir()  # of an older version, or anything

    assert len(bank.contents().damaged) == 3 and len(bank.cards()) == 2
    assert len(bank.verify(repair=True)) == 3 and bank.verify() == [] and len(bank.cards()) == 2


def test_an_adapter_whose_bytes_changed_is_not_used(bank):
    card = bank.find("task-0")
    file = bank.folder(card.digest) / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    with pytest.raises(BankError, match="task-0: its bytes are not those that were added"):
        bank.adapter(card)
