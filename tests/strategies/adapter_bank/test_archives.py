"""Archives of adapters from others: one wrong entry brings nothing in."""

import io
import os
import random
import tarfile

import pytest

from strategies.adapter_bank.adapter import CONFIG
from strategies.adapter_bank.card import CARD, BankError
from strategies.adapter_bank.exchange import export, import_
from strategies.adapter_bank.store import Bank


def a_tar(file, entries, mode="w"):
    with tarfile.open(file, mode) as made:
        for name, kind, content, link in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.linkname = kind, len(content), link
            made.addfile(entry, io.BytesIO(content))


D = "a" * 64


@pytest.mark.parametrize(
    "entry",
    [
        ("../out", tarfile.REGTYPE, b"x", ""),
        ("/tmp/out-of-the-bank", tarfile.REGTYPE, b"x", ""),
        (f"{D}/../../out", tarfile.REGTYPE, b"x", ""),
        (f"{D}/{CARD}", tarfile.SYMTYPE, b"", "/etc/passwd"),
        (f"{D}/{CARD}", tarfile.LNKTYPE, b"", "../../x"),
        (D, tarfile.SYMTYPE, b"", "/tmp"),
        (f"{D}/{CARD}", tarfile.CHRTYPE, b"", ""),
        (f"{D}/{CARD}", tarfile.FIFOTYPE, b"", ""),
        (f"{D}/other.py", tarfile.REGTYPE, b"x", ""),
        (f"{D[1:]}/{CARD}", tarfile.REGTYPE, b"x", ""),
        (f"{D}/sub/{CARD}", tarfile.REGTYPE, b"x", ""),
        (f"{D}/{CARD}", tarfile.GNUTYPE_SPARSE, b"x", ""),
    ],
)
def test_an_archive_with_one_wrong_entry_brings_nothing_in(bank, tmp_path, entry):
    good = bank.cards()[0]
    parts = [
        (f"{good.digest}/{n}", tarfile.REGTYPE, (bank.folder(good.digest) / n).read_bytes(), "") for n in (CONFIG, CARD)
    ]
    a_tar(tmp_path / "bad.tar", [*parts, entry])
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(BankError, match="is not an export of a bank"):
        import_(Bank(tmp_path / "other", create=True), tmp_path / "bad.tar")

    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_adapter_of_an_archive_is_named_and_the_others_come_in(bank, tmp_path):
    first_one, second = bank.cards()
    (bank.folder(first_one.digest) / CARD).write_text("{}")
    with tarfile.open(tmp_path / "mixed.tar", "w") as made:
        for card in (first_one, second):
            made.add(bank.folder(card.digest), card.digest)

    done = import_(Bank(tmp_path / "other", create=True), tmp_path / "mixed.tar")

    assert [card.name for card in done.cards] == ["task-1"] and len(done.refused) == 1
    assert first_one.digest[:12] in str(done.refused[0]) and Bank(tmp_path / "other").verify() == []


def test_archives_that_are_cut_flipped_or_none_are_refused_or_named(bank, tmp_path):
    export(bank, tmp_path / "all.tar", bank.cards())
    sound, draw = (tmp_path / "all.tar").read_bytes(), random.Random(4)
    other = Bank(tmp_path / "other", create=True)

    for number in range(150):
        content = bytearray(sound)
        for _ in range(draw.choice([1, 4])):
            content[draw.randrange(min(len(content), 6000))] = draw.randrange(256)
        (tmp_path / "x.tar").write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        try:
            import_(other, tmp_path / "x.tar")
        except BankError as error:
            assert "is not an export of a bank" in str(error), number

    for odd in ("fifo", "folder"):
        os.mkfifo(tmp_path / odd) if odd == "fifo" else (tmp_path / odd).mkdir()
        with pytest.raises(BankError, match="is not an export"):
            import_(other, tmp_path / odd)
    assert (tmp_path / "other" / "objects").exists() is False or other.verify() == []


def test_a_bomb_is_refused(tmp_path):
    entry = tarfile.TarInfo(f"{D}/{CARD}")
    entry.size = 2**40
    (tmp_path / "bomb.tar").write_bytes(entry.tobuf(tarfile.PAX_FORMAT) + bytes(10_240))
    a_tar(tmp_path / "zip.tar", [(f"{D}/{CARD}", tarfile.REGTYPE, bytes(2**20), "")], "w:gz")

    for name, said in (("bomb.tar", "holds more than"), ("zip.tar", "is compressed")):
        with pytest.raises(BankError, match=said):
            import_(Bank(tmp_path / "bank", create=True), tmp_path / name)
    assert not (tmp_path / "bank").exists()
