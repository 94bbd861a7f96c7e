"""Tokens as text: what is certain at each of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as draw

from orchestrator.serving.engines.text import AnswerText


class Bytes:
    """A tokenizer with a token for each byte."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", "replace")


def pieces(text, stops=()):
    answer, found = AnswerText(Bytes(), tuple(stops)), []
    for token in text.encode():
        if not answer.is_stopped:
            found.append(answer.add(token))
    return [*found, answer.rest()]


def test_a_character_of_several_tokens_comes_whole():
    assert pieces("aé日") == ["a", "", "é", "", "", "日", ""]


def test_what_may_begin_a_stop_is_held_back_until_it_is_none():
    assert pieces("a<|b", ["<|end|>"]) == ["a", "", "", "<|b", ""]


def test_an_answer_ends_before_its_stop():
    assert "".join(pieces("one STOP two", ["STOP"])) == "one "


def test_the_first_of_several_stops_ends_it():
    assert "".join(pieces("a b c d", ["c", "b c"])) == "a "


def test_what_was_held_back_comes_at_the_end():
    assert "".join(pieces("so <|en", ["<|end|>"])) == "so <|en"


@given(draw.text(alphabet="ab|é日😀", max_size=30), draw.lists(draw.text(alphabet="ab|é", min_size=1, max_size=3)))
def test_pieces_together_are_the_text_up_to_its_first_stop(text, stops):
    places = [text.index(stop) for stop in stops if stop in text]
    got = "".join(pieces(text, stops))

    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert text.startswith(got)
    assert (got == text) == (not places)
    assert not places or len(got) <= min(ends) - 1
    assert not any(stop in got for stop in stops)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_half_a_character_at_the_end_is_shown_as_such(cut):
    answer = AnswerText(Bytes(), ())

    got = "".join(answer.add(token) for token in "a😀".encode()[: 1 + cut]) + answer.rest()

    assert got.startswith("a") and "\ufffd" in got
