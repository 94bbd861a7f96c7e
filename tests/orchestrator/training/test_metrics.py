"""Scores of answers in any script."""

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from orchestrator.errors import JobError
from orchestrator.training.metrics import how_compared, refuse_tokenizer, score, spaced, words_of

ALL = ("exact_match", "accuracy", "macro_f1", "rouge_l", "bleu", "chrf")
TEXTS = ("rouge_l", "bleu", "chrf")
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ascii_text = st.text(st.characters(max_codepoint=127), max_size=60)


def test_exact_match_forgives_outer_space_only():
    assert score(["exact_match"], [(" a ", "a"), ("A", "a"), ("b", "a"), ("a", "a")])["exact_match"] == 0.5


def test_exact_match_does_not_tell_two_spellings_of_one_letter_apart():
    assert score(["exact_match"], [("cafe\u0301", "caf\u00e9"), ("か\u3099", "が")])["exact_match"] == 1.0


def test_macro_f1_counts_each_label_alike_and_strange_answers_as_wrong():
    scores = score(["accuracy", "macro_f1"], [("x", "x"), ("x", "x"), ("x", "x"), ("nonsense", "y")])

    assert scores == {"accuracy": 0.75, "macro_f1": pytest.approx(0.5)}


@given(st.lists(any_text, min_size=1, max_size=4))
@settings(max_examples=150)
def test_equal_texts_score_one_whatever_they_are_written_in(texts):
    found = score(ALL, [(text, text) for text in texts])

    assert found == {metric: pytest.approx(1.0) for metric in ALL}


@given(st.lists(st.tuples(any_text, any_text), min_size=1, max_size=4))
@settings(max_examples=150)
def test_scores_of_any_texts_lie_between_zero_and_one(pairs):
    assert all(0 <= value <= 1 for value in score(ALL, pairs).values())


@given(ascii_text, ascii_text)
@settings(max_examples=200)
def test_rouge_of_ascii_text_is_that_of_rouge_score(generated, wanted):
    theirs = RougeScorer(["rougeL"]).score(wanted.strip(), generated.strip())["rougeL"].fmeasure

    ours = score(["rouge_l"], [(generated, wanted)])["rouge_l"]

    has_words = any(c.isalnum() for c in generated) and any(c.isalnum() for c in wanted)
    assert ours == pytest.approx(theirs) or not has_words


def test_bleu_and_chrf_of_english_are_those_of_sacrebleu():
    import sacrebleu

    generated = ["the cat sat on the mat today, it seems", "a dog ran off quickly"]
    wanted = ["the cat sat on the red mat, it seems", "the dog ran off very quickly"]

    found = score(["bleu", "chrf"], list(zip(generated, wanted, strict=True)))

    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(generated, [wanted]).score / 100)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(generated, [wanted]).score / 100)


@pytest.mark.parametrize(
    ("generated", "wanted", "rouge_l"),
    [
        ("猫が好きです", "猫が嫌いです", 2 * 4 / 12),  # likes cats, dislikes cats: 猫 が で す of six
        ("今天很热", "今天很冷", 3 / 4),
        ("ฉันชอบแมว", "ฉันเกลียดแมว", None),
        ("ខ្ញុំ ចូលចិត្ត", "ខ្ញុំ ស្អប់", None),
        ("GPT-4は速い", "GPT-4は遅い", None),
        ("да, это так", "нет, это не так", 2 * 2 / 7),
        ("👍", "👎", 0.0),
        ("!!!", "???", 0.0),
        ("", "answer", 0.0),
        ("answer", "", 0.0),
    ],
)
def test_texts_that_say_something_else_do_not_score_one(generated, wanted, rouge_l):
    found = score(TEXTS, [(generated, wanted)])

    assert all(value < 0.95 for value in found.values())
    assert rouge_l is None or found["rouge_l"] == pytest.approx(rouge_l)


def test_short_answers_of_which_half_are_right_have_a_bleu():
    assert 0.4 < score(["bleu"], [("repair", "repair"), ("sale", "repair")])["bleu"] < 0.8


def test_marks_stay_with_their_letter():
    assert words_of("ที่นี่ is here") == ["ที่", "นี่", "is", "here"]
    assert spaced("猫。cat") == " 猫  。 cat"
    assert words_of("हिन्दी में") == ["हिन्दी", "में"]


def test_whole_answers_are_equal_in_any_width_of_letters_and_not_of_marks():
    pairs = [("１２０円", "120円"), ("ＯＫ", "OK"), ("ﾃﾞｰﾀ", "データ"), ("①", "1"), ("｛1｝", "{1}")]

    found = [score(["exact_match"], [pair])["exact_match"] for pair in pairs]

    assert found == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert score(["macro_f1"], [("Ａ", "A"), ("B", "B"), ("x", "B")])["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("references", "tokens"),
    [
        (["a cat", "a dog"], "words between spaces"),
        (["猫です", "犬です"], "characters of a script without spaces"),
        (["a cat", "犬です"], "words; characters where a script has no spaces"),
    ],
)
def test_what_is_counted_is_said_and_depends_on_the_references(references, tokens):
    found = how_compared(ALL, references)

    assert found["rouge_l"] == tokens and found["bleu"] == f"{tokens}, by sacrebleu's 13a"
    assert found["exact_match"].startswith("whole answers") and found["chrf"] == "character n-grams"


def test_a_stated_tokenizer_counts_its_tokens():
    import sacrebleu

    pairs = [("私は猫が好きです", "私は犬が好きです"), ("今日は雨です", "今日は晴れです")]
    generated, wanted = (list(texts) for texts in zip(*pairs, strict=True))

    found = score(["rouge_l", "bleu"], pairs, "char")

    theirs = sacrebleu.corpus_bleu(generated, [wanted], tokenize="char", use_effective_order=True).score / 100
    assert found["bleu"] == pytest.approx(theirs)
    assert found["rouge_l"] == pytest.approx((7 / 8 + 2 * 5 / 13) / 2)
    assert how_compared(["rouge_l"], wanted, "char") == {"rouge_l": "tokens of sacrebleu's char"}


@pytest.mark.skipif(importlib.util.find_spec("MeCab") is None, reason="needs sacrebleu[ja]")
def test_mecab_counts_words_of_japanese():
    found = score(["rouge_l"], [("私は猫が好きです", "私は犬が好きです")], "ja-mecab")

    assert found["rouge_l"] == pytest.approx(5 / 6)  # 私 は 猫 が 好き です


@pytest.mark.skipif(importlib.util.find_spec("MeCab") is not None, reason="sacrebleu[ja] is here")
def test_a_tokenizer_whose_packages_are_missing_is_refused_with_the_way_to_get_them():
    with pytest.raises(JobError, match=r"eval\.tokenizer: ja-mecab needs the package MeCab.*sacrebleu\[ja\]"):
        refuse_tokenizer("ja-mecab", ["bleu"])

    refuse_tokenizer("ja-mecab", ["exact_match"])  # which has no tokens
    refuse_tokenizer("auto", ALL)


def test_nothing_to_compare_has_no_score():
    assert score(ALL, []) == {}
