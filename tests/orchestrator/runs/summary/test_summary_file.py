"""The file beside the events: always what the events say, whatever happens to either."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.runs.run_folder import RunFolder
from orchestrator.runs.summary.event_summary import EventSummary
from orchestrator.runs.summary.facts import facts_of_whole_run
from orchestrator.runs.summary.summary_file import NAME, identity_of, summary_of
from orchestrator.views.result import listed_row, run_row
from tests.benchmarks.reading import EARLIER, events_of_run, make_run
from tests.orchestrator.runs.summary.test_event_summary import content_of, summary_of_bytes
from tests.orchestrator.runs.test_damage import WAYS

SETTLED_S = 2.3


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A run whose events are worth a summary of their own: 4 MB."""
    return make_run(tmp_path_factory.mktemp("long") / "run", 12_000)


@pytest.fixture
def run(long, tmp_path):
    """A copy of its own, read once."""
    copy = RunFolder(shutil.copytree(long.path, tmp_path / "run"))
    summary_of(copy)
    assert (copy.path / NAME).is_file()
    return copy


def assert_says_what_its_events_say(run):
    fresh = summary_of_bytes((run.path / "events.jsonl").read_bytes())
    assert json.dumps(summary_of(run).to_json()) == json.dumps(fresh.to_json())
    return fresh


def changed(run, change):
    file = run.path / "events.jsonl"
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda old: old,
        lambda old: old + content_of(1),
        lambda old: old + b'{"event": "no',
        lambda old: old[: len(old) // 2],
        lambda old: old[:-1],
        lambda old: b"",
        lambda old: b"\n",
        lambda old: old[1:],
        lambda old: old[:9] + b"#" + old[10:],
        lambda old: old[: len(old) // 2] + b"#" + old[len(old) // 2 + 1 :],
        lambda old: old[: len(old) // 2] + b"#" + old[len(old) // 2 + 1 :] + content_of(2),
        lambda old: old.replace(b"tokens", b"t0kens", 1),
        lambda old: old.replace(b"\n", b"\r\n"),
        lambda old: content_of(3) + old,
        lambda old: old * 2,
    ],
)
def test_a_summary_is_of_the_events_that_are_there(run, change):
    changed(run, change)

    assert_says_what_its_events_say(run)
    assert_says_what_its_events_say(run)


def test_a_line_damaged_since_is_named(run):
    lines = (run.path / "events.jsonl").read_bytes().split(b"\n")
    lines[6000] = lines[6000][:-3] + b"###"
    changed(run, lambda old: b"\n".join(lines))

    assert summary_of(run).damaged_lines == "line 6001: is not JSON"


def test_events_are_read_as_they_are_written(tmp_path):
    run = RunFolder(tmp_path)
    for number, event in enumerate(events_of_run(60, 2)):
        run.record(event)
        if number % 7 == 0:
            assert_says_what_its_events_say(run)

    assert len(summary_of(run).steps) == 60


def test_a_cut_line_counts_once_it_is_whole(run):
    changed(run, lambda old: old + b'{"event": "note", "ti')
    before = assert_says_what_its_events_say(run).num_lines
    with (run.path / "events.jsonl").open("ab") as stream:
        stream.write(b'me": 1.5, "text": "late"}\n')

    assert assert_says_what_its_events_say(run).num_lines == before + 1


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_summary_is_made_again(run, way):
    file = run.path / NAME
    change = WAYS[way]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))

    assert_says_what_its_events_say(run)


def test_a_summary_of_another_version_or_by_another_hand_is_made_again(run):
    from orchestrator.runs.summary.summary_file import _line, _parsed

    row, line = (run.path / NAME).read_bytes().splitlines(keepends=True)
    values = _parsed(line)
    for other in ({"format": "0"}, {"summary": {}}, {"summary": None}, {"num_bytes": "x"}, {"crc32": None}):
        (run.path / NAME).write_bytes(row + _line(values | other))
        assert_says_what_its_events_say(run)


@pytest.mark.parametrize("kind", ["FIFO", "folder", "link"])
def test_what_is_no_summary_stands_in_nobodys_way(run, kind):
    (run.path / NAME).unlink()
    {"FIFO": os.mkfifo, "folder": os.mkdir, "link": lambda path: path.symlink_to("/dev/zero")}[kind](run.path / NAME)

    assert_says_what_its_events_say(run)
    assert listed_row(run)["state"] == "finished"


def test_events_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "events.jsonl").mkdir()

    with pytest.raises(JobError, match=r"events\.jsonl: cannot be read"):
        summary_of(RunFolder(tmp_path))


def test_no_events_leave_no_summary(tmp_path):
    assert summary_of(RunFolder(tmp_path)).to_json() == EventSummary().to_json()
    assert list(tmp_path.iterdir()) == []


def test_readers_at_once_beside_a_writer_see_whole_summaries(long, tmp_path):
    run, found, problems = RunFolder(shutil.copytree(long.path, tmp_path / "run")), [], []
    (run.path / "events.jsonl").write_bytes(b"")

    def read():
        while not found or found[-1] < 12_000:
            try:
                summary = summary_of(run)
                found.append(max(len(summary.steps), found[-1] if found else 0))
                assert summary.num_skipped == 0
            except BaseException as error:
                problems.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    content = (long.path / "events.jsonl").read_bytes()
    with (run.path / "events.jsonl").open("ab", buffering=0) as stream:
        for start in range(0, len(content), 300_001):
            stream.write(content[start : start + 300_001])
    for reader in readers:
        reader.join()

    assert problems == []
    assert_says_what_its_events_say(run)
    assert [path.name for path in run.path.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_read_without(long, tmp_path):
    run = RunFolder(shutil.copytree(long.path, tmp_path / "run"))
    run.path.chmod(0o555)
    try:
        assert_says_what_its_events_say(run)
        assert listed_row(run)["step"] == 12_000
        assert not (run.path / NAME).exists()
    finally:
        run.path.chmod(0o755)


def test_a_process_that_may_write_no_file_reads_the_same(long, tmp_path):
    """A full disk, as a limit of zero bytes a file makes it."""
    run = RunFolder(shutil.copytree(long.path, tmp_path / "run"))
    code = (
        "import json, resource, signal, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.runs.run_folder import RunFolder\n"
        "from orchestrator.runs.summary.summary_file import summary_of\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "print(len(summary_of(RunFolder(Path(sys.argv[1]))).steps))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(run.path)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[4],
    )  # fmt: skip

    assert (shown.stdout, shown.stderr) == ("12000\n", "")
    assert not list(run.path.glob(f"{NAME}*"))


# Rows of a table.


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """Runs that were written a while ago."""
    folder = tmp_path_factory.mktemp("settled")
    for name in ("finished", "stopped"):
        shutil.copytree(EARLIER / "results" / name, folder / name)
    make_run(folder / "twelve", 12)
    time.sleep(SETTLED_S)
    return folder


def damaged_files(run):
    names = ["recorded.json", "job.yaml", "origin.json", "capability.json", "plan.json", "data.json", "result.json"]
    exported = [f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")]
    return [*names, *exported, "events.jsonl"]


@pytest.mark.parametrize("name", ["finished", "stopped", "twelve"])
def test_a_row_that_was_kept_is_the_row(settled, name):
    run = RunFolder(settled / name)
    wanted = run_row(run, summary_of_bytes((run.path / "events.jsonl").read_bytes()))

    first = listed_row(run)
    kept = (run.path / NAME).stat()
    again = listed_row(run)

    assert first == again == wanted
    assert identity_of((run.path / NAME).stat()) == identity_of(kept)  # it was read, not made again


def test_a_row_that_was_kept_is_not_read_once_a_file_changed(settled, tmp_path):
    """Each file damaged in each way: the same complaint or row as without anything kept."""
    seen = 0
    kept = settled / "twelve"
    facts_of_whole_run(RunFolder(kept))
    for name in damaged_files(RunFolder(kept)):
        for way in ("empty", "a byte less", "middle", "list", "gone"):
            run, plain = kept / name, tmp_path / "plain"
            saved = run.read_bytes()
            shutil.copytree(kept, plain, ignore=shutil.ignore_patterns(f"{NAME}*"))
            for folder in (kept, plain):
                file = folder / name
                file.unlink() if WAYS[way] is None else file.write_bytes(WAYS[way](saved))
            assert said_of(kept) == said_of(plain), (name, way)
            seen += 1
            run.write_bytes(saved)
            shutil.rmtree(plain)
    assert seen == 50


def said_of(folder):
    try:
        return {
            key: value for key, value in listed_row(RunFolder(folder)).items() if key not in ("run", "path", "exported")
        }
    except JobError as error:
        return str(error).replace(str(folder), "")


def test_a_row_of_a_run_that_moved_names_where_it_is(settled, tmp_path):
    listed_row(RunFolder(settled / "twelve"))
    moved = RunFolder(shutil.copytree(settled / "twelve", tmp_path / "elsewhere"))

    row = listed_row(moved)

    assert (row["run"], row["path"], row["exported"]) == ("elsewhere", str(moved.path), str(moved.path / "adapter"))
