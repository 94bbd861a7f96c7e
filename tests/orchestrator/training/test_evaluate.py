import pyarrow
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.data.dataset import Dataset, TokenizeOptions, build
from orchestrator.data.readers.files import read_rows
from orchestrator.data.rendering.template import Renderer
from orchestrator.progress.updates import ProgressUpdate, reporting_to
from orchestrator.training.evaluate import Generation, context_of, generate_answers, num_without_room
from orchestrator.training.stops import end_of_turn, stops_of
from strategies.model.sampling import Sampling
from tests.conftest import CHAT_TEMPLATE, rows, write_jsonl


def test_generated_answers_equal_one_by_one_generation_and_leave_the_model_as_it_was(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").train()
    file = write_jsonl(tmp_path / "rows.jsonl", rows(9))
    data = build(
        read_rows(file),
        Renderer(tokenizer, CHAT_TEMPLATE),
        TokenizeOptions("auto", "", 64, "truncate", True),
        tmp_path / "out",
    )

    found = generate_answers(model, tokenizer, data, range(9), Generation(6, "float32"))

    assert [answer.reference for answer in found] == [row["completion"] for row in rows(9)]
    for index, answer in enumerate(found):
        prompt = torch.tensor(data.prompt(index)[0], dtype=torch.long)[None]
        alone = model.eval().generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=2
        )
        model.train()
        assert tokenizer.decode(alone[0, prompt.shape[1] :], skip_special_tokens=True).strip() == answer.generated
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_a_drawn_answer_is_the_same_whatever_is_answered_beside_it(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    data = build(
        read_rows(write_jsonl(tmp_path / "rows.jsonl", rows(6))),
        Renderer(tokenizer, CHAT_TEMPLATE),
        TokenizeOptions("auto", "", 64, "truncate", True),
        tmp_path / "out",
    )
    how = Generation(8, "float32", sampling=Sampling(1.0, seed=5))

    together = generate_answers(model, tokenizer, data, range(6), how)

    alone = [generate_answers(model, tokenizer, data, [row], how)[0] for row in range(6)]
    assert [one.generated for one in alone] == [one.generated for one in together]
    greedy = generate_answers(model, tokenizer, data, range(6), Generation(8, "float32"))
    assert [one.generated for one in greedy] != [one.generated for one in together]


CHATML, MARKED = CHAT_TEMPLATE, CHAT_TEMPLATE.replace("<|im_end|>", "<end_of_turn>")


@pytest.mark.parametrize(
    ("template", "token", "text"),
    [
        (CHATML, "<|im_end|>", None),
        (MARKED, None, "<end_of_turn>"),
        ("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", "<|im_end|>", None),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", None, None),
        ("{{ raise_exception('no') }}", None, None),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", None, None),
        (None, None, None),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(tokenizer_folder, template, token, text):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = template

    found = end_of_turn(tokenizer)

    assert found == (None if token is None else tokenizer.convert_tokens_to_ids(token), text)


@pytest.mark.parametrize("own", [None, 0, [0, 1], [0, 2]])
def test_stops_are_the_union_of_what_model_tokenizer_and_template_say(model_folder, own):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.eos_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.eos_token_id = own

    stops = stops_of(model, tokenizer)

    assert set(stops.ids) == {0, 2, *(own if isinstance(own, list) else [])}


def saying(model, tokenizer, text):
    """The model made to say `text` over and over, whatever it is asked."""
    ids, step = tokenizer(text, add_special_tokens=False)["input_ids"], [0]

    def count(module, args, kwargs):
        step[0] = 0 if kwargs["input_ids"].shape[1] > 1 else step[0] + 1  # prompts come whole, answers token by token

    def forced(module, inputs, output):
        said = torch.full(output.shape[:2], ids[step[0] % len(ids)])
        return torch.nn.functional.one_hot(said, model.config.vocab_size).float()

    model.register_forward_pre_hook(count, with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(forced)
    return model


@pytest.fixture
def asked(model_folder, tmp_path):
    """(model that can be made to say things, tokenizer, held-out rows), each its own."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "cat", "completion": "dog"}, *rows(3)])
    options = TokenizeOptions("auto", "", None, "truncate", True)
    return model, tokenizer, build(read_rows(file), Renderer(tokenizer, CHAT_TEMPLATE), options, tmp_path / "out")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_answer_ends_with_the_turn_though_the_tokenizers_end_is_another(asked, template):
    model, tokenizer, data = asked
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", template
    model.generation_config.eos_token_id = 0
    end = "<|im_end|>" if template == CHATML else "<end_of_turn>"

    found = generate_answers(
        saying(model, tokenizer, f"dog{end}"), tokenizer, data, range(2), Generation(40, "float32")
    )

    assert [answer.generated for answer in found] == ["dog", "dog"]


def test_no_answer_goes_beyond_the_models_context(asked):
    model, tokenizer, data = asked
    prompts = [len(data.prompt(row)[0]) for row in range(4)]
    model.config.max_position_embeddings = max(prompts)

    found = generate_answers(saying(model, tokenizer, "dog"), tokenizer, data, range(4), Generation(1000, "float32"))

    limit = context_of(model)
    said = [len(tokenizer(answer.generated)["input_ids"]) for answer in found]
    assert said == [max(0, limit - length) for length in prompts]
    assert num_without_room(model, data, range(4)) == sum(length >= limit for length in prompts) > 0


def test_a_prompt_without_a_token_starts_as_a_text_does(asked):
    model, tokenizer, data = asked
    at = data._table.schema.get_field_index("prompt_length")
    empty = data._table.set_column(at, data._table.schema.field(at), pyarrow.array([0] * 4, pyarrow.int32()))

    found = generate_answers(
        model, tokenizer, Dataset(empty, data.statistics, "empty"), range(4), Generation(3, "float32")
    )

    assert [answer.reference for answer in found] == ["dog", *(row["completion"] for row in rows(3))]
    assert len({answer.generated for answer in found}) == 1


def test_how_many_prompts_are_answered_is_told_batch_by_batch(asked):
    model, tokenizer, data = asked
    heard = []

    with reporting_to(heard.append):
        one_at_a_time = Generation(4, "float32", cache_bytes=1.0)
        generate_answers(saying(model, tokenizer, "dog"), tokenizer, data, range(4), one_at_a_time)

    assert heard == [ProgressUpdate("answers", done, 4, "prompts") for done in (1, 2, 3, 4)]
