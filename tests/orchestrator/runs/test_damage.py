"""Every file of a finished and of an interrupted run, damaged in twelve ways: the same adapter, or its name and why."""

import json
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.cli.report import report
from orchestrator.cli.runs import list_runs, status
from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.runs import checkpoints, record
from orchestrator.runs.condition import check_model, exported_whole, require_finished
from orchestrator.runs.events import Note
from orchestrator.runs.json_files import HandedBack
from orchestrator.views.result import handed_back_text
from tests.orchestrator.conftest import Listener, stopped, train_here

WAYS = {
    "empty": lambda old: b"",
    "half": lambda old: old[: len(old) // 2],
    "a byte less": lambda old: old[:-1],
    "a byte more": lambda old: old + b"x",
    "first byte": lambda old: flipped(old, 0),
    "middle": lambda old: flipped(old, len(old) // 2),
    "last bytes": lambda old: flipped(old, max(0, len(old) - 3)),
    "list": lambda old: b"[]",
    "text": lambda old: b'"text"',
    "number": lambda old: b"3",
    "null": lambda old: b"null",
    "gone": None,
}


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] if content else b"\1"


def damage(file, way):
    change = WAYS[way]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


def files_of(run, place):
    """Of the run, its model and its samples; who holds it and what workers logged decide nothing."""
    folders = [run.path, place / "model", *(Path(folder) for folder in (run.data().train, run.data().eval))]
    found = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    chosen = [file for file in found if file.name != ".lock" and "logs" not in file.parts and file.name != "stop"]
    assert len(chosen) > 25
    return chosen


class WouldTrain(Exception):
    """The workers would be started now."""


def would_train(*_):
    raise WouldTrain


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def asked(run, file, capsys):
    """What the verbs that look at a run say of it: none may end in anything but an answer or a refusal."""
    said = []
    for verb in (lambda: status(str(run.path), run.path.parent), lambda: list_runs(run.path.parent)):
        with suppress(OrchestratorError):
            try:
                verb()
            except OrchestratorError as error:
                said.append(str(error))
                raise
    return "\n".join([*said, *capsys.readouterr()])


def goes_on(run, file, pristine, train):
    """What `resume` does: the name of the file in a refusal, or everything that decides the adapter as it was."""
    listener = Listener()
    whole = pristine / "runs" / run.run_id
    try:
        path_of_a_job.resume(run, listener)
    except WouldTrain:
        check_model(run)
        datasets(run.data())
        for name in ("job.yaml", "origin.json", "capability.json", "plan.json", "data.json"):
            assert (run.path / name).read_bytes() == (whole / name).read_bytes(), (file, name)
        newest = checkpoints.whole(run.checkpoints)
        for kept in newest.iterdir() if newest else ():
            assert kept.read_bytes() == (whole / "checkpoints" / newest.name / kept.name).read_bytes()
        return "trains"
    except OrchestratorError as error:
        assert file.name in str(error) or file.parent.name in str(error), (file, str(error))
        return "refuses"
    return "is done"


def cases(runs, place, share):
    for run in runs:
        for file in files_of(run, place):
            for number, way in enumerate(WAYS):
                if (zlib.crc32(f"{run.run_id}{file.name}{file.parent.name}".encode()) + number) % share == 0:
                    yield run, file, way


def try_all(runs, place, pristine, put_back, capsys, share):
    outcomes = []
    for run, file, way in cases(runs, place, share):
        damage(file, way)
        said = asked(run, file, capsys)
        outcome = goes_on(run, file, pristine, would_train)
        outcomes.append(outcome)
        if outcome == "is done":
            assert adapter(run.path) == adapter(pristine / "runs" / "finished"), (file, way, said)
        put_back()
    return outcomes


def test_damage_to_any_file_is_named_or_changes_nothing(
    place, finished, interrupted, pristine, put_back, capsys, monkeypatch
):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", would_train)

    outcomes = try_all([finished, interrupted], place, pristine, put_back, capsys, 8)

    counts = {outcome: outcomes.count(outcome) for outcome in ("trains", "refuses", "is done")}
    assert min(counts.values()) > 3 and sum(counts.values()) == len(outcomes) > 80, counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", ["finished", "interrupted"])
def test_damage_in_every_way_with_the_training_that_follows(
    place, finished, interrupted, pristine, put_back, capsys, monkeypatch, which
):
    """The whole table; what is trained again hands back the same bytes."""
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", train_here)
    wanted, trained = adapter(finished.path), 0
    for run, file, way in cases([{"finished": finished, "interrupted": interrupted}[which]], place, 1):
        damage(file, way)
        asked(run, file, capsys)
        if way in ("half", "middle", "list", "gone"):  # its plots take as long as all the rest
            with suppress(OrchestratorError):
                report(str(run.path), runs=run.path.parent)
        try:
            path_of_a_job.resume(run, Listener())
        except OrchestratorError as error:
            assert file.name in str(error) or file.parent.name in str(error), (file, way, str(error))
        else:
            trained += 1
            assert adapter(run.path) == wanted, (file, way)
        put_back()
    assert trained > 100


def test_an_interrupted_run_goes_on_to_the_adapter_of_the_undisturbed_one(
    finished, interrupted, without_ray, put_back, pristine
):
    path_of_a_job.resume(interrupted, Listener())

    assert adapter(interrupted.path) == adapter(finished.path)
    ours, theirs = interrupted.result(), finished.result()
    assert ours.after.scores == theirs.after.scores
    assert ours.handed_back.files == theirs.handed_back.files
    assert interrupted.state() == "finished" and path_of_a_job.is_complete(interrupted, interrupted.job())


EDITS = [
    ("plan.json", '"num_steps": 4', '"num_steps": 9', "num_steps is 9, was 4"),
    ("plan.json", '"global_batch_size": 4', '"global_batch_size": 8', "global_batch_size is 8, was 4"),
    ("job.yaml", "lora_r: 4", "lora_r: 8", "method.lora_r is 8, was 4"),
    ("job.yaml", "max_length: 64", "max_length: 32", "data.max_length is 32, was 64"),
    ("data.json", '"train": "', '"train": "/elsewhere', "train is"),
    ("origin.json", '"folder": "', '"folder": "/elsewhere', "folder is"),
    ("capability.json", '"num_cores": ', '"num_cores": 9', "nodes.0.num_cores is"),
]


@pytest.mark.parametrize("name, old, new, said", EDITS)
def test_an_edited_file_is_named_with_what_differs_and_can_be_put_back(
    interrupted, put_back, monkeypatch, name, old, new, said
):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", would_train)
    file = interrupted.path / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))

    with pytest.raises(JobError, match=name) as refused:
        path_of_a_job.resume(interrupted, Listener())
    file.unlink()  # what the message says
    with pytest.raises(WouldTrain):
        path_of_a_job.resume(interrupted, listener := Listener())

    assert said in str(refused.value) and "Delete the file" in str(refused.value)
    assert file.read_text() == text and any("put back as it was recorded" in line for line in listener.said)


def test_what_decides_nothing_may_be_changed_and_is_said(interrupted, put_back, monkeypatch):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", would_train)
    file = interrupted.path / "job.yaml"
    file.write_text(file.read_text() + "bank: {path: elsewhere}\n")

    with pytest.raises(WouldTrain):
        path_of_a_job.resume(interrupted, listener := Listener())

    assert any(line.startswith("bank.path was changed since the run began") for line in listener.said)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_is_another_now_is_refused_by_name_and_not_by_its_time(
    place, interrupted, put_back, monkeypatch, name
):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", would_train)
    file = place / "model" / name
    content = file.read_bytes()

    file.write_bytes(content)  # another time, the same bytes
    with pytest.raises(WouldTrain):
        path_of_a_job.resume(interrupted, Listener())
    file.write_bytes(flipped(content, len(content) - 9))

    with pytest.raises(JobError, match=f"is not the model that interrupted began with \\({name} has changed\\)"):
        path_of_a_job.resume(interrupted, Listener())


def test_damaged_samples_are_made_again_and_it_is_said(interrupted, put_back, monkeypatch, place):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", would_train)
    samples = Path(interrupted.data().train) / "samples.arrow"
    content = samples.read_bytes()
    samples.write_bytes(flipped(content, len(content) // 2))

    with pytest.raises(WouldTrain):
        path_of_a_job.resume(interrupted, listener := Listener())

    assert samples.read_bytes() == content
    assert any("samples.arrow" in line and "made again" in line for line in listener.said)


def test_the_best_checkpoint_that_verifies_is_chosen(interrupted, put_back):
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    best = interrupted.checkpoints / "step-00000002" / "weights.safetensors"

    choice = checkpoints.choose(interrupted.checkpoints, losses, 4)
    best.write_bytes(flipped(best.read_bytes(), 400))
    next_best = checkpoints.choose(interrupted.checkpoints, losses, 4)

    assert (choice.step, choice.reason) == (2, None)
    unknown = checkpoints.choose(interrupted.checkpoints, {1: float("nan"), 3: 2.0, 4: float("nan")}, 4)
    assert (unknown.step, unknown.eval_loss, unknown.instead_of) == (3, 2.0, None)
    assert (next_best.step, next_best.instead_of) == (3, "step-00000002")
    assert "weights.safetensors has changed" in next_best.reason
    text = handed_back_text(HandedBack("adapter", **vars(next_best)))
    assert "step-00000002 has the lowest held-out loss, but cannot be used" in text and "step 3" in text


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_the_next_best_is_handed_back_where_the_best_is_damaged_and_said_everywhere(
    place, without_ray, tmp_path, damage
):
    fast = ["train.learning_rate=0.3", "train.lr_scheduler_type=constant", f"checkpoint.output_dir={tmp_path}"]
    job = read_job(place / "job.yaml", fast)
    run = stopped(job, "worse")
    state = json.loads((run.checkpoints / "step-00000003" / "state.json").read_text())
    losses = {int(step): loss for step, loss in state["eval_losses"].items()}
    best = min(losses, key=losses.get)
    assert best < 3, losses  # so fast, it learns too much
    if damage == "gone":
        shutil.rmtree(run.checkpoints / f"step-{best:08d}")
    else:
        weights = run.checkpoints / f"step-{best:08d}" / "weights.safetensors"
        weights.write_bytes(flipped(weights.read_bytes(), 400))

    path_of_a_job.resume(run, listener := Listener())

    handed, after = run.result().handed_back, run.result().after
    assert handed.instead_of == f"step-{best:08d}" and handed.step != best
    assert ("is gone" if damage == "gone" else "weights.safetensors has changed") in handed.reason
    assert after.eval_loss == pytest.approx(handed.eval_loss, rel=1e-6)
    assert any(f"step-{best:08d} has the lowest held-out loss, but cannot be used" in line for line in listener.said)
    assert handed.instead_of in (run.path / "adapter" / "README.md").read_text()
    assert "the next best" in handed_back_text(run.result().handed_back)


def test_an_adapter_that_is_damaged_is_exported_again_bit_by_bit(finished, put_back, without_ray, pristine):
    file = finished.path / "adapter" / "adapter_model.safetensors"
    whole, result = file.read_bytes(), finished.result()
    file.write_bytes(flipped(whole, 900))
    with pytest.raises(JobError, match=r"adapter_model.safetensors has changed since it was handed back"):
        require_finished(finished)

    path_of_a_job.resume(finished, listener := Listener())

    assert file.read_bytes() == whole
    again = finished.result()
    for key in ("train_seconds", "time", "memory", "before", "steps", "handed_back"):
        assert again.values[key] == result.values[key], key
    assert any("exported again from the checkpoints" in line for line in listener.said)


def test_an_adapter_is_not_exported_again_from_nothing(finished, put_back, without_ray):
    (finished.path / "adapter" / "adapter_config.json").unlink()
    for folder in checkpoints.complete(finished.checkpoints):
        (folder / "weights.safetensors").write_bytes(b"")

    with pytest.raises(JobError, match=r"adapter_config.json is gone, and no whole checkpoint is left"):
        path_of_a_job.resume(finished, Listener())


@pytest.mark.parametrize("folder", ["../adapter", "/tmp", "checkpoints", ""])
def test_no_other_folder_passes_for_what_was_handed_back(finished, put_back, folder):
    result = finished.read_json("result.json")
    finished.write("result.json", json.dumps({**result, "handed_back": {**result["handed_back"], "folder": folder}}))

    with pytest.raises(JobError, match=r"is gone|result\.json"):
        exported_whole(finished)


def test_a_damaged_run_is_listed_as_damaged_beside_the_others(finished, interrupted, put_back, capsys):
    (finished.path / "plan.json").write_text("[]")

    list_runs(finished.path.parent, json_=True)
    shown = capsys.readouterr()
    with pytest.raises(JobError, match=r"finished is damaged: .*plan.json: holds a list, not a dict"):
        status("finished", finished.path.parent)

    states = {row["run"]: row["state"] for row in json.loads(shown.out)}
    assert states == {"finished": "damaged", "interrupted": "stopped"}
    assert "plan.json" in shown.err


def test_a_record_of_another_version_is_said_to_be_so(interrupted, put_back):
    file = interrupted.path / record.NAME
    file.write_text(file.read_text().replace('"version": 1', '"version": 7', 1))

    with pytest.raises(record.OtherVersion, match=r"recorded.json: has version 7, this program writes 1"):
        interrupted.plan()


def test_damaged_lines_of_events_are_passed_over_and_named(finished, put_back, capsys):
    file = finished.path / "events.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[1] = b'{"event": "step", "time": 1, "step": "x"}'
    file.write_bytes(b"\n".join(lines[:-1]) + b'\n{"event": "no')  # the last one was cut by a power loss
    finished.record(Note("after it"))

    status("finished", finished.path.parent)

    assert finished.events()[0][-1].text == "after it"
    assert "line 2: step: step is" in capsys.readouterr().err.replace("\n", " ")
