"""A summary of events says what functions of all events say, and the same when it is built in pieces."""

import io
import json
import math
import random
from dataclasses import replace

import pytest

from orchestrator.runs import events as kinds
from orchestrator.runs.events import ErrorReport, Evaluation, QualityReport, StateChange, StepReport, read_event
from orchestrator.runs.phases import PhaseClock
from orchestrator.runs.record import few
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.lines import read_lines
from orchestrator.runs.worker_stats import stages_of_run, stats_of_run, timelines
from tests.conftest import FIXTURES
from tests.orchestrator.lifecycle.stages.test_stages import BIG, SMALL_CARD, pipeline
from tests.orchestrator.runs.test_events import LINES, STEP

GROUP = {"members": [{"node": "a", "device": "CPU"}, {"node": "b", "device": "RTX", "pid": 7}]}
DAMAGED = ["", "{", '"text"', '{"event": "step"}', '{"event": "step", "time": 1.5, "step": "2"}', "\udcff", "[" * 5000]
WORKERS = {"worker_tokens": [4, 5], "worker_s": [0.2, 0.3], "worker_peak_bytes": [2, 3], "step_bytes_sent": 7}
STAGES = ("stage_busy_s", "stage_wait_s", "stage_bytes_sent", "stage_bytes_received")


def content_of(seed, count=300):
    """Lines of every kind, steps above all, some damaged; the last one is not whole."""
    draw, lines, step = random.Random(seed), [], 0
    for _ in range(count):
        step = draw.randrange(max(1, step)) if draw.random() < 0.02 else step + 1
        kind = draw.choice(("step", "step", "step", "step", "any", "any", "damaged"))
        if kind == "any":
            values = json.loads(draw.choice(LINES)) | {"time": round(1e9 * draw.random(), 3)}
            values |= GROUP if values["event"] == "group" else {}
            lines.append(json.dumps(values | ({"step": step} if "step" in values else {})))
        elif kind == "damaged":
            lines.append(draw.choice(DAMAGED))
        else:
            lines.append(json.dumps(step_values(draw, step, seed % 3)))
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape") + b'{"event": "st'


def step_values(draw, step, num_workers):
    values = json.loads(f'{{"event": "step", "time": {step}.5, {STEP}}}')
    values |= {"step": step, "loss": draw.choice((draw.random(), 2, math.nan)), "seconds": draw.random()}
    if num_workers == 2:
        values |= WORKERS | {"worker_s": [draw.random(), 0.3], "slowest": draw.choice((0, 1))}
        if draw.random() < 0.5:
            values |= {name: [draw.random(), draw.choice((1, 2.0))] for name in STAGES}
    return values | draw.choice(({}, {}, {"lane_s": {"up": 0.5}}, {"more": [1]}, {"loss_scale": 8.0}))


def summary_of_bytes(content, summary=None):
    found = summary or EventSummary()
    for _, lines in read_lines(io.BufferedReader(io.BytesIO(content))):
        found.add(lines)
    return found


def reference(content):
    """(events, faults) by each line on its own, by way of nothing that is cached."""
    events, faults = [], []
    lines = content.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            events.append(read_event(json.loads(line)))
        except kinds.BadInput as error:
            faults.append(f"line {number}: {error}")
        except (ValueError, RecursionError):
            faults.append(f"line {number}: is not JSON")
    return events, faults


def trained_seconds(events):
    seen, whole, again = set(), 0.0, 0.0
    for event in events:
        if isinstance(event, StepReport):
            whole += event.seconds
            again += event.seconds if event.step in seen else 0.0
            seen.add(event.step)
    return whole, again


def held_out(events, steps):
    held = {event.step: event.eval_loss for event in events if isinstance(event, Evaluation)}
    for event in events:
        if isinstance(event, QualityReport) and event.eval_loss is not None and steps:
            held[0 if event.when == "before" else max(steps)] = event.eval_loss
    return sorted(held.items())


def is_fault(event):
    odd = isinstance(event, StateChange) and event.state not in ("running", "finished")
    return odd or isinstance(
        event, kinds.WorkerKilled | ErrorReport | kinds.Failure | kinds.Replan | kinds.Note | kinds.ShareChange
    )


def told(event):
    return event.time, event.kind, getattr(event, "text", None)


def same(one, other):
    assert json.dumps(one) == json.dumps(other)  # NaN equals itself as text


def check(content, summary):
    plan = pipeline(BIG, SMALL_CARD)
    events, faults = reference(content)
    steps = {event.step: event for event in events if isinstance(event, StepReport)}
    texts = [event.text for event in events if isinstance(event, ErrorReport | StateChange) and event.text]
    states = [event.state for event in events if isinstance(event, StateChange)]
    clock = PhaseClock()
    for event in events:
        clock.add(event)

    assert summary.num_lines == content.count(b"\n")
    assert summary.damaged_lines == (few(faults) or None)
    assert summary.started == (events[0].time if events else None)
    assert summary.state_by_events == (states[-1] if states else "interrupted")
    assert summary.error == (texts[-1] if texts else None)
    assert len(summary.steps) == len(steps)
    same(summary.losses.points(), [(step, one.loss) for step, one in sorted(steps.items())])
    same(summary.last_step and summary.last_step.to_json(), steps[max(steps)].to_json() if steps else None)
    assert (summary.trained_s, summary.repeated_s) == trained_seconds(events)
    assert not steps or summary.held_out_losses() == held_out(events, steps)
    assert summary.num_sittings == sum(isinstance(event, kinds.ModelReady) for event in events)
    assert summary.phases == clock.phases
    assert [told(one) for one in summary.faults] == [told(one) for one in events if is_fault(one)][:40]
    same(*([one.to_json() for one in stats_of_run(found)] for found in (summary.group_events, events)))
    same(*([one.to_json() for one in stages_of_run(plan, found)] for found in (summary.group_events, events)))
    assert timelines(plan, summary.group_events) == timelines(plan, events)


@pytest.mark.parametrize("seed", range(30))
def test_a_summary_says_what_all_events_say(seed):
    content = content_of(seed)

    check(content, summary_of_bytes(content))


@pytest.mark.parametrize("name", ["finished", "stopped"])
def test_a_summary_says_what_the_events_of_an_earlier_run_say(name):
    content = (FIXTURES / "earlier" / "results" / name / "events.jsonl").read_bytes()
    assert content.count(b"\n") > 5

    check(content, summary_of_bytes(content))


@pytest.mark.parametrize("seed", range(30))
def test_a_summary_built_in_pieces_is_the_same(seed):
    content, pieces = content_of(seed), EventSummary()
    draw, at = random.Random(seed), 0

    while (until := content.rfind(b"\n", at, at + draw.randrange(20_000)) + 1) > at or at < content.rfind(b"\n"):
        until = until or content.index(b"\n", at) + 1
        pieces = EventSummary.from_json(json.loads(json.dumps(pieces.to_json())))
        summary_of_bytes(content[at:until], pieces)
        at = until
    whole = summary_of_bytes(content)
    same(pieces.to_json(), whole.to_json())
    check(content, pieces)


def test_a_summary_does_not_grow_with_the_run():
    draw = random.Random(0)
    step = StepReport.from_json(step_values(draw, 0, 2))
    summary, sizes = EventSummary(), []
    for number in range(40_000):
        summary.add([(replace(step, step=number, loss=draw.random()), "")])
        if number in (4000, 10_000, 39_999):
            sizes.append(len(json.dumps(summary.to_json())))

    assert max(sizes) < 200_000


def test_no_event_at_all_is_an_interrupted_run():
    summary = EventSummary()

    assert summary.state_by_events == "interrupted" and summary.last_step is None
    assert summary.held_out_losses() == [] and summary.faults == [] and summary.group_events == []
