"""The quick start as the README shows it: a real model goes from no right answer to most of them."""

import json

import pytest

from tests.conftest import needs_smollm2
from tests.processes import orchestrator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    needs_smollm2,
]


def submit(recipe, folder):
    done = orchestrator("submit", recipe, "--json", cwd=folder, check=0, OMP_NUM_THREADS=None)
    return json.loads(done.stdout)["result"]


def test_quick_start_lifts_exact_match_from_none_to_most(tmp_path):
    result = submit("quickstart", tmp_path)

    assert result["before"]["exact_match"] <= 0.02
    assert result["after"]["exact_match"] >= 0.6
    assert result["after"]["eval_loss"] < 0.1 * result["before"]["eval_loss"]


def test_classification_learns_the_label_words(tmp_path):
    result = submit("classify", tmp_path)

    assert result["before"]["accuracy"] <= 0.5
    assert result["after"]["accuracy"] >= 0.6  # measured: 0.762
    assert result["after"]["macro_f1"] >= 0.6
