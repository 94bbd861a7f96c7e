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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def quick(folder):
    return submit("quickstart", folder)


def test_quick_start_lifts_exact_match_from_none_to_most(quick):
    result = quick

    assert result["before"]["exact_match"] <= 0.02
    assert result["after"]["exact_match"] >= 0.6
    assert result["after"]["eval_loss"] < 0.1 * result["before"]["eval_loss"]


def test_its_adapter_gives_the_same_json_in_llama_cpp(quick, folder):
    pytest.importorskip("xllamacpp")

    done = orchestrator("export", "latest", "--gguf", "--check", "--out", "gguf", "--json", cwd=folder, check=0)

    found = json.loads(done.stdout)["check"]
    assert found["engine"] == "llama.cpp" and found["compared"] >= 3
    assert found["equal"] >= found["compared"] - 1, found["differ"]  # 76 of 80 are (LOG.md)
    assert all(json.loads(one["found"]) for one in found["differ"])


def test_classification_learns_the_label_words(tmp_path):
    result = submit("classify", tmp_path)

    assert result["before"]["accuracy"] <= 0.5
    assert result["after"]["accuracy"] >= 0.6  # measured: 0.762
    assert result["after"]["macro_f1"] >= 0.6
