"""Files of other tools that train on preferences: the objective, its options, and the rows down to what is compared."""

import json
import shutil

import pytest
import yaml

from orchestrator.job.job_file import read_job
from strategies import OBJECTIVES
from tests.cli import called
from tests.conftest import CHAT_TEMPLATE, SMALL_MODEL, write_jsonl
from tests.orchestrator.job.importers.test_columns import MINE, START, llama_factory

PAIR = {"frage": "red cat", "gut": "blue dog", "schlecht": "small bird"}
PAIR_COLUMNS = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
MARKED = {"frage": "red cat", "antwort": "blue dog", "urteil": True}
MARKED_COLUMNS = {"prompt": "frage", "completion": "antwort", "label": "urteil"}
ONE = "<|im_start|>user\nred cat<|im_end|>\n<|im_start|>assistant\n⟦{}<|im_end|>⟧\n"
GOOD, BAD = ONE.format("blue dog"), ONE.format("small bird")

# tool, what its file says, a row, the job's data section, the objective
ROWS = {
    "Axolotl's own columns": (
        "axolotl",
        {
            "rl": "dpo",
            "datasets": [
                {**MINE, "type": {"field_prompt": "frage", "field_chosen": "gut", "field_rejected": "schlecht"}}
            ],
        },
        PAIR,
        {"train": {**MINE, "columns": PAIR_COLUMNS}},
        "dpo",
    ),
    "Axolotl's own columns of marked answers": (
        "axolotl",
        {
            "rl": "kto",
            "datasets": [
                {**MINE, "type": {"field_prompt": "frage", "field_completion": "antwort", "field_label": "urteil"}}
            ],
        },
        MARKED,
        {"train": {**MINE, "columns": MARKED_COLUMNS}},
        "kto",
    ),
    "LLaMA-Factory's ranking": (
        "llama_factory",
        {"stage": "dpo"}
        | llama_factory(ranking=True, columns={"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}),
        PAIR,
        {"train": {**MINE, "columns": PAIR_COLUMNS}},
        "dpo",
    ),
    "LLaMA-Factory's rows with their usual names and another column": (
        "llama_factory",
        {"stage": "rm"} | llama_factory(ranking=True, columns={"prompt": "instruction", "chosen": "chosen"}),
        {"instruction": "red cat", "id": "7", "chosen": "blue dog", "rejected": "small bird"},
        {"train": {**MINE, "columns": {"prompt": "instruction", "chosen": "chosen"}}},
        "reward",
    ),
    "LLaMA-Factory's tags of marked answers": (
        "llama_factory",
        {"stage": "kto"} | llama_factory(columns={"prompt": "frage", "response": "antwort", "kto_tag": "urteil"}),
        MARKED,
        {"train": {**MINE, "columns": MARKED_COLUMNS}},
        "kto",
    ),
    "ms-swift's columns": (
        "ms_swift",
        {
            "rlhf_type": "simpo",
            "dataset": "rows.jsonl",
            "columns": {"frage": "query", "gut": "response", "schlecht": "rejected_response"},
        },
        PAIR,
        {"train": "rows.jsonl", "columns": PAIR_COLUMNS},
        "simpo",
    ),
    "TRL's mixture": (
        "trl",
        {"loss_type": "ipo", "datasets": [{"path": "json", "data_files": "rows.jsonl"}]},
        {"prompt": "red cat", "chosen": "blue dog", "rejected": "small bird"},
        {"train": "rows.jsonl"},
        "ipo",
    ),
}


@pytest.fixture
def imported(tmp_path):
    """`imported(tool, said, row, *options)`: the finished command; the rows lie in rows.jsonl."""

    def act(tool, said, row=PAIR, *options):
        theirs = {"datasets": [MINE]} if tool == "axolotl" else {"dataset": "rows.jsonl"} if tool == "ms_swift" else {}
        theirs |= {"dataset_name": "org/rows"} if tool == "trl" and "datasets" not in said else {}
        theirs |= {key: one for key, one in (START[tool] | said).items() if key != "info"}
        write_jsonl(tmp_path / "rows.jsonl", [row] * 8)
        if "info" in said:
            (tmp_path / "dataset_info.json").write_text(json.dumps(said["info"]))
            theirs["dataset_dir"] = "."
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
        command = ("import", "theirs.yaml", "--from", tool, "--output", "made.yaml", "--force", *options)
        return called(*command, cwd=tmp_path, COLUMNS="400")

    return act


@pytest.fixture
def objective(imported, tmp_path):
    """`objective(tool, said)`: the objective of the job, with the options that are stated, and what is listed."""

    def act(tool, said, *options):
        done = imported(tool, said, PAIR, *options)
        assert done.returncode == 0, done.output
        return yaml.safe_load((tmp_path / "made.yaml").read_text()).get("objective"), done.output

    return act


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_compared_are_read_as_the_other_tool_reads_them(case, imported, tmp_path):
    tool, said, row, expected, name = ROWS[case]
    shutil.copytree(SMALL_MODEL, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(CHAT_TEMPLATE)

    done = imported(tool, said, row)
    assert done.returncode == 0, done.output
    data = yaml.safe_load((tmp_path / "made.yaml").read_text())["data"]
    validated = called("validate", "made.yaml", cwd=tmp_path)
    shown = called("inspect", "made.yaml", "--rows", "1", cwd=tmp_path)

    assert {key: value for key, value in data.items() if key != "max_length"} == expected, done.output
    assert "not known here" not in done.output
    assert validated.returncode == 0, validated.output
    assert GOOD in shown.stdout, shown.output
    assert (BAD in shown.stdout) == (OBJECTIVES[name].rows == "pairs")
    assert read_job(tmp_path / "made.yaml").spec.objective.type == name


@pytest.mark.parametrize(
    ("tool", "said", "expected"),
    [
        ("axolotl", {"rl": "dpo", "rl_beta": 0.2}, {"type": "dpo", "beta": 0.2}),
        ("axolotl", {"rl": "dpo", "trl": {"beta": 0.3}, "rl_beta": 0.2}, {"type": "dpo", "beta": 0.3}),
        (
            "axolotl",
            {"rl": "dpo", "dpo_loss_type": ["robust"], "dpo_label_smoothing": 0.1},
            {"type": "dpo", "loss_type": "robust", "label_smoothing": 0.1},
        ),
        ("axolotl", {"rl": "ipo", "rl_beta": 0.2}, {"type": "ipo", "beta": 0.2}),
        ("axolotl", {"rl": "orpo", "orpo_alpha": 0.1}, {"type": "orpo", "beta": 0.1}),
        ("axolotl", {"rl": "simpo"}, {"type": "simpo", "beta": 0.1, "simpo_gamma": 0.5, "cpo_alpha": 1.0}),
        (
            "axolotl",
            {"rl": "kto", "kto_desirable_weight": 0.2, "kto_undesirable_weight": 2},
            {"type": "kto", "desirable_weight": 0.2, "undesirable_weight": 2},
        ),
        (
            "axolotl",
            {"reward_model": True, "center_rewards_coefficient": 0.01},
            {"type": "reward", "center_rewards_coefficient": 0.01},
        ),
        ("llama_factory", {"stage": "dpo", "pref_loss": "hinge"}, {"type": "dpo", "loss_type": "hinge"}),
        ("llama_factory", {"stage": "dpo", "pref_loss": "ipo", "pref_beta": 0.2}, {"type": "ipo", "beta": 0.2}),
        (
            "llama_factory",
            {"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.0, "pref_ftx": 0.5},
            {"type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5},
        ),
        (
            "llama_factory",
            {"stage": "kto", "kto_chosen_weight": 0.5, "kto_rejected_weight": 2.0},
            {"type": "kto", "desirable_weight": 0.5, "undesirable_weight": 2.0},
        ),
        ("llama_factory", {"stage": "sft", "pref_beta": 0.1}, None),
        ("trl", {"loss_type": ["hinge"], "beta": 0.2}, {"type": "dpo", "loss_type": "hinge", "beta": 0.2}),
        (
            "trl",
            {"loss_type": "discopop", "discopop_tau": 0.1},
            {"type": "dpo", "loss_type": "discopop", "discopop_tau": 0.1},
        ),
        ("trl", {"beta": 0.2}, {"type": "dpo", "beta": 0.2}),
        ("trl", {"desirable_weight": 2.0}, {"type": "kto", "desirable_weight": 2.0}),
        ("trl", {"loss_type": "simpo"}, {"type": "simpo", "beta": 0.1, "simpo_gamma": 0.5, "cpo_alpha": 1.0}),
        ("trl", {"loss_type": "chunked_nll"}, None),
        ("ms_swift", {"rlhf_type": "dpo", "loss_type": "ipo"}, {"type": "ipo"}),
        ("ms_swift", {"rlhf_type": "kto", "beta": 0.2, "loss_type": "kto"}, {"type": "kto", "beta": 0.2}),
        ("ms_swift", {"rlhf_type": "simpo"}, {"type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 1.0}),
        ("ms_swift", {"rlhf_type": "rm"}, {"type": "reward"}),
    ],
)
def test_an_objective_and_its_options_are_those_of_the_other_tool(tool, said, expected, objective):
    found, told = objective(tool, said | (llama_factory() if tool == "llama_factory" else {}))

    assert found == expected, told


def test_what_an_objective_does_with_a_file_s_other_keys_is_told(objective, tmp_path):
    said = {"rl": "dpo", "dpo_label_smoothing": 0.1, "adapter": "lora", "lora_dropout": 0.1, "train_on_inputs": True}

    _, told = objective("axolotl", said)

    text, told = (tmp_path / "made.yaml").read_text(), " ".join(told.split())
    assert "dpo_label_smoothing (line 5): it is not used: label_smoothing is of loss_type robust" in told
    assert "train_on_inputs: the answers that are compared are what is trained" in told
    assert "lora_dropout: 0.0" in text and "Axolotl trains dpo without dropout" in text


def test_a_command_s_objective_can_be_said_beside_its_file(objective, tmp_path):
    """`trl reward --config FILE` and others of its commands: the file is the same."""
    found, _ = objective("trl", {}, "--objective", "reward")
    guessed, told = objective("trl", {"beta": 0.2}, "--objective", "orpo")

    assert found == {"type": "reward"} and guessed == {"type": "orpo", "beta": 0.2}
    assert "read as a file of" not in told
    assert 'type: "orpo"' in (tmp_path / "made.yaml").read_text()
    assert "--objective" in (tmp_path / "made.yaml").read_text()


def test_a_guess_is_told(objective):
    _, told = objective("trl", {"beta": 0.2})

    assert "beta (line 1): read as a file of `trl dpo`" in told


@pytest.mark.parametrize(
    ("tool", "said", "options", "told"),
    [
        ("axolotl", {"rl": "grpo"}, (), "rl is 'grpo': trains on rewards of answers that are generated"),
        ("axolotl", {"rl": "dpo", "dpo_loss_type": ["sigmoid", "sft"]}, (), "one is trained at a time"),
        ("axolotl", {"process_reward_model": True}, (), "scores steps of an answer"),
        ("llama_factory", {"stage": "ppo"}, (), "stage is 'ppo': trains on rewards"),
        ("llama_factory", {"stage": "dpo", "pref_loss": "kto_pair"}, (), "no such loss of a pair is here"),
        ("trl", {"cpo_alpha": 1.0}, (), "cpo_alpha is 1.0: trains by CPO, which is not here"),
        ("trl", {"loss_type": "aot"}, (), "no such loss is here"),
        ("trl", {"num_generations": 8, "beta": 0.04}, (), "trains on rewards of answers that are generated"),
        ("trl", {"loss_type": "hinge"}, ("--objective", "kto"), "--objective kto: the file says dpo by loss_type"),
        ("trl", {}, ("--objective", "dop"), "--objective dop: is not known here; known: sft, dpo"),
        ("ms_swift", {"rlhf_type": "cpo"}, (), "rlhf_type is 'cpo': trains another way"),
    ],
)
def test_what_is_no_objective_here_is_refused(tool, said, options, told, imported, tmp_path):
    done = imported(tool, said, PAIR, *options)

    assert done.returncode == 2, done.output
    assert told in done.stderr
    assert not (tmp_path / "made.yaml").exists()


@pytest.mark.parametrize(
    ("tool", "said", "section", "expected"),
    [
        ("axolotl", {"noisy_embedding_alpha": 5}, "train", {"neftune_noise_alpha": 5}),
        (
            "axolotl",
            {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1},
            "train",
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        ("axolotl", {"optimizer": "paged_lion_8bit"}, "train", {"optim": "lion_8bit"}),
        ("axolotl", {"optimizer": "muon"}, "train", {"optim": "muon"}),
        (
            "axolotl",
            {"val_set_size": 0.1, "generation_temperature": 0.7, "generation_top_p": 0.9, "num_generation_samples": 5},
            "eval",
            {"temperature": 0.7, "top_p": 0.9, "num_samples": 5},
        ),
        ("axolotl", {"val_set_size": 0.1, "eval_causal_lm_metrics": ["chrf", "ter"]}, "eval", {"metrics": ["chrf"]}),
        (
            "llama_factory",
            {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "optim": "paged_ademamix_8bit"}
            | {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
            "train",
            {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "optim": "ademamix_8bit"}
            | {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
        ),
        (
            "llama_factory",
            {"val_size": 0.1, "do_sample": True, "top_p": 0.9},
            "eval",
            {"temperature": 0.95, "top_p": 0.9},
        ),
        ("llama_factory", {"val_size": 0.1, "do_sample": False, "temperature": 0.9}, "eval", {"temperature": 0.0}),
        (
            "ms_swift",
            {"split_dataset_ratio": 0.1, "temperature": 0.3, "max_new_tokens": 9},
            "eval",
            {"temperature": 0.3, "max_new_tokens": 9},
        ),
    ],
)
def test_noise_smoothing_schedules_optimizers_and_drawing_come_along(tool, said, section, expected, imported, tmp_path):
    done = imported(tool, said | (llama_factory() if tool == "llama_factory" else {}))

    assert done.returncode == 0, done.output
    found = yaml.safe_load((tmp_path / "made.yaml").read_text())[section]
    assert {key: found.get(key) for key in expected} == expected
    assert "not known here" not in done.output


def test_a_schedule_beside_an_optimizer_that_needs_none_is_listed(imported, tmp_path):
    stated = imported("axolotl", {"optimizer": "schedule_free_adamw", "lr_scheduler": "cosine"})
    default = imported("trl", {"optim": "schedule_free_radam", "warmup_ratio": 0.1})

    train = yaml.safe_load((tmp_path / "made.yaml").read_text())["train"]
    assert "lr_scheduler (line 4): schedule_free_adamw does by itself" in stated.output
    assert "warmup_ratio (line 5): schedule_free_radam does by itself" in default.output
    assert train["optim"] == "schedule_free_radam" and "lr_scheduler_type" not in train and "warmup_ratio" not in train


def test_without_a_temperature_nothing_is_drawn_and_top_p_is_listed(imported, tmp_path):
    done = imported("ms_swift", {"split_dataset_ratio": 0.1, "top_p": 0.9})

    assert "top_p (line 4): answers are drawn where eval.temperature is above 0" in done.output
    assert "eval" not in yaml.safe_load((tmp_path / "made.yaml").read_text())
