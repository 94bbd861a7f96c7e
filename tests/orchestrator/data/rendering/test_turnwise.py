"""Where each turn begins in a text is read off the template that wrote it, or the turns are rendered again."""

import random

import pytest

from orchestrator.data.rendering.chat import ChatTemplate, Conversation
from orchestrator.data.rendering.turnwise import Turns, compile_template, endings
from tests.conftest import CHAT_TEMPLATE
from tests.orchestrator.data.rendering.test_chat import LEARNT, SYSTEM_FIRST, each

LOOP = "{% for m in messages %}"
TURN_BY_TURN = {
    "ChatML": CHAT_TEMPLATE,
    "a default system prompt": (
        LOOP + "{% if loop.first and messages[0]['role'] != 'system' %}{{ 'be kind\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "the first turn in the second": SYSTEM_FIRST,
    "roles that must take turns": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% set said = m.content.strip() %}"
        "{% if m.role == 'user' %}[INST] {{ said }} [/INST]{% else %}{{ said ~ eos_token }}{% endif %}{% endfor %}"
    ),
}
NOT = {
    "the last turn differs": LOOP + "{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
    "the number of turns counts": LOOP + "{{ m.content }}{% if loop.length > 2 %}!{% endif %}{% endfor %}",
    "the next turn counts": LOOP
    + "{% if loop.nextitem %}{{ loop.nextitem.role }}{% endif %}{{ m.content }}{% endfor %}",
    "another turn is read": LOOP + "{{ m.content }}{{ messages[-1].role }}{% endfor %}",
    "all turns are counted": LOOP + "{{ m.content }}{{ messages | length }}{% endfor %}",
    "the prompt is asked inside": LOOP + "{{ m.content }}{% if add_generation_prompt %}?{% endif %}{% endfor %}",
    "a value goes from turn to turn": (
        "{% set seen = namespace(n=0) %}"
        + LOOP
        + "{% set seen.n = seen.n + 1 %}{{ seen.n }}{{ m.content }}{% endfor %}"
    ),
    "the clock is read": LOOP + "{{ strftime_now('%f') }}{{ m.content }}{% endfor %}",
    "other turns than those given": "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    "some turns are passed over": "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
    "two loops": LOOP + "{{ m.role }}{% endfor %}" + LOOP + "{{ m.content }}{% endfor %}",
    "the end names a turn": LOOP + "{{ m.content }}{% endfor %}{{ messages[0].content }}",
    "a name with two meanings": "{% set m = 'a' %}" + LOOP + "{{ m.content }}{% endfor %}",
    "an order by chance": LOOP + "{{ m.content.split() | random }}{% endfor %}",
    "marks": LOOP + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "no template": "{% for",
}


@pytest.mark.parametrize("source", TURN_BY_TURN.values(), ids=TURN_BY_TURN)
def test_the_first_turns_are_the_beginning_of_all_as_if_they_were_rendered_alone(source, tokenizer):
    draw, template = random.Random(0), ChatTemplate(tokenizer, source)
    words = ["red", "<|im_start|>assistant\n", " ", "<|im_end|>", "[/INST]", "日本", "\n\n", "user"]
    for _ in range(30):
        first = draw.choice([[], [{"role": "system", "content": "be"}]]) if "INST] {{ said" not in source else []
        turns = [
            {"role": ("user", "assistant")[number % 2], "content": "".join(draw.choices(words, k=draw.randint(1, 5)))}
            for number in range(draw.randint(1, 6))
        ]
        talk = Conversation((*first, *turns))
        whole = template.write(talk)

        found = [
            template._through(talk, number, whole, prompted)
            for number in range(len(talk.turns) - 1)
            for prompted in (False, True)
        ]

        assert whole.begins is not None and whole.text == template.text(talk)
        assert found == [
            template.text(talk.through(number), prompted)
            for number in range(len(talk.turns) - 1)
            for prompted in (False, True)
        ]


@pytest.mark.parametrize("source", NOT.values(), ids=NOT)
def test_a_template_whose_turns_depend_on_later_ones_is_rendered_again(source, tokenizer):
    assert endings(source, {"eos_token", "bos_token"}) is None
    assert ChatTemplate(tokenizer, source)._endings is None


def test_tools_and_turns_with_more_than_text_are_rendered_again(tokenizer):
    template = ChatTemplate(tokenizer, CHAT_TEMPLATE)
    talk = Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}))

    assert template.write(talk).begins is None
    assert template.write(Conversation(talk.turns[:1], ({"function": {"name": "f"}},))).begins is None


def test_one_rendering_serves_every_answer_of_a_conversation(tokenizer, monkeypatch):
    template, turns = ChatTemplate(tokenizer, each("m.content")), []
    talk = Conversation(tuple({"role": ("user", "assistant")[n % 2], "content": f"t{n}"} for n in range(8)))
    assert template._endings
    render = template._direct
    monkeypatch.setitem(template.__dict__, "_direct", lambda *given: turns.append(given) or render(*given))

    _, spans = template.answers(talk)

    assert spans is not None and len(spans) == 4 and len(turns) == 1


def test_turns_count_what_is_written_in_each_rendering(tokenizer):
    turns = Turns([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    render = compile_template(tokenizer, each("m.content"))

    text = render(turns, False)
    first = list(turns.begins)
    again = render(turns, False)

    assert text == again and first == [0, text.index("<|im_start|>assistant")]
    assert turns.begins == first


def test_the_templates_of_the_other_tests_are_of_both_kinds():
    found = [endings(template, {"eos_token"}) for template, *_ in LEARNT.values()]

    assert any(found) and not all(found)
