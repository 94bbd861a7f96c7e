"""Every mistake at once, with line, key, value and the nearest known key; nothing ever ends in a traceback."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import Diverged, JobError
from orchestrator.job.job_file import parse_job, read_job
from orchestrator.lifecycle.validate import check
from tests.conftest import write_jsonl

HERE = Path("/jobs")
GOOD = "model: {model_name_or_path: m}\ndata: {train: a.jsonl}\n"


def mistakes(text, overrides=()):
    with pytest.raises(JobError) as caught:
        parse_job(text, HERE, "job.yaml", overrides)
    return caught.value.mistakes


def test_two_sections_are_enough_and_the_rest_has_defaults():
    job = parse_job(GOOD, HERE)

    assert job.spec.method.type == "auto"
    assert job.spec.train.learning_rate == 2e-4
    assert job.spec.data.max_length == "auto"


def test_all_mistakes_come_at_once_each_with_its_line():
    text = (
        "model: {model_name_or_path: m}\n"
        "data:\n"
        "  train: a.jsonl\n"
        "  max_lenght: 5\n"
        "method:\n"
        "  lora_r: 0\n"
        "train:\n"
        "  learning_rate: fast\n"
        "trian: {}\n"
    )

    found = mistakes(text)

    assert found == [
        "job.yaml: line 4: data.max_lenght: there is no such key; did you mean data.max_length?",
        "job.yaml: line 6: method.lora_r is 0; it should be greater than or equal to 1",
        "job.yaml: line 8: train.learning_rate is 'fast'; it should be a valid number",
        "job.yaml: line 9: trian: there is no such key; did you mean train?",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty", "orchestrator init"]),
        ("- 1\n- 2\n", ["holds [1, 2]", "mapping"]),
        ("model: [\n", ["line", "not YAML"]),
        ("a: &a [*a]\n", ["anchor that contains itself"]),
        ("model: {}\nmodel: {}\n", ["line 2", "occurs twice"]),
        (GOOD.replace("train: a.jsonl", ""), ["data.train is missing"]),
        (GOOD + "method: {type: lorra}\n", ["lora, full"]),
        (GOOD + "method: {load_in_4bit: true}\n", ["no such key yet", "type: qlora"]),
        (GOOD + "method: {type: full, lora_r: 8}\n", ["use a type that has it: lora"]),
        (GOOD + "lora_r: 4\nmethod: {lora_r: 8}\n", ["same setting", "keep one"]),
        (GOOD + "train: {optim: adam}\n", ["'adam'", "adamw_torch"]),
        (GOOD + "train: {num_train_epochs: .inf}\n", ["train.num_train_epochs is inf", "finite number"]),
        (GOOD + f"train: {{seed: {2**64}}}\n", ["train.seed", f"less than or equal to {2**64 - 1}"]),
        (GOOD + "checkpoint: {save_total_limit: 1}\n", ["greater than or equal to 2"]),
        (GOOD + "name: 'a/b'\n", ["name", "'a/b'"]),
    ],
)
def test_a_mistake_names_what_to_do(text, words):
    told = "\n".join(mistakes(text))

    for word in words:
        assert word in told


def test_names_of_other_tools_are_read_with_a_notice():
    job = parse_job(
        "base_model: m\ntrain: {num_epochs: 2}\ndata: {train: a.jsonl, cutoff_len: 99}\nlora_rank: 5\n", HERE
    )

    assert job.spec.model.model_name_or_path == "m"
    assert job.spec.train.num_train_epochs == 2
    assert job.spec.data.max_length == 99
    assert job.spec.method.lora_r == 5
    assert len(job.notices) == 4
    assert parse_job(job.text, HERE).notices == []  # what is written into the run folder is in our own names


def test_flat_keys_are_sorted_into_their_sections():
    job = parse_job("model_name_or_path: m\nlearning_rate: 1e-3\nmax_length: 64\ndata: {train: a.jsonl}\n", HERE)

    assert (job.spec.train.learning_rate, job.spec.data.max_length) == (1e-3, 64)


def test_overrides_win_and_are_validated_like_the_file():
    job = parse_job(GOOD, HERE, overrides=["train.learning_rate=1e-3", "data.eval={split: 0.2}", "method.lora_r=2"])

    assert job.spec.train.learning_rate == 1e-3
    assert job.spec.data.eval.split == 0.2
    assert parse_job(job.text, HERE).spec == job.spec
    assert "did you mean train.learning_rate?" in mistakes(GOOD, ["train.learning_rat=1"])[0]
    assert "section.key=value" in mistakes(GOOD, ["nonsense"])[0]
    assert "not a section" in mistakes(GOOD, ["model.model_name_or_path.x=1"])[0]


def test_validation_does_not_rewrite_what_the_user_wrote():
    text = GOOD + "train: {global_batch_size: auto}\n"

    assert parse_job(text, HERE).text == text


NAMES = """version name model data method train strategy cluster checkpoint eval tracking lora_r learning_rate type path
split max_length model_name_or_path format x lora_rank"""
keys = st.sampled_from(NAMES.split())
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "lora"])
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5), max_leaves=12
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(keys, junk, max_size=8))
def test_junk_in_known_places_is_an_error_or_a_job(values):
    import yaml

    try:
        parse_job(yaml.safe_dump(values, allow_unicode=True), HERE)
    except JobError as error:
        assert error.mistakes


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_an_error_or_a_job(text):
    try:
        parse_job(text, HERE)
    except JobError as error:
        assert error.mistakes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=3))
def test_any_override_is_an_error_or_a_job(overrides):
    try:
        parse_job(GOOD, HERE, overrides=overrides)
    except JobError as error:
        assert error.mistakes


@pytest.mark.parametrize(
    ("start", "told"),
    [("adapters/a", "is a relative path"), ("/no/such/folder", "does not exist"), ("/tmp/" + "x" * 300, "too long")],
)
def test_an_adapter_to_start_from_that_is_not_there_is_refused_at_once(tmp_path, start, told):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    text = "model: {model_name_or_path: a/b}\ndata: {train: a.jsonl}\n"
    (tmp_path / "job.yaml").write_text(f"{text}method: {{type: lora, init_adapter: {start}}}\n")

    with pytest.raises(JobError, match=f"method.init_adapter: .*{told}"):
        check(read_job(tmp_path / "job.yaml"))


def test_a_secret_that_is_not_set_here_is_said(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    text = "model: {model_name_or_path: a/b}\ndata: {train: a.jsonl}\ncluster: {secrets: [ONE, TWO]}\n"
    (tmp_path / "job.yaml").write_text(text + 'tracking: {mlflow_uri: "http://me:${THREE}@127.0.0.1:9"}\n')
    monkeypatch.setenv("TWO", "x")

    unchecked = check(read_job(tmp_path / "job.yaml"))["unchecked"]

    assert [line.split(":")[0] for line in unchecked[:-1]] == ["the secret ONE", "the secret THREE"]


def test_a_loss_that_is_no_number_at_once_is_not_blamed_on_the_learning_rate():
    assert "Nothing was trained before it" in str(Diverged(0, [3])) and "learning_rate" not in str(Diverged(0, [3]))
    assert "Lower train.learning_rate" in str(Diverged(4, [3]))
