"""Losses of tasks that were left out are kept one by one, and what was stopped resumes."""

import pytest

from orchestrator.bank.evaluate import gains, summary
from orchestrator.bank.left_out import measure_each, names_of, spread
from orchestrator.errors import JobError
from strategies.adapter_bank.card import AdapterCard

NAMES = {4: "first", 7: "second", 9: "third"}


def loss_of(place: int) -> dict[str, float]:
    return {"base": 2.0, "own": 1.0, "adapt": place / 10}


def test_what_was_stopped_resumes_with_the_tasks_that_are_left(tmp_path):
    file, measured, said = tmp_path / "partial.json", [], []

    def until_the_third(place):
        if place == 9:
            raise KeyboardInterrupt
        measured.append(place)
        return loss_of(place)

    with pytest.raises(KeyboardInterrupt):
        measure_each(file, {"rows": 4}, NAMES, until_the_third, said.append)
    found = measure_each(file, {"rows": 4}, NAMES, lambda place: measured.append(place) or loss_of(place), said.append)

    assert measured == [4, 7, 9] and list(found) == ["first", "second", "third"]
    assert found["second"] == loss_of(7) and not file.exists()
    assert "2 of 3 tasks were measured before" in said[2] and "3/3 third: base 2.000" in said[3]


@pytest.mark.parametrize("content", ["{", "[]", '{"question": {"rows": 4}, "tasks": 3}', '{"question": {"rows": 8}}'])
def test_a_file_of_another_question_or_a_damaged_one_holds_nothing(tmp_path, content):
    file, measured = tmp_path / "partial.json", []
    file.write_text(content)

    measure_each(file, {"rows": 4}, NAMES, lambda place: measured.append(place) or loss_of(place), print)

    assert measured == [4, 7, 9]


def test_adapters_of_one_name_are_different_tasks():
    cards = [
        AdapterCard(name, "tiny", "b" * 64, digest=digit * 64) for name, digit in (("a", "1"), ("b", "2"), ("a", "3"))
    ]

    assert names_of(cards, [0, 1, 2]) == {0: "a 11111111", 1: "b", 2: "a 33333333"}
    assert names_of(cards, [0, 1]) == {0: "a", 1: "b"}


def test_tasks_are_spread_over_the_bank():
    assert spread([2, 3, 5, 7, 11, 13], 3) == [2, 5, 11] and spread([2, 3], 3) == [2, 3] == spread([2, 3], None)


def test_a_task_whose_own_adapter_gains_nothing_has_no_share_of_it_and_is_named():
    tasks = {
        "good": {"base": 2.0, "own": 1.0, "nearest": 1.8, "adapt": 1.5},
        "idle": {"base": 2.0, "own": 2.0, "nearest": 2.0, "adapt": 1.0},
    }
    said = []

    found = summary(tasks, said.append)

    assert found["adapt"]["gain"] == 0.5 and found["adapt"]["loss"] == 1.25 and "idle" in said[0]
    assert gains({"tasks": tasks, "settings": found})["adapt"] == {"good": 0.5}
    with pytest.raises(JobError, match="train the bank's adapters for longer"):
        summary({"idle": tasks["idle"]}, said.append)
