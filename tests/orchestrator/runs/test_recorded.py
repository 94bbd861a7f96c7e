"""What a folder was begun with: each way a file can differ from its record, and each file's parser."""

import json

import pytest

from clusters.capability import ClusterCapability
from orchestrator.errors import JobError
from orchestrator.runs import digests, events, json_files, record
from orchestrator.runs.condition import damage
from orchestrator.runs.record import Recorded, difference
from orchestrator.runs.recorded_folder import Folder
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.search_folder import SearchFolder
from orchestrator.runs.summary.summary_file import summary_of

TEXT = json.dumps({"steps": 4, "rate": 0.1, "list": [1, 2], "name": "a"}, indent=1)


@pytest.mark.parametrize(
    "content, fault, said",
    [
        (TEXT, None, ""),
        (json.dumps(json.loads(TEXT)), None, ""),  # the same values
        (TEXT.replace("4", "9"), "edited", "steps is 9, was 4"),
        (TEXT.replace("0.1", "true"), "edited", "rate is true, was 0.1"),
        (TEXT.replace("2", "3"), "edited", "list.1 is 3, was 2"),
        (TEXT.replace(' "name": "a"', ' "name": "a", "more": 1'), "edited", "more is 1, was null"),
        (TEXT[:-4], "damaged", "is not JSON"),
        ("[]", "damaged", "holds a list, not a dict"),
        ("", "damaged", "is not JSON"),
        ('{"a": ' * 200 + "1" + "}" * 200, "damaged", "nested too deeply"),
        (b"\xff\xfe\x00", "damaged", "is not UTF-8"),
        (None, "gone", "does not exist"),
    ],
)
def test_a_file_is_as_recorded_or_its_fault_is_named(tmp_path, content, fault, said):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())

    found = difference(tmp_path, "a.json", Recorded("run", {"a.json": TEXT}))

    assert (found and found.fault) == fault
    assert found is None or (said in found.text and str(tmp_path / "a.json") in found.text)


def test_a_crash_between_the_record_and_the_file_is_no_edit(tmp_path):
    folder = _Run(tmp_path)
    folder.begin({"plan.json": '{"a": 1}'})
    found = record.read(tmp_path)

    record.write(tmp_path, found.with_files({"plan.json": '{"a": 2}'}))  # and then the power goes

    assert folder.differences() == [] and folder._text("plan.json") == '{"a": 2}'
    (tmp_path / "plan.json").write_text('{"a": 3}')
    assert "a is 3, was 2" in folder.differences()[0].text


def test_a_start_that_is_killed_after_its_record_has_lost_nothing(tmp_path):
    folder, said = _Run(tmp_path), []
    record.write(tmp_path, Recorded("run", {"plan.json": '{"a": 1}'}))  # and then the power goes

    folder.restore(said.append)

    assert (tmp_path / "plan.json").read_text() == '{"a": 1}' and "put back as it was recorded" in said[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "kind": "run", "sha256": "x"}', "\0", "null"])
def test_a_damaged_record_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / record.NAME).write_text(content)

    with pytest.raises(JobError, match=r"recorded.json.*delete it to continue without that check"):
        record.read(tmp_path)


def test_a_record_that_was_edited_does_not_pass_for_one(tmp_path):
    record.write(tmp_path, Recorded("run", {"plan.json": '{"a": 1}'}))
    file = tmp_path / record.NAME
    file.write_text(file.read_text().replace(r"\"a\": 1", r"\"a\": 2"))

    with pytest.raises(JobError, match="its bytes are not those that were written"):
        record.read(tmp_path)


def test_a_file_with_a_password_and_its_record_are_their_owners_alone(tmp_path):
    folder = _Run(tmp_path)
    folder.begin({"job.yaml": "tracking: {mlflow_uri: 'http://ann:pw@host'}", "plan.json": "{}"})

    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("job.yaml", "plan.json", record.NAME)}

    assert modes["job.yaml"] == modes[record.NAME] == 0o600 != modes["plan.json"]


RESULT = {
    "steps": 4,
    "tokens": 10,
    "supervised_tokens": 5,
    "train_seconds": 1.0,
    "data_digest": "a",
    "plan_hash": "b",
    "memory": {"predicted_bytes": 1, "measured_peak_bytes": 2.0},
    "after": {"eval_loss": 1.0, "samples": [{"prompt": "a", "generated": "b", "reference": "c"}], "bleu": 0.5},
    "mine": [1],
}


def test_a_result_keeps_what_is_not_known_and_has_no_numbers_that_are_none():
    text = json.dumps({**RESULT, "before": {"eval_loss": float("nan")}})

    found = json_files.parse_result(text, "result.json")

    assert found.values["mine"] == [1] and found.before.eval_loss is None
    assert found.after.scores == {"eval_loss": 1.0, "bleu": 0.5}


@pytest.mark.parametrize(
    "key, value",
    [
        ("steps", "4"), ("steps", None), ("tokens", 1.5), ("memory", []), ("memory", {"predicted_bytes": 1}),
        ("after", 3), ("after", {"eval_loss": "x"}), ("after", {"eval_loss": 1.0, "samples": [{"prompt": 1}]}),
        ("before", [1]), ("time", {"measured_step_s": "1"}), ("energy", {"wh": 1}), ("versions", {"torch": 2}),
        ("handed_back", {"step": 1}), ("plan_hash", {}), ("best_checkpoint", 12),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_named_with_its_file(key, value):
    with pytest.raises(JobError, match=f"result.json: {key}"):
        json_files.parse_result(json.dumps({**RESULT, key: value}), "result.json")


@pytest.mark.parametrize(
    "line, fault",
    [
        (b"[]", "is no event"),
        (b'{"event": 3, "time": 1}', "is no event"),
        (b'{"event": "note", "time": "1", "text": "a"}', "its time is not a number"),
        (b'{"event": "note", "time": 1}', "note: text is null"),
        (b'{"event": "state", "time": 1, "state": {}}', "state: state is"),
        (b'{"event": "eval", "time": 1, "step": true, "eval_loss": 1}', "eval: step is true"),
        (b'{"event": "group", "time": 1, "members": [1]}', "group: a member without node and device"),
        (b'{"event": "quality", "time": 1, "when": "before", "eval_loss": "a"}', "quality: eval_loss is"),
        (b'{"event": "checkpoint", "time": 1, "step": 1.5}', "checkpoint: step is 1.5"),
        (b'{"event": "learnt", "time": 1, "step": 1}', "learnt: text is null"),
        (b"[" * 9000, "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
)
def test_a_line_that_is_no_event_is_passed_over_and_named(line, fault, tmp_path):
    good = b'{"event": "note", "time": 1, "text": "a"}'
    content = good + b"\n" + line + b"\n" + good + b'\n{"event": "being written'

    assert [event.text for event in events.parse_lines(content)] == ["a", "a"]
    (tmp_path / "events.jsonl").write_bytes(content)
    found = summary_of(RunFolder(tmp_path))
    assert (found.num_lines, found.num_skipped) == (3, 1) and found.damaged_lines.startswith(f"line 2: {fault}")


def test_digests_of_a_model_are_read_again_where_a_file_was_touched_and_only_there(tmp_path, monkeypatch):
    model, cache = tmp_path / "model", tmp_path / "digests.json"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "README.md", ".hidden.json"):
        (model / name).write_text(name)
    first, read = digests.of_model(model, cache), []
    of_file = digests.of_file
    monkeypatch.setattr(digests, "of_file", lambda file: read.append(file.name) or of_file(file))

    (model / "config.json").write_text("other.json!")
    second = digests.of_model(model, cache)

    assert set(first) == {"config.json", "model.safetensors"} and read == ["config.json"]
    assert digests.changed(first, second) == ["config.json has changed"]
    assert digests.changed(first, {}) == ["config.json is gone", "model.safetensors is gone"]
    cache.write_text("[1")
    assert digests.of_model(model, cache) == second


SEARCH = {
    "origin.json": '{"folder": "/"}',
    "capability.json": json.dumps(ClusterCapability().as_dict()),
    "study.json": "[]",
    "asked.yaml": "model: {model_name_or_path: a}\ndata: {train: b.jsonl}\n",
    "search.yaml": "model: {model_name_or_path: a}\ndata: {train: b.jsonl}\n",
    "summary.json": '{"why": "no trial has run", "recommended": null}',
    "data.json": '{"64": {"model": "m", "train": "t", "train_rows": [1], "eval_rows": []}}',
}


@pytest.mark.parametrize("name", [*SEARCH, "trials.jsonl"])
@pytest.mark.parametrize("content", ["", "[", '"x"', '{"why": 1, "folder": 2, "64": 3}'])
def test_every_file_of_a_search_is_parsed_or_named(tmp_path, name, content):
    with SearchFolder.take(tmp_path, "search-x") as folder:
        folder.begin(SEARCH)
    whole = damage(folder)
    (folder.path / name).write_text(content)

    wrong = damage(folder)

    assert whole == [line for line in whole if "plan.json" in line]  # a plan is too long to write here
    if name == "trials.jsonl":
        assert folder.trials() == []
    else:
        assert any(name in line for line in wrong), wrong
    assert [one.path for one in SearchFolder.all(tmp_path)] == [folder.path]


class _Run(Folder):
    kind, document = "run", "job.yaml"
