"""What of a job leaves this machine, and what is taken from a cluster."""

import base64
import gzip
import io
import json
import os
import tarfile

import pytest

from orchestrator.data.readers.sources import rows_of, sources_of
from orchestrator.errors import JobError, RunFailed
from orchestrator.job.job_file import read_job
from orchestrator.remote import package
from orchestrator.runs.run_folder import RunFolder
from tests.conftest import rows, write_jsonl


@pytest.fixture
def folder(tmp_path):
    """A job with a folder of data, beside which other things lie, and a model's folder."""
    data = tmp_path / "data"
    (data / "part").mkdir(parents=True)
    write_jsonl(data / "a.jsonl", rows(3))
    write_jsonl(data / "part" / "b.jsonl", rows(3))
    (data / "secrets.env").write_text("TOKEN=1")
    (data / ".hidden.jsonl").write_text('{"text": "no"}\n')
    (data / "notes.pdf").write_bytes(b"x" * 1000)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"w" * 100)
    (model / "optimizer.pt").write_bytes(b"o" * 10_000)
    (model / "id_rsa").write_text("key")
    (tmp_path / "job.yaml").write_text("model: {model_name_or_path: model}\ndata: {train: data}\n")
    return tmp_path


def packed(folder):
    return package.find_files(read_job(folder / "job.yaml", []))


def test_of_folders_only_what_is_read_is_sent(folder):
    found = packed(folder)

    assert sorted(found.files) == [
        "0-model/config.json",
        "0-model/model.safetensors",
        "1-data/a.jsonl",
        "1-data/part/b.jsonl",
    ]
    assert found.places == {folder / "model": "0-model", folder / "data": "1-data"}
    assert found.as_dict()["num_files"] == 4 and found.links == {}


def test_the_files_of_a_pattern_are_sent_and_found_there_in_their_order(folder, tmp_path):
    for name, text in (("b/part.jsonl", "2"), ("a/part.jsonl", "1"), ("a/other.jsonl", "3")):
        (folder / "more" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "more" / name).write_text(json.dumps({"text": text}) + "\n")
    job = read_job(folder / "job.yaml", ["data.train=more/*/part.jsonl"])

    package.pack(job, tmp_path / "sent")

    there = read_job(tmp_path / "sent" / "job.yaml")
    (found,) = sources_of(there, there.spec.data.train, "data.train")
    assert [row.values["text"] for row in rows_of(there, *found)] == ["1", "2"]


def test_a_saved_data_set_is_one_there_too(folder):
    saved = folder / "saved" / "train"
    saved.mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (saved / "data-00000-of-00001.arrow").write_bytes(b"rows")
    (saved / "cache-1.arrow").write_bytes(b"cache")
    (folder / "job.yaml").write_text("model: {model_name_or_path: model}\ndata: {train: saved}\n")

    found = packed(folder)

    assert [place for place in found.files if place.startswith("1-")] == [
        "1-saved/train/data-00000-of-00001.arrow",
        "1-saved/dataset_dict.json",
        "1-saved/train/state.json",
    ]


def test_modules_of_own_metrics_are_sent_under_their_names_beside_the_job_file(folder):
    (folder / "mine.py").write_text("def score(predictions, references):\n    return 1.0\n")
    (folder / "other.py").write_text("")
    with (folder / "job.yaml").open("a") as file:
        file.write("eval: {metrics: ['mine:score', exact_match]}\n")

    found = packed(folder)

    assert found.files["mine.py"] == folder / "mine.py"
    assert not {"other.py"} & {*found.files}


def test_links_travel_as_files_are_counted_and_named(folder, tmp_path, monkeypatch):
    outside = tmp_path / "outside.jsonl"
    write_jsonl(outside, rows(500))
    (folder / "data" / "link.jsonl").symlink_to(outside)
    (folder / "data" / "key").symlink_to("/etc/hostname")

    found = packed(folder)
    lines = "\n".join(found.lines())
    with tarfile.open(fileobj=io.BytesIO(package.archive(found.files, {}))) as sent:
        entries = {entry.name: entry for entry in sent}

    assert found.links == {"1-data/link.jsonl": outside}
    assert "1 of them are links; their targets are sent: 1-data/link.jsonl -> " in lines
    assert all(entry.isreg() for entry in entries.values())
    assert entries["1-data/link.jsonl"].size == outside.stat().st_size
    monkeypatch.setattr(package, "UPLOAD_LIMIT_BYTES", outside.stat().st_size)
    with pytest.raises(JobError, match=r"outside\.jsonl alone .* can be sent"):
        packed(folder)


def test_a_data_file_that_is_a_link_keeps_its_name(folder):
    (folder / "blobs").mkdir()
    write_jsonl(folder / "blobs" / "0f3a", rows(3))
    (folder / "train.jsonl").symlink_to("blobs/0f3a")
    (folder / "job.yaml").write_text("model: {model_name_or_path: model}\ndata: {train: train.jsonl}\n")

    found = packed(folder)

    assert found.files["1-train.jsonl"] == folder / "blobs" / "0f3a"
    assert found.links == {"1-train.jsonl": folder / "blobs" / "0f3a"}


def test_a_package_for_a_dashboard_holds_no_link(folder):
    (folder / "data" / "link.jsonl").symlink_to(folder / "data" / "a.jsonl")

    package.pack(read_job(folder / "job.yaml", []), folder / "package")

    inside = [path for path in (folder / "package").rglob("*") if path.parts[len(folder.parts) + 1][:2] in ("0-", "1-")]
    assert len([path for path in inside if path.is_file()]) == 5
    assert not any(path.is_symlink() for path in inside)
    assert "train: 1-data" in (folder / "package" / "job.yaml").read_text()


def test_what_is_no_file_is_not_sent(folder):
    os.mkfifo(folder / "chat.jinja")
    text = (folder / "job.yaml").read_text().replace("train: data", "train: data, chat_template: chat.jinja")
    (folder / "job.yaml").write_text(text)

    with pytest.raises(JobError, match=r"chat\.jinja is a FIFO: it cannot be sent"):
        packed(folder)


# What comes back.


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(tmp_path / "runs", "job", "job-1")
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "adapter_config.json").write_text("old")
    (run.path / "remote.json").write_text("{}")
    return run


def told(entries, wrap=gzip.compress):
    """What a cluster prints that sends these entries."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for entry, content in entries:
            entry.size = len(content) if entry.isreg() else entry.size
            made.addfile(entry, io.BytesIO(content))
    return f"-----BEGIN RUN-----\n{base64.encodebytes(wrap(out.getvalue())).decode()}-----END RUN-----"


def an_entry(name, kind=tarfile.REGTYPE, **fields):
    entry = tarfile.TarInfo(name)
    entry.type = kind
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry


def test_a_run_comes_back_and_takes_the_place_of_what_was_fetched_before(run, tmp_path):
    there = RunFolder.create(tmp_path / "there", "job", "job-1")
    (there.path / "adapter").mkdir()
    (there.path / "adapter" / "adapter_config.json").write_text("new")
    (there.path / "result.json").write_text("{}")
    os.mkfifo(there.path / "pipe")
    (there.path / "key").symlink_to("/etc/hostname")

    package.receive(package.send(there), run.path)

    assert (run.path / "adapter" / "adapter_config.json").read_text() == "new"
    assert (run.path / "result.json").exists() and not os.path.lexists(run.path / "key")
    assert not list(run.path.glob(".fetched*"))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (an_entry("../out"), "not a path below"),
        (an_entry("/tmp/out-of-it"), "not a path below"),
        (an_entry("adapter/../../out"), "not a path below"),
        (an_entry("link", tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, a device"),
        (an_entry("hard", tarfile.LNKTYPE, linkname="ok"), "a link, a device"),
        (an_entry("pipe", tarfile.FIFOTYPE), "a link, a device"),
        (an_entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3), "a link, a device"),
        (an_entry("a/" * 40 + "deep"), "too long or too deep"),
        (an_entry("ok"), "comes twice"),
        (an_entry("ok/inside"), "comes twice"),
        (an_entry("remote.json"), "it contains remote.json"),
        (an_entry(".lock"), r"it contains \.lock"),
    ],
    ids=lambda value: value.name[:12] if isinstance(value, tarfile.TarInfo) else "",
)
def test_what_may_not_be_unpacked_is_refused_and_nothing_is_written(run, entry, said):
    before = sorted(run.path.rglob("*"))

    with pytest.raises(RunFailed, match=said):
        package.receive(told([(an_entry("ok"), b"fine"), (entry, b"")]), run.path)

    assert sorted(run.path.rglob("*")) == before
    assert (run.path / "remote.json").read_text() == "{}" and not (run.path.parent / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-----BEGIN RUN-----\n-----END RUN-----",
        "-----BEGIN RUN-----\n!!!!-----END RUN-----",
        "-----END RUN----- -----BEGIN RUN-----",
        told([], wrap=lambda content: b"no gzip"),
        told([(an_entry("a"), b"x" * 5000)], wrap=lambda content: gzip.compress(content)[:-40]),
        told([(an_entry("a"), b"x" * 5000)], wrap=lambda content: gzip.compress(content[:3000])),
    ],
)
def test_what_is_no_run_is_refused(run, text):
    before = sorted(run.path.rglob("*"))

    with pytest.raises(RunFailed, match="is not a run"):
        package.receive(text, run.path)

    assert sorted(run.path.rglob("*")) == before


def test_a_bomb_is_not_unpacked(run, monkeypatch):
    monkeypatch.setattr(package, "_LEAST_FETCHED_BYTES", 2**20)

    with pytest.raises(RunFailed, match="holds more than"):
        package.receive(told([(an_entry("zeros"), bytes(64 * 2**20))]), run.path)
    with pytest.raises(RunFailed, match="holds more than"):
        monkeypatch.setattr(package, "_MOST_FETCHED", 10)
        package.receive(told([(an_entry(f"f{n}"), b"") for n in range(11)]), run.path)

    assert not list(run.path.glob(".fetched*")) and not (run.path / "zeros").exists()


def test_what_was_sent_is_listed_for_machines(folder, tmp_path):
    run, lines = RunFolder.create(tmp_path / "runs", "job", "job-1"), []

    package.report(packed(folder), run, lines.append)

    assert "sends 4 files of the job" in lines[0]
    told = json.loads((run.path / package.SENT).read_text())
    assert told["num_files"] == 4 and {one["name"] for one in told["files"]} >= {"1-data/a.jsonl"}
