"""The Japanese catalogue holds every message of the source, and a text that was made finds its own."""

import pytest

from orchestrator.language.catalogue import PLACE, Catalogue, Pattern, translator
from tests import translations

ja = translator("ja")


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
        ("run r-7", "実行 r-7"),
        ("job.yaml: does not exist", "job.yaml: 存在しません"),
        ("node-1 is not used: its memory is unknown", "node-1 は使いません: メモリの量が不明です"),
        ("2x the time, about as much memory", "時間は 2 倍、ほぼ同じメモリ"),
        ("lora on a: needs 3 GiB, has 2 GiB usable", "lora on a: 3 GiB 必要ですが、使えるのは 2 GiB です"),
        ("job.yaml: line 9: a.b is missing; add it", "job.yaml: 9 行目: a.b がありません。追加してください"),
        ("rows: is empty\nno runs in 日本語", "rows: 空です\n日本語 に実行はありません"),
        ("  no such text of ours  ", "  no such text of ours  "),
        ("12 rows dropped", "除外した行 12"),
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


def test_english_loads_nothing():
    assert translator("en") is str
