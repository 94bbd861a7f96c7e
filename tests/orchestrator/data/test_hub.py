"""Data sets of the hub, as `datasets.load_dataset` takes them; the hub is a folder in its form."""

import json

import pytest

from orchestrator.data.readers.sources import rows_of, sources_of
from orchestrator.errors import JobError
from orchestrator.job.job_file import parse_job

datasets = pytest.importorskip("datasets")
CARD = """\
---
configs:
- config_name: small
  data_files: [{split: train, path: small.jsonl}]
- config_name: large
  data_files: [{split: train, path: large.jsonl}, {split: test, path: held.jsonl}]
---
"""


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """`texts(config="small")`: the texts of a source of the hub; what the library was asked is in `texts.asked`."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text(CARD)
    for name in ("small", "large", "held", "other"):
        (hub / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(20)))
    load = datasets.load_dataset
    asked = []

    def from_folder(path, *arguments, revision=None, **options):  # the one door to the network
        asked.append((path, revision))
        return load(str(hub), *arguments, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)

    def act(**source):
        document = {"model": {"model_name_or_path": "none/here"}, "data": {"train": {"path": "org/name", **source}}}
        job = parse_job(json.dumps(document), tmp_path)
        (found,) = sources_of(job, job.spec.data.train, "data.train")
        return [row.values["text"] for row in rows_of(job, *found)]

    act.asked = asked
    return act


def test_configuration_split_revision_and_files_choose_the_rows(texts):
    assert texts(config="small")[:2] == ["small 0", "small 1"]
    assert texts(config="large", split="test", revision="1a2b3c")[0] == "held 0"
    assert texts.asked == [("org/name", None), ("org/name", "1a2b3c")]
    assert texts(data_files="other.jsonl", config=None)[0] == "other 0"
    assert texts(config="large", split="train[5:7]") == ["large 5", "large 6"]
    assert len(texts(config="large", max_samples=3)) == 3


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({}, "Config name is missing.*'small', 'large'.*State it: {path: org/name, config: ...}"),
        ({"config": "small", "split": "dev"}, "Unknown split.*State one of them: {path: org/name, split: ...}"),
    ],
)
def test_what_the_hub_wants_to_know_is_said_with_the_choices(texts, source, told):
    with pytest.raises(JobError, match=told):
        texts(**source)
