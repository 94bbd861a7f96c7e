"""The light commands of the guides, typed as they are written there: what a guide shows is what the program prints."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import needs_smollm2
from tests.house import ROOT

GUIDES = sorted((ROOT / "orchestrator/guides").glob("*.md"))
LIGHT = ("plan job.yaml", "validate quickstart", "inspect", "schema", "tco", "import", "doctor")
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


def yaml_block(guide: str) -> str:
    """The first file that a guide shows."""
    text = (ROOT / f"orchestrator/guides/{guide}.md").read_text()
    found = re.search(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def folder(tmp_path):
    """The job that `planning` shows, beside a model of which only config.json is here."""
    (tmp_path / "job.yaml").write_text(yaml_block("planning"))
    (tmp_path / "llama-3-8b").mkdir()
    (tmp_path / "llama-3-8b/config.json").write_text(json.dumps(LLAMA_3_8B))
    (tmp_path / "axolotl.yml").write_text(yaml_block("other-tools"))
    row = json.dumps({"prompt": "p" * 400, "completion": "c" * 480})
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 2000)
    return tmp_path


def test_guides_show_commands():
    assert len(console()) > 25
    assert {guide for guide, _, _ in TYPED} >= {
        "planning",
        "data-formats",
        "methods",
        "job-file",
        "other-tools",
        "first-hour",
    }


@pytest.mark.parametrize(("guide", "command", "shown"), TYPED, ids=[f"{one[0]}: {one[1]}" for one in TYPED])
def test_a_guide_shows_what_the_program_prints(guide, command, shown, folder):
    words = [sys.executable, "-m", *shlex.split(command)]
    environment = os.environ | {"COLUMNS": "118", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)

    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    for part in shown.split("..."):
        assert " ".join(part.split()) in printed, f"type it again in the guide: {command}"


def typed_in(document: str, title: str) -> list[str]:
    """The commands of a section's shell blocks, without their comments."""
    text = (ROOT / document).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]


FIRST_HOUR = {
    "README.md": typed_in("README.md", "Your own job"),
    "README.ja.md": typed_in("README.ja.md", "自分のジョブ"),
    "first-hour": typed_in("orchestrator/guides/first-hour.md", "A job of your own"),
}
TRAINS = ("submit", "merge", "report")


def type_in(folder, commands: list[str]) -> None:
    """Type commands one after the other in a window of 80 columns; the first that fails ends it."""
    (folder / "mydata.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}", "completion": f"{n} " * 8}) + "\n" for n in range(40))
    )
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for command in commands:
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        tables = [line for line in done.stdout.splitlines() if "   " in line.strip()]
        assert not [line for line in tables if len(line) > 80], command


def test_the_first_hour_is_a_path_of_commands():
    assert all(len(commands) >= 6 for commands in FIRST_HOUR.values())
    assert all(command.startswith("orchestrator ") for commands in FIRST_HOUR.values() for command in commands)


@needs_smollm2
@pytest.mark.parametrize("document", FIRST_HOUR)
def test_the_first_hour_works_as_it_is_written(document, tmp_path):
    type_in(tmp_path, [one for one in FIRST_HOUR[document] if one.split()[1] not in TRAINS])


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "README.ja.md"])
def test_the_first_hour_works_to_its_end(document, tmp_path):
    type_in(tmp_path, FIRST_HOUR[document])
