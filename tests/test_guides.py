"""The light commands of the guides, typed as they are written there: what a guide shows is what the program prints."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.house import ROOT

GUIDES = sorted((ROOT / "orchestrator/guides").glob("*.md"))
LIGHT = ("plan job.yaml", "validate quickstart", "inspect", "schema", "tco")
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def console() -> list[tuple[str, str, str]]:
    """Each command of the guides' console blocks: guide, command, what is shown below it."""
    found = []
    for path in GUIDES:
        for block in re.findall(r"^```console\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                found.append((path.stem, command.partition(" #")[0].strip(), shown))
    return found


TYPED = [one for one in console() if one[1].removeprefix("orchestrator ").startswith(LIGHT)]


@pytest.fixture
def folder(tmp_path):
    """The job that `planning` shows, beside a model of which only config.json is here."""
    text = (ROOT / "orchestrator/guides/planning.md").read_text()
    job = re.search(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert job
    (tmp_path / "job.yaml").write_text(job[1])
    (tmp_path / "llama-3-8b").mkdir()
    (tmp_path / "llama-3-8b/config.json").write_text(json.dumps(LLAMA_3_8B))
    row = json.dumps({"prompt": "p" * 400, "completion": "c" * 480})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 2000)
    return tmp_path


def test_guides_show_commands():
    assert len(console()) > 25
    assert {guide for guide, _, _ in TYPED} >= {"planning", "data-formats", "methods", "job-file"}


@pytest.mark.parametrize(("guide", "command", "shown"), TYPED, ids=[f"{one[0]}: {one[1]}" for one in TYPED])
def test_a_guide_shows_what_the_program_prints(guide, command, shown, folder):
    words = [sys.executable, "-m", *shlex.split(command)]
    environment = os.environ | {"COLUMNS": "118", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)

    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    for part in shown.split("..."):
        assert " ".join(part.split()) in printed, f"type it again in the guide: {command}"
