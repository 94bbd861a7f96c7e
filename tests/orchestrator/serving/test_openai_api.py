"""Requests of the OpenAI API: what is understood, and that everything else is an answer and no traceback."""

import json
import random

import pytest

from orchestrator.language.catalogue import translator
from orchestrator.serving.engines.protocol import Piece, Refused, ServedModel, TokenScore
from orchestrator.serving.openai_api import Answer, error_body, parse_request

MODEL = ServedModel("tuned", "/models/tiny", "/adapters/tuned")
HELLO = {"model": "tuned", "messages": [{"role": "user", "content": "hello"}]}


def resolve(name):
    if name != "tuned":
        raise Refused(404, f"no {name}", "model_not_found", "model")
    return MODEL


def parse(body, is_chat=True):
    return parse_request(json.dumps(body).encode(), is_chat, resolve)


def refused(body, is_chat=True):
    with pytest.raises(Refused) as caught:
        parse(body, is_chat)
    return caught.value


def test_a_chat_request_is_read():
    asked = parse(
        {**HELLO, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "stream": True}
    )

    query = asked.query
    assert (query.model, query.messages) == (MODEL, HELLO["messages"])
    assert (query.max_tokens, query.temperature, query.top_p, query.seed) == (5, 0.5, 0.9, 3)
    assert query.stop == ("x",) and asked.streams and not asked.with_usage


def test_answers_are_greedy_where_nothing_is_said():
    assert parse(HELLO).query.temperature == 0


def test_ends_are_passed_over_where_a_request_says_so():
    assert parse({**HELLO, "ignore_eos": True}).query.ignore_eos and not parse(HELLO).query.ignore_eos


def test_texts_in_parts_and_the_developer_role_are_read():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    asked = parse({"model": "tuned", "messages": [{"role": "developer", "content": parts}]})

    assert asked.query.messages == [{"role": "system", "content": "ab"}]


@pytest.mark.parametrize(("prompt", "wanted"), [("a", ("a", None)), (["a"], ("a", None)), ([1, 2], (None, [1, 2]))])
def test_a_completion_takes_a_text_or_tokens(prompt, wanted):
    query = parse({"model": "tuned", "prompt": prompt}, is_chat=False).query

    assert (query.prompt, query.tokens) == wanted


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"seed": 1.5}, "seed"),
        ({"top_k": 40}, "top_k"),
        ({"n": True}, "n"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_token": 3}, "max_token"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": True, "top_logprobs": 2.7}, "top_logprobs"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(change, param):
    refusal = refused({**HELLO, **change})

    assert (refusal.status, refusal.param) == (400, param)
    assert param in error_body(refusal, str)["error"]["message"]


def test_an_error_is_in_the_language_of_who_asks_and_its_code_for_programs():
    refusal = refused({**HELLO, "stream": "yes"})

    english, japanese = (error_body(refusal, translator(name))["error"] for name in ("en", "ja"))

    assert english["message"] == "stream: give true or false"
    assert japanese["message"] == "stream: true または false を指定してください"
    assert english | {"message": ""} == japanese | {"message": ""}


def test_neutral_values_of_what_is_not_supported_pass():
    assert parse({**HELLO, "top_k": -1, "repetition_penalty": 1.0, "tool_choice": "auto", "metadata": {"a": "b"}})
    assert parse({**HELLO, "n": 1, "presence_penalty": 0, "tools": [], "user": "me", "logit_bias": {}})


def test_a_misspelt_field_says_which_one_was_meant_and_a_limit_both_ends():
    assert "did you mean max_tokens?" in refused({**HELLO, "max_token": 3}).message
    assert "from 1 to 2147483648" in refused({**HELLO, "max_tokens": 10**12}).message
    with pytest.raises(Refused, match="max_completion_tokens is not supported"):
        parse({"model": "tuned", "prompt": "x", "max_completion_tokens": 3}, is_chat=False)


def test_offsets_count_characters_of_the_text_where_tokens_are_parts_of_one():
    scores = [TokenScore("bytes:\\xe6\\x97", [0xE6, 0x97], -1.0), TokenScore("bytes:\\xa5", [0xA5], -1.0)]
    pieces = [Piece("日a", [*scores, TokenScore("a", [97], -1.0)]), Piece("", [], "stop", 1, 3)]

    body = {"model": "tuned", "prompt": "x", "logprobs": 0}
    found = Answer(parse(body, is_chat=False)).whole(pieces)["choices"][0]["logprobs"]

    assert found["text_offset"] == [0, 1, 1]


def test_an_unknown_model_is_not_found():
    assert error_body(refused({**HELLO, "model": "other"}), str)["error"] == {
        "message": "no other",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b'"\\ud800"', b"[" * 100_000, b'{"a":' * 50_000],
)
def test_a_body_that_is_no_object_of_json_is_refused(text):
    with pytest.raises(Refused) as caught:
        parse_request(text, True, resolve)

    assert caught.value.status == 400


def malformed(draw):
    """A request with some fields of values that do not belong there."""
    values = [None, True, -1, 1e308, 2**80, "", "x", "\ud800", [], {}, [[]], [None], {"role": "user"}, [{}], [1, "a"]]
    names = [*HELLO, "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "logprobs", "top_logprobs"]
    names += ["stream", "stream_options", "max_completion_tokens", "response_format", "logit_bias"]
    return HELLO | {draw.choice(names): draw.choice(values) for _ in range(draw.randint(1, 4))}


def test_a_thousand_malformed_requests_are_refused_or_understood():
    draw, refusals = random.Random(1), 0

    for _ in range(1000):
        try:
            parse(malformed(draw), draw.random() < 0.5)
        except Refused as refusal:
            refusals += 1
            assert 400 <= refusal.status < 500 and refusal.message

    assert refusals > 800


def test_a_stream_ends_with_its_reason_and_the_counts_that_were_asked_for():
    answer = Answer(parse({**HELLO, "stream": True, "stream_options": {"include_usage": True}}))

    chunks = [*answer.opening(), *answer.chunks(Piece("hi")), *answer.chunks(Piece("", [], "stop", 3, 2))]

    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "hi"},
        {},
    ]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_log_probabilities_of_both_kinds_are_given():
    other = TokenScore("b", [98], -2.0)
    pieces = [Piece("a", [TokenScore("a", [97], -1.0, [other])]), Piece("", [], "stop", 1, 1)]

    chat = Answer(parse({**HELLO, "logprobs": True, "top_logprobs": 1})).whole(pieces)["choices"][0]["logprobs"]
    body = {"model": "tuned", "prompt": "x", "logprobs": 1}
    plain = Answer(parse(body, is_chat=False)).whole(pieces)["choices"][0]["logprobs"]

    top = [{"token": "b", "logprob": -2.0, "bytes": [98]}]
    assert chat == {"content": [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": top}]}
    assert plain == {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"b": -2.0}], "text_offset": [0]}
