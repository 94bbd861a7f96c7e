"""Writers that are killed or that wait leave a bank that works."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from strategies.adapter_bank.card import AdapterCard, BankError
from strategies.adapter_bank.exchange import export
from strategies.adapter_bank.store import Bank
from tests.strategies.adapter_bank.parts import an_adapter

ROOT = Path(__file__).resolve().parents[3]


WRITER = """
import json, sys
from pathlib import Path
from strategies.adapter_bank.card import AdapterCard
from strategies.adapter_bank.exchange import import_
from strategies.adapter_bank import store
work, turn = Path(sys.argv[1]), int(sys.argv[2])
store.Adapter.corrections = lambda self: {}  # of numbers that the test made: loading torch takes longer than all else
bank = store.Bank(work / "bank", create=True)
print("ready", flush=True)
while True:
    name = f"s{turn % 4}"
    known = {card.name: card for card in bank.cards()}
    if name in known:
        bank.remove(known[name])
    else:
        bank.add(work / name, AdapterCard(name, "tiny", "b" * 64))
    if turn % 3 == 0:
        import_(bank, work / "two.tar")
    turn += 1
"""


def killed_at_random(tmp_path, times):
    draw = random.Random(5)
    for number in range(4):
        an_adapter(tmp_path / f"s{number}", number)
    other = Bank(tmp_path / "two", create=True)
    for number in (8, 9):
        other.add(an_adapter(tmp_path / f"o{number}", number), AdapterCard(f"o{number}", "tiny", "b" * 64))
    export(other, tmp_path / "two.tar", other.cards())
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    for turn in range(times):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(turn)], stdout=subprocess.PIPE, env=env)
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.3))
        for writer in writers:
            assert writer.poll() is None, "a writer ended by itself"
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()

        bank = Bank(tmp_path / "bank", create=True)
        assert bank.verify() == [] and bank.contents().damaged == []
        assert {card.name for card in bank.cards()} <= {"s0", "s1", "s2", "s3", "o8", "o9"}
    bank.add(tmp_path / "s0", AdapterCard("s0", "tiny", "b" * 64))
    assert not list((bank.path / "objects").glob(".*"))


def test_writers_that_are_killed_leave_a_bank_that_works(tmp_path):
    killed_at_random(tmp_path, 3)


@pytest.mark.slow
def test_writers_that_are_killed_a_hundred_times_leave_a_bank_that_works(tmp_path):
    killed_at_random(tmp_path, 100)


def test_who_holds_the_bank_is_waited_for_and_then_told(bank, monkeypatch):
    from strategies.adapter_bank import store

    monkeypatch.setattr(store, "_BUSY_S", 0.2)

    with bank.writing(), pytest.raises(BankError, match="another process has been writing"):
        Bank(bank.path).remove(bank.cards()[0])


def test_a_lock_that_is_a_link_or_a_folder_is_told(bank, precious):
    (bank.path / ".lock").unlink()
    (bank.path / ".lock").symlink_to(precious / "thesis.txt")
    with pytest.raises(BankError, match="cannot be opened"):
        bank.remove(bank.cards()[0])
    (bank.path / ".lock").unlink()
    (bank.path / ".lock").mkdir()
    with pytest.raises(BankError, match="cannot be opened"):
        bank.remove(bank.cards()[0])
