"""A tokenised data set, and three steps trained on it one sample at a time: what every layout is compared with."""

import pytest
from transformers import AutoTokenizer

from orchestrator.data.dataset import TokenizeOptions, build
from orchestrator.data.readers.files import read_rows
from orchestrator.data.rendering.template import Renderer
from tests.conftest import CHAT_TEMPLATE, WORDS, rows, write_jsonl


@pytest.fixture(scope="session")
def data_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    file = write_jsonl(folder / "rows.jsonl", rows(24))
    renderer = Renderer(AutoTokenizer.from_pretrained(model_folder), CHAT_TEMPLATE)
    build(read_rows(file), renderer, TokenizeOptions("auto", "", 64, "truncate", True), folder / "samples")
    return folder / "samples"


@pytest.fixture(scope="session")
def chat_data_folder(model_folder, tmp_path_factory):
    """Conversations that begin with one system prompt."""
    folder = tmp_path_factory.mktemp("chats")
    system = {"role": "system", "content": " ".join(WORDS)}
    asked = [
        [system, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows(24)
    ]
    file = write_jsonl(folder / "rows.jsonl", [{"messages": turns} for turns in asked])
    renderer = Renderer(AutoTokenizer.from_pretrained(model_folder), CHAT_TEMPLATE)
    build(read_rows(file), renderer, TokenizeOptions("auto", "", 96, "truncate", True), folder / "samples")
    return folder / "samples"


@pytest.fixture(scope="session")
def reference(model_folder, data_folder):
    from tests.orchestrator.training.test_loop import ONE_BY_ONE, run

    return run(model_folder, data_folder, ONE_BY_ONE)
