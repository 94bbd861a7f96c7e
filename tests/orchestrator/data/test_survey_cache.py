"""Data that did not change is not looked at again; whatever the findings follow from makes another entry."""

import os

import pytest

from orchestrator.data import survey_cache
from orchestrator.data.survey_cache import SurveyFindings, entry_of
from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle import validate
from tests.conftest import rows, write_jsonl


@pytest.fixture
def job_at(tmp_path, model_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "a.jsonl", rows(6))
    write_jsonl(tmp_path / "b.jsonl", rows(3, start=50))

    def job(more="", train="a.jsonl", template="tokenizer"):
        data = f"data: {{train: {train}, eval: b.jsonl, chat_template: {template}}}\n"
        return parse_job(f"model: {{model_name_or_path: {model_folder}}}\n{data}{more}", tmp_path)

    return job


@pytest.fixture
def looks(monkeypatch):
    """How often rows were looked at."""
    found, real = [], validate._survey_rows
    monkeypatch.setattr(validate, "_survey_rows", lambda *given: found.append(given) or real(*given))
    return found


def test_a_second_look_at_the_same_rows_finds_the_same_and_reads_none(job_at, looks):
    first, second = validate.check(job_at()), validate.check(job_at())

    assert first == second and first["statistics"]["data.train"]["rows"] == 6
    assert len(looks) == 1


def test_rows_with_mistakes_are_known_too(job_at, looks, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}])

    said = []
    for _ in range(2):
        with pytest.raises(JobError) as error:
            validate.check(job_at())
        said.append(error.value.mistakes)

    assert said[0] == said[1] and said[0] and len(looks) == 1


@pytest.mark.parametrize("change", ["rows", "the same size", "template", "tokenizer", "options", "exact"])
def test_what_the_findings_follow_from_is_looked_at_again(job_at, looks, tmp_path, model_folder, change):
    validate.check(job_at())
    file, given = tmp_path / "a.jsonl", {}
    if change == "rows":
        write_jsonl(file, rows(7))
    elif change == "the same size":
        seen, text = file.stat(), file.read_text()
        file.write_text(text.replace("0", "1", 1))
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    elif change == "template":
        (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
        given = {"template": "t.jinja"}
    elif change == "tokenizer":
        (model_folder / "tokenizer_config.json").touch()
    elif change == "options":
        given = {"more": "train: {seed: 3}\n"}

    validate.check(job_at(**given), exact=change == "exact")

    assert len(looks) == 2


def test_an_entry_that_is_damaged_is_made_anew(job_at, looks, tmp_path):
    first = validate.check(job_at())
    (entry,) = (tmp_path / "cache").rglob("surveys/*.json")
    entry.write_text(entry.read_text()[:40])

    assert validate.check(job_at()) == first and len(looks) == 2


def test_old_entries_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(survey_cache, "_KEPT", 2)
    for number in range(4):
        survey_cache.keep(tmp_path / f"{number}.json", SurveyFindings({}, {}, [str(number)], [], []))
        os.utime(tmp_path / f"{number}.json", (number, number))

    assert sorted(file.stem for file in tmp_path.glob("*.json")) == ["2", "3"]


def test_rows_of_a_hub_have_no_entry(job_at, model_folder):
    assert entry_of(job_at(train="someone/chats"), model_folder, 64, 1000) is None
    assert entry_of(job_at(), model_folder, 64, 1000)
