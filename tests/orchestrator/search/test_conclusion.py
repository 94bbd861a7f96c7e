"""A search's result as it is written down: the recommendation, and the job that carries it out."""

import json

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.runs.search_folder import SearchFolder
from orchestrator.search.conclusion import conclude
from tests.orchestrator.search.test_after_trials import trial
from tests.orchestrator.search.test_before_trials import planning

TEXT = "model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 1024}\nsearch: {quality_tolerance: 0.1}\n"
POINTS = [{"method.type": "lora", "data.packing": packing} for packing in (True, False)]


def concluded(place, *trials):
    """A search with these trials of POINTS, as it is after its end: (point number, options of a trial)."""
    with SearchFolder.take(place, "search-x") as folder:
        folder.begin({"origin.json": json.dumps({"folder": str(place)}), "asked.yaml": TEXT, "search.yaml": TEXT})
    plans = planning(folder.job().spec)
    folder.keep("plan.json", plans.real(POINTS[0]).to_json())
    for number, (point, options) in enumerate(trials):
        folder.add(trial(number, POINTS[point], None, **options))
    conclude(folder, folder.job(), plans)
    return folder, plans


def test_what_is_recommended_is_a_job_to_submit(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    folder, plans = concluded(tmp_path, (0, {"slower": 2.0}), (1, {"slower": 1.0, "loss": 1.01}))

    summary = folder.summary()
    best = summary.recommended
    job = read_job(folder.path / "recommended.yaml")

    assert summary.best_trial == 1 and best.point == POINTS[1] and (best.eval_loss, best.lack) == (1.01, 1.01)
    assert best.total_s == pytest.approx(plans.real(POINTS[1]).total_s)
    assert (job.spec.method.type, job.spec.data.packing, job.spec.train.global_batch_size) == ("lora", False, 16)
    assert "corrected by trial 1" in job.text and job.spec.data.train == str(tmp_path / "a.jsonl")


def test_a_search_without_a_whole_trial_recommends_nothing_and_says_why(tmp_path):
    folder, _ = concluded(tmp_path, (0, {"status": "stopped"}))

    summary = folder.summary()

    assert summary.recommended is summary.best_trial is None
    assert "raise search.budget" in summary.why and [one.status for one in summary.outcomes] == ["stopped"]
    assert not (folder.path / "recommended.yaml").exists()


def test_before_its_end_a_search_has_no_summary_and_a_lost_trial_is_named(tmp_path):
    folder, _ = concluded(tmp_path, (0, {}), (1, {}))
    (folder.path / "trials.jsonl").unlink()

    with pytest.raises(JobError, match=r"trials.jsonl: trial 0, listed in summary.json, is missing"):
        folder.summary()
    folder.take_back("summary.json")

    assert folder.summary() is None
