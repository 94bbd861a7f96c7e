"""The cache folder follows the XDG base directory specification."""

from pathlib import Path

import pytest

from clusters.safe.cache import cache_folder


@pytest.mark.parametrize(
    ("stated", "base"),
    [("/scratch/cache", "/scratch/cache"), ("relative", "/home/me/.cache"), ("", "/home/me/.cache")],
)
def test_the_cache_is_where_xdg_says_and_a_relative_path_counts_as_none(monkeypatch, stated, base):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", stated)

    assert cache_folder() == Path(base) / "finetune-orchestrator"
    assert cache_folder("models", "a") == Path(base) / "finetune-orchestrator" / "models" / "a"


def test_without_the_variable_it_is_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    assert cache_folder("probe") == Path("/home/me/.cache/finetune-orchestrator/probe")
