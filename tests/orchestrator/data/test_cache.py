"""Tokenised samples on disk: whole, verified, made again when damaged, cleaned up after the killed."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.data.dataset import DamagedCache, Dataset
from orchestrator.data.prepare import prepare_data
from orchestrator.job import manifest
from orchestrator.job.job_file import read_job
from tests.conftest import rows, write_jsonl
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def prepare(job_text, model_folder, tmp_path):
    """Prepare the tiny job's data; gives the prepared data and what was said."""
    (tmp_path / "job.yaml").write_text(job_text)

    def act():
        said = []
        job = read_job(tmp_path / "job.yaml")
        return prepare_data(job, model_folder, 64, tmp_path / "cache", said.append), said

    return act


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def make_fifo(file):
    file.unlink()
    os.mkfifo(file)


DAMAGES = {
    "a flipped bit": flip,
    "one byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "an empty file": lambda file: file.write_bytes(b""),
    "another JSON type": lambda file: file.write_text("[1]"),
    "no file": Path.unlink,
    "a FIFO": make_fifo,
}


@pytest.mark.parametrize("name", ["samples.arrow", "statistics.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_refused_by_name_and_made_again(prepare, name, damage):
    first, _ = prepare()
    folder = Path(first.files.train)
    whole = (folder / "samples.arrow").read_bytes()

    DAMAGES[damage](folder / name)

    with pytest.raises(DamagedCache, match=str(folder)):
        Dataset.load(folder)
    again, said = prepare()
    assert any("damaged" in text and "made again" in text for text in said)
    assert (folder / "samples.arrow").read_bytes() == whole
    assert again.files == first.files and not again.cached
    assert prepare()[0].cached


@pytest.mark.parametrize("place", ["a file", "an empty folder", "a link to nothing"])
def test_what_lies_where_the_cache_belongs_is_replaced(prepare, tmp_path, place):
    folder = Path(prepare()[0].files.train)
    manifest.remove(folder)
    if place == "a file":
        folder.write_text("x")
    elif place == "an empty folder":
        folder.mkdir()
    else:
        folder.symlink_to(tmp_path / "nowhere")

    again, said = prepare()

    assert len(again.train) == 40 and any("made again" in text for text in said)


_WRITER = """
import sys, time
from pathlib import Path
from orchestrator.job import manifest
with manifest.temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "samples.arrow").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_leftovers_of_the_killed_go_and_those_of_the_living_stay(prepare, tmp_path):
    cache = tmp_path / "cache"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(cache / name)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for name in ("killed", "living")
    ]
    killed, living = (Path(writer.stdout.readline().strip()) for writer in writers)
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()

    _, said = prepare()

    assert not killed.exists() and living.exists()
    assert any("leftovers of 1 killed" in text for text in said)
    for writer in writers:
        writer.kill()
        writer.wait()
        writer.stdout.close()


_PUBLISHER = """
import sys
from pathlib import Path
from orchestrator.job import manifest
for number in range(30):
    final = Path(sys.argv[1]) / str(number)
    with manifest.temporary_folder(final) as folder:
        (folder / "samples.arrow").write_bytes(b"the same content")
        manifest.publish(folder, final, ["samples.arrow"])
    assert manifest.damage(final, ["samples.arrow"]) is None
"""


def test_processes_that_make_the_same_folders_at_once_all_succeed(tmp_path):
    command = [sys.executable, "-c", _PUBLISHER, str(tmp_path)]

    makers = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [maker.communicate(timeout=PATIENCE_S)[1] for maker in makers]

    assert errors == ["", "", ""]
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name != ".lock") == list(range(30))


def test_the_same_rows_prepared_twice_at_once_give_the_same_samples(prepare, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(400))

    with ThreadPoolExecutor(2) as pool:
        found = [future.result()[0] for future in [pool.submit(prepare) for _ in range(2)]]

    assert [len(one.train) for one in found] == [400, 400] and found[0].files == found[1].files
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_a_damaged_folder_is_not_read_twice_a_process_and_a_new_damage_is_seen(prepare):
    folder = Path(prepare()[0].files.train)
    began = time.process_time()
    for _ in range(200):
        Dataset.load(folder)

    assert time.process_time() - began < 5
    flip(folder / "samples.arrow")
    with pytest.raises(DamagedCache):
        Dataset.load(folder)
