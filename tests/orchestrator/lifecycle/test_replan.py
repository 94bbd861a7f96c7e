"""What planning again after a fault may and may not decide."""

import pytest

from orchestrator.job.job_file import parse_job
from orchestrator.job.sections.methods import METHOD_SECTIONS
from orchestrator.lifecycle.recovery import fixed_job
from orchestrator.planning.goal import LONG_S
from tests.orchestrator.planning.machines import TINY, machine
from tests.orchestrator.planning.test_choice import plan


def test_a_run_that_has_begun_is_not_refused_for_its_length(tmp_path):
    text = "model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 2048}\n"
    first = plan(TINY, machine("a"))

    again = fixed_job(parse_job(text, tmp_path), first, METHOD_SECTIONS[first.method["type"]], 1)

    assert again.spec.train.global_batch_size == first.global_batch_size
    assert 3600 * (again.spec.goal.max_hours or 0) > 100 * LONG_S


@pytest.mark.parametrize(
    ("text", "num_slots", "mode", "stages"),
    [
        ("mode: pipeline", 3, "pipeline", "auto"),
        ("mode: pipeline", 1, "auto", "auto"),
        ("mode: pipeline, pipeline: {stages: 3}", 2, "pipeline", 2),
        ("mode: pipeline, pipeline: {stages: 3, ahead: 1}", 4, "pipeline", 3),
    ],
)
def test_stages_that_are_left_continue_and_one_alone_does_without(tmp_path, text, num_slots, mode, stages):
    job = f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl, max_length: 2048}}\nstrategy: {{{text}}}\n"
    first = plan(TINY, machine("a"))

    strategy = fixed_job(
        parse_job(job, tmp_path), first, METHOD_SECTIONS[first.method["type"]], num_slots
    ).spec.strategy

    assert (strategy.mode, strategy.pipeline.stages) == (mode, stages)
    assert strategy.pipeline.ahead == (1 if "ahead" in text else "auto")
