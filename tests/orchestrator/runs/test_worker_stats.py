"""What each worker does, read from events as the training loop writes them."""

from orchestrator.runs import worker_stats

MEMBERS = [{"node": "box", "device": "CPU", "pid": 1}, {"node": "card", "device": "RTX", "pid": 2}]
GROUP = {"event": "group", "members": MEMBERS}


def step(number, seconds, worker_s, slowest):
    return {
        "event": "step",
        "step": number,
        "seconds": seconds,
        "worker_tokens": [100, 300],
        "worker_s": worker_s,
        "worker_peak_bytes": [2**30, 2**31],
        "step_bytes_sent": 1000,
        "slowest": slowest,
    }


def test_pace_waiting_and_straggler_are_those_of_the_last_steps():
    events = [GROUP, step(1, 9.0, [9.0, 1.0], 0), *(step(n, 2.0, [1.0, 1.5], 1) for n in range(2, 12))]
    box, card = worker_stats.of_run(events)

    assert (box["tokens_per_s"], card["tokens_per_s"]) == (100.0, 200.0)
    assert (box["wait_s"], card["wait_s"]) == (1.0, 0.5)
    assert (box["share"], card["share"]) == (0.25, 0.75)
    assert not box["is_slowest"] and card["is_slowest"]


def test_a_new_group_begins_with_no_numbers_and_one_worker_has_none():
    assert worker_stats.of_run([GROUP, step(1, 2.0, [1.0, 1.0], 0), GROUP])[0] == {"node": "box", "device": "CPU"}
    assert worker_stats.of_run([{"event": "step", "step": 1}]) == []


def test_a_nodes_second_device_has_a_metric_of_its_own():
    twins = [{"node": "box", "device": "RTX"}, {"node": "box", "device": "RTX"}]
    found = worker_stats.metrics(twins, step(1, 2.0, [1.0, 1.5], 1))

    assert found["worker.box.tokens_per_s"] == 100.0
    assert found["worker.box.1.wait_s"] == 0.5
