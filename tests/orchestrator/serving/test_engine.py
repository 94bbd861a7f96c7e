"""The transformers engine: answers are `generate`'s, whatever else is in the batch, joins it or leaves it."""

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.serving.engines.batch import RowBatch
from orchestrator.serving.engines.kinds import kind_of_adapter
from orchestrator.serving.engines.prompts import prompt_tokens
from orchestrator.serving.engines.protocol import Query, Refused, ServedModel
from orchestrator.serving.engines.transformers_engine import TransformersEngine
from orchestrator.serving.engines.weights import EngineSettings, Weights
from tests.conftest import question
from tests.orchestrator.serving.conftest import write_adapter


class Answers:
    """What an engine sends."""

    def __init__(self):
        self.pieces, self.refusals, self.order = {}, {}, []

    def __call__(self, number, answer):
        if isinstance(answer, Refused):
            self.refusals[number] = answer
        elif answer is not None:
            self.pieces.setdefault(number, []).append(answer)
            self.order.append(number)

    def text(self, number):
        return "".join(piece.text for piece in self.pieces[number])


@pytest.fixture
def start(model_folder):
    """An engine and what it sends."""

    def started(**settings):
        answers = Answers()
        return TransformersEngine(EngineSettings(str(model_folder), **settings), answers), answers

    return started


def served(model_folder, folder=None):
    return ServedModel(folder.name if folder else "base", str(model_folder), folder and str(folder))


def asked(model, number, **options):
    content = " ".join(question(number + place) for place in range(1 + number % 3))
    return Query(model, messages=[{"role": "user", "content": content}], **{"max_tokens": 6 + number, **options})


def generated(query, tokenizer, model_folder):
    """The tokens that plain transformers and PEFT generate greedily, one prompt alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = query.model.folder
    is_whole = folder and not (Path(folder) / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder if is_whole else model_folder)
    if folder and not is_whole:
        model = PeftModel.from_pretrained(model, folder)
    ids = torch.tensor([prompt_tokens(tokenizer, query)])
    output = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=query.max_tokens,
        pad_token_id=0,
    )
    return output[0, ids.shape[1] :].tolist()


def run(engine):
    while engine.is_busy:
        engine.step()


def test_answers_of_rows_that_join_and_leave_are_those_of_generate(start, adapters, model_folder, tokenizer):
    engine, answers = start()
    names = [None, "plain", "scaled", "dora", "norm", "biased", "sparse", "whole"]
    models = [served(model_folder, name and adapters[name]) for name in names]
    queries = [asked(model, number) for number, model in enumerate([*models, *models[:4]])]

    for number, query in enumerate(queries):
        engine.submit(number, query)
        engine.step()
        engine.step()
    run(engine)

    assert not answers.refusals
    for number, query in enumerate(queries):
        tokens = generated(query, tokenizer, model_folder)
        ended = tokens[-1] == tokenizer.eos_token_id
        assert answers.text(number) == tokenizer.decode(tokens, skip_special_tokens=True), query.model.name
        assert answers.pieces[number][-1].completion_tokens == len(tokens)
        assert answers.pieces[number][-1].finish == ("stop" if ended else "length")
    texts = {answers.text(number) for number in range(len(models))}
    assert len(texts) > 4, "the adapters change nothing"
    interleaved = [number for number, _ in itertools.groupby(answers.order)]
    assert len(interleaved) > 2 * len(queries), "each was computed after the other"


def test_an_answer_goes_past_its_end_where_a_query_says_so(model_folder, tokenizer, tmp_path):
    query = asked(served(model_folder), 1, max_tokens=12)
    whole = generated(query, tokenizer, model_folder)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": whole[5]}))
    answers = Answers()
    engine = TransformersEngine(EngineSettings(str(folder)), answers)

    for number, ignores in enumerate((False, True)):
        engine.submit(number, replace(query, ignore_eos=ignores))
    run(engine)

    ended, past = (answers.pieces[number][-1] for number in range(2))
    assert (ended.finish, ended.completion_tokens) == ("stop", whole.index(whole[5]) + 1)
    assert (past.finish, past.completion_tokens) == ("length", 12) and len(whole) == 12
    assert answers.text(1) == tokenizer.decode(whole, skip_special_tokens=True)


def test_a_batch_of_several_adapters_gives_the_logits_of_each_alone(start, adapters, model_folder):
    engine, _ = start()
    models = [served(model_folder, folder) for folder in (None, adapters["plain"], adapters["scaled"])]
    rows = [engine._row(n, asked(m, n), engine._seats.take(m, ())) for n, m in enumerate([*models, *models])]
    mixed = RowBatch()
    first, *rest = ([rows[0], rows[3]], [rows[1]], [rows[2], rows[4], rows[5]])

    together = [mixed.join(first)]
    for joining in rest:
        together.append(mixed.join(joining))
    for row in mixed.rows:
        row.last = 5
    after = mixed.step()

    for joined, logits_BV in zip([first, *rest], together, strict=True):
        for row, logits_V in zip(joined, logits_BV, strict=True):
            alone = RowBatch()
            torch.testing.assert_close(logits_V, alone.join([row])[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(after[mixed.rows.index(row)], alone.step()[0], atol=1e-5, rtol=1e-5)


def test_rows_that_leave_take_their_padding_along(start, model_folder):
    engine, _ = start()
    rows = [engine._row(n, asked(served(model_folder), n), engine._seats.base) for n in range(6)]
    batch = RowBatch()
    batch.join(rows)
    longest = max(len(row.prompt) for row in rows)

    batch.keep([row for row in rows if len(row.prompt) < longest])

    assert batch._mask_BT.shape[1] == max(len(row.prompt) for row in batch.rows) < longest
    for row in batch.rows:
        row.last = 7
    logits_BV = batch.step()
    for row, logits_V in zip(batch.rows, logits_BV, strict=True):
        alone = RowBatch()
        alone.join([row])
        torch.testing.assert_close(logits_V, alone.step()[0], atol=1e-5, rtol=1e-5)


def test_the_least_recently_used_adapter_makes_room(start, adapters, model_folder):
    engine, answers = start(max_adapters=2)
    one, two, three = (served(model_folder, adapters[name]) for name in ("plain", "scaled", "dora"))

    for number, model in enumerate([one, two, one, three, one, two]):
        engine.submit(number, asked(model, 1, max_tokens=2))
        run(engine)

    # one and two are loaded, one is hit, three evicts two, one is hit, two evicts three
    assert {name: engine.counts[f"adapter_{name}"] for name in ("loads", "hits", "evictions")} == {
        "loads": 4,
        "hits": 2,
        "evictions": 2,
    }
    assert engine.counts["adapters_loaded"] == 2
    assert answers.text(0) == answers.text(2) == answers.text(4) and answers.text(1) == answers.text(5)


def test_a_hundred_adapters_take_turns_in_eight_places(start, adapters, model_folder, tmp_path):
    engine, answers = start(max_adapters=8)
    folders = [shutil.copytree(adapters["plain"], tmp_path / f"a{number}") for number in range(100)]
    draw = random.Random(5)
    order = [*range(100), *(draw.randrange(12) for _ in range(40))]

    for number, which in enumerate(order):
        engine.submit(number, asked(served(model_folder, folders[which]), 1, max_tokens=1))
        run(engine)

    held, hits, evictions = [], 0, 0  # the least recently used one first
    for which in order:
        hits += which in held
        evictions += which not in held and len(held) == 8
        held = [*(one for one in held if one != which), which][-8:]
    assert len(answers.pieces) == len(order) and hits > 10
    assert engine.counts["adapter_hits"] == hits
    assert engine.counts["adapter_loads"] == len(order) - hits
    assert engine.counts["adapter_evictions"] == evictions


def test_eight_answers_take_the_steps_of_one(start, adapters, model_folder):
    engine, answers = start()
    models = [served(model_folder, folder) for folder in (None, adapters["plain"], adapters["scaled"])]
    queries = [asked(models[number % 3], 3, max_tokens=20, temperature=1.0, seed=number) for number in range(8)]
    for number, query in enumerate(queries):
        engine.submit(number, query)

    steps = 0
    while engine.is_busy:
        engine.step()
        steps += 1

    longest = max(answers.pieces[number][-1].completion_tokens for number in range(8))
    assert steps == longest


def test_more_adapters_at_a_time_than_there_are_places_wait_for_one(start, adapters, model_folder):
    engine, answers = start(max_adapters=1)
    models = [served(model_folder, adapters[name]) for name in ("plain", "scaled", "norm", "whole")]

    for number, model in enumerate(models):
        engine.submit(number, asked(model, number))
    run(engine)

    assert sorted(answers.pieces) == [0, 1, 2, 3] and not answers.refusals
    assert engine.counts["adapter_evictions"] == 3


def test_a_damaged_adapter_is_named_and_the_others_go_on(start, adapters, model_folder, tmp_path):
    engine, answers = start()
    broken = write_adapter(model_folder, tmp_path / "broken", 9)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    for number, folder in enumerate((broken, adapters["plain"], None)):
        engine.submit(number, asked(served(model_folder, folder), 1))
    run(engine)

    assert list(answers.refusals) == [0] and answers.refusals[0].message.startswith("broken cannot be loaded")
    assert answers.text(1) and answers.text(2)


def test_a_seed_draws_the_same_tokens_in_any_company(start, model_folder):
    engine, answers = start()
    warm = {"temperature": 1.0, "top_p": 0.9}

    engine.submit(0, asked(served(model_folder), 4, seed=11, **warm))
    run(engine)
    for number in range(1, 5):
        engine.submit(number, asked(served(model_folder), 4, seed=11 if number == 3 else None, **warm))
    run(engine)

    assert answers.text(0) == answers.text(3)
    assert len({answers.text(number) for number in (0, 1, 2, 4)}) > 1


def test_logprobs_are_those_of_the_model(start, model_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    engine, answers = start()
    query = asked(served(model_folder), 2, max_tokens=1, logprobs=3)
    engine.submit(0, query)
    run(engine)

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        logits_V = model(torch.tensor([prompt_tokens(tokenizer, query)])).logits[0, -1]
    best = torch.log_softmax(logits_V, 0).topk(3)
    (score,) = answers.pieces[0][0].scores
    assert score.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
    assert [one.logprob for one in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("cold", [{"temperature": 1.0, "top_p": 0.0}, {"temperature": 1e-39}, {"temperature": 1e-320}])
def test_no_probability_left_to_draw_from_is_the_likeliest_token_and_harms_nobody(start, model_folder, cold):
    engine, answers = start()
    engine.submit(0, asked(served(model_folder), 4))
    run(engine)
    engine.submit(1, asked(served(model_folder), 4, **cold))
    engine.submit(2, asked(served(model_folder), 5, temperature=1e-4, top_p=1e-9, seed=1))
    engine.submit(3, asked(served(model_folder), 5))

    run(engine)

    assert not answers.refusals
    assert answers.text(1) == answers.text(0) and answers.text(2) == answers.text(3)


def test_a_row_whose_logits_are_no_numbers_is_refused_alone(start, model_folder):
    engine, answers = start()
    broken, sound = (asked(served(model_folder), number, temperature=1.0, seed=1) for number in (1, 4))
    engine.submit(0, sound)
    run(engine)
    engine.submit(1, broken)
    engine.submit(2, sound)

    def spoil(module, inputs, output):
        places = [row.number for batch in itertools.chain(*engine._batches.values()) for row in batch.rows]
        if output.shape[0] == len(places) == 2:
            output[places.index(1)] = torch.nan

    for lane in engine._batches:
        lane.model.get_output_embeddings().register_forward_hook(spoil)
    engine.step()
    for lane in engine._batches:
        lane.model.get_output_embeddings().register_forward_hook(spoil)
    run(engine)

    assert answers.refusals[1].status == 500 and "the logits are no numbers" in answers.refusals[1].message
    assert answers.text(2) == answers.text(0)


def test_bytes_of_tokens_put_together_are_the_text():
    from transformers import AutoTokenizer

    from orchestrator.job.model_files import locate
    from orchestrator.serving.engines.sampling import bytes_of, score

    tokenizer = AutoTokenizer.from_pretrained(locate("smollm2-135m-instruct", Path.cwd()))
    text = "日本🎌 é"
    ids = tokenizer(text).input_ids

    found = [score(tokenizer, torch.zeros(tokenizer.vocab_size), token, 0) for token in ids]

    assert bytes(byte for one in found for byte in one.bytes).decode() == text
    parts = [one.token for one in found if one.token.startswith("bytes:")]
    assert parts and all(part.startswith("bytes:\\x") for part in parts)
    assert bytes_of("<0xE6>") == b"\xe6" and bytes_of("Ġa") == b" a" and bytes_of("日") is None


def test_a_stop_ends_an_answer(start, model_folder):
    engine, answers = start()
    engine.submit(0, asked(served(model_folder), 5, max_tokens=20))
    run(engine)
    whole = answers.text(0)
    stop = whole[4:7]

    engine.submit(1, asked(served(model_folder), 5, max_tokens=20, stop=(stop,)))
    run(engine)

    assert answers.text(1) == whole[: whole.index(stop)]
    assert answers.pieces[1][-1].finish == "stop"


def test_a_row_that_is_cancelled_leaves_the_batch(start, model_folder):
    engine, answers = start()
    for number in range(3):
        engine.submit(number, asked(served(model_folder), number, max_tokens=50))
    engine.step()

    engine.cancel(1)

    assert engine.counts["rows"] == 2
    run(engine)
    assert answers.pieces[1][-1].finish is None and answers.pieces[0][-1].finish


def test_a_prompt_beyond_the_context_is_refused(start, model_folder):
    engine, answers = start()

    engine.submit(0, Query(served(model_folder), tokens=[5] * 256))
    engine.submit(1, Query(served(model_folder), tokens=[5] * 250))
    run(engine)

    assert answers.refusals[0].code == "context_length_exceeded"
    assert answers.pieces[1][-1].completion_tokens <= 6


def test_a_sliding_window_and_layers_with_a_state_are_computed_as_generate_does(tokenizer_folder, tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    answers = Answers()
    engine = TransformersEngine(EngineSettings(str(tmp_path)), answers)
    queries = [asked(served(tmp_path), number) for number in range(4)]

    for number, query in enumerate(queries):
        engine.submit(number, query)
        engine.step()
    run(engine)

    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), Gemma3ForCausalLM)
    for number, query in enumerate(queries):
        tokens = generated(query, tokenizer, tmp_path)
        assert answers.text(number) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_options_that_a_later_version_brings_get_a_model_of_their_own(adapters, tmp_path):
    later = shutil.copytree(adapters["plain"], tmp_path / "later")
    settings = json.loads((later / "adapter_config.json").read_text())
    (later / "adapter_config.json").write_text(json.dumps({**settings, "use_tomorrows_trick": True}))

    kinds = {name: kind_of_adapter(folder) for name, folder in adapters.items()}

    assert kind_of_adapter(later) == "alone"
    assert kinds == {
        **dict.fromkeys(("plain", "scaled"), "shared"),
        "dora": "in turn",
        **dict.fromkeys(("norm", "biased", "sparse", "whole"), "alone"),
    }


def test_a_run_is_served_as_it_trained(finished, place, tokenizer):
    answers, base = Answers(), finished.data().model
    engine = TransformersEngine(EngineSettings(base, run=str(finished.path)), answers)
    model = ServedModel("finished", base, str(finished.exported()), system="red green")
    query, bare = asked(model, 3), asked(ServedModel("finished", base, model.folder), 3)

    for number, one in enumerate((query, bare)):
        engine.submit(number, one)
    run(engine)

    assert prompt_tokens(tokenizer, query) != prompt_tokens(tokenizer, bare), "its system message is not there"
    for number, one in enumerate((query, bare)):
        assert answers.text(number) == tokenizer.decode(generated(one, tokenizer, base), skip_special_tokens=True)


def test_a_model_that_memory_cannot_hold_is_refused_with_both_sizes(tmp_path):
    """A file of four TiB, of which the disk holds the header."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**42)

    with pytest.raises(Refused, match=r"takes 4096\.0 GiB and .* GiB are free on cpu") as caught:
        Weights(EngineSettings(str(tmp_path))).load(str(tmp_path))

    assert caught.value.status == 503 and "orchestrator merge" in caught.value.message
