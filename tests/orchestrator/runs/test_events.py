"""Events as dataclasses: the lines that were written before, and those of other versions."""

import json

import pytest

from orchestrator.runs import events
from orchestrator.runs.events import Event, Member, Note, OtherEvent, QualityReport, StepReport, WorkerGroup
from orchestrator.runs.proofs import proof
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.tasks import task_score

STEP = '"step": 2, "epoch": 0.5, "loss": 1.0, "grad_norm": 0.1, "learning_rate": 0.01, "tokens": 9'
STEP += ', "supervised_tokens": 5, "seconds": 0.5, "tokens_per_s": 18.0, "peak_bytes": 3, "samples": "ab"'
WORKERS = '"worker_tokens": [4, 5], "worker_s": [0.2, 0.3], "worker_peak_bytes": [2, 3], "step_bytes_sent": null'
# Lines as the program has always written them: every kind, with and without what is optional.
LINES = [
    '{"event": "state", "time": 1.5, "state": "running", "pid": 7}',
    '{"event": "state", "time": 1.5, "state": "finished", "step": 4}',
    '{"event": "state", "time": 1.5, "state": "failed", "text": "why"}',
    '{"event": "note", "time": 1.5, "text": "a"}',
    '{"event": "progress", "time": 1.5, "phase": "answers", "done": 4, "total": 80}',
    '{"event": "error", "time": 1.5, "text": "a", "exit_code": 3, "again": false}',
    '{"event": "error", "time": 1.5, "text": "a", "traceback": "b", "exit_code": 5, "again": true, "node": "n"}',
    '{"event": "failure", "time": 1.5, "text": "a", "step": 3, "failures": 1}',
    '{"event": "killed", "time": 1.5, "rank": 1, "node": null}',
    '{"event": "replanned", "time": 1.5, "plan": "h", "nodes": ["a"], "lost": ["b"], "joined": [], "seconds": 0.1}',
    '{"event": "ready", "time": 1.5, "seconds": 2.5, "trainable": 100}',
    '{"event": "preflight", "time": 1.5, "seconds": 1.0, "longest_batch_s": 0.5, "longest_batch_tokens": 64,'
    ' "peak_bytes": 5, "reserved_bytes": null, "checkpoint_bytes": 9, "text": "a"}',
    '{"event": "group", "time": 1.5, "step": 0, "plan": "h", "members": [{"node": "a", "device": "CPU", "pid": 1,'
    ' "planned_share": 0.5, "tokens_per_s": null, "plan": "h"}], "shares": [1.0]}',
    '{"event": "shares", "time": 1.5, "step": 4, "shares": [0.4, 0.6]}',
    f'{{"event": "step", "time": 1.5, {STEP}, {WORKERS}, "slowest": 0, "stage_busy_s": [0.3, 0.2], "stage_wait_s":'
    ' [0.0, 0.1], "stage_bytes_sent": [8.0, 8.0], "stage_bytes_received": [8.0, 8.0]}',
    '{"event": "timeline", "time": 1.5, "step": 3, "stages": [{"replica": 0, "stage": 0, "passes": [[1, 0, 0.0, 0.25],'
    ' [0, 0, 0.5, 0.75]], "waits": [[0.25, 0.5]]}]}',
    f'{{"event": "step", "time": 1.5, {STEP}}}',
    f'{{"event": "step", "time": 1.5, {STEP}, "loss_scale": 65536.0, {WORKERS}, "slowest": 1, "bus_down_bytes": 1,'
    ' "bus_up_bytes": 2, "lane_s": {"up": 0.1}}',
    '{"event": "timeline", "time": 1.5, "step": 3, "stages": [{"replica": 0, "stage": 1, "passes": [[1, 0, 0.5, 0.75]],'
    ' "waits": [[0.0, 0.5]]}]}',
    '{"event": "learnt", "time": 1.5, "step": 0, "text": "a", "bias": 0.5, "seconds": 2.0}',
    '{"event": "between", "time": 1.5, "step": 4, "text": "a", "rank": 8}',
    '{"event": "eval", "time": 1.5, "step": 4, "eval_loss": 1.25}',
    '{"event": "checkpoint", "time": 1.5, "step": 4, "name": "step-00000004"}',
    '{"event": "last_evaluation", "time": 1.5, "rows": 8}',
    '{"event": "quality", "time": 1.5, "when": "before", "eval_loss": 1.25, "rows": 40, "rouge_l": 0.5}',
    '{"event": "handed_back", "time": 1.5, "text": "a"}',
    '{"event": "prediction", "time": 1.5, "predicted_step_s": 1.0, "measured_step_s": 2.0, "predicted_bytes": 3,'
    ' "measured_peak_bytes": 4}',
    '{"event": "tracking", "time": 1.5, "ok": true, "text": "a"}',
    '{"event": "proof", "time": 1.5, "check": "packing", "compared": "a", "outcome": "passed", "difference": 0.0,'
    ' "tolerance": 1e-05, "why": "b"}',
    '{"event": "task", "time": 1.5, "task": "a", "metric": "acc", "rows": 48, "before": 0.25, "before_stderr": 0.0625,'
    ' "after": 0.5, "after_stderr": 0.0625, "low": 0.1, "high": 0.4, "is_paired": true}',
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[11:20])
def test_a_line_is_written_again_byte_for_byte(line):
    (event,) = events.parse_lines(f"{line}\n".encode())

    assert type(event) is Event.kinds[event.kind]
    assert json.dumps(event.to_json()) == line


def test_every_kind_is_among_those_lines():
    assert {proof.Proof, task_score.TaskScore} <= set(Event.kinds.values())  # of rooms of their own
    assert {json.loads(line)["event"] for line in LINES} == set(Event.kinds)


def test_fields_and_kinds_of_other_versions_are_kept():
    lines = ['{"event": "note", "time": 1, "text": "a", "colour": [1]}', '{"event": "moon", "time": 1, "phase": {}}']

    note, moon = events.parse_lines("".join(f"{line}\n" for line in lines).encode())

    assert (type(note), note.extra) == (Note, {"colour": [1]})
    assert (type(moon), moon.kind, moon.extra) == (OtherEvent, "moon", {"phase": {}})
    assert [json.dumps(event.to_json()) for event in (note, moon)] == lines


@pytest.mark.parametrize(
    "line, fault",
    [
        (f'{{"event": "step", "time": 1, {STEP}, "worker_s": [0.1]}}', "step: worker_tokens is missing"),
        (f'{{"event": "step", "time": 1, {STEP}, "lane_s": {{"up": "a"}}}}', "step: lane_s is"),
        (f'{{"event": "step", "time": 1, {STEP}, {WORKERS}, "slowest": true}}', "step: slowest is true"),
        ('{"event": "shares", "time": 1, "shares": [0.5, "a"]}', "shares: shares is"),
        ('{"event": "tracking", "time": 1, "ok": 1, "text": "a"}', "tracking: ok is 1"),
    ],
)
def test_a_field_of_another_type_is_named(line, fault):
    _, found = events.parse_line(line.encode())

    assert found.startswith(fault)


def test_an_event_is_recorded_with_its_time_and_without_passwords(tmp_path):
    run = RunFolder(tmp_path)
    members = [Member("box", "CPU", {"pid": 1})]

    run.record(Note("sqlite at http://me:secret@host"))
    run.record(WorkerGroup(step=0, members=members))
    run.record(QualityReport("after", 1.5, extra={"rouge_l": 0.5}))

    note, group, quality = run.events()[0]
    assert "secret" not in note.text and note.time > 1e9
    assert group.members == members
    assert (quality.eval_loss, quality.extra) == (1.5, {"rouge_l": 0.5})


def test_a_step_that_was_trained_again_counts_as_it_was_last(tmp_path):
    run = RunFolder(tmp_path)
    for loss in (2.0, 1.0):
        values = json.loads(f'{{"event": "step", "time": 1, {STEP}}}') | {"loss": loss}
        run.record(StepReport.from_json(values))

    assert run.steps()[2].loss == 1.0 and len(run.events_of(StepReport)) == 2
