"""Seconds of a job outside of its steps, against numbers worked out by hand."""

import dataclasses

import pytest

from clusters.capability import NodeCapability
from clusters.hardware import datasheet
from strategies.cost.phases import Phases, decode_step_s, start_s
from strategies.workload import Techniques
from tests.orchestrator.planning.machines import MIDDLE as LLAMA_8B
from tests.strategies.test_time import CPU, NODE

BF16 = Techniques("bfloat16", "sdpa", False, False, 1, 2048)


def test_a_gpu_that_answers_alone_waits_for_its_weights_or_for_python():
    found = datasheet.find("RTX 3090")
    assert found
    card = datasheet.device(found)
    node = NodeCapability("pc", 8, None, (card,))

    one, many = (decode_step_s(LLAMA_8B, card, node, BF16, 0.0, rows) for rows in (1, 64))

    weights = 2 * (LLAMA_8B.num_linear_parameters + 128256 * 4096)
    assert one == pytest.approx(max(weights / (0.8 * 936e9), 45 * 32 * 15e-6), rel=0.01)  # about 20 ms a token
    assert many < 2 * one


def test_a_longer_cache_takes_longer_to_append_to():
    short, long = (decode_step_s(LLAMA_8B, CPU, NODE, BF16, cache, 1) for cache in (0.0, 1e9))

    assert long - short == pytest.approx(6e9 / 2e10)


def test_a_larger_model_starts_later():
    small = dataclasses.replace(LLAMA_8B, num_layers=2)

    late, early = (start_s(shape, CPU, 0.0) for shape in (LLAMA_8B, small))

    assert late - early == pytest.approx(2e-9 * (LLAMA_8B.num_parameters - small.num_parameters))


def test_phases_are_told_in_one_line_the_longest_first():
    phases = Phases(start_s=40.0, evaluation_s=120.0, training_s=12.0, saving_s=5.0, guesses=("start", "preparation"))

    assert phases.total_s == 177.0
    assert phases.text == "evaluation 2 min 00 s, start 40 s, training 12 s, saving 5 s"
    measured = phases.with_preparation(3.0)
    assert measured.preparation_s == 3.0 and measured.guesses == ("start",)
