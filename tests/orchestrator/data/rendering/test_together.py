"""Rows that are tokenised together become what each becomes alone, and fail as they would alone."""

import copy
import json

import pytest

from orchestrator.data.counts import RowCounts
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.rendering.together import Texts, encode, run_together
from orchestrator.data.rows.formats import convert
from orchestrator.data.rows.row import BadRow, Row
from orchestrator.data.samples import TokenizeOptions, tokenise
from orchestrator.errors import JobError
from tests.conftest import CHAT_TEMPLATE
from tests.orchestrator.data.rendering.test_chat import LEARNT, each, say
from tests.orchestrator.data.rendering.test_template import MARKED

TEMPLATES = {name: template for name, (template, *_) in LEARNT.items()}
TEMPLATES |= {"marked": MARKED, "first turns cut": each("m.content if loop.last else m.content.split()[0]")}
TALKS = [turns for _, turns, _ in LEARNT.values()]
TALKS += [
    say("red", ""),
    say("red cat", "blue dog", "one"),
    say("a"),
    say("red cat", "blue dog", "one", "two", "three", "red"),
]
ROWS = [
    *({"messages": turns} for turns in TALKS),
    {"messages": [{**turn, "train": number > 2} for number, turn in enumerate(TALKS[0])]},
    {"prompt": "red cat", "completion": "blue dog"},
    {"prompt": "red cat ", "completion": " one two<|im_end|>\n"},
    {"prompt": "red", "completion": ""},
    {"instruction": "red", "input": "cat", "output": "blue"},
    {"text": "red cat blue dog"},
    {"text": "red <|endoftext|><|eot_id|> cat " * 40},
    {"conversations": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "blue dog one"}]},
    {"messages": "none"},
    {"nothing": 1},
]


def results(renderer, rows, one_by_one):
    """(samples of each row that is kept, rejected rows with their reasons, all counts)."""
    options, counts, kept, rejected = TokenizeOptions("auto", "", 24, "auto", False), RowCounts(), [], []
    calls = [[row] for row in rows] if one_by_one else [rows]
    for call in calls:
        made = tokenise(call, renderer, options, counts, lambda row, why: rejected.append((row.where, why.reason)))
        kept += [(row.where, samples) for row, samples in made]
    return kept, rejected, counts.statistics, counts.broken.lines()


@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_batch_of_rows_is_each_of_them(tokenizer, name, bos, assistant_only):
    own = copy.deepcopy(tokenizer)
    own.bos_token = "<|endoftext|>" if bos else None
    renderer = Renderer(own, TEMPLATES[name], assistant_only, assistant_only, system_prompt="small" if bos else None)
    rows = [Row(values, f"file {number}", 1) for number, values in enumerate(ROWS)]

    together, alone = (results(renderer, rows, one_by_one) for one_by_one in (False, True))

    assert together == alone
    assert len(together[0]) > 3 and len(together[1]) > 3


def test_more_rows_than_a_batch_keep_their_order(tokenizer):
    renderer = Renderer(tokenizer, CHAT_TEMPLATE)
    rows = [Row(ROWS[number % 20], "file", number) for number in range(1000)]

    together, alone = (results(renderer, rows, one_by_one) for one_by_one in (False, True))

    assert together == alone


def test_without_a_template_prompts_are_tokenised_together_too(tokenizer):
    renderer = Renderer(tokenizer, None)
    examples = [
        convert({"prompt": f"red {'cat ' * n}", "completion": "one " * n + "two"}, "prompt_completion")
        for n in range(9)
    ]

    assert renderer.render_all(examples) == [renderer.render(one) for one in examples]


def test_what_no_row_can_be_rendered_with_is_raised_behind_the_rows_before_it(tokenizer):
    rows = [
        Row({"prompt": "red", "completion": "cat"}, "file", 1),
        Row(ROWS[0], "other", 2),
        Row({"nothing": 1}, "file", 3),
    ]
    counts, kept = RowCounts(), []

    with pytest.raises(JobError, match="no chat template"):
        for row, _ in tokenise(rows, Renderer(tokenizer, None), TokenizeOptions("auto", "", 24, "auto", False), counts):
            kept.append(row.line)

    assert kept == [1] and counts.statistics.rows == 2


def test_a_file_that_cannot_be_read_on_is_named_behind_its_rows(tokenizer):
    def rows():
        yield Row({"prompt": "red", "completion": "cat"}, "file", 1)
        raise JobError("the disk is gone")

    counts, kept = RowCounts(), []
    with pytest.raises(JobError, match="the disk is gone"):
        for row, _ in tokenise(
            rows(), Renderer(tokenizer, CHAT_TEMPLATE), TokenizeOptions("auto", "", 24, "auto", False), counts
        ):
            kept.append(row.line)

    assert kept == [1] and counts.statistics.samples == 1


def test_nobody_reads_rows_that_are_not_wanted_and_counts_only_what_was_given(tokenizer):
    counts, read = RowCounts(), []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield Row({"prompt": "red", "completion": "cat"}, "file", number)

    made = tokenise(rows(), Renderer(tokenizer, CHAT_TEMPLATE), TokenizeOptions("auto", "", 24, "auto", False), counts)
    for _ in range(3):
        next(made)

    assert counts.statistics.rows == 3 and len(read) <= 512


def test_long_texts_are_not_held_by_the_hundred(tokenizer):
    read = []

    def rows():
        for number in range(100):
            read.append(number)
            yield Row({"text": "red cat " * 50_000}, "file", number)

    made = tokenise(rows(), Renderer(tokenizer, None), TokenizeOptions("text", "", 24, "drop", False), RowCounts())
    next(made)

    assert len(read) <= 8


def test_a_text_that_the_tokenizer_refuses_fails_alone(tokenizer):
    def rendering(text):
        (one,) = yield Texts((text,), with_offsets=True)
        (two,) = yield Texts((text + text,))
        return one[0], two[0]

    texts = ["red", "\ud800", "blue cat"]
    good, bad, other = run_together(tokenizer, [rendering(text) for text in texts])

    with pytest.raises(Exception) as alone:
        encode(tokenizer, ["\ud800"], with_offsets=True)
    assert type(bad) is type(alone.value)
    assert [good, other] == [
        tuple(encode(tokenizer, [t], False)[0][0] for t in (x, x + x)) for x in ("red", "blue cat")
    ]


def test_renderings_may_end_at_once_and_wait_as_often_as_they_like(tokenizer):
    def rendering(rounds):
        found = []
        for number in range(rounds):
            answers = yield Texts(("red", "cat " * number), with_offsets=number % 2 == 0)
            found.append([len(ids) for ids, _ in answers])
        if rounds == 2:
            raise BadRow("two")
        return found

    none, one, two, three = run_together(tokenizer, [rendering(rounds) for rounds in range(4)])

    assert (none, one, len(three)) == ([], three[:1], 3) and isinstance(two, BadRow)
    assert json.loads(json.dumps(run_together(tokenizer, []))) == []
