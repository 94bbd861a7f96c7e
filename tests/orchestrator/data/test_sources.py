import json
import os

import pytest

from orchestrator.data.readers.sources import digest_of, looks_like_hub_name, rows_of, skipped_of, sources_of
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job


@pytest.fixture
def source(tmp_path):
    """`source("train: data")`: a job whose data section reads so, with every file of `files` written below it."""

    def make(data, files=()):
        for name in files:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"text": name}) + "\n")
        (tmp_path / "job.yaml").write_text(f"model: {{model_name_or_path: some/model}}\ndata: {{{data}}}\n")
        return read_job(tmp_path / "job.yaml")

    return make


def texts(job, key="train"):
    value = getattr(job.spec.data, key)
    return [row.values["text"] for found in sources_of(job, value, f"data.{key}") for row in rows_of(job, *found)]


FOREIGN = [
    "data/.ipynb_checkpoints/train-checkpoint.jsonl",
    "data/._train.jsonl",
    "data/__MACOSX/._train.jsonl",
    "data/.hidden.jsonl",
    "data/.git/train.jsonl",
    "data/_delta_log/0000.json",
    "data/_temporary/train.jsonl",
    "data/dataset_info.json",
    "data/state.json",
    "data/README.md",
    "data/notes.txt",
    "data/train.jsonl~",
    "data/train.jsonl.bak",
    "data/cache-0f3a.arrow",
]


def test_of_a_folder_only_its_data_files_are_read_and_the_others_are_named(source):
    job = source("train: data", ["data/train.jsonl", "data/more/b.JSONL", *FOREIGN])

    assert texts(job) == ["data/more/b.JSONL", "data/train.jsonl"]
    told = "\n".join(skipped_of(job, "data", "data.train"))
    for reason in ("2 hidden files", "5 hidden folders", "files about the data", "1 text file beside rows (notes.txt"):
        assert reason in told, told


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("test.jsonl", "test"),
        ("validation.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("my-val.jsonl", "validation"),
        ("val_2024.jsonl", "validation"),
        ("eval.jsonl", "test"),
        ("TEST.JSONL", "test"),
        ("test-00000-of-00002.jsonl", "test"),
        ("test/part-0.jsonl", "test"),
        ("dev/train/part-0.jsonl", "train"),
        ("train/test_cases.jsonl", "test"),
        ("latest.jsonl", None),
        ("contest.jsonl", None),
        ("all.jsonl", None),
        ("train_test.jsonl", None),
    ],
)
def test_files_belong_to_the_split_that_their_names_tell(source, name, split):
    job = source("train: data, eval: {path: data, split: test}", ["data/train.jsonl", f"data/{name}"])

    assert (f"data/{name}" in texts(job)) == (split in (None, "train"))
    assert split != "test" or texts(job, "eval") == [f"data/{name}"]


def test_held_out_rows_come_from_the_validation_or_test_files_of_a_folder(source):
    files = ["data/train.jsonl", "data/test.jsonl", "data/validation.jsonl"]

    assert texts(source("train: data, eval: data", files), "eval") == ["data/validation.jsonl"]
    assert texts(source("train: data, eval: {path: data, split: test}"), "eval") == ["data/test.jsonl"]
    assert texts(source("train: {path: data, split: validation}")) == ["data/validation.jsonl"]
    assert texts(source("train: data, eval: own", ["own/a.jsonl"]), "eval") == ["own/a.jsonl"]


def test_a_split_of_ones_own_name_is_found(source):
    files = ["data/train_sft-00000-of-00001.jsonl", "data/train_gen.jsonl", "data/train_sft_2.jsonl"]

    assert texts(source("train: {path: data, split: train_sft}", files)) == ["data/train_sft-00000-of-00001.jsonl"]


@pytest.mark.parametrize(
    ("data", "files", "told"),
    [
        ("train: data", ["data/test.jsonl"], "has no file of the split train; it has: test"),
        ("train: {path: data, split: dev}", ["data/train.jsonl"], "has no file of the split validation; it has: train"),
        ("train: {path: data.jsonl, split: test}", ["data.jsonl"], "a file has no splits"),
        ("train: {path: data.jsonl, split: 'train[:10]'}", ["data.jsonl"], "a file has no splits"),
        ("train: data", ["data/.x.jsonl"], "holds no .*not read: 1 hidden file "),
        ("train: trian.txt", ["train.txt"], "does not exist. Did you mean train.txt?"),
        ("train: tarin.jsonl", ["train.jsonl"], "Did you mean train.jsonl?"),
        ("train: tarin", ["train.jsonl"], "Did you mean train.jsonl?"),
        ("train: data/trian.jsonl", ["data/train.jsonl"], "Did you mean data/train.jsonl?"),
        ("train: data/other", ["data/train.jsonl"], "does not exist"),
        ("train: none.jsonl", [], "does not exist"),
        ("train: none.json.gz", [], "does not exist"),
        ("train: a/b/c", [], "does not exist"),
        ("train: 'data.jsonl[:10%]'", ["data.jsonl"], r"\{path: data.jsonl, max_samples: 1000\}"),
        ("train: 'imdb[train]'", [], "in brackets"),
        ("train: 'data/*.csv'", ["data/a.jsonl"], "matches no file"),
        ("train: 'data/*'", ["data/a.jsonl", "data/b.pdf"], "b.pdf: a data file ends in"),
        ("train: 'gs://bucket/x'", [], "names no data file"),
        ("train: 'ftp://host/x.csv'", [], "Fetch the file first, and give"),
        ("train: {path: data.jsonl, config: main}", ["data.jsonl"], "config is given for data.jsonl, which is no data"),
        ("train: 'file:///data/x.jsonl'", [], "Give the path alone: /data/x.jsonl"),
        ("train: []", [], "empty list"),
        ("train: [{path: data, split: train}, none.jsonl]", ["data/train.jsonl"], "none.jsonl does not exist"),
        ("train: data.parquet.gz", ["data.parquet.gz"], "gunzip -k data.parquet.gz"),
        ("train: data.tar.gz", ["data.tar.gz"], "tar -xf data.tar.gz"),
        ("train: data.xlsx", ["data.xlsx"], "Save the sheet as csv"),
        ("train: '~nobody-there/x.jsonl'", [], "data.train"),
        (r'train: "a\0b.jsonl"', [], "NUL"),
        ("train: job.yaml", [], "a data file ends in"),
        ("eval: me/x, train: data.jsonl", ["data.jsonl"], "Name the split to hold out"),
    ],
)
def test_sources_that_cannot_be_read_say_what_to_do(source, data, files, told):
    job = source(data, files)

    with pytest.raises(JobError, match=told):
        for key in ("train", "eval"):
            if getattr(job.spec.data, key) is not None:
                sources_of(job, getattr(job.spec.data, key), f"data.{key}")


def test_a_pattern_reads_the_files_that_it_matches_in_order(source):
    job = source("train: 'data/**/part-*.jsonl'", ["data/b/part-1.jsonl", "data/part-0.jsonl", "data/x.jsonl"])

    assert texts(job) == ["data/b/part-1.jsonl", "data/part-0.jsonl"]
    assert texts(source("train: data/part-?.jsonl")) == ["data/part-0.jsonl"]


def test_a_file_at_an_address_is_fetched_once_and_again_when_it_changed(source, tmp_path, monkeypatch):
    import functools
    import http.server
    import threading

    pytest.importorskip("aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    asked = []

    class Site(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.command)

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(tmp_path / "site")))
    threading.Thread(target=site.serve_forever, daemon=True).start()
    file = tmp_path / "site" / "rows.jsonl"
    file.write_text('{"text": "one"}\n')
    job = source(f"train: 'http://127.0.0.1:{site.server_port}/rows.jsonl?download=1'")

    assert sources_of(job, job.spec.data.train, "data.train")[0][1] == [] and asked == []
    assert texts(job) == texts(job) == ["one"]
    assert asked.count("GET") <= 2
    file.write_text('{"text": "two"}\n')
    os.utime(file, (10**9, 10**9))
    assert texts(job) == ["two"]
    file.unlink()
    with pytest.raises(JobError, match="cannot be fetched"):
        texts(job)
    site.shutdown()
    site.server_close()


def test_an_address_without_its_package_names_the_package(source, monkeypatch):
    import importlib.util

    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    job = source("train: 's3://bucket/train.jsonl'")

    with pytest.raises(JobError, match="pip install fsspec s3fs"):
        texts(job)


def test_drawn_rows_are_the_same_for_a_seed_and_keep_their_order(source, tmp_path):
    job = source("train: {path: many.jsonl, max_samples: 5}")
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"{n:03}"}) + "\n" for n in range(200)))

    drawn = texts(job)

    assert drawn == texts(job) == sorted(drawn) and len(set(drawn)) == 5 and drawn != [f"{n:03}" for n in range(5)]
    assert len(texts(source("train: many.jsonl, max_samples: 7"))) == 7
    assert len(texts(source("train: {path: many.jsonl, max_samples: 500}"))) == 200


def test_what_is_no_file_is_refused_or_named(source, tmp_path):
    job = source("train: data", ["data/a.jsonl"])
    os.mkfifo(tmp_path / "data" / "b.jsonl")

    assert texts(job) == ["data/a.jsonl"]
    assert "1 special file (b.jsonl)" in skipped_of(job, "data", "data.train")[0]
    with pytest.raises(JobError, match="is a FIFO"):
        texts(source("train: data/b.jsonl"))
    with pytest.raises(JobError, match="device"):
        texts(source("train: /dev/zero"))
    (tmp_path / "data" / "c.jsonl").symlink_to("gone")
    with pytest.raises(JobError, match="a link to a file that is not there"):
        texts(job)


def test_links_of_a_cache_are_read_by_their_name_and_without_one_by_their_content(source, tmp_path):
    job = source("train: snapshot", ["blobs/0f3a", "blobs/1f3a"])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to("../blobs/0f3a")
    (tmp_path / "snapshot" / "more").symlink_to("../blobs/1f3a")

    assert texts(job) == ["blobs/1f3a", "blobs/0f3a"]
    assert texts(source("train: snapshot/train.jsonl")) == ["blobs/0f3a"]
    assert texts(source("train: blobs/0f3a")) == ["blobs/0f3a"]


def test_a_json_object_that_is_no_row_is_a_file_about_the_data(source, tmp_path):
    job = source("train: data", ["data/train.jsonl"])
    for name, values in {"stats": {"rows": 3}, "empty": {}, "row": {"text": "row"}}.items():
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(values, indent=1))

    assert texts(job) == ["row", "data/train.jsonl"]
    assert "2 files about the data (empty.json, stats.json)" in skipped_of(job, "data", "data.train")[0]
    (tmp_path / "data" / "rows.json").write_text(json.dumps({"rows": [{"text": "a"}]}))
    with pytest.raises(JobError, match="jq -c"):
        texts(job)


def test_the_digest_is_of_the_files_that_are_read(source, tmp_path):
    job = source("train: data", ["data/train.jsonl", "data/test.jsonl"])
    before = digest_of(job, "data", "data.train")

    (tmp_path / "data" / "test.jsonl").write_text("changed")
    (tmp_path / "data" / ".train.jsonl").write_text("changed")

    assert digest_of(job, "data", "data.train") == before
    (tmp_path / "data" / "train.jsonl").write_text("changed")
    assert digest_of(job, "data", "data.train") != before


def test_hub_names_are_told_from_paths(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "imdb.yaml").touch()
    for name in ("org/name", "imdb", "org/name-v1.5", "wikitext-2.0"):
        assert looks_like_hub_name(name, tmp_path), name
    for name in ("./name", "rows.jsonl", "a/b/c", "data/name", "dat", "org/name.csv.gz", "a b", "org/", "~x", "x.TXT"):
        assert not looks_like_hub_name(name, tmp_path), name


# --- what `datasets` saves


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": f"row {number}"} for number in range(30)])
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    splits = {"train": rows, "test": rows.select(range(5)), "extra": rows.select([7])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved_dict")
    (tmp_path / "saved" / "cache-0f3a.arrow").write_bytes(b"left by a map")
    return tmp_path


def test_what_datasets_saved_is_read_split_by_split(source, saved):
    assert texts(source("train: saved")) == [f"row {number}" for number in range(30)]
    job = source("train: saved_dict, eval: saved_dict")
    assert len(texts(job)) == 30 and len(texts(job, "eval")) == 5
    assert skipped_of(job, "saved_dict", "data.train") == [
        "data.train: saved_dict: not read: 2 other splits (test, extra)"
    ]
    assert texts(source("train: {path: saved_dict, split: extra}")) == ["row 7"]
    with pytest.raises(JobError, match="has no split validation; it has: train, test, extra"):
        texts(source("train: {path: saved_dict, split: validation}"))


def indexed(folder, numbers):
    """Give a saved folder an index, as `datasets` 1.2 wrote one of a selection."""
    import pyarrow

    with pyarrow.ipc.new_stream(folder / "indices.arrow", pyarrow.schema([("indices", pyarrow.uint64())])) as stream:
        stream.write_table(pyarrow.table({"indices": pyarrow.array(numbers, pyarrow.uint64())}))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))


def test_rows_that_were_saved_through_an_index_are_read_in_its_order(source, saved, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved / "cache"))
    numbers = [29, 0, *range(0, 30, 3)] * 200  # more than one batch
    indexed(saved / "saved", numbers)

    first = texts(source("train: saved"))
    indexed(saved / "saved", [3, 1])
    second = texts(source("train: saved"))

    assert first == [f"row {number}" for number in numbers]
    assert second == ["row 3", "row 1"]


@pytest.mark.parametrize("damage", ["range", "cut", "gone"])
def test_an_index_that_is_none_is_refused(damage, source, saved, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(saved / "cache"))
    indexed(saved / "saved", [1, 30 if damage == "range" else 2])
    if damage == "cut":
        (saved / "saved/indices.arrow").write_bytes(b"x" * 40)
    elif damage == "gone":
        (saved / "saved/indices.arrow").unlink()

    with pytest.raises(JobError, match=r"[sS]ave the data set again"):
        texts(source("train: saved"))

    assert not list((saved / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        '{"_data_files": 3}',
        '{"_data_files": [{"filename": "../x"}]}',
        '{"_data_files": [{"filename": "x"}]}',
    ],
)
def test_a_damaged_saved_data_set_is_refused(source, saved, state):
    (saved / "saved" / "state.json").write_text(state)

    with pytest.raises(JobError, match=r"state\.json"):
        texts(source("train: saved"))
