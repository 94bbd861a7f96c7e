"""The Japanese catalogue holds every message of the source, and a text that was made finds its own."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.language.catalogue import PLACE, Catalogue, Pattern, core, translator
from tests import translations

ja = translator("ja")
ENGLISH = {core(str(message.id))[1] for message in translations.catalogue()}


def test_every_message_has_a_translation():
    assert len(translations.messages()) > 2000

    assert not translations.missing(), "python tests/translations.py prints these as stubs (CONTRIBUTING.md)"


def test_the_catalogue_holds_no_message_that_is_gone():
    assert not translations.dead(), "python tests/translations.py removes them"


def test_translations_have_the_places_of_their_messages():
    assert not translations.wrong_places()


def test_the_compiled_catalogue_is_that_of_the_texts():
    assert translations.MO.read_bytes() == translations.mo_bytes(), "python tests/translations.py compiles it"


def test_no_message_is_listed_as_none_in_vain():
    listed = translations._others()
    sources = "\n".join(path.read_text(encoding="utf-8") for path in translations.house().files.values())

    def literal(text):
        return max(PLACE.split(text)[::2], key=len)

    assert listed and [text for text in listed if literal(text)[:20] not in sources] == []


@pytest.mark.parametrize(
    ("english", "japanese"),
    [
        ("no result yet", "結果はまだありません"),
        ("wrote /a b/report.html", "/a b/report.html を書き出しました"),
        ("run r-7", "実行 r-7"),
        ("job.yaml: does not exist", "job.yaml: 存在しません"),
        ("node-1 is not used: its memory is unknown", "node-1 は使いません: メモリの量が不明です"),
        ("2x the time, about as much memory", "時間は 2 倍、ほぼ同じメモリ"),
        ("lora on a: needs 3 GiB, has 2 GiB usable", "lora on a: 3 GiB 必要ですが、使えるのは 2 GiB です"),
        ("job.yaml: line 9: a.b is missing; add it", "job.yaml: 9 行目: a.b がありません。追加してください"),
        (
            "line 1: model.dtype is 3; it should be 'a' or be a valid list",
            "1 行目: model.dtype は 3 です。正しくは: 'a' or リスト",
        ),
        ("rows: is empty\nno runs in 日本語", "rows: 空です\n日本語 に実行はありません"),
        ("  no such text of ours  ", "  no such text of ours  "),
        ("12 rows dropped", "除外した行 12"),
        ("training 1 min 05 s, start 28 s", "学習 1 min 05 s, 起動 28 s"),
        ("training objective", "学習目的"),
        (
            "a step would take 2 s with it, 0.5 s without. It is free for other jobs",
            "これを使うと 1 ステップ 2 s、使わないと 0.5 s. ほかのジョブに使えます",
        ),
        (
            "a step would take 2 s with it, 1 s of it waiting for the network, 0.5 s without. It evaluates nothing",
            "これを使うと 1 ステップ 2 s, うち 1 s はネットワーク待ち、使わないと 0.5 s. It evaluates nothing",
        ),
        ("", ""),
    ],
)
def test_a_text_is_translated_as_far_as_it_is_known(english, japanese):
    assert ja(english) == japanese


def test_a_value_of_one_word_stays_a_name():
    assert ja("tracked in memory") == "memory に記録しました"


def test_the_most_specific_message_wins():
    found = Catalogue(
        {"the run {0} failed": "実行 {0} が失敗", "the run {0} failed after {1} steps": "{1} 歩で {0} が失敗"}
    )

    assert found.translate("the run a failed after 3 steps") == "3 歩で a が失敗"


def test_every_message_finds_its_own_translation():
    """With values in its places, none is taken by another message."""
    wrong = []
    for text in translations.messages():
        if not PLACE.search(text) or not Pattern(text, "").is_certain:
            continue
        made = PLACE.sub(lambda place: f"v{place[1]}", text)
        expected = PLACE.sub(lambda place: f"v{place[1]}", ja(text))
        if ja(made) != expected:
            wrong.append((made, ja(made), expected))

    assert not wrong


@given(st.text(max_size=60), st.sampled_from(["", ": is missing; add it", "run ", "3 GiB of ", "\n", "\x1b[31m"]))
@settings(max_examples=200)
def test_any_text_comes_back(text, around):
    assert isinstance(ja(around + text + around), str)
    assert ja(text) == text or any(word in text for word in (" ", ":", ",", ".", ";")) or text.strip() in ENGLISH


def test_a_text_of_many_parts_takes_little_time():
    parts = ", ".join(f"a value {number}, and b: c is not a number" for number in range(40))
    begun = time.process_time()

    assert "数ではありません" in ja(parts)
    assert time.process_time() - begun < 5


def test_english_loads_nothing():
    assert translator("en") is str


@pytest.mark.parametrize(
    ("text", "japanese"),
    [
        ("turn 2 (user) has no text in 'content'. Fill it or remove the turn", "発言 2 (user) の 'content' に"),
        ("data.train: lines end with CRLF (2 rows)", "data.train: 行末が CRLF です (行 2)"),
        ("data.columns: {text: Frage}  (a guess: look at the row below)", "推測"),
    ],
)
def test_what_stands_behind_a_turn_and_in_brackets_is_translated_too(text, japanese):
    assert japanese in translator("ja")(text)
