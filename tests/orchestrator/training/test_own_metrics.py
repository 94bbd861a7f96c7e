"""Metrics of a job's own in an evaluation: scored, explained, and never the end of a run."""

import json

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.lifecycle.validate import check
from orchestrator.runs.events import Note
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.quality import scores_of
from tests.orchestrator.conftest import JOB, Listener, train_here

OWN = """\
def each(predictions, references):
    return [0.5 for _ in references]

def number(predictions, references):
    return 0.25

def breaks(predictions, references):
    if predictions != references:
        raise RuntimeError("no such answer")
    return 1.0
"""


@pytest.fixture
def job(place, tmp_path):
    """The job of these tests in a folder of its own, with a module beside it."""

    def make(evaluation):
        for name in ("train.jsonl", "eval.jsonl"):
            (tmp_path / name).write_bytes((place / name).read_bytes())
        (tmp_path / "own.py").write_text(OWN)
        text = JOB.format(model=place / "model", runs=tmp_path / "runs")
        old = "eval: {max_new_tokens: 4, max_rows: 2, eval_steps: 1}"
        assert old in text
        (tmp_path / "job.yaml").write_text(text.replace(old, f"eval: {{max_new_tokens: 4, max_rows: 3, {evaluation}}}"))
        return read_job(tmp_path / "job.yaml")

    return make


def context_of(job, finished, metrics, notes):
    from dataclasses import replace

    plan = replace(finished.plan(), metrics=metrics)
    record = lambda event: notes.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    return WorkerContext(job, plan, plan.nodes[0], "", None, record=record)


def test_own_metrics_stand_beside_the_others_those_of_each_answer_with_their_scores(job, finished):
    made, notes = job("metrics: [exact_match, 'own:each', 'own:number', 'own:breaks']"), []

    found = scores_of(context_of(made, finished, tuple(made.spec.eval.metrics), notes), [("a", "a"), ("b", "c")])

    assert (found["exact_match"], found["each"], found["number"]) == (0.5, 0.5, 0.25)
    assert found["by_answer"] == {"exact_match": [1.0, 0.0], "each": [0.5, 0.5]}
    assert found["compared"]["each"] == "by own:each of the job's folder"
    assert "breaks" not in found
    assert notes == ["eval.metrics: own:breaks failed: RuntimeError: no such answer; it is not measured"]


def test_an_answer_is_found_in_both_texts_and_compared_as_a_number(job, finished):
    made = job("metrics: [exact_match, rouge_l], answer_pattern: gsm8k")
    pairs = [("so\n#### 1,000", "it is\n#### 1000.0"), ("it is\n#### 7", "it is\n#### 8"), ("1", "#### 1")]

    found = scores_of(context_of(made, finished, ("exact_match", "rouge_l"), []), pairs)

    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["by_answer"]["exact_match"] == [1.0, 0.0, 0.0]
    assert found["no_answer"] == 1
    assert found["rouge_l"] < 1
    assert "gsm8k" in found["compared"]["exact_match"] and "words" in found["compared"]["rouge_l"]


def test_a_run_keeps_the_module_scores_at_most_max_rows_and_has_intervals(job, monkeypatch):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", train_here)

    run = path_of_a_job.submit(job("metrics: ['own:each', exact_match]"), Listener(), "own")

    assert (run.path / "metrics/own.py").read_text() == OWN
    result = run.result()
    assert result.after.scores["each"] == 0.5
    assert len(result.after.by_answer["each"]) == result.after.answers == 3
    assert result.gains["each"].difference.value == 0.0
    assert json.loads((run.path / "plan.json").read_text())["metrics"] == ["own:each", "exact_match"]


@pytest.mark.parametrize(
    ("evaluation", "mistake"),
    [
        ("metrics: ['gone:each']", "gone:each: the module cannot be imported"),
        ("answer_pattern: gsm8k", "finds an answer in none of the 3 held-out references"),
        ("metrics: [rouge_l], answer_pattern: last_number", "no metric here compares whole answers"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(job, evaluation, mistake):
    with pytest.raises(JobError, match=mistake):
        prepare(job(evaluation), lambda text: None)


def test_validate_names_a_metric_that_cannot_be_imported(job):
    with pytest.raises(JobError, match="own:gone: the module has no function gone"):
        check(job("metrics: ['own:gone']"))
