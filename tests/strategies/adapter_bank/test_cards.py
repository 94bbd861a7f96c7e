"""Cards, configurations, evidence and names of any kind: refused in a sentence, or read as PEFT reads them."""

import json
import random
import time

import numpy
import pytest

from strategies.adapter_bank.adapter import CONFIG, Adapter, Unusable
from strategies.adapter_bank.card import CARD, AdapterCard, BankError, card_of
from strategies.adapter_bank.evidence import Evidence
from tests.strategies.adapter_bank.parts import MAP, SETTINGS, an_adapter, mutated


def test_no_card_ends_in_a_traceback(bank):
    folder = bank.folder(bank.find("task-0").digest)
    sound = json.loads((folder / CARD).read_text())
    draw, shown = random.Random(1), 0

    for _ in range(400):
        (folder / CARD).write_bytes(mutated(draw, sound))
        contents = bank.contents()
        assert len(contents.cards) + len(contents.damaged) == 2
        for card in contents.cards:
            shown += len(card.loss_change) > 0
            json.dumps(card.as_dict())
        assert all("\x1b" not in str(one) and "\n" not in str(one) for one in contents.damaged)
        try:
            bank.find("task-0")
        except BankError:
            continue


def test_no_configuration_ends_in_a_traceback(tmp_path):
    folder = an_adapter(tmp_path / "one")
    full = {**SETTINGS, "bias": "none", "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False}
    full |= {"base_model_name_or_path": "tiny", "init_lora_weights": True, "modules_to_save": None}
    draw, refused = random.Random(2), 0

    for _ in range(700):
        (folder / CONFIG).write_bytes(mutated(draw, full))
        try:
            adapter = Adapter(folder)
            assert all(numpy.isfinite(target.scale) for target in adapter.targets.values())
            assert isinstance(adapter.base_name, str) and adapter.ranks == [2] and adapter.num_parameters == 28
        except Unusable:
            refused += 1

    assert 100 < refused < 700


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern", "target_modules"])
@pytest.mark.parametrize("pattern", ["(.|.)*[^j]", "(", "*", "(?P<a>.)(?P<a>.)", "(" * 5000, "(?:x)" * 300])
def test_a_pattern_that_never_ends_or_compiles_is_refused_in_time(tmp_path, field, pattern):
    value = pattern if field == "target_modules" else {pattern: 3}
    folder = an_adapter(tmp_path / "one", settings={**SETTINGS, field: value})
    began = time.process_time()

    with pytest.raises(Unusable, match="pattern"):
        Adapter(folder)

    assert time.process_time() - began < 10


@pytest.mark.parametrize("pattern", ["(a|a|_|.)*$X", "((.*)*)*Y", "x" * 2000])
def test_a_pattern_that_fits_nothing_is_passed_over_in_time(tmp_path, pattern):
    began = time.process_time()

    adapter = Adapter(an_adapter(tmp_path / "one", settings={**SETTINGS, "alpha_pattern": {pattern: 3}}))

    assert adapter.targets[MAP].scale == 2 and time.process_time() - began < 10


def test_patterns_mean_what_they_mean_to_peft(tmp_path):
    settings = {**SETTINGS, "alpha_pattern": {r".*\.k_proj": 1, r"^model\.layers\.[0-3]\..*q_proj": 32}}

    adapter = Adapter(an_adapter(tmp_path / "one", settings=settings))

    assert adapter.targets[MAP].scale == 16
    assert Adapter(an_adapter(tmp_path / "two", settings={"peft_type": "LORA", "r": 2})).targets[MAP].scale == 4


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_ids": numpy.array([5, 99], numpy.int32)},
        {"tokens_ids": numpy.array([-1, 5], numpy.int32)},
        {"tokens_ids": numpy.array([5, 5], numpy.int32)},
        {"tokens_counts": numpy.array([1, numpy.nan], numpy.float32)},
        {"tokens_counts": numpy.array([1], numpy.float32)},
        {"answers_ids": numpy.zeros((2, 2), numpy.int32)},
        {"sketch": numpy.full((2, 4), numpy.inf, numpy.float16)},
        {"sketch": numpy.zeros((0, 4), numpy.float16)},
        {"sketch": numpy.zeros(4, numpy.float16)},
        {"sizes": numpy.array([10**15, 3])},
        {"sizes": numpy.array([0, 3])},
        {"sizes": numpy.array([20])},
        {"sizes": numpy.array([20.0, 3.0])},
        {"sizes": None},
    ],
)
def test_evidence_that_cannot_be_is_refused(change):
    arrays = {"tokens_ids": numpy.array([1, 5], numpy.int32), "tokens_counts": numpy.ones(2, numpy.float32)}
    arrays |= {"answers_ids": numpy.array([5], numpy.int32), "answers_counts": numpy.ones(1, numpy.float32)}
    arrays |= {"sketch": numpy.zeros((2, 4), numpy.float16), "sizes": numpy.array([20, 3])}
    assert Evidence.from_arrays(arrays).vocabulary == 20

    with pytest.raises(ValueError):
        Evidence.from_arrays({key: value for key, value in (arrays | change).items() if value is not None})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "x" * 64, "a\nb", "a\0b", "a b", "\ud800", "語" * 64])
def test_names_follow_the_pattern(bank, tmp_path, name):
    an_adapter(tmp_path / "new", 9)

    with pytest.raises(BankError, match="a name has 1 to 63"):
        bank.add(tmp_path / "new", AdapterCard(name, "tiny", "b" * 64))
    assert len(bank.cards()) == 2


def test_letters_of_every_script_are_names(bank, tmp_path):
    an_adapter(tmp_path / "new", 9)

    bank.add(tmp_path / "new", AdapterCard("要約_v1.2-é", "tiny", "b" * 64))

    assert bank.find("要約_v1.2-é") == bank.cards()[-1]


def test_a_digest_is_asked_for_by_its_digits_alone(bank):
    for which in ("______", "%%%%%%", "../../..", "*" * 8, "\0" * 8, "\ud800" * 8, "x" * 10_000):
        with pytest.raises(BankError, match="has no adapter"):
            bank.find(which)


@pytest.mark.parametrize("run_id", ["../x", "/etc", ".", "..", "", "a\0b", ".hidden", "x" * 300])
def test_a_run_of_a_card_names_a_folder_and_no_path(run_id):
    with pytest.raises(BankError, match="run_id"):
        card_of(AdapterCard("x", "tiny", "b" * 64, digest="a" * 64, run_id=run_id).as_dict())
