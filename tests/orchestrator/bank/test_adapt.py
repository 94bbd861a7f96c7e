"""Which adapters of a bank `adapt` and `merge` use."""

import json

import numpy
import pytest
from safetensors.numpy import save_file

from orchestrator.bank.library import neighbours
from orchestrator.bank.merge import MergeOptions, merge_adapters
from orchestrator.errors import JobError
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Adapter, Unusable
from strategies.adapter_bank.card import CARD, AdapterCard, BankError
from strategies.adapter_bank.evidence import gather
from strategies.adapter_bank.folders import EVIDENCE


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_is_damaged_is_said_and_the_others_are_used(bank, base):
    flip(bank.folder(bank.find("first").digest) / WEIGHTS)
    flip(bank.folder(bank.find("second").digest) / EVIDENCE)
    (bank.folder(bank.find("third").digest) / CARD).write_bytes(b"\xff")
    told = []

    near = neighbours(bank, base, told.append)

    assert [card.name for card in near.cards] == ["fourth"] and len(near.adapters) == len(near.evidence) == 1
    (text,) = told
    assert "first: its bytes are not those that were added" in text and "the data of second has changed" in text
    assert text.splitlines()[-1].startswith("3 damaged are not used")


def test_a_bank_of_nothing_but_damage_says_so(bank, base):
    for card in bank.cards():
        flip(bank.folder(card.digest) / WEIGHTS)

    with pytest.raises(JobError, match="has no adapter of tiny whose data is known"):
        neighbours(bank, base)


def test_an_adapter_of_another_model_is_not_used_whatever_its_card_says(bank, base, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    key = "base_model.model.model.other_proj.lora_"
    save_file({f"{key}A.weight": numpy.ones((2, 8)), f"{key}B.weight": numpy.ones((6, 2))}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    evidence = gather([(numpy.arange(9, dtype=numpy.int32), numpy.arange(9) > 5)], numpy.ones((20, 4), numpy.float32))
    bank.add(folder, AdapterCard("foreign", "tiny", base.digest), evidence)
    told = []

    near = neighbours(bank, base, told.append)

    assert [card.name for card in near.cards] == ["first", "second", "third", "fourth"]
    assert "foreign: " in told[0] and "belongs to another model" in told[0]


def test_a_merge_of_changed_bytes_is_refused_and_writes_nothing(bank, tmp_path):
    cards = [bank.find("first"), bank.find("second")]
    flip(bank.folder(cards[1].digest) / WEIGHTS)

    with pytest.raises(BankError, match="second: its bytes are not those"):
        merge_adapters(bank, cards, tmp_path / "out", MergeOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, 3e38])
def test_weights_that_are_no_numbers_are_refused(bank, tmp_path, value):
    folder = tmp_path / "sick"
    folder.mkdir()
    key = "base_model.model.model.q_proj.lora_"
    tensors = {f"{key}A.weight": numpy.ones((2, 8), numpy.float32), f"{key}B.weight": numpy.full((6, 2), value, "f4")}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 20}))

    with pytest.raises(Unusable, match=r"the weights of model\.q_proj are not finite"):
        bank.add(folder, AdapterCard("sick", "tiny", "b" * 64))
    assert len(bank.cards()) == 4


def test_a_sparse_adapter_that_lies_is_refused(tmp_path):
    from strategies.adapter_bank.sparse import read

    key, sound = "base_model.model.q_proj.shira_", {"r": 2, "peft_type": "SHIRA"}
    values, places = numpy.ones(8, numpy.float32), numpy.tile(numpy.arange(4, dtype=numpy.int32), (2, 2))
    folder = tmp_path / "one"
    folder.mkdir()

    def wrote(values=values, places=places, config=sound):
        save_file({f"{key}weight": values, f"{key}indices": places}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    assert read(wrote())["q_proj"].shape == (4, 4)
    for wrong in (
        {"config": {"r": 0}},
        {"config": {"r": "2"}},
        {"config": {"r": True}},
        {"config": {"r": 10**30}},
        {"config": {"r": 3}},
        {"places": places - 1},
        {"places": places + 1},
        {"places": places[:, :3]},
        {"places": places.astype(numpy.float32)},
        {"values": values[None]},
        {"values": values * numpy.nan},
        {"values": values.astype(numpy.int32)},
        {"values": values[:0], "places": places[:, :0]},
    ):
        with pytest.raises(Unusable):
            read(wrote(**wrong))
    with pytest.raises(Unusable):
        Adapter(folder)
