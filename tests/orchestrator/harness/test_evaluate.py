"""Public tasks over a run's base and tuned model: task files with local rows, by the harness itself."""

import importlib.util
import json

import pytest

from orchestrator.errors import JobError, MissingExtra
from orchestrator.harness.evaluate import evaluate_tasks, idle_node
from orchestrator.harness.wish import TaskWish
from tests.cli import called
from tests.conftest import rows, write_jsonl

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs pip install -e '.[eval]': lm_eval is not installed"
)
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def node(name, state="alive", in_use=0.0, does=(), slots=1.0):
    return {"name": name, "state": state, "slots_in_use": in_use, "does": list(does), "slots": slots}


def test_an_idle_machine_is_one_that_does_nothing_with_a_slot_first():
    nodes = [
        node("lost", state="lost"),
        node("training", in_use=1.0, does=["trains"]),
        node("head", slots=0.0),
        node("idle"),
    ]

    assert idle_node(nodes) == "idle"
    assert idle_node(nodes[:3]) == "head"
    assert idle_node(nodes[:2]) is None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_the_line_to_type_is_said(finished):
    with pytest.raises(MissingExtra, match=r"pip install.*\[eval\]"):
        evaluate_tasks(finished, TaskWish(("gsm8k",)), lambda text: None)


@pytest.mark.parametrize(
    "arguments",
    [("--limit", 3), ("--include-path", "."), ("--tasks", "a", "--data", "x.jsonl"), ("--chat",), ("--tasks", " , ")],
)
def test_options_of_tasks_are_refused_without_tasks_and_beside_rows(finished, arguments):
    done = called("evaluate", finished.path, *arguments, cwd=finished.path.parent, check=2)

    assert "--tasks" in done.output


@needs_harness
def test_local_tasks_are_measured_kept_and_shown(finished, tmp_path, put_back):
    asked = [{**row, "choices": [row["completion"], "small bird", "the cat"]} for row in rows(12)]
    file = write_jsonl(tmp_path / "rows.jsonl", asked)
    (tmp_path / "colours.yaml").write_text(TASK.format(file=file))

    (found,) = evaluate_tasks(finished, TaskWish(("colours",), str(tmp_path), limit=8), lambda text: None)

    assert (found.task, found.metric, found.rows, found.limit) == ("colours", "acc", 8, 8)
    assert 0 <= found.before <= 1 and 0 <= found.after <= 1
    assert found.low <= found.difference <= found.high
    assert found.is_paired
    kept = json.loads((finished.path / "lm_eval.json").read_text())["tasks"]
    assert kept[0]["after"] == found.after

    with pytest.raises(JobError, match="nothing is no task"):
        evaluate_tasks(finished, TaskWish(("nothing",), str(tmp_path)), lambda text: None)
