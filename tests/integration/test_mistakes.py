"""Ten mistakes users make: each ends with its exit code and a message that names the fix, and nothing is started."""

import json
import os
from pathlib import Path

import pytest

from tests.cli import called
from tests.conftest import rows, write_jsonl
from tests.processes import outcome, start_python

CACHE = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # what the machine can do is measured once


def run(*arguments, cwd):
    return called(*arguments, cwd=cwd, HOME=str(cwd), XDG_CACHE_HOME=CACHE)


def swap(old, new):
    def change(folder):
        job = folder / "job.yaml"
        assert old in job.read_text()
        job.write_text(job.read_text().replace(old, new))

    return change


def broken_row(folder):
    write_jsonl(folder / "train.jsonl", [*rows(5), {"prompt": "no completion"}])


def no_data(folder):
    (folder / "train.jsonl").unlink()


def chat_without_marks(folder):
    template = "{{ messages|length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "t.jinja").write_text(template)
    swap("max_length: 64", "max_length: 64\n  chat_template: t.jinja")(folder)


def too_large(folder):
    """A model of 40 billion parameters by its config.json, which is all that planning reads."""
    model = folder / "huge"
    model.mkdir()
    source = Path(
        next(line.split(": ")[1] for line in (folder / "job.yaml").read_text().splitlines() if "name_or" in line)
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            (model / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64}
    (model / "config.json").write_text(json.dumps(config))
    swap(str(source), str(model))(folder)


MISTAKES = {
    "a misspelt key": (swap("max_length", "max_lenght"), 2, ["line 8", "did you mean data.max_length?"]),
    "a wrong value": (swap("lora_r: 4", "lora_r: four"), 2, ["method.lora_r", "'four'", "integer"]),
    "data that is not there": (no_data, 2, ["train.jsonl does not exist", "Relative paths start at"]),
    "a broken row": (broken_row, 2, ["train.jsonl:6", "'completion' is missing", "strict: false"]),
    "a model that is not there": (swap("model_name_or_path: ", "model_name_or_path: ./none"), 2, ["is not a folder"]),
    "a template that cannot be masked": (chat_without_marks, 2, ["data.chat_template", "{% generation %}"]),
    "a batch that contradicts itself": (
        swap("size: 8", "size: 8\n  per_device_train_batch_size: 3\n  gradient_accumulation_steps: 2"),
        2,
        ["global_batch_size is 8", "is 6", "leave one of them auto"],
    ),
    "early stopping without held-out rows": (
        swap("  eval: eval.jsonl\n", "") , 2, ["early_stopping_patience needs data.eval"],
    ),
    "a model that does not fit": (too_large, 3, ["needs", "GiB", "It would fit with: a model of at most"]),
    "a cluster that is not there": (
        swap("checkpoint:", "cluster: {address: '127.0.0.1:1'}\ncheckpoint:"), 4, ["127.0.0.1:1", "`local`"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_its_exit_code_and_names_the_fix(name, job_text, tmp_path):
    make_mistake, exit_code, words = MISTAKES[name]
    (tmp_path / "job.yaml").write_text(job_text)
    if "early" in name:
        (tmp_path / "job.yaml").write_text(job_text + "eval:\n  early_stopping_patience: 2\n")
    make_mistake(tmp_path)

    done = run("submit", "job.yaml", cwd=tmp_path)

    told = done.stdout + done.stderr
    assert done.returncode == exit_code, told
    for word in words:
        assert word in told
    assert "Traceback" not in told
    if exit_code in (2, 3):
        assert not [path for path in (tmp_path / "runs").glob("*") if not path.name.startswith(".")]


def test_an_unknown_run_and_an_unknown_recipe_name_the_known_ones(tmp_path):
    for arguments in (("status", "nothing"), ("recipes", "nothing"), ("init", "x.yaml", "--recipe", "nothing")):
        done = run(*arguments, cwd=tmp_path)

        assert done.returncode == 2
        assert "nothing" in done.stderr and "Traceback" not in done.stderr


def test_an_error_for_machines_is_json(tmp_path):
    done = run("submit", "none.yaml", "--json", cwd=tmp_path)

    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2


def test_a_missing_extra_is_refused_with_the_line_that_installs_it(job_text, tmp_path):
    """The verbs that train, on an interpreter with nothing but the core."""
    (tmp_path / "job.yaml").write_text(job_text)
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'ray', 'transformers', 'peft', 'pyarrow', 'numpy', 'mlflow'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from orchestrator.cli.app import main\n"
        "main()\n"
    )
    for verb in ("submit", "inspect"):
        done = outcome(start_python("-c", code, verb, "job.yaml", cwd=tmp_path))

        assert done.returncode == 2, done.stderr
        assert "pip install 'finetune-orchestrator[train]'" in done.stderr
    done = outcome(start_python("-c", code, "validate", "job.yaml", cwd=tmp_path))
    assert done.returncode == 0, done.stderr
