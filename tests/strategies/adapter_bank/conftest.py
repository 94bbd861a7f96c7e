"""A bank of two adapters, and a folder outside it that nothing may touch."""

import pytest

from strategies.adapter_bank.card import AdapterCard
from strategies.adapter_bank.store import Bank
from tests.strategies.adapter_bank.parts import an_adapter, some_evidence


@pytest.fixture
def bank(tmp_path):
    there = Bank(tmp_path / "bank", create=True)
    for number in range(2):
        source = an_adapter(tmp_path / f"source-{number}", number)
        there.add(source, AdapterCard(f"task-{number}", "tiny", "b" * 64), some_evidence())
    return there


@pytest.fixture
def precious(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    return folder
