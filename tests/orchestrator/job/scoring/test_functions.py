"""`module:function` as a metric: found in the job's folder, tried before anything starts, refused with the fix."""

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.job.scoring.functions import FOLDER, call, check, files_of, keep_files, load

MODULE = """\
def each(predictions, references):
    return [float(a == b) for a, b in zip(predictions, references)]

def mean(predictions, references):
    return sum(each(predictions, references)) / len(references)

def points(predictions, references):
    return 12.5

def fails(predictions, references):
    return references[1000]

def short(predictions, references):
    return [1.0]

def text(predictions, references):
    return "good"

def of_one(predictions):
    return 1.0
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_scores.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    package = tmp_path / "pack" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "pack/__init__.py").write_text("")
    (package / "__init__.py").write_text("from pack.inner.own import score\n")
    (package / "own.py").write_text("def score(a, b):\n    from . import own\n    return float(own is not None)\n")
    return tmp_path


def test_scores_of_each_answer_have_a_mean_and_those_of_all_stand_alone(folder):
    each, mean = (load(f"my_scores:{name}", folder) for name in ("each", "mean"))

    assert call("m:each", each, ["a", "b"], ["a", "c"]).by_answer == [1.0, 0.0]
    assert call("m:each", each, ["a", "b"], ["a", "c"]).mean == 0.5
    assert call("m:mean", mean, ["a", "b"], ["a", "c"]).by_answer is None


def test_a_runs_folder_gets_the_module_or_the_whole_package(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    keep_files(["exact_match", "my_scores:each", "pack.inner:score", "json:dumps"], folder, run)

    kept = sorted(path.relative_to(run / FOLDER).as_posix() for path in run.rglob("*.py"))
    assert kept == ["my_scores.py", "pack/__init__.py", "pack/inner/__init__.py", "pack/inner/own.py"]
    assert call("p:s", load("pack.inner:score", run / FOLDER), ["a"], ["b"]).mean == 1.0


def test_two_jobs_may_have_a_module_of_the_same_name(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "my_scores.py").write_text("def each(a, b):\n    return 0.25\n")

    assert load("my_scores:each", folder)(["a"], ["a"]) == [1.0]
    assert load("my_scores:each", other)(["a"], ["a"]) == 0.25


@pytest.mark.parametrize(
    ("metric", "mistake"),
    [
        ("gone:score", "gone: the module cannot be imported: ModuleNotFoundError"),
        ("broken:score", "no_such_package"),
        ("my_scores:gone", "the module has no function gone"),
        ("my_scores:of_one", r"it is called as of_one\(predictions, references\)"),
        ("my_scores:points", "gave 12.5; it should give a number from 0 to 1"),
        ("my_scores:fails", "my_scores:fails failed: IndexError"),
        ("my_scores:short", "gave 1 scores for 2 answers"),
        ("my_scores:text", "gave 'good'; it should give a number"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused_before_anything_starts(folder, metric, mistake):
    with pytest.raises(JobError, match=mistake.replace("gone: the", "gone:score: the")):
        check([metric], folder, ["yes", "no"])


def test_all_that_are_wrong_are_named_at_once(folder):
    with pytest.raises(JobError) as error:
        check(["my_scores:gone", "my_scores:each", "broken:score"], folder, ["yes"])

    assert len(error.value.mistakes) == 2


@pytest.mark.parametrize(
    ("metrics", "mistake"),
    [
        ("[exact_match, 'mine:exact_match']", "of the name exact_match already"),
        ("['mine:rows']", "of the name rows already"),
        ("['orchestrator.x:score']", "belongs to this program"),
        ("['mine.score']", "eval.metrics"),
        ("['a b:score']", "eval.metrics"),
    ],
)
def test_names_that_cannot_be_are_mistakes_of_the_job_file(metrics, mistake):
    text = f"model: {{model_name_or_path: m}}\ndata: {{train: t.jsonl, eval: e.jsonl}}\neval: {{metrics: {metrics}}}\n"
    with pytest.raises(JobError, match=mistake):
        parse_job(text, folder=None)


def test_an_installed_module_needs_no_file(folder):
    assert files_of(["difflib:SequenceMatcher"], folder) == {}
    assert callable(load("statistics:fmean", folder))
