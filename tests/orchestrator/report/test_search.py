"""The report of a search: what is recommended, what was tried and how the trials compare."""

import pytest

from orchestrator.language.catalogue import translator
from orchestrator.report.blocks import Facts, Figure, Paragraph, Table
from orchestrator.report.search import report_of_search
from tests.orchestrator.search.test_conclusion import concluded


def sections(folder, lang="en"):
    return {one.title: one.blocks for one in report_of_search(folder, folder.job(), lang).sections}


def of_kind(kind, blocks):
    return [block for block in blocks if isinstance(block, kind)]


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_every_trial_has_a_row_and_the_recommended_one_stands_out(tmp_path, lang):
    folder, _ = concluded(
        tmp_path, (0, {"slower": 2.0}), (1, {"loss": 0.9}), (0, {"status": "stopped", "loss": 3.0, "slower": 4.0})
    )

    found = sections(folder, lang)

    title = translator(lang)("Trials")
    (table,) = of_kind(Table, found[title])
    assert [row[0] for row in table.rows] == ["0", "1", "2"] and table.marked == (1,)
    assert [row[3] for row in table.rows] == ["1.0000", "0.9000", "3.0000"]
    assert {figure.name for figure in of_kind(Figure, found[title])} == {
        "pareto-memory", "pareto-quality", "predicted"
    }  # fmt: skip


def test_notes_name_the_front_and_what_was_stopped(tmp_path):
    folder, _ = concluded(tmp_path, (0, {"slower": 2.0, "loss": 0.99}), (1, {}), (0, {"status": "stopped"}))

    found = sections(folder)

    (table,) = of_kind(Table, found["Trials"])
    assert [row[-1] for row in table.rows] == ["on the front", "recommended, on the front", "stopped early"]
    (facts,) = of_kind(Facts, found["Recommendation"])
    assert dict(facts.facts)["held-out loss"] == "1.0000" and dict(facts.facts)["cost"].endswith(" EUR")


def test_a_search_that_has_not_ended_says_its_state_and_draws_nothing(tmp_path):
    folder, _ = concluded(tmp_path, (0, {}), (1, {}))
    folder.take_back("summary.json")

    found = sections(folder)

    assert found["Recommendation"] == [Paragraph("interrupted")]
    assert not of_kind(Figure, found["Trials"]) and of_kind(Table, found["Trials"])[0].rows == []
