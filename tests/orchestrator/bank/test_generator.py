"""When a bank's generator is used, and how a task unlike the bank's is recognised."""

import json
from dataclasses import replace

import numpy
import pytest

from orchestrator.bank.generator import FILE, Fitted, learned_start, read_generator, refusal_of
from orchestrator.bank.library import Base, neighbours
from orchestrator.bank.likeness import likeness
from orchestrator.errors import JobError
from orchestrator.job.sections.search import BankSection
from strategies.adapter_bank.shares.generator import FitSetting

LOSSES = {"linear": 1.5, "decoder": 1.6, "nearest": 2.0, "uniform": 2.1, "shuffled": 1.9, "learned": 1.2, "adapt": 1.3}


def fitted_to(near, base: Base) -> Fitted:
    digests = tuple(sorted(card.digest for card in near.cards))
    return Fitted(base.digest, digests, "linear", FitSetting("parts", 1.0, 2), 0.8, LOSSES, None)


def keep(bank, fitted) -> None:
    values = {**vars(fitted), "setting": vars(fitted.setting)}
    (bank.path / FILE).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"linear": 2.05}, "without labelled rows its loss is 2.050, that of nearest 2.000"),
        ({"shuffled": 1.5}, "that of shuffled 1.500"),
        ({"learned": 1.3}, "with labelled rows its loss is 1.300, that of adapt 1.300"),
    ],
)
def test_a_generator_is_offered_only_where_it_beats_what_it_must(changed, reason):
    found = refusal_of(LOSSES | changed, "linear")

    assert found is None if reason is None else reason in found


def test_a_generator_gives_each_map_shares_that_sum_to_one(bank, base):
    near = neighbours(bank, base)
    keep(bank, fitted_to(near, base))

    start = learned_start(bank, base, near, near.evidence[0])

    assert set(start.by_map) == {"model.q_proj"} and len(start.shares_N) == 4
    assert read_generator(bank) == fitted_to(near, base)


def test_a_generator_of_other_adapters_or_one_that_lost_is_refused(bank, base):
    near = neighbours(bank, base)
    query, fitted = near.evidence[0], fitted_to(near, base)
    for wrong, reason in (
        (None, "has none. Run `orchestrator bank generator fit`"),
        (replace(fitted, adapters=fitted.adapters[1:]), "other adapters than it holds now"),
        (replace(fitted, refusal="it lost"), "is not offered .*: it lost. Use rule: auto"),
    ):
        if wrong is not None:
            keep(bank, wrong)
        with pytest.raises(JobError, match=reason):
            learned_start(bank, base, near, query)
    (bank.path / FILE).write_text('{"variant": "linear"}')
    with pytest.raises(JobError, match="Run `orchestrator bank generator fit` again"):
        read_generator(bank)


def test_a_data_set_farther_than_the_banks_own_is_like_none(bank, base):
    near = neighbours(bank, base)
    several = near.at([0, 1, 2, 3, 0, 1])
    asked = BankSection()

    close = likeness(numpy.array([0.01, 0.2, 0.3, 0.4, 0.4, 0.5]), several, asked)
    far = likeness(numpy.array([0.66, 0.67, 0.68, 0.68, 0.68, 0.69]), several, asked)

    assert not close.is_like_none and close.nearest == "first"
    assert far.is_like_none and "like none in the bank" in far.sentence and far.as_far == 0
    assert likeness(numpy.array([0.66, 0.67]), near.at([0, 1]), asked).as_far is None
