"""Keys and values of other tools: the same setting is read, what has no key here is named with what to write."""

from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.job.aliases import other_tools, targets_of
from orchestrator.job.job_file import parse_job

JOB = "model: {model_name_or_path: m}\ndata: {train: t.jsonl}\n"


@pytest.mark.parametrize(
    ("asked", "read"),
    [
        ("all", "all-linear"),
        (["all"], "all-linear"),
        (True, "all-linear"),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (" q_proj, v_proj ,", ["q_proj", "v_proj"]),
        ("q_proj v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("self_attn.q_proj", ["self_attn.q_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (["q_proj"], ["q_proj"]),
        ("", ""),
        (7, 7),
        (None, None),
    ],
)
def test_targets_are_read_as_peft_takes_them(asked, read):
    assert targets_of(asked) == read


def test_a_comma_list_is_split_with_a_notice():
    job = parse_job(JOB + "lora_target: q_proj,v_proj\n", Path())

    assert job.spec.method.lora_target_modules == ["q_proj", "v_proj"]
    assert "line 3: method.lora_target_modules 'q_proj,v_proj' is read as ['q_proj', 'v_proj']" in job.notices


def test_axolotl_s_linear_targets_are_all_linear_maps():
    assert parse_job(JOB + "lora_target_linear: true\n", Path()).spec.method.lora_target_modules == "all-linear"


@pytest.mark.parametrize("name", ["logging_steps", "val_set_size", "load_in_8bit", "bf16", "exclude_modules"])
def test_a_key_of_another_tool_says_what_to_write_instead_of_a_key_that_looks_alike(name):
    for text in (f"{name}: 1\n", f"train: {{{name}: 1}}\n"):
        with pytest.raises(JobError) as caught:
            parse_job(JOB + text, Path())

        assert (other_tools().not_yet | other_tools().not_needed)[name] in str(caught.value)
        assert "did you mean" not in str(caught.value)


def test_a_misspelt_key_of_the_same_meaning_is_still_found():
    with pytest.raises(JobError, match=r"did you mean train.learning_rate\?"):
        parse_job(JOB + "train: {learning_rat: 1}\n", Path())


@pytest.mark.parametrize("name", ["eval_delay", "torch_empty_cache_steps", "num_proc", "save_on_each_node"])
def test_an_unknown_key_is_not_guessed_to_be_one_of_another_meaning(name):
    with pytest.raises(JobError) as caught:
        parse_job(JOB + f"{name}: 1\n", Path())

    assert "did you mean" not in str(caught.value)


def test_no_name_stands_in_two_lists():
    known = other_tools()

    names = [*known.same, *known.not_yet, *known.not_needed]
    assert len(names) == len(set(names)) > 80


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("loging_steps", "logging_steps: every step is logged"),
        ("logging_step", "logging_steps: every step is logged"),
        ("lerning_rate", "did you mean train.learning_rate?"),
        ("maxlength", "did you mean data.max_length?"),
        ("local_step", "did you mean strategy.local_steps?"),
        ("eval_steps", "did you mean eval.eval_steps?"),
        ("galore_rank", "known here"),
        ("pace", "known here"),
        ("model", "model: stands at the beginning of a line"),
    ],
)
def test_a_suggestion_means_the_same(key, told):
    with pytest.raises(JobError) as caught:
        parse_job(JOB + f"train: {{{key}: 1}}\n", Path())

    assert told in str(caught.value)


def test_no_key_of_another_tool_is_led_to_a_setting_of_another_meaning():
    from orchestrator.job.importers.tables import tables

    stated = {key for table in tables().values() for part in table.sentences.values() for key in part}
    keys = {
        key.rpartition(".")[2] for key in stated if not key.startswith("source.")
    }  # those stand in a data set's entry
    assert len(keys) > 150
    for key in sorted(keys - set(other_tools().same)):
        with pytest.raises(JobError) as caught:
            parse_job(JOB + f"train: {{{key}: {{a: 1}}}}\n", Path())

        suggested = str(caught.value).partition("did you mean ")[2].rstrip("?")
        assert not suggested or suggested.endswith(f".{key}"), key
