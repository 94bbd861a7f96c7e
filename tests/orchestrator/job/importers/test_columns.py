"""Data that are described for other tools, down to the tokens that are learnt of them."""

import json
import shutil

import pytest
import yaml

from orchestrator.job.importers.tables import TOOLS, tables
from orchestrator.job.sections.training import ColumnNames, DataSection, Source
from tests.cli import called
from tests.conftest import CHAT_TEMPLATE, SMALL_MODEL, write_jsonl

START = {
    "axolotl": {"base_model": "model", "sequence_len": 64, "micro_batch_size": 1},
    "llama_factory": {"model_name_or_path": "model", "cutoff_len": 64, "stage": "sft", "dataset": "mine"},
    "trl": {"model_name_or_path": "model", "max_length": 64},
    "ms_swift": {"model": "model", "train_type": "lora"},
    "torchtune": {"checkpointer": {"_component_": "x.Checkpointer", "checkpoint_dir": "model"}},
}
PAIR = {"frage": "red cat", "antwort": "blue dog"}
TURNS = [
    {"who": "client", "words": "red cat"},
    {"who": "helper", "words": "blue dog"},
    {"who": "client", "words": "small bird"},
    {"who": "helper", "words": "large dog"},
]
FLAGGED = [turn | ({"learn": n == 3} if n % 2 else {}) for n, turn in enumerate(TURNS)]
ONE = "<|im_start|>user\nred cat<|im_end|>\n<|im_start|>assistant\n⟦blue dog<|im_end|>⟧\n"
READ = ONE.replace("⟦", "").replace("⟧", "")
LAST = "<|im_start|>user\nsmall bird<|im_end|>\n<|im_start|>assistant\n⟦large dog<|im_end|>⟧\n"
TEXT = "red⟦ cat<|im_end|>⟧\n"
SYSTEM = "<|im_start|>system\nsmall dog<|im_end|>\n"
MINE = {"path": "rows.jsonl"}
PAIR_COLUMNS = {"prompt": "frage", "completion": "antwort"}
TURN_COLUMNS = {"messages": "log", "role": "who", "content": "words"}
ROLES = {"client": "user", "helper": "assistant"}


def llama_factory(**said):
    return {"info": {"mine": {"file_name": "rows.jsonl", **said}}}


def axolotl(**said):
    return {"datasets": [{**MINE, **said}]}


def torchtune(component, **said):
    files = {"source": "json", "data_files": "rows.jsonl"}
    return {"dataset": {"_component_": f"torchtune.datasets.{component}", **files, **said}}


# tool, what its file says, a row, the job's data section, what is seen and learnt
CASES = {
    "LLaMA-Factory's columns": (
        "llama_factory",
        llama_factory(columns={"prompt": "frage", "query": "more", "response": "antwort", "system": "persona"}),
        PAIR | {"more": "", "persona": "small dog"},
        {"train": {**MINE, "format": "alpaca", "columns": PAIR_COLUMNS | {"input": "more", "system": "persona"}}},
        SYSTEM + ONE,
    ),
    "LLaMA-Factory's columns without a query": (
        "llama_factory",
        llama_factory(columns={"prompt": "frage", "response": "antwort"}, num_samples=5),
        PAIR | {"id": "7"},
        {"train": {**MINE, "format": "prompt_completion", "max_samples": 5, "columns": PAIR_COLUMNS}},
        ONE,
    ),
    "LLaMA-Factory's tags": (
        "llama_factory",
        llama_factory(
            formatting="sharegpt",
            columns={"messages": "log"},
            tags={"role_tag": "who", "content_tag": "words", "user_tag": "client", "assistant_tag": "helper"},
        ),
        {"log": TURNS[:2]},
        {"train": {**MINE, "format": "messages", "columns": TURN_COLUMNS}, "roles": ROLES},
        ONE,
    ),
    "LLaMA-Factory's texts": (
        "llama_factory",
        llama_factory(columns={"prompt": "body"}) | {"stage": "pt", "max_samples": 3},
        {"body": "red cat"},
        {"train": {**MINE, "format": "text", "columns": {"text": "body"}}, "max_samples": 3},
        TEXT,
    ),
    "Axolotl's fields and roles": (
        "axolotl",
        axolotl(
            type="chat_template",
            field_messages="log",
            message_property_mappings={"role": "who", "content": "words"},
            roles={"user": ["client"], "assistant": ["helper", "gpt"]},
            roles_to_train=["assistant"],
            train_on_eos="all",
        ),
        {"log": TURNS[:2]},
        {"train": {**MINE, "columns": TURN_COLUMNS}, "roles": ROLES, "train_on_eos": "all"},
        "<|im_start|>user\nred cat⟦<|im_end|>⟧\n<|im_start|>assistant\n⟦blue dog<|im_end|>⟧\n",
    ),
    "Axolotl's older fields and flags of turns": (
        "axolotl",
        axolotl(
            type="sharegpt",
            field_messages="log",
            message_field_role="who",
            message_field_content="words",
            message_field_training="learn",
            field_human="client",
            field_model="helper",
        ),
        {"log": FLAGGED},
        {"train": {**MINE, "format": "messages", "columns": TURN_COLUMNS | {"train": "learn"}}, "roles": ROLES},
        READ + LAST,
    ),
    "Axolotl's last ends": (
        "axolotl",
        axolotl(type="chat_template", field_messages="log", train_on_eos="last", roles={"user": "client"}),
        {"log": [{"role": "client", "content": "red cat"}, {"role": "assistant", "content": "blue dog"}]},
        {"train": {**MINE, "columns": {"messages": "log"}}, "roles": {"client": "user"}, "train_on_eos": "last"},
        ONE,
    ),
    "Axolotl's texts": (
        "axolotl",
        axolotl(type="completion", field="body"),
        {"body": "red cat"},
        {"train": {**MINE, "format": "text", "columns": {"text": "body"}}},
        TEXT,
    ),
    "Axolotl's own kind of rows": (
        "axolotl",
        axolotl(type={"field_instruction": "frage", "field_output": "antwort", "system_prompt": "small dog"}),
        PAIR,
        {
            "train": {
                **MINE,
                "format": "alpaca",
                "columns": PAIR_COLUMNS | {"input": "input", "system": "system"},
            },
            "system_prompt": "small dog",
        },
        SYSTEM + ONE,
    ),
    "TRL's field of a text": (
        "trl",
        {"dataset_name": "rows.jsonl", "dataset_text_field": "body"},
        {"body": "red cat", "label": 1},
        {"train": {**MINE, "format": "text", "columns": {"text": "body"}}},
        TEXT,
    ),
    "TRL's default field beside conversations": (
        "trl",
        {"dataset_name": "rows.jsonl", "dataset_text_field": "text", "assistant_only_loss": True},
        {"messages": [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue dog"}]},
        {"train": "rows.jsonl"},
        ONE,
    ),
    "TRL's choice of columns": (
        "trl",
        {"datasets": [{**MINE, "columns": ["text"]}], "max_train_samples": 4},
        {"text": "red cat", "label": 1},
        {"train": {**MINE, "format": "text"}, "max_samples": 4},
        TEXT,
    ),
    "ms-swift's columns": (
        "ms_swift",
        {"dataset": ["rows.jsonl#5"], "columns": {"frage": "query", "antwort": "response", "persona": "system"}},
        PAIR | {"persona": "small dog"},
        {"train": {**MINE, "max_samples": 5}, "columns": PAIR_COLUMNS | {"system": "persona"}},
        SYSTEM + ONE,
    ),
    "ms-swift's columns in JSON": (
        "ms_swift",
        {"dataset": "rows.jsonl", "columns": '{"frage": "query", "antwort": "response"}'},
        PAIR,
        {"train": "rows.jsonl", "columns": PAIR_COLUMNS},
        ONE,
    ),
    "torchtune's column map": (
        "torchtune",
        torchtune("instruct_dataset", column_map={"input": "frage", "output": "antwort"}),
        PAIR,
        {"train": {**MINE, "format": "prompt_completion", "columns": PAIR_COLUMNS}},
        ONE,
    ),
    "torchtune's conversations": (
        "torchtune",
        torchtune("chat_dataset", conversation_column="log", conversation_style="sharegpt"),
        {"log": [{"from": "human", "value": "red cat"}, {"from": "gpt", "value": "blue dog"}]},
        {"train": {**MINE, "format": "messages", "columns": {"messages": "log"}}},
        ONE,
    ),
    "torchtune's texts": (
        "torchtune",
        torchtune("text_completion_dataset", column="body", split="train"),
        {"body": "red cat"},
        {"train": {**MINE, "format": "text", "columns": {"text": "body"}}},
        TEXT,
    ),
}
OTHER_KEYS = {"assistant_only_loss", "completion_only_loss", "max_length"}  # the tools' own defaults


@pytest.fixture
def imported(tmp_path):
    """`imported(tool, said)`: the data section of the job, and what the import lists; the rows lie in rows.jsonl."""

    def act(tool, said, row=PAIR):
        theirs = {key: one for key, one in (START[tool] | said).items() if key != "info"}
        write_jsonl(tmp_path / "rows.jsonl", [row] * 8)
        if "info" in said:
            (tmp_path / "dataset_info.json").write_text(json.dumps(said["info"]))
            theirs["dataset_dir"] = "."
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
        done = called("import", "theirs.yaml", "--from", tool, "--output", "made.yaml", cwd=tmp_path, COLUMNS="400")
        assert done.returncode == 0, done.output
        data = yaml.safe_load((tmp_path / "made.yaml").read_text())["data"]
        return {key: value for key, value in data.items() if key not in OTHER_KEYS}, done.output

    return act


@pytest.mark.parametrize("case", CASES)
def test_rows_are_read_as_the_other_tool_reads_them(case, imported, tmp_path):
    tool, said, row, expected, seen = CASES[case]
    shutil.copytree(SMALL_MODEL, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(CHAT_TEMPLATE)

    data, told = imported(tool, said, row)
    validated = called("validate", "made.yaml", cwd=tmp_path)
    shown = called("inspect", "made.yaml", "--rows", "1", cwd=tmp_path)

    assert data == expected, told
    assert "rename" not in told and "not known here" not in told
    assert validated.returncode == 0, validated.output
    assert seen in shown.stdout, shown.output


HUB = {"config": "main", "revision": "1a2b3c", "split": "train[:10%]", "data_files": ["a.jsonl", "b.jsonl"]}
OF_THE_HUB = {
    "axolotl": (
        {"datasets": [{"path": "org/rows", "name": "main"} | {key: HUB[key] for key in HUB if key != "config"}]},
        HUB,
    ),
    "llama_factory": (
        {"info": {"mine": {"hf_hub_url": "org/rows", "subset": "main", "split": "train[:10%]"}}},
        {"format": "alpaca", "config": "main", "split": "train[:10%]"},
    ),
    "trl": ({"dataset_name": "org/rows", "dataset_config": "main"}, {"config": "main"}),
    "ms_swift": ({"dataset": "HF::org/rows:main#500"}, {"config": "main", "max_samples": 500}),
    "torchtune": (
        {"dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "org/rows", "name": "main"}},
        {"format": "messages", "config": "main"},
    ),
}


@pytest.mark.parametrize("tool", OF_THE_HUB)
def test_what_is_chosen_of_a_data_set_of_the_hub_is_kept(tool, imported):
    said, expected = OF_THE_HUB[tool]

    data, told = imported(tool, said)

    assert data["train"] == {"path": "org/rows", **expected}, told


@pytest.mark.parametrize(
    ("tool", "said", "told"),
    [
        ("axolotl", axolotl(roles_to_train=["user"]), "datasets.0.roles_to_train (line 4): the assistant's turns are"),
        ("axolotl", axolotl(roles_to_train=[]), "datasets.0.roles_to_train"),
        ("axolotl", axolotl(roles={"narrator": ["x"]}), "a turn is the system's, the user's, the"),
        ("axolotl", axolotl(name="main"), "config main: only data sets of the hub have one"),
        ("axolotl", axolotl(shards=10), "max_samples of the source draws so many"),
        ("axolotl", axolotl(odd_key=1), "datasets.0.odd_key (line 3): not known here"),
        ("axolotl", axolotl(train_on_eos="none") | {"train_on_inputs": True}, "train_on_eos none: every token is"),
        (
            "axolotl",
            {"datasets": [{**MINE, "train_on_eos": "all"}, {"path": "b.jsonl", "train_on_eos": "last"}]},
            "datasets.1.train_on_eos (line 6): data.train_on_eos is all for all sources",
        ),
        (
            "axolotl",
            {"datasets": [{**MINE, "roles": {"user": ["x"]}}, {"path": "b.jsonl", "roles": {"assistant": ["x"]}}]},
            "data.roles: x is user for all sources",
        ),
        (
            "llama_factory",
            llama_factory(formatting="sharegpt", tags={"function_tag": "act"}),
            "mine: tags.function_tag: turns that call a function",
        ),
        ("ms_swift", {"dataset": "rows.jsonl", "columns": {"a": "label"}}, "columns: label: no column is read so"),
        ("ms_swift", {"dataset": "rows.jsonl", "columns": "a=b"}, "columns (line 1): is no mapping of columns"),
        ("torchtune", torchtune("chat_dataset", filter_fn="f"), "dataset.filter_fn (line 7): all rows are used"),
    ],
)
def test_what_data_cannot_say_here_is_listed(tool, said, told, imported):
    _, listed = imported(tool, said)

    assert told in " ".join(listed.split())
    assert listed.startswith("not supported, and matters:")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_table_of_data_leads_to_keys_of_a_job(tool):
    ours = {
        "columns": ColumnNames.model_fields,
        "roles": ("system", "user", "assistant", "tool"),
        "data": DataSection.model_fields,
    }
    read_by_name = {"type", "file_name", "formatting", "ranking", "component", "packed", "train_on_input"}

    targets = [one for one in tables()[tool].source.values() if isinstance(one, str)]

    for target in targets:
        section, _, name = target.rpartition(".")
        assert name in (ours[section] if section else {*Source.model_fields, *read_by_name}), target
