"""What was found out about a model once is not found out again, and never believed of another one."""

import json
import shutil

import pytest

from orchestrator.errors import JobError
from orchestrator.job import model_check
from orchestrator.job.model_check import check_model
from strategies.model import architecture


@pytest.fixture
def folder(model_folder, tmp_path, monkeypatch):
    """A model of one's own, and a cache in which nothing is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def builds(monkeypatch):
    """How often the library was asked."""
    asked, build = [], architecture.build

    def counted(*arguments):
        asked.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(architecture, "build", counted)
    return asked


def looked_at(folder, trust=False):
    """As another process does, which holds nothing in memory."""
    model_check._examine.cache_clear()
    check_model(folder, (), trust)
    return model_check._examine(folder, model_check._signature(folder), trust)


def edited(folder, **values):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def entries(folder):
    return sorted((folder.parent / "cache" / "finetune-orchestrator" / "architectures").iterdir())


def test_another_process_has_the_same_answer_without_the_library(folder, builds):
    assert looked_at(folder) == looked_at(folder)
    assert len(builds) == 1


def test_other_files_are_looked_at_themselves(folder, builds):
    looked_at(folder)
    edited(folder, num_hidden_layers=3)

    with pytest.raises(JobError, match="missing in the files"):
        looked_at(folder)
    with pytest.raises(JobError, match="missing in the files"):
        looked_at(folder)

    assert len(builds) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"built": {"model_type": 1}, "report": null}'])
def test_a_damaged_entry_is_made_again(folder, builds, content):
    answer = looked_at(folder)
    (entry,) = entries(folder)
    entry.write_bytes(content)

    assert looked_at(folder) == answer
    assert looked_at(folder) == answer and len(builds) == 2


def test_code_that_is_trusted_is_always_run(folder, builds):
    looked_at(folder, trust=True)
    looked_at(folder, trust=True)

    assert len(builds) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(folder, builds):
    (folder.parent / "cache").write_text("a file")

    assert looked_at(folder) == looked_at(folder)
    assert len(builds) == 2


def test_the_oldest_entries_go(folder, builds, monkeypatch):
    monkeypatch.setattr("orchestrator.job.architecture_cache._KEPT", 2)
    for width in range(3):
        edited(folder, unused_key=width)
        looked_at(folder)

    assert len(entries(folder)) == 2
