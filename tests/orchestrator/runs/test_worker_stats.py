"""What each worker does, read from events as the training loop writes them."""

from orchestrator.runs.events import Member, StepReport, WorkerGroup
from orchestrator.runs.worker_stats import metrics, stats_of_run

MEMBERS = [Member("box", "CPU", {"pid": 1}), Member("card", "RTX", {"pid": 2})]
GROUP = WorkerGroup(members=MEMBERS)
NUMBERS = ("epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_s", "peak_bytes")


def step(number, seconds, worker_s, slowest):
    return StepReport(
        **dict.fromkeys(NUMBERS, 1.0),
        step=number,
        seconds=seconds,
        worker_tokens=[100, 300],
        worker_s=worker_s,
        worker_peak_bytes=[2**30, 2**31],
        step_bytes_sent=1000,
        slowest=slowest,
    )


def test_pace_waiting_and_straggler_are_those_of_the_last_steps():
    events = [GROUP, step(1, 9.0, [9.0, 1.0], 0), *(step(n, 2.0, [1.0, 1.5], 1) for n in range(2, 12))]
    box, card = stats_of_run(events)

    assert (box.tokens_per_s, card.tokens_per_s) == (100.0, 200.0)
    assert (box.wait_s, card.wait_s) == (1.0, 0.5)
    assert (box.share, card.share) == (0.25, 0.75)
    assert not box.is_slowest and card.is_slowest


def test_a_new_group_begins_with_no_numbers_and_one_worker_has_none():
    alone = StepReport(**dict.fromkeys(NUMBERS, 1.0), step=1, seconds=1.0)

    assert stats_of_run([GROUP, step(1, 2.0, [1.0, 1.0], 0), GROUP])[0] == Member("box", "CPU")
    assert stats_of_run([alone]) == []


def test_a_nodes_second_device_has_a_metric_of_its_own():
    twins = [Member("box", "RTX"), Member("box", "RTX")]

    found = metrics(twins, step(1, 2.0, [1.0, 1.5], 1))

    assert found["worker/box/tokens_per_s"] == 100.0
    assert found["worker/box.1/wait_s"] == 0.5
