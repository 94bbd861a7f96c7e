"""What people's rows become under their models' chat templates: rightly supervised, or a broken row with its place."""

import json

import pytest
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.data.prepare import prepare_data
from orchestrator.data.samples import renderer_for
from orchestrator.data.survey import survey
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from tests.conftest import write_jsonl


@pytest.fixture
def open_case(case, tmp_path):
    """`open_case("12")` gives the job, and a function that prepares its rows and gives (samples, what was said)."""

    def act(number, name="job.yaml", **changes):
        folder = case(number)
        overrides = [f"data.{key}={json.dumps(value)}" for key, value in changes.items()]
        job = read_job(folder / name, overrides)
        model = (folder / job.spec.model.model_name_or_path).resolve()

        def prepare():
            said = []
            return prepare_data(job, model, 1024, tmp_path / "cache", said.append).train, said

        return job, model, prepare

    return act


def supervised(data, tokenizer, index=0):
    ids, mask = data.tokens(index)
    return tokenizer.decode(ids[mask])


def tokenizer_of(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def mistakes(prepare):
    with pytest.raises(JobError) as caught:
        prepare()
    return caught.value.mistakes


def test_nothing_before_the_assistants_first_words_is_supervised(open_case):
    _, model, prepare = open_case("12")

    data, _ = prepare()

    assert supervised(data, tokenizer_of(model)) == "Welcome to the shop!<|im_end|>Yes, in aisle two.<|im_end|>"
    assert "You are Tinybot" in tokenizer_of(model).decode(data.tokens(0)[0])
    assert data.statistics.repeated == 4


def test_a_text_that_brings_its_own_beginning_and_end_has_one_of_each(open_case):
    _, model, prepare = open_case("17")
    tokenizer = tokenizer_of(model)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    data, _ = prepare()

    ids, mask = data.tokens(0)
    assert ids.tolist().count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.tolist().count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)
    assert data.statistics.bos_doubled == 4


def test_an_answer_that_is_empty_is_a_broken_row_named_once_for_all(open_case):
    _, _, prepare = open_case("18")

    said = mistakes(prepare)

    assert "data.jsonl:1" in said[0] and "turn 4 (assistant) is empty" in said[0] and "4 more such rows" in said[0]
    assert len(said) == 2 and "data.strict: false" in said[1]


def test_a_long_text_is_split_and_every_token_is_learnt_once(open_case, tmp_path):
    job, model, prepare = open_case("19")
    words = "The invoice arrived on Monday and was paid. " * 1200
    write_jsonl(job.folder / "data.jsonl", [{"text": words}, {"text": "A short one."}])

    data, said = prepare()

    tokenizer = tokenizer_of(model)
    whole = len(tokenizer(words)["input_ids"]) + 1
    assert data.statistics.supervised_tokens == (whole - 1) + len(tokenizer("A short one.")["input_ids"])
    assert data.statistics.cut_tokens == 0 and data.statistics.longest == 1024 and len(data) > 10
    assert not any("lost" in text for text in said)


def test_thoughts_that_the_template_cuts_are_named_with_row_and_turn(open_case):
    _, _, prepare = open_case("20")

    said = mistakes(prepare)

    assert "data.jsonl:1: turn 2 (assistant)" in said[0] and "Ten times four is forty" in said[0]
    assert "data.chat_template" in said[0] and "7 more such rows" in said[0]


def test_each_answer_of_a_conversation_is_trained_after_the_prompt_that_inference_gives_it(open_case):
    _, model, prepare = open_case("21")
    tokenizer = tokenizer_of(model)

    data, _ = prepare()

    thoughts = "<think>\n\n</think>\n\n"
    assert [supervised(data, tokenizer, index) for index in (0, 1)] == [
        f"{thoughts}Hello<|im_end|>",
        f"{thoughts}Floor two.<|im_end|>",
    ]
    assert (len(data), data.statistics.rows, data.statistics.per_turn) == (16, 8, 8)
    asked = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Where is the printer?"},
    ]
    prompt, reference = data.prompt(1)
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert reference == "Floor two."


def test_rows_that_a_template_refuses_are_broken_rows(open_case):
    _, _, prepare = open_case("22")

    said = mistakes(prepare)

    assert "data.jsonl:7" in said[0] and "no system turn here" in said[0] and "data.chat_template" in said[0]
    assert "data.jsonl:8" in said[1] and "take turns" in said[1]


def test_rows_that_a_template_refuses_are_kept_aside_when_not_strict(open_case):
    _, _, prepare = open_case("22", "loose.yaml")

    data, _ = prepare()

    assert (data.statistics.rows, data.statistics.rejected, len(data)) == (8, 2, 6)


def rewritten(job, items):
    write_jsonl(job.folder / "data.jsonl", items)


TALK = [{"role": "user", "content": "Room 9?"}, {"role": "assistant", "content": "Floor 9"}]


@pytest.mark.parametrize("model, words", [("silentdrop", "drops a part"), ("noeos", "would never learn to stop")])
def test_a_template_that_drops_a_turn_or_the_end_breaks_the_row(open_case, case_models, model, words):
    job, _, _ = open_case("22")
    folder = case_models.build(f"llama-{model}")
    rewritten(job, [{"messages": [{"role": "system", "content": "Be brief."}, *TALK]}])

    found = survey(job, renderer_for(job, folder), 1024)

    [line, _] = found.mistakes()
    assert words in line and "data.jsonl:1: turn" in line
    assert found.train.counts.statistics.lost_turns == (model == "silentdrop")


CASES = [("06", "job"), ("06", "loose"), ("12", "job"), ("18", "job"), ("20", "job"), ("21", "job"), ("22", "job")]
CASES += [("22", "loose")]


@pytest.mark.parametrize("number, name", CASES)
def test_validate_accepts_what_is_prepared_and_refuses_what_is_not(open_case, number, name):
    job, _, prepare = open_case(number, f"{name}.yaml")

    refused = CliRunner().invoke(app, ["validate", str(job.folder / f"{name}.yaml")]).exception

    if refused is None:
        assert len(prepare()[0])
    else:
        assert isinstance(refused, JobError) and refused.mistakes == mistakes(prepare)


def test_half_a_surrogate_pair_breaks_its_rows_alone(open_case):
    _, _, prepare = open_case("06", "loose.yaml")

    data, _ = prepare()

    assert (data.statistics.rejected, len(data)) == (4, 8)


def test_inspect_marks_what_is_supervised_without_colour(open_case):
    job, _, _ = open_case("12")

    shown = CliRunner().invoke(app, ["inspect", str(job.folder / "job.yaml"), "--rows", "1"])

    assert "\u27e6Welcome to the shop!<|im_end|>\u27e7" in shown.output
    assert "supervision: 52 of 188 tokens" in shown.output


def test_losing_much_needs_to_be_asked_for(open_case, tmp_path):
    job, model, _ = open_case("22")
    long = [{"role": "user", "content": "Room 9? " * 400}, {"role": "assistant", "content": "Floor 9"}]
    rewritten(job, [{"messages": TALK}, {"messages": long}])

    with pytest.raises(JobError, match=r"of the tokens are lost.*data\.truncate: true"):
        prepare_data(job, model, 64, tmp_path / "cache", lambda text: None)

    said = []
    asked = read_job(job.folder / "job.yaml", ["data.truncate=true"])
    data = prepare_data(asked, model, 64, tmp_path / "cache", said.append).train
    assert (len(data), data.statistics.dropped) == (1, 1)
    assert any("1 of 2 rows dropped" in text for text in said)
