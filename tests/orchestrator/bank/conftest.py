"""A bank of four adapters of one small map."""

import json

import numpy
import pytest
from safetensors.numpy import save_file

from orchestrator.bank.library import Base
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS
from strategies.adapter_bank.card import AdapterCard
from strategies.adapter_bank.evidence import gather
from strategies.adapter_bank.folders import base_digest
from strategies.adapter_bank.store import Bank

NAMES = ("first", "second", "third", "fourth")


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"model.q_proj.weight": numpy.zeros((6, 8), numpy.float32)}, folder / "model.safetensors")
    return Base("tiny", folder, base_digest(folder))


@pytest.fixture
def bank(tmp_path, base):
    there = Bank(tmp_path / "bank", create=True)
    for number, name in enumerate(NAMES):
        source = tmp_path / name
        source.mkdir()
        draw = numpy.random.default_rng(number)
        sides = {"A": (2, 8), "B": (6, 2)}
        key = "base_model.model.model.q_proj.lora_"
        tensors = {f"{key}{side}.weight": draw.random(shape, numpy.float32) for side, shape in sides.items()}
        save_file(tensors, source / WEIGHTS)
        (source / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        rows = [(numpy.arange(number, number + 9, dtype=numpy.int32), numpy.arange(9) > 5)] * 4
        evidence = gather(rows, numpy.ones((20, 4), numpy.float32))
        there.add(source, AdapterCard(name, "tiny", base.digest), evidence)
    return there
