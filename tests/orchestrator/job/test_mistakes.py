"""What is wrong in a job file, for a program: each mistake with its line, key, value and fix."""

import json

import pytest

from orchestrator.job.hub import known_model_like
from tests.cli import called

JOB = """model: {model_name_or_path: meta-lama/Llama-3.2-1B}
data:
  train: rows.jsonl
  eval: nowhere.jsonl
"""


def mistakes(folder, text):
    (folder / "job.yaml").write_text(text)
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    found = json.loads(called("validate", "job.yaml", "--json", cwd=folder, check=2).stdout)["mistakes"]
    assert all({"line", "key", "value", "fix", "text"} == set(one) for one in found)
    return [(one["line"], one["key"], one["value"], one["fix"]) for one in found]


def test_mistakes_of_the_file_have_their_parts(tmp_path):
    found = mistakes(tmp_path, JOB + "train: {learning_rate: fast, sead: 3}\nlogging_steps: 5\n")

    assert found == [
        (5, "train.learning_rate", "fast", "it should be a valid number"),
        (5, "train.sead", 3, "did you mean train.seed?"),
        (6, "logging_steps", 5, "every step is logged; remove it"),
    ]


def test_mistakes_of_what_the_file_names_have_the_line_it_is_named_in(tmp_path):
    (one, other) = mistakes(tmp_path, JOB)

    assert one[:3] == (4, "data.eval", "nowhere.jsonl")
    assert other == (
        1,
        "model.model_name_or_path",
        "meta-lama/Llama-3.2-1B",
        "did you mean meta-llama/Llama-3.2-1B?",
    )


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen2.5-0.5B-Instuct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("mistralai/Mistral-7B-Insruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("Qwen/Qwen2.5-0.5B-Instruct", None),
        ("qwen/qwen2.5-0.5b-instruct", None),
        ("Qwen/Qwen2.5-0.5B-Instruct-AWQ", None),
        ("unsloth/Llama-3.2-1B", None),
        ("meta-llama/Llama-3.2-2B", None),
        ("google/gemma-2-2b-pt", None),
    ],
)
def test_a_misspelt_name_of_a_known_model_is_told_and_a_name_of_its_own_is_not(name, known):
    assert known_model_like(name) == known
