"""Configurations of other tools become jobs that validate and plan; what has no counterpart is listed with its fate."""

import json
import re
import shutil

import pytest
import yaml

from orchestrator.job.importers.tables import TOOLS, recognise, tables
from orchestrator.job.job_file import read_job
from strategies import OBJECTIVES
from tests.cli import called
from tests.conftest import FIXTURES, write_jsonl

FILES = sorted(path for path in (FIXTURES / "other_tools").glob("*/*.y*ml") if not path.name.endswith(".job.yaml"))
NAMES = [f"{path.parent.name}/{path.name}" for path in FILES]
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ROWS = {
    "alpaca": {"instruction": "Say it", "input": "", "output": "it " * 20},
    "messages": {"messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "it " * 20}]},
    "text": {"text": "it " * 80},
    "auto": {"prompt": "Say it", "completion": "it " * 20},
    "pairs": {"prompt": "Say it", "chosen": "it " * 20, "rejected": "this " * 20},
    "labelled": {"prompt": "Say it", "completion": "it " * 20, "label": True},
}


def golden(path):
    return path.with_name(path.stem + ".job.yaml").read_text()


def without_place(text):
    """Without the line that names this machine's cache."""
    return text.partition("\n")[2]


def make_what_a_job_names(job, folder):
    """The model's config.json and the rows, where the job looks for them: names of the hub are folders here as well."""
    model = folder / job["model"]["model_name_or_path"]
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(SMALL))
    kinds = OBJECTIVES[job.get("objective", {}).get("type", "sft")].rows
    for key in ("train", "eval"):
        stated = job["data"].get(key)
        for source in stated if isinstance(stated, list) else [stated]:
            if source is None or (isinstance(source, dict) and "path" not in source):
                continue
            path, kind = (
                (source["path"], source.get("format", "auto")) if isinstance(source, dict) else (source, "auto")
            )
            place = folder / path if "." in path.rpartition("/")[2] else folder / path / "train.jsonl"
            place.parent.mkdir(parents=True, exist_ok=True)
            if kinds != "answers":
                columns = {
                    **job["data"].get("columns", {}),
                    **(source.get("columns", {}) if isinstance(source, dict) else {}),
                }
                asked = {"messages": [{"role": "user", "content": "Say it"}]} if "messages" in columns else {}
                row = {columns.get(name, name): value for name, value in (ROWS[kinds] | asked).items()}
                kind = "own"
            rows = [row if kind == "own" else ROWS[kind]] * (
                16_000 if job["train"].get("warmup_steps") == 100 else 2000
            )
            place.write_text(json.dumps(rows)) if place.suffix == ".json" else write_jsonl(place, rows)
            if isinstance(source, dict) and source.get("split") == "test":
                write_jsonl(place.with_name("test.jsonl"), rows[:8])


@pytest.fixture
def imported(tmp_path):
    def run(path, *options):
        shutil.copytree(path.parent, tmp_path, dirs_exist_ok=True)
        return called("import", path.name, "--output", "made.yaml", *options, cwd=tmp_path)

    return run


def test_every_tool_has_an_example():
    assert {path.parent.name for path in FILES} == set(TOOLS)
    assert len(FILES) >= 14


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_recognised_as_its_tool_s(path):
    assert recognise(yaml.safe_load(path.read_text())) == path.parent.name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_becomes_a_job_that_says_where_each_value_came_from(path, imported, tmp_path):
    done = imported(path)

    assert done.returncode == 0, done.output
    text = (tmp_path / "made.yaml").read_text()
    assert without_place(text) == golden(path)
    values = [line for line in text.splitlines()[2:] if not line.endswith(":")]
    assert all("  # " in line for line in values)
    assert not read_job(tmp_path / "made.yaml").notices


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_key_is_converted_or_listed(path, imported, tmp_path):
    done = imported(path, "--json")

    shown = json.loads(done.stdout)
    listed = {one["key"] for group in shown["without_counterpart"].values() for one in group}
    text = (tmp_path / "made.yaml").read_text()
    for key in yaml.safe_load(path.read_text()):
        is_listed = any(one == key or one.startswith(f"{key}.") for one in [*listed, *shown["not_set"]])
        assert is_listed or re.search(rf"  # (.*; )?{key}[.,]", text), key
    assert not [one for one in shown["without_counterpart"]["matters"] if "not known here" in one["instead"]]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_job_of_another_tool_can_be_planned(path, imported, tmp_path):
    assert imported(path).returncode == 0
    make_what_a_job_names(yaml.safe_load((tmp_path / "made.yaml").read_text()), tmp_path)
    done = called("plan", "made.yaml", "--hardware", "home-lab", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["num_steps"] > 0


def test_that_data_of_llama_factory_are_found_by_its_names(imported, tmp_path):
    path = FIXTURES / "other_tools/llama_factory/qwen3_lora_sft_ds3.yaml"

    imported(path)

    train = read_job(tmp_path / "made.yaml").spec.data.train
    assert [(one.path, one.format) for one in train] == [
        ("data/identity.json", "alpaca"),
        ("data/chat_demo.json", "messages"),
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pairs", "pairs: chosen, rejected: answers that are compared; this stage copies answers"),
        ("pictures", "pictures: columns.images: only text is trained on"),
        ("nowhere", "dataset_info.json does not name it"),
    ],
)
def test_data_that_mean_something_else_here_are_listed(name, told, imported, tmp_path):
    path = FIXTURES / "other_tools/llama_factory/llama3_lora_sft.yaml"
    shutil.copytree(path.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own.yaml").write_text(path.read_text().replace("identity,alpaca_en_demo", name))

    done = called("import", "own.yaml", cwd=tmp_path, COLUMNS="200")

    assert told in " ".join(done.stderr.split())  # whatever the width of the terminal is


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("base_model: m\nsequence_len: 9\nadapter: ia3\n", "line 3: adapter is 'ia3': no such adapter"),
        ("base_model: m\nsequence_len: 9\nrl: grpo\n", "line 3: rl is 'grpo': trains on rewards"),
        ("stage: ppo\nfinetuning_type: lora\n", "line 1: stage is 'ppo': trains on rewards"),
        ("stage: sft\nfinetuning_type: freeze\n", "line 2: finetuning_type is 'freeze': no such way"),
        ("base_model: m\nsequence_len: few\ndatasets: [{path: a.jsonl}]\n", "line 2: data.max_length is 'few'"),
        ("base_model: m\nsequence_len: 9\n", "data.train is missing"),
        ("hello: 1\n", "is of no tool that is known here"),
    ],
)
def test_what_cannot_be_trained_here_is_refused_and_nothing_is_written(line, told, tmp_path):
    (tmp_path / "theirs.yml").write_text(line)

    done = called("import", "theirs.yml", "--output", "job.yaml", cwd=tmp_path, check=2)

    assert told in done.stderr
    assert not (tmp_path / "job.yaml").exists()


def test_a_job_that_is_there_is_kept_without_force(imported, tmp_path):
    path = FIXTURES / "other_tools/trl/example_config.yaml"
    (tmp_path / "made.yaml").write_text("mine")

    refused = imported(path)
    kept = (tmp_path / "made.yaml").read_text()
    forced = imported(path, "--force")

    assert refused.returncode == 2 and "--force" in refused.stderr and kept == "mine"
    assert forced.returncode == 0 and "stanfordnlp/imdb" in (tmp_path / "made.yaml").read_text()


def test_without_output_the_job_alone_is_printed_and_nothing_is_written(tmp_path):
    path = FIXTURES / "other_tools/trl/example_config.yaml"

    done = called("import", path, cwd=tmp_path, check=0)

    assert without_place(done.stdout) == golden(path)
    assert "rows of a text and a label" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tool", "name"),
    [("axolotl", "an Axolotl"), ("llama_factory", "a LLaMA-Factory"), ("trl", "a TRL"), ("torchtune", "a torchtune")],
)
def test_validate_says_what_reads_the_file_of_another_tool(tool, name, tmp_path):
    path = next(path for path in FILES if path.parent.name == tool)

    done = called("validate", path, cwd=tmp_path, check=2)

    assert f"this looks like {name} file: orchestrator import {path} --output job.yaml" in done.stderr
    assert done.stderr.count("\n") == 1


ODD = [
    None,
    "",
    "auto",
    -1,
    0,
    0.5,
    7,
    True,
    False,
    [],
    [1],
    {},
    {"a": 1},
    [{"path": 3}],
    "a,b",
    "2e-4",
    [None],
    "${x}",
]


@pytest.mark.parametrize("tool", TOOLS)
def test_odd_values_end_in_a_job_or_in_a_message(tool, tmp_path):
    table = tables()[tool]
    keys = [*table.entries, *table.data_keys, *table.refuse]
    codes = set()
    for value in ODD:
        nested = {}
        for key in keys:
            *outer, last = key.split(".")
            place = nested
            for part in outer:
                place = place.setdefault(part, {}) if isinstance(place.get(part, {}), dict) else {}
            if not isinstance(place.get(last), dict):
                place[last] = value
        for chosen in (nested, {key: part for key, part in nested.items() if key not in table.refuse}):
            (tmp_path / "odd.yaml").write_text(yaml.safe_dump(chosen))
            codes.add(called("import", "odd.yaml", "--from", tool, cwd=tmp_path).returncode)

    assert codes <= {0, 2}
    assert 2 in codes
