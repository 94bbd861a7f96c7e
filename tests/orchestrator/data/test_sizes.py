import json
import shutil

import pytest

from orchestrator.data.dataset import TokenizeOptions, build
from orchestrator.data.readers.sources import rows_of, sources_of
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.sizes import rough_lengths
from orchestrator.job.job_file import read_job
from tests.conftest import CHAT_TEMPLATE

GOOD = {"prompt": "red green", "completion": "blue"}
BROKEN = [
    '{"prompt": "red"}',
    '{"prompt": "red", "completion": NaN}',
    '{"prompt": "red", "completion": "\\ud83d"}',
    '{"prompt": "red", "completion": "blue", "label": false}',
    "no JSON",
    "[1]",
]


@pytest.fixture
def job(tmp_path, tokenizer_folder):
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "job.yaml").write_text(
        "model: {model_name_or_path: ./model}\ndata: {train: train.jsonl, strict: false}\n"
    )
    return read_job(tmp_path / "job.yaml")


def test_a_plan_without_torch_counts_the_rows_that_are_trained(job, tmp_path, tokenizer):
    lines = [json.dumps(GOOD)] * 2500
    for number, line in enumerate(BROKEN * 10):
        lines.insert(number * 41, line)
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")

    lengths, supervised = rough_lengths(job, 64)

    rows = (row for found in sources_of(job, "train.jsonl", "data.train") for row in rows_of(job, *found))
    exact = build(
        rows, Renderer(tokenizer, CHAT_TEMPLATE), TokenizeOptions("auto", "", 64, "truncate", False), tmp_path / "out"
    )
    assert len(lengths) == len(exact) == 2500
    assert exact.statistics.rejected == len(BROKEN) * 10
    assert 0 < supervised < sum(lengths)


def test_thoughts_calls_and_tools_take_room_and_turns_that_are_not_learnt_are_not_counted(job, tmp_path):
    def measure(turn, **more):
        row = {
            "messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue", **turn}],
            **more,
        }
        row["messages"] += [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}]
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        (length,), supervised = rough_lengths(job, 4096)
        return length, supervised

    plain = measure({})

    assert measure({"reasoning_content": "red " * 20})[0] > plain[0] + 10
    assert measure({"tool_calls": [{"name": "cat", "arguments": {"a": 1}}]})[0] > plain[0] + 5
    assert measure({}, tools=[{"name": "cat", "description": "red " * 20}])[0] > plain[0] + 10
    assert measure({"train": False})[0] == plain[0] and measure({"train": False})[1] < plain[1]
