"""What planning again after a fault may and may not decide."""

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


def test_stages_that_were_stated_are_as_many_as_machines_are_left(tmp_path):
    text = "model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 2048}\n"
    job = parse_job(f"{text}strategy: {{mode: pipeline, pipeline: {{stages: 3, ahead: 1}}}}\n", tmp_path)
    first = plan(TINY, machine("a"))

    found = [fixed_job(job, first, METHOD_SECTIONS[first.method["type"]], left).spec.strategy for left in (3, 2, 1)]

    assert [(one.mode, one.pipeline.stages, one.pipeline.ahead) for one in found] == [
        ("pipeline", 3, 1),
        ("pipeline", "auto", 1),
        ("auto", "auto", 1),
    ]


def test_one_worker_that_is_left_of_several_with_everything_continues_alone(tmp_path):
    text = "model: {model_name_or_path: m}\ndata: {train: a.jsonl}\nstrategy: {mode: ddp}\ncluster: {num_workers: 2}\n"
    nodes = [machine(name, "RTX 3060 12GB") for name in "ab"]
    first = plan(TINY, *nodes, text="strategy: {mode: ddp}\n", link_bytes_per_s=118e6)

    two, one = (
        fixed_job(parse_job(text, tmp_path), first, METHOD_SECTIONS[first.method["type"]], left).spec for left in (2, 1)
    )

    assert (two.strategy.mode, two.cluster.num_workers) == ("ddp", 2)
    assert (one.strategy.mode, one.cluster.num_workers) == ("auto", 1)


def test_pipelines_that_were_stated_may_be_fewer_when_a_machine_is_lost(tmp_path):
    text = "model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 2048}\ncluster: {num_workers: 4}\n"
    job = parse_job(f"{text}strategy: {{mode: pipeline, pipeline: {{stages: 2, replicas: 2}}}}\n", tmp_path)
    nodes = [machine(name, "RTX 3060 12GB") for name in "abcd"]
    first = plan(TINY, *nodes, text=text.partition("max_length: 2048}\n")[2] + STATED, link_bytes_per_s=118e6)

    four, three = (fixed_job(job, first, METHOD_SECTIONS[first.method["type"]], left).spec for left in (4, 3))

    assert len(first.nodes) == 4
    assert (four.strategy.pipeline.replicas, four.cluster.num_workers) == (2, 4)
    assert (three.strategy.pipeline.replicas, three.cluster.num_workers) == ("auto", "auto")
    assert three.strategy.pipeline.stages == 2


STATED = "strategy: {mode: pipeline, pipeline: {stages: 2, replicas: 2}}\n"
