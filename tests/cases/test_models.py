import json

import pytest

from tests.cases.models import TEMPLATES


def test_a_case_finds_the_models_its_jobs_name(case):
    folder = case("07-pandas-nan")

    model = folder / "../models/llama-chatml"
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 49152
    assert (model / "chat_template.jinja").read_text() == TEMPLATES["llama-chatml"]
    assert (folder / "job.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_model_of_the_cases_is_built(case_models, name):
    assert (case_models.build(name) / "model.safetensors").is_file()
