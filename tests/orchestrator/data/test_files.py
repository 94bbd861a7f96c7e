import gzip
import io
import json
import math
import os
import struct
import subprocess
import sys
import time

import pytest

from orchestrator.data.readers.files import ReadOptions, read_rows
from orchestrator.errors import JobError

ITEMS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
CSV = "prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(3))


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reasons(file):
    return [str(row.broken) for row in read_rows(file) if row.broken]


def parquet(path, columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(columns, path)
    return path


def arrow(items, stream):
    import pyarrow

    table = pyarrow.Table.from_pylist(items)
    out = io.BytesIO()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def parquet_bytes(items):
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), out)
    return out.getvalue()


LINES = "\n".join(map(json.dumps, ITEMS))
CONTENTS = {
    "a.jsonl": lambda: LINES + "\n\n",
    "bom.jsonl": lambda: "\ufeff" + LINES,
    "list.jsonl": lambda: json.dumps(ITEMS, indent=2),
    "a.JSONL": lambda: LINES.replace("\n", "\r\n"),
    "a.ndjson": lambda: LINES,
    "a.jsonl.gz": lambda: gzip.compress(LINES.encode()),
    "gz-by-content.jsonl": lambda: gzip.compress(LINES.encode()),
    "b.json": lambda: json.dumps(ITEMS),
    "lines.json": lambda: LINES,
    "pretty.json": lambda: "\n".join(json.dumps(item, indent=1) for item in ITEMS),
    "b.json.gz": lambda: gzip.compress(json.dumps(ITEMS, indent=1).encode()),
    "c.csv": lambda: CSV,
    "bom.csv": lambda: "\ufeff" + CSV.replace("\n", "\r\n"),
    "mac.csv": lambda: CSV.replace("\n", "\r"),
    "c.csv.gz": lambda: gzip.compress(CSV.encode()),
    "c.tsv": lambda: CSV.replace(",", "\t"),
    "d.parquet": lambda: parquet_bytes(ITEMS),
    "stream.arrow": lambda: arrow(ITEMS, True),
    "file.arrow": lambda: arrow(ITEMS, False),
    "0f3a": lambda: LINES,
    "1f3a": lambda: json.dumps(ITEMS),
    "2f3a": lambda: CSV,
    "3f3a": lambda: parquet_bytes(ITEMS),
    "4f3a": lambda: arrow(ITEMS, True),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = list(read_rows(written(tmp_path / name, CONTENTS[name]())))

    assert [row.values for row in rows] == ITEMS
    assert not any(row.broken for row in rows)


def test_a_broken_line_is_named_with_its_number(tmp_path):
    file = written(
        tmp_path / "a.jsonl",
        b'{"text": "x"}\n\n{"text": \n[1]\n\xff\xfe\n{"text": "a", "text": "b"}\n' + b'{"text": "ok"}\n' * 9,
    )

    rows = list(read_rows(file))

    assert [row.line for row in rows][:6] == [1, 3, 4, 5, 6, 7]
    assert not rows[0].broken and not rows[-1].broken
    told = ("is not JSON: Expecting value", "is a list, not an object", "is not UTF-8 text", "'text' twice")
    for row, reason in zip(rows[1:5], told, strict=True):
        assert reason in str(row.broken)


def test_the_rows_of_a_json_list_are_told_by_their_lines(tmp_path):
    file = written(tmp_path / "a.json", json.dumps([{"text": "a\nb"}, 3, {"text": "\ud83d"}], indent=2))

    rows = list(read_rows(file))

    assert [row.line for row in rows] == [2, 5, 6]
    assert [bool(row.broken) for row in rows] == [False, True, True]


def test_a_json_file_larger_than_what_is_read_at_once_comes_whole(tmp_path):
    items = [{"text": "x" * (i % 1000), "number": i} for i in range(6000)]
    file = written(tmp_path / "a.json", json.dumps(items))

    assert [row.values for row in read_rows(file)] == items


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", None),
        ("[]", None),
        ("[{}", "the list has no end"),
        ('[{"text": "a"} {"text": "b"}]', "a comma is missing"),
        ('[{"text": "a"}] []', "text after the end"),
        ("[1,\n2,\nx]", ":3: is not JSON: Expecting value"),
        ("[" * 3000, "is not JSON"),
        ('{"data": [{"text": "a"}]}', "jq -c"),
        ('{"version": 1}', "holds one object"),
        ("plain text", "is not JSON"),
    ],
)
def test_json_that_is_no_list_of_objects_says_what_it_is(tmp_path, content, told):
    file = written(tmp_path / "a.json", content)

    if told is None:
        assert list(read_rows(file)) == []
    else:
        with pytest.raises(JobError, match=told):
            list(read_rows(file))


@pytest.mark.parametrize(
    "value",
    [
        '"nice \\ud83d"',
        '["\\udc00"]',
        '{"a": [{"b": "\\ud800"}]}',
        '{"\\ud800": 1}',
        '[{"role": "user", "content": "\\udfff"}]',
    ],
)
def test_half_a_surrogate_pair_anywhere_in_a_row_is_a_broken_row(tmp_path, value):
    file = written(tmp_path / "a.jsonl", f'{{"text": "ok", "more": {value}}}\n{{"text": "\\ud83d\\ude00"}}\n')

    rows = list(read_rows(file))

    assert "field 'more' holds half a surrogate pair" in str(rows[0].broken)
    assert not rows[1].broken and rows[1].values["text"] == "\U0001f600"


def test_deep_and_huge_values_are_broken_rows(tmp_path):
    deep = "[" * 200 + "]" * 200
    deeper = "[" * 200_000 + "]" * 200_000
    number = "9" * 5000
    file = written(tmp_path / "a.jsonl", "".join(f'{{"text": {value}}}\n' for value in (deep, deeper, number)))

    found = reasons(file)

    assert len(found) == 3
    assert "nested too deeply" in found[0] and "nested too deeply" in found[1] and "not JSON" in found[2]


def test_a_line_of_hundreds_of_megabytes_is_a_broken_row_and_takes_little_memory(tmp_path):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(300):
            stream.write(b"x" * 2**20)
        stream.write(b'"}\n{"text": "ok"}\n')
    code = (
        "import sys; from pathlib import Path; from orchestrator.data.readers.files import ReadOptions, read_rows\n"
        "rows = list(read_rows(Path(sys.argv[1])))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(len(rows), rows[0].broken, int(peak.split()[1]) // 1024)"
    )

    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)

    count, *reason, mib = done.stdout.split()
    assert count == "2" and "longer" in reason and int(mib) < 300


# --- csv


def test_a_cell_of_a_million_characters_is_read(tmp_path):
    file = written(tmp_path / "a.csv", f"prompt,completion\np,{'x' * 1_000_000}\n")

    assert [len(row.values["completion"]) for row in read_rows(file)] == [1_000_000]


def test_csv_rows_have_the_line_where_they_begin(tmp_path):
    file = written(tmp_path / "a.csv", 'prompt,completion\n"a\nb",c\n\nd,e\nf\ng,h,i\n"j"k,l\nm,n\n')

    rows = list(read_rows(file))

    assert [(row.line, bool(row.broken)) for row in rows] == [
        (2, False),
        (5, False),
        (6, True),
        (7, True),
        (8, True),
        (9, False),
    ]
    assert "has 1 cells, but the header has 2" in str(rows[2].broken)
    assert rows[2].broken.kind == rows[3].broken.kind


def test_line_separators_of_unicode_do_not_end_a_csv_row(tmp_path):
    file = written(tmp_path / "a.csv", "prompt,completion\na\u2028b\x0bc\x85,d\n")

    assert [row.values for row in read_rows(file)] == [{"prompt": "a\u2028b\x0bc\x85", "completion": "d"}]


def test_a_quote_that_is_never_closed_does_not_swallow_rows_in_silence(tmp_path):
    file = written(tmp_path / "a.csv", 'prompt,completion\na,b\nc,"d\ne,f\n')

    assert "never closed" in reasons(file)[0]


def test_empty_header_cells_get_names_and_repeated_ones_are_refused(tmp_path):
    file = written(tmp_path / "a.csv", ",prompt,completion,\n0,a,b,\n")

    assert [*next(read_rows(file)).values] == ["column 1 (no name)", "prompt", "completion", "column 4 (no name)"]
    with pytest.raises(JobError, match="'completion' twice"):
        list(read_rows(written(tmp_path / "b.csv", "prompt,completion,completion\na,b,c\n")))


@pytest.mark.parametrize(("separator", "told"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_another_separator_is_found_and_named(tmp_path, separator, told):
    file = written(tmp_path / "my data.csv", CSV.replace(",", separator))

    rows = list(read_rows(file))

    assert [row.values for row in rows] == ITEMS
    assert f"cells are separated by {told}" in rows[0].notes[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sep=;\r\nprompt;completion\r\na,b;c\r\n", {"prompt": "a,b", "completion": "c"}),
        ('"prompt";"completion"\n"a;b";"c, d"\n', {"prompt": "a;b", "completion": "c, d"}),
        ("Frage;Antwort\nWer, wo?;Ich, hier\n", {"Frage": "Wer, wo?", "Antwort": "Ich, hier"}),
        ("Question,Answer\na;b,c\n", {"Question": "a;b", "Answer": "c"}),
        ("id|問い|答え\n1|a|b\n", {"id": "1", "問い": "a", "答え": "b"}),
    ],
)
def test_the_separator_is_the_one_that_makes_columns(tmp_path, content, expected):
    rows = list(read_rows(written(tmp_path / "a.csv", content)))

    assert [row.values for row in rows] == [expected] and not rows[0].broken


def test_a_stated_separator_and_encoding_are_taken(tmp_path):
    file = written(tmp_path / "a.csv", "prompt#completion\nÅ#ä\n".encode("mac_roman"))

    (row,) = read_rows(file, ReadOptions(encoding="mac_roman", delimiter="#"))

    assert row.values == {"prompt": "Å", "completion": "ä"} and row.notes == ()
    for name in ("klingon", "hex", "zlib", "rot13", "idna", "punycode", "undefined", "a\0b"):
        with pytest.raises(JobError, match="no encoding that is known"):
            list(read_rows(file, ReadOptions(encoding=name)))
    with pytest.raises(JobError, match="no single character"):
        list(read_rows(file, ReadOptions(delimiter="ab")))
    with pytest.raises(JobError, match=r"is not shift_jis text at byte .* State another"):
        list(read_rows(written(tmp_path / "b.csv", b"prompt,completion\na,\xff\xff\n"), ReadOptions("shift_jis")))


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("auto", [("One\ntwo.", 1), ("Three.", 5)]),
        ("line", [("One", 1), ("two.", 2), ("Three.", 5)]),
        ("document", [("One\ntwo.\n\n\nThree.", 1)]),
    ],
)
def test_a_txt_file_is_paragraphs_lines_or_one_text(tmp_path, way, expected):
    file = written(tmp_path / "a.txt", "One\r\ntwo.\r\n\r\n\r\nThree.\r\n")

    rows = list(read_rows(file, ReadOptions(sample_by=way)))

    assert [(row.values["text"], row.line) for row in rows] == expected
    assert "of a txt file is a row" in rows[0].notes[0] and "CRLF" in rows[0].notes[0]


def test_a_txt_file_without_blank_lines_is_one_row_a_line(tmp_path):
    rows = list(read_rows(written(tmp_path / "a.txt", "one\ntwo\n")))

    assert [row.values["text"] for row in rows] == ["one", "two"]


@pytest.mark.parametrize("packing", ["bz2", "xz", "zst"])
def test_packed_texts_are_read_as_they_are(tmp_path, packing):
    import bz2
    import lzma

    import pyarrow

    pack = {
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda text: pyarrow.compress(text, codec="zstd", asbytes=True),
    }[packing]
    name = f"a.jsonl.{packing}"

    assert [row.values for row in read_rows(written(tmp_path / name, pack(LINES.encode())))] == ITEMS
    with pytest.raises(JobError, match="cannot be read"):
        list(read_rows(written(tmp_path / name, pack(LINES.encode() * 9)[:60])))


JAPANESE = "営業時間を教えてください。,はい、九時から五時です。\n支店の電話番号は？,代表番号です。\n"
FRENCH = "À quelle heure ouvrez-vous le café?,À neuf heures précises\n"


@pytest.mark.parametrize(
    ("codec", "text", "told"),
    [
        ("cp932", JAPANESE, "CP932"),
        ("cp932", "東京都千代田区丸之内一丁目,東京駅\n大阪市北区梅田三丁目,大阪駅\n", "CP932"),  # without kana
        ("euc_jp", JAPANESE, "EUC-JP"),
        ("iso2022_jp", JAPANESE, "ISO-2022-JP"),
        ("utf-16", JAPANESE, "UTF-16"),
        ("utf-16-le", JAPANESE, "UTF-16LE"),
        ("utf-16-be", JAPANESE, "UTF-16BE"),
        ("utf-32", JAPANESE, "UTF-32"),
        ("gb18030", "营业时间是几点？,从九点到五点，欢迎光临。\n", "GB18030"),
        ("big5", "營業時間是幾點？,從九點到五點，歡迎光臨。\n", "BIG5"),
        ("cp949", "영업 시간은 언제입니까?,아홉 시부터입니다.\n", "CP949"),
        ("cp1251", "Когда вы открыты?,С девяти до пяти.\n", "WINDOWS-1251"),
        ("cp1252", FRENCH, "WINDOWS-1252"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_another_encoding_is_read_and_named(tmp_path, codec, text, told, suffix):
    rows = [dict(zip(("prompt", "completion"), line.split(","), strict=True)) for line in text.splitlines()] * 3
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    contents = {
        "csv": "prompt,completion\n" + text * 3,
        "jsonl": "\n".join(lines) + "\n",
        "json": "[" + ",\n".join(lines) + "]\n",
    }
    file = written(tmp_path / f"my data.{suffix}", contents[suffix].encode(codec))

    found = list(read_rows(file))

    assert [row.values for row in found] == rows
    assert f"read as {told}" in found[0].notes[0]
    assert ("may be wrong" in found[0].notes[0]) == (codec == "cp1252")


@pytest.mark.parametrize(("codec", "read_as"), [("cp1252", "WINDOWS-1252"), ("utf-8", None)])
def test_a_few_accents_tell_the_encoding_of_a_western_file(tmp_path, codec, read_as):
    text = "Frage;Antwort\nWo ist die Küche?;Oben.\n" + "Wer?;Ich.\n" * 50

    rows = list(read_rows(written(tmp_path / "a.csv", text.encode(codec))))

    assert rows[0].values == {"Frage": "Wo ist die Küche?", "Antwort": "Oben."}
    assert ("read as" in rows[0].notes[0]) == (read_as is not None) and (read_as or "cells") in rows[0].notes[0]


def test_a_few_lines_in_another_encoding_are_broken_rows_of_one_kind(tmp_path):
    for name, start, line in (
        ("a.csv", b"prompt,completion\n", b"a,b\n"),
        ("a.jsonl", b"", b'{"prompt": "a", "completion": "b"}\n'),
    ):
        wrong, right = (line.replace(b"b", "caf\xe9".encode(codec)) for codec in ("latin-1", "utf-8"))
        file = written(tmp_path / name, start + line * 10 + right * 5 + wrong * 2)

        broken = [row.broken for row in read_rows(file) if row.broken]

        assert len(broken) == 2 and len({reason.kind for reason in broken}) == 1
        assert "is not UTF-8 text; it may be WINDOWS-1252" in str(broken[0])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.csv", b"PK\x03\x04" + bytes(range(40, 90)), "zip or Excel"),
        ("a.parquet", b"PAR1 and no more", "is not a parquet file"),
        ("a.parquet", b"", "is not a parquet file"),
        ("a.arrow", b"ARROW1 and no more", "is not an Arrow file"),
        ("a.arrow", b"nothing", "is not an Arrow file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:40], "cannot be read"),
        ("a.csv", b"prompt\xe9,completion\n" + "é,b\n".encode() * 9, "header is not UTF-8"),
        ("a", b"\x00\x01\x02", "is of no known kind"),
    ],
)
def test_files_that_are_not_what_their_name_says_are_refused(tmp_path, name, content, told):
    with pytest.raises(JobError, match=told):
        list(read_rows(written(tmp_path / name, content)))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")

    for file in (tmp_path / "a.jsonl", tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(JobError):
            list(read_rows(file))


# --- parquet and Arrow


def test_null_nan_empty_and_zero_stay_apart(tmp_path):
    import pyarrow

    table = pyarrow.table({"label": pyarrow.array([None, float("nan"), 0.0]), "text": [None, "", "0"]})
    rows = [row.values for row in read_rows(parquet(tmp_path / "a.parquet", table))]

    assert [row["text"] for row in rows] == [None, "", "0"]
    assert rows[0]["label"] is None and math.isnan(rows[1]["label"]) and rows[2]["label"] == 0


def test_values_that_python_has_no_type_for_are_read_as_unreadable(tmp_path):
    import pyarrow

    far = 2**62
    columns = {
        "date": pyarrow.array([far, 0], pyarrow.timestamp("s")),
        "duration": pyarrow.array([far, 0], pyarrow.duration("s")),
        "day": pyarrow.array([2**31 - 1, 0], pyarrow.date32()),
        "nanoseconds": pyarrow.array([1, 0], pyarrow.time64("ns")),
        "decimal": pyarrow.array([10**70, 0], pyarrow.decimal256(76, 0)),
        "bytes": pyarrow.array([b"\xff", b""], pyarrow.binary()),
        "big": pyarrow.array([2**64 - 1, 0], pyarrow.uint64()),
        "months": pyarrow.array([(1, 2, 3), None], pyarrow.month_day_nano_interval()),
        "text": ["a", "b"],
    }
    file = written(tmp_path / "a.arrow", arrow_table(pyarrow.table(columns)))

    rows = [row.values for row in read_rows(file)]

    assert [row["text"] for row in rows] == ["a", "b"]
    assert "timestamp" in rows[0]["date"].arrow_type
    assert rows[0]["decimal"] == 10**70 and rows[0]["big"] == 2**64 - 1


def strings(ends, content):
    import pyarrow

    ends = pyarrow.py_buffer(struct.pack(f"<{len(ends)}i", *ends))
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, ends, pyarrow.py_buffer(content)])


def test_texts_of_parquet_and_arrow_that_are_no_utf8_are_no_texts(tmp_path):
    import pyarrow

    table = pyarrow.table({"text": strings([0, 2, 3], b"\xff\xfea")})

    rows = list(read_rows(parquet(tmp_path / "a.parquet", table)))
    assert rows[0].values["text"].arrow_type == "string" and rows[1].values["text"] == "a"
    with pytest.raises(JobError, match="UTF8"):
        list(read_rows(written(tmp_path / "a.arrow", arrow_table(table))))


def test_an_arrow_file_that_points_past_its_end_is_refused(tmp_path):
    import pyarrow

    content = arrow_table(pyarrow.table({"text": strings([0, 1, 3], b"abc")}))
    damaged = content.replace(struct.pack("<3i", 0, 1, 3), struct.pack("<3i", 0, 2**30, 3))

    assert damaged != content
    with pytest.raises(JobError, match="is not an Arrow file"):
        list(read_rows(written(tmp_path / "a.arrow", damaged)))


def arrow_table(table):
    import pyarrow

    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def test_fields_that_other_turns_have_are_not_fields_of_a_turn(tmp_path):
    import pyarrow

    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}]
    file = parquet(tmp_path / "a.parquet", pyarrow.Table.from_pylist([{"messages": turns}]))

    assert next(read_rows(file)).values == {"messages": turns}


def test_hub_data_sets_are_read_as_parquet_is(tmp_path):
    from orchestrator.data.readers.columnar import HubData, read_hub_rows

    written(tmp_path / "data" / "train.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": 0}\n')

    rows = list(read_hub_rows(HubData(str(tmp_path / "data"))))

    assert [row.values for row in rows] == [{"text": "a", "label": None}, {"text": "b", "label": 0}]
    with pytest.raises(JobError, match="neither a local file"):
        list(read_hub_rows(HubData(str(tmp_path / "none"))))


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch):
    import datasets
    from huggingface_hub import constants

    from orchestrator.data.readers.columnar import HubData, read_hub_rows

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()

    with pytest.raises(JobError, match=r"neither a local file nor .*127\.0\.0\.1 cannot be reached"):
        list(read_hub_rows(HubData("someone/rows")))

    assert time.monotonic() - began < 30
    assert not constants.HF_HUB_OFFLINE
