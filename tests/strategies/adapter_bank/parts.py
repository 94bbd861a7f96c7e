"""Small adapters and evidence, and a card that another program has written into."""

import json

import numpy
from safetensors.numpy import save_file

from strategies.adapter_bank.adapter import CONFIG, WEIGHTS
from strategies.adapter_bank.card import CARD
from strategies.adapter_bank.evidence import gather

MAP = "model.layers.0.self_attn.q_proj"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def an_adapter(folder, seed=0, settings=SETTINGS):
    draw = numpy.random.default_rng(seed)
    folder.mkdir(parents=True)
    sides = {"A": (2, 8), "B": (6, 2)}
    tensors = {f"base_model.model.{MAP}.lora_{s}.weight": draw.random(n, numpy.float32) for s, n in sides.items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def some_evidence():
    rows = [(numpy.arange(9, dtype=numpy.int32), numpy.arange(9) > 5)] * 4
    return gather(rows, numpy.ones((20, 4), numpy.float32))


def lies(bank, **fields):
    """Write fields into the first adapter's card as another program might; its folder."""
    folder = bank.folder(bank.find("task-0").digest)
    values = json.loads((folder / CARD).read_text()) | fields
    (folder / CARD).write_text(json.dumps(values))
    return folder


STRANGE = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x"),
    *(
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "[/red]",
        "[bold]x",
        "\x1b[31m",
        "\u202e",
        "x" * 5000,
        "(a+)+$",
        "(",
        "*",
    ),
    *([], {}, [[]], [None], ["x"], [1, "x"], {"x": 1}, {"": None}, [[1]] * 50, {"eval_loss": "low"}, {"after": 3}),
    *({"after": {"eval_loss": None}}, {"(a|a)+$": 3}, {".*": float("nan")}, {"q_proj": "x"}, {"q_proj": -3}, [0], [-1]),
]


def mutated(draw, values):
    """Some fields strange, gone, doubled or renamed; or not an object at all."""
    values = dict(values)
    for _ in range(draw.choice([1, 1, 2, 5])):
        key = draw.choice(list(values) or ["x"])
        action = draw.random()
        if action < 0.75:
            values[key] = draw.choice(STRANGE)
        elif action < 0.85:
            values.pop(key, None)
        else:
            values[draw.choice(["use_dora", "bias", "modules_to_save", "new", "x" * 300])] = draw.choice(STRANGE)
    text = json.dumps(values)
    if draw.random() < 0.1:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(["{", "}", '"', "\\", "NaN", "\ud83d", "1e999", ""]) + text[place + 1 :]
    return text.encode("utf-8", "surrogatepass")
