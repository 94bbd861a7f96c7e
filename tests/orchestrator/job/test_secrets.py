"""Secrets of a job: named, filled in where the job runs, and never shown."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job
from orchestrator.job.secrets import (
    SecretMissing,
    find_secrets,
    notices,
    refuse_written_out,
    secret_names,
    uri_mistake,
    with_values,
)

GOOD = "model: {model_name_or_path: m}\ndata: {train: a.jsonl}\n"
URI = "postgresql://${USER_NAME}:${PASSWORD}@db/${NAME}"
WRITTEN_OUT = {
    "name": "a",
    "tracking": {"mlflow_uri": "postgresql://ann:pa55@db/x"},
    "data": {"train": ["rows.jsonl", "https://host/rows.jsonl?token=pa55"]},
}


def test_each_variable_that_a_job_names_is_named_once():
    job = parse_job(f"{GOOD}cluster: {{secrets: [HF_TOKEN, PASSWORD]}}\ntracking: {{mlflow_uri: '{URI}'}}\n", Path("/"))
    untracked = parse_job(f"{GOOD}tracking: {{mlflow_uri: '{URI}', report_to: []}}\n", Path("/"))

    assert secret_names(job.spec) == ["HF_TOKEN", "PASSWORD", "USER_NAME", "NAME"]
    assert secret_names(untracked.spec) == []


@pytest.mark.parametrize("password", ["p@ss/w:rd?#", "${HOME}", "%41", "日本", "a b"])
def test_a_password_of_any_signs_arrives_as_it_is(password):
    filled = with_values(URI, {"USER_NAME": "ann@team", "PASSWORD": password, "NAME": "mlflow"})

    parts = urlsplit(filled)
    assert (unquote(parts.username), unquote(parts.password)) == ("ann@team", password)
    assert (parts.hostname, parts.path) == ("db", "/mlflow")


def test_a_variable_that_is_not_set_is_named_and_no_value_of_another_shown():
    with pytest.raises(SecretMissing, match=r"tracking.mlflow_uri names NAME, which is not set here. Export it") as one:
        with_values(URI, {"USER_NAME": "ann", "PASSWORD": "pa55"})

    assert "pa55" not in str(one.value)


def test_what_is_written_out_is_found_by_its_key_at_any_depth():
    assert find_secrets(WRITTEN_OUT) == ["tracking.mlflow_uri", "data.train"]
    assert find_secrets({"tracking": {"mlflow_uri": URI}, "seed": 1, "names": [None, "http://host:5000"]}) == []


def test_a_notice_and_a_refusal_say_what_to_write_in_its_place_and_not_what_it_is():
    uri, rows = notices(WRITTEN_OUT)
    with pytest.raises(JobError) as refused:
        refuse_written_out(WRITTEN_OUT, "the ConfigMap")

    assert uri.startswith("tracking.mlflow_uri holds") and "write ${MLFLOW_PASSWORD} in its place" in uri
    assert rows.startswith("data.train holds") and rows.endswith("Remove it")
    assert [text.split()[0] for text in refused.value.mistakes] == ["tracking.mlflow_uri", "data.train"]
    assert "pa55" not in f"{uri}{rows}{refused.value}"
    refuse_written_out({"tracking": {"mlflow_uri": URI}}, "the ConfigMap")


@pytest.mark.parametrize("uri", ["http://ann:pa 55@host", 'http://ann:pa"55@host'])
def test_a_password_that_could_not_be_masked_is_refused_unseen(uri):
    assert "percent-encoded" in uri_mistake(uri) and "55" not in uri_mistake(uri)
    assert uri_mistake("http://ann:pa%2055@host") is uri_mistake(None) is None
