"""Banks from anybody: what is wrong in them is told in a sentence, stops nothing else and reaches nothing outside."""

import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from clusters.safe.reading import BadInput
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Adapter, Unusable
from strategies.adapter_bank.card import CARD, BankError, Card, card_of
from strategies.adapter_bank.evidence import Evidence, gather
from strategies.adapter_bank.exchange import export, import_
from strategies.adapter_bank.folders import EVIDENCE
from strategies.adapter_bank.store import Bank
from strategies.model.tensor_file import read_header
from tests.adapters import write_adapter

ROOT = Path(__file__).resolve().parents[2]
MAP = "model.layers.0.self_attn.q_proj"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def an_adapter(folder, seed=0, settings=SETTINGS):
    draw = numpy.random.default_rng(seed)
    folder.mkdir(parents=True)
    sides = {"A": (2, 8), "B": (6, 2)}
    tensors = {f"base_model.model.{MAP}.lora_{s}.weight": draw.random(n, numpy.float32) for s, n in sides.items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


def some_evidence():
    rows = [(numpy.arange(9, dtype=numpy.int32), numpy.arange(9) > 5)] * 4
    return gather(rows, numpy.ones((20, 4), numpy.float32))


@pytest.fixture
def bank(tmp_path):
    there = Bank(tmp_path / "bank", create=True)
    for number in range(2):
        source = an_adapter(tmp_path / f"source-{number}", number)
        there.add(source, Card(f"task-{number}", "tiny", "b" * 64), some_evidence())
    return there


def lies(bank, **fields):
    """Write fields into the first adapter's card as another program might; its folder."""
    folder = bank.folder(bank.find("task-0").digest)
    values = json.loads((folder / CARD).read_text()) | fields
    (folder / CARD).write_text(json.dumps(values))
    return folder


# Nothing outside the bank goes.


@pytest.fixture
def precious(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    return folder


@pytest.mark.parametrize(
    "digest", ["..", "../../precious", "{precious}", "", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "/"]
)
def test_a_digest_that_is_a_path_removes_nothing(bank, precious, digest):
    folder = lies(bank, digest=digest.format(precious=precious))

    (damaged,) = bank.contents().damaged
    bank.remove(damaged)

    assert (precious / "thesis.txt").exists() and not folder.exists()
    assert [card.name for card in bank.cards()] == ["task-1"]
    with pytest.raises(BankError, match="is no digest"):
        bank.folder(digest.format(precious=precious))


def test_a_card_of_another_adapter_is_not_believed(bank):
    other = bank.find("task-1").digest
    lies(bank, digest=other)

    (damaged,) = bank.contents().damaged

    assert "its card is that of another adapter" in damaged.reason
    bank.remove(damaged)
    assert bank.adapter(bank.find("task-1"))


@pytest.mark.parametrize("what", ["adapter", "file", "shard"])
def test_of_a_link_the_link_alone_is_removed(bank, precious, what):
    folder = bank.folder(bank.find("task-0").digest)
    moved = precious / "moved"
    if what == "adapter":
        folder.rename(moved)
        folder.symlink_to(moved)
    elif what == "shard":
        folder.parent.rename(moved)
        folder.parent.symlink_to(moved)
    else:
        (folder / WEIGHTS).rename(moved)
        (folder / WEIGHTS).symlink_to(moved)

    (damaged,) = bank.contents().damaged
    bank.remove(damaged)

    assert "link" in damaged.reason or "named by its digest" in damaged.reason
    assert moved.exists() and (precious / "thesis.txt").exists()
    assert not os.path.lexists(damaged.path) and bank.verify() == []


def test_what_is_put_aside_or_cleared_away_is_never_followed(bank, precious):
    (bank.path / "objects" / "zz").symlink_to(precious)
    (bank.path / "objects" / ".under-way-new-1").symlink_to(precious)
    (bank.path / "objects" / ".under-way-import-2").mkdir()

    assert len(bank.verify(repair=True)) == 1

    assert (precious / "thesis.txt").exists() and bank.verify() == []
    assert not list((bank.path / "objects").glob(".*"))


def test_a_bank_whose_objects_are_a_link_is_refused(bank, precious):
    (bank.path / "objects").rename(precious / "objects")
    (bank.path / "objects").symlink_to(precious / "objects")

    with pytest.raises(BankError, match="is a link"):
        Bank(bank.path)


@pytest.mark.parametrize("kind", ["file", "fifo", "objects-file", "objects-fifo", "nul", "loop"])
def test_a_path_that_is_no_bank_is_told(tmp_path, kind):
    path = tmp_path / "odd"
    place = path / "objects" if "objects" in kind else path
    place.parent.mkdir(exist_ok=True)
    if "fifo" in kind:
        os.mkfifo(place)
    elif kind == "loop":
        place.symlink_to(place)
    elif "file" in kind:
        place.write_text("x")

    with pytest.raises(BankError):
        Bank(Path("a\0b") if kind == "nul" else path, create=True)


# One damaged adapter stops no other.


def break_it(folder, how):
    target = folder / {"weights": WEIGHTS, "config": CONFIG, "evidence": EVIDENCE}.get(how.partition("-")[0], CARD)
    what = how.partition("-")[2]
    if what == "gone":
        target.unlink()
    elif what == "fifo":
        target.unlink()
        os.mkfifo(target)
    elif what == "folder":
        target.unlink()
        target.mkdir()
    elif what == "empty":
        target.write_bytes(b"")
    elif what == "half":
        target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    elif what == "bytes":
        target.write_bytes(b"\xff\xfe\x00" * 50)
    elif what == "deep":
        target.write_text("[" * 100_000)
    elif what == "list":
        target.write_text("[1]")


BREAKS = [
    f"{file}-{what}"
    for file in ("card", "config", "weights", "evidence")
    for what in ("gone", "fifo", "folder", "empty", "half", "bytes", "deep", "list")
]


@pytest.mark.parametrize("how", BREAKS)
def test_a_damaged_adapter_is_named_and_the_other_one_stays_of_use(bank, tmp_path, how):
    break_it(bank.folder(bank.find("task-0").digest), how)
    an_adapter(tmp_path / "new", 9)

    contents = bank.contents()
    (wrong,) = bank.verify()
    exported = export(bank, tmp_path / "out.tar", contents.cards)
    bank.add(tmp_path / "new", Card("new", "tiny", "b" * 64))

    assert wrong.reason and len(contents.damaged) == (1 if how.startswith("card") else 0)
    assert [card.name for card in exported.cards] == ["task-1"]
    assert bank.adapter(bank.find("task-1")).corrections()
    assert len(bank.verify(repair=True)) == 1 and bank.verify() == []
    assert [card.name for card in bank.cards()] == ["task-1", "new"]
    assert bank.add(tmp_path / "source-0", Card("task-0", "tiny", "b" * 64)) and bank.verify() == []


@pytest.mark.parametrize("how", ["weights-half", "evidence-half", "card-half"])
def test_adding_what_is_damaged_again_makes_it_whole(bank, tmp_path, how):
    break_it(bank.folder(bank.find("task-0").digest), how)

    card = bank.add(tmp_path / "source-0", Card("task-0", "tiny", "b" * 64))

    assert (bank.evidence(card) is not None) == (how == "weights-half")
    assert bank.verify() == [] and len(list((bank.path / "broken").iterdir())) == 1


def test_other_evidence_takes_the_place_of_the_former(bank, tmp_path, monkeypatch):
    from strategies.adapter_bank import store

    card, other = bank.find("task-0"), gather([(numpy.arange(3), numpy.arange(3) > 1)], numpy.ones((20, 4), "f4"))
    again = bank.add(tmp_path / "source-0", Card("task-0", "tiny", "b" * 64), other)
    assert bank.evidence(again).digest == other.digest != card.evidence_digest and bank.verify() == []

    for renames in range(5):  # that are done before the writer is killed: four are needed
        bank.add(tmp_path / "source-0", Card("task-0", "tiny", "b" * 64), other)
        left = iter(range(renames))

        def replace(*paths, left=left):
            if next(left, None) is None:
                raise SystemExit
            os.rename(*paths)

        monkeypatch.setattr(store.os, "replace", replace)
        with pytest.raises(SystemExit) if renames < 4 else nullcontext():
            bank.add(tmp_path / "source-0", Card("task-0", "tiny", "b" * 64), some_evidence())
        monkeypatch.undo()
        assert bank.verify() == [] and bank.find("task-0").digest == card.digest


def test_two_adapters_of_one_name_are_both_known(bank, tmp_path):
    lies(bank, name="task-1")

    (damaged,) = bank.contents().damaged

    assert "is called task-1 too" in damaged.reason and len(bank.cards()) == 1
    bank.remove(bank.find_all(damaged.path.name[:12]))
    assert len(bank.cards()) == 1 and bank.contents().damaged == []


def test_fields_of_another_version_are_kept(bank, tmp_path):
    lies(bank, colour="blue", unknown="also one")

    card = bank.add(tmp_path / "source-0", Card("task-0", "tiny", "b" * 64, licence="MIT"))

    assert card.unknown == {"colour": "blue", "unknown": "also one"}
    assert json.loads((bank.folder(card.digest) / CARD).read_text())["colour"] == "blue"


def test_things_that_are_no_adapters_are_told_and_hidden_ones_passed_over(bank):
    (bank.path / "objects" / ".DS_Store").write_text("x")
    (bank.path / "objects" / "ab").mkdir(exist_ok=True)
    (bank.path / "objects" / "ab" / "notes").mkdir()
    (bank.path / "objects" / "README").write_text("x")
    (bank.path / "objects" / "cd").mkdir()
    (bank.path / "objects" / "cd" / ("ab" + "0" * 62)).mkdir()
    (bank.path / "index.sqlite").mkdir()  # of an older version, or anything

    assert len(bank.contents().damaged) == 3 and len(bank.cards()) == 2
    assert len(bank.verify(repair=True)) == 3 and bank.verify() == [] and len(bank.cards()) == 2


# Cards, configurations and headers of any kind.


STRANGE = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x"),
    *(
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "[/red]",
        "[bold]x",
        "\x1b[31m",
        "\u202e",
        "x" * 5000,
        "(a+)+$",
        "(",
        "*",
    ),
    *([], {}, [[]], [None], ["x"], [1, "x"], {"x": 1}, {"": None}, [[1]] * 50, {"eval_loss": "low"}, {"after": 3}),
    *({"after": {"eval_loss": None}}, {"(a|a)+$": 3}, {".*": float("nan")}, {"q_proj": "x"}, {"q_proj": -3}, [0], [-1]),
]


def mutated(draw, values):
    """Some fields strange, gone, doubled or renamed; or not an object at all."""
    values = dict(values)
    for _ in range(draw.choice([1, 1, 2, 5])):
        key = draw.choice(list(values) or ["x"])
        action = draw.random()
        if action < 0.75:
            values[key] = draw.choice(STRANGE)
        elif action < 0.85:
            values.pop(key, None)
        else:
            values[draw.choice(["use_dora", "bias", "modules_to_save", "new", "x" * 300])] = draw.choice(STRANGE)
    text = json.dumps(values)
    if draw.random() < 0.1:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(["{", "}", '"', "\\", "NaN", "\ud83d", "1e999", ""]) + text[place + 1 :]
    return text.encode("utf-8", "surrogatepass")


def test_no_card_ends_in_a_traceback(bank):
    folder = bank.folder(bank.find("task-0").digest)
    sound = json.loads((folder / CARD).read_text())
    draw, shown = random.Random(1), 0

    for _ in range(400):
        (folder / CARD).write_bytes(mutated(draw, sound))
        contents = bank.contents()
        assert len(contents.cards) + len(contents.damaged) == 2
        for card in contents.cards:
            shown += len(card.losses_told) > 0
            json.dumps(card.as_dict())
        assert all("\x1b" not in str(one) and "\n" not in str(one) for one in contents.damaged)
        try:
            bank.find("task-0")
        except BankError:
            continue


def test_no_configuration_ends_in_a_traceback(tmp_path):
    folder = an_adapter(tmp_path / "one")
    full = {**SETTINGS, "bias": "none", "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False}
    full |= {"base_model_name_or_path": "tiny", "init_lora_weights": True, "modules_to_save": None}
    draw, refused = random.Random(2), 0

    for _ in range(700):
        (folder / CONFIG).write_bytes(mutated(draw, full))
        try:
            adapter = Adapter(folder)
            assert all(numpy.isfinite(target.scale) for target in adapter.targets.values())
            assert isinstance(adapter.base_name, str) and adapter.ranks == [2] and adapter.num_parameters == 28
        except Unusable:
            refused += 1

    assert 100 < refused < 700


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern", "target_modules"])
@pytest.mark.parametrize("pattern", ["(.|.)*[^j]", "(", "*", "(?P<a>.)(?P<a>.)", "(" * 5000, "(?:x)" * 300])
def test_a_pattern_that_never_ends_or_compiles_is_refused_in_time(tmp_path, field, pattern):
    value = pattern if field == "target_modules" else {pattern: 3}
    folder = an_adapter(tmp_path / "one", settings={**SETTINGS, field: value})
    began = time.process_time()

    with pytest.raises(Unusable, match="pattern"):
        Adapter(folder)

    assert time.process_time() - began < 10


@pytest.mark.parametrize("pattern", ["(a|a|_|.)*$X", "((.*)*)*Y", "x" * 2000])
def test_a_pattern_that_fits_nothing_is_passed_over_in_time(tmp_path, pattern):
    began = time.process_time()

    adapter = Adapter(an_adapter(tmp_path / "one", settings={**SETTINGS, "alpha_pattern": {pattern: 3}}))

    assert adapter.targets[MAP].scale == 2 and time.process_time() - began < 10


def test_patterns_mean_what_they_mean_to_peft(tmp_path):
    settings = {**SETTINGS, "alpha_pattern": {r".*\.k_proj": 1, r"^model\.layers\.[0-3]\..*q_proj": 32}}

    adapter = Adapter(an_adapter(tmp_path / "one", settings=settings))

    assert adapter.targets[MAP].scale == 16
    assert Adapter(an_adapter(tmp_path / "two", settings={"peft_type": "LORA", "r": 2})).targets[MAP].scale == 4


def rewritten(file, change):
    """A safetensors file with another header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    told = change(header)
    header = told if isinstance(told, bytes) else json.dumps(header if told is None else told).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def first(header):
    return next(value for key, value in header.items() if key != "__metadata__")


HEADERS = {
    "list": lambda header: [1],
    "no JSON": lambda header: b"{",
    "deep": lambda header: b"[" * 100_000,
    "no UTF-8": lambda header: b"\xff" * 100,
    "entry a list": lambda header: {**header, "x": []},
    "no shape": lambda header: first(header).pop("shape") and None,
    "no offsets": lambda header: first(header).pop("data_offsets") and None,
    "shape a text": lambda header: first(header).update(shape="2,8"),
    "shape of floats": lambda header: first(header).update(shape=[2.0, 8]),
    "shape negative": lambda header: first(header).update(shape=[-2, -8]),
    "shape huge": lambda header: first(header).update(shape=[2**62, 2**62]),
    "shape of 100": lambda header: first(header).update(shape=[1] * 100),
    "rank 0": lambda header: first(header).update(shape=[0, 8], data_offsets=[0, 0]),
    "type a number": lambda header: first(header).update(dtype=4),
    "type unknown": lambda header: first(header).update(dtype="F33"),
    "type of integers": lambda header: first(header).update(dtype="I32"),
    "offsets beyond": lambda header: first(header).update(data_offsets=[10**9, 10**9 + 64]),
    "offsets backwards": lambda header: first(header).update(data_offsets=[64, 0]),
    "offsets negative": lambda header: first(header).update(data_offsets=[-64, 0]),
    "offsets three": lambda header: first(header).update(data_offsets=[0, 64, 128]),
    "overlap": lambda header: {key: {**first(header)} for key in header},
    "empty": lambda header: {},
    "other names": lambda header: {f"x{key}": value for key, value in header.items()},
    "a path": lambda header: {key.replace(MAP, "../../x"): value for key, value in header.items()},
    "a terminal's code": lambda header: {key.replace(MAP, "\x1b[2J"): value for key, value in header.items()},
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, change):
    folder = an_adapter(tmp_path / "one")
    rewritten(folder / WEIGHTS, HEADERS[change])

    with pytest.raises(Unusable) as told:
        Adapter(folder)

    assert "\x1b" not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**62, 2**64 - 1])
def test_a_header_of_a_length_that_cannot_be_is_refused(tmp_path, length):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")

    with pytest.raises(BadInput):
        read_header(file)


def test_any_byte_of_a_header_may_be_wrong(tmp_path):
    folder, draw, refused = an_adapter(tmp_path / "one"), random.Random(3), 0
    sound = (folder / WEIGHTS).read_bytes()

    for _ in range(400):
        content = bytearray(sound)
        for _ in range(draw.choice([1, 2, 8])):
            content[draw.randrange(300)] = draw.randrange(256)
        (folder / WEIGHTS).write_bytes(content[: draw.choice([len(content)] * 4 + [draw.randrange(len(content))])])
        try:
            Adapter(folder)
        except Unusable:
            refused += 1

    assert refused > 200


def test_an_adapter_of_usual_size_is_read_and_its_damage_is_refused(tmp_path):
    folder, draw = write_adapter(tmp_path / "sound", "HuggingFaceTB/SmolLM-135M"), random.Random(6)
    adapter = Adapter(folder)
    assert len(adapter.targets) == 60 and adapter.ranks == [16]
    assert {target.scale for target in adapter.targets.values()} == {2.0}
    weights, config = (folder / WEIGHTS).read_bytes(), json.loads((folder / CONFIG).read_text())

    for turn in range(40):
        content, settings = bytearray(weights), json.dumps(config).encode()
        if turn % 2:
            content[draw.randrange(8)] ^= 1 << draw.randrange(8)
        else:
            content, settings = content[: draw.randrange(len(weights))], mutated(draw, config)
        (folder / WEIGHTS).write_bytes(content)
        (folder / CONFIG).write_bytes(settings)

        with pytest.raises(Unusable):
            Adapter(folder)


def test_a_pickle_is_refused_with_the_way_out(tmp_path):
    folder = an_adapter(tmp_path / "one")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")

    with pytest.raises(Unusable, match=r"adapter_model\.bin, a pickle that runs code.*save_pretrained writes"):
        Adapter(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_ids": numpy.array([5, 99], numpy.int32)},
        {"tokens_ids": numpy.array([-1, 5], numpy.int32)},
        {"tokens_ids": numpy.array([5, 5], numpy.int32)},
        {"tokens_counts": numpy.array([1, numpy.nan], numpy.float32)},
        {"tokens_counts": numpy.array([1], numpy.float32)},
        {"answers_ids": numpy.zeros((2, 2), numpy.int32)},
        {"sketch": numpy.full((2, 4), numpy.inf, numpy.float16)},
        {"sketch": numpy.zeros((0, 4), numpy.float16)},
        {"sketch": numpy.zeros(4, numpy.float16)},
        {"sizes": numpy.array([10**15, 3])},
        {"sizes": numpy.array([0, 3])},
        {"sizes": numpy.array([20])},
        {"sizes": numpy.array([20.0, 3.0])},
        {"sizes": None},
    ],
)
def test_evidence_that_cannot_be_is_refused(change):
    arrays = {"tokens_ids": numpy.array([1, 5], numpy.int32), "tokens_counts": numpy.ones(2, numpy.float32)}
    arrays |= {"answers_ids": numpy.array([5], numpy.int32), "answers_counts": numpy.ones(1, numpy.float32)}
    arrays |= {"sketch": numpy.zeros((2, 4), numpy.float16), "sizes": numpy.array([20, 3])}
    assert Evidence.from_arrays(arrays).vocabulary == 20

    with pytest.raises(ValueError):
        Evidence.from_arrays({key: value for key, value in (arrays | change).items() if value is not None})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "x" * 64, "a\nb", "a\0b", "a b", "\ud800", "語" * 64])
def test_names_follow_the_pattern(bank, tmp_path, name):
    an_adapter(tmp_path / "new", 9)

    with pytest.raises(BankError, match="a name has 1 to 63"):
        bank.add(tmp_path / "new", Card(name, "tiny", "b" * 64))
    assert len(bank.cards()) == 2


def test_letters_of_every_script_are_names(bank, tmp_path):
    an_adapter(tmp_path / "new", 9)

    bank.add(tmp_path / "new", Card("要約_v1.2-é", "tiny", "b" * 64))

    assert bank.find("要約_v1.2-é") == bank.cards()[-1]


def test_a_digest_is_asked_for_by_its_digits_alone(bank):
    for which in ("______", "%%%%%%", "../../..", "*" * 8, "\0" * 8, "\ud800" * 8, "x" * 10_000):
        with pytest.raises(BankError, match="has no adapter"):
            bank.find(which)


@pytest.mark.parametrize("run_id", ["../x", "/etc", ".", "..", "", "a\0b", ".hidden", "x" * 300])
def test_a_run_of_a_card_names_a_folder_and_no_path(run_id):
    with pytest.raises(BankError, match="run_id"):
        card_of(Card("x", "tiny", "b" * 64, digest="a" * 64, run_id=run_id).as_dict())


# Archives.


def a_tar(file, entries, mode="w"):
    with tarfile.open(file, mode) as made:
        for name, kind, content, link in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.linkname = kind, len(content), link
            made.addfile(entry, io.BytesIO(content))


D = "a" * 64


@pytest.mark.parametrize(
    "entry",
    [
        ("../out", tarfile.REGTYPE, b"x", ""),
        ("/tmp/out-of-the-bank", tarfile.REGTYPE, b"x", ""),
        (f"{D}/../../out", tarfile.REGTYPE, b"x", ""),
        (f"{D}/{CARD}", tarfile.SYMTYPE, b"", "/etc/passwd"),
        (f"{D}/{CARD}", tarfile.LNKTYPE, b"", "../../x"),
        (D, tarfile.SYMTYPE, b"", "/tmp"),
        (f"{D}/{CARD}", tarfile.CHRTYPE, b"", ""),
        (f"{D}/{CARD}", tarfile.FIFOTYPE, b"", ""),
        (f"{D}/other.py", tarfile.REGTYPE, b"x", ""),
        (f"{D[1:]}/{CARD}", tarfile.REGTYPE, b"x", ""),
        (f"{D}/sub/{CARD}", tarfile.REGTYPE, b"x", ""),
        (f"{D}/{CARD}", tarfile.GNUTYPE_SPARSE, b"x", ""),
    ],
)
def test_an_archive_with_one_wrong_entry_brings_nothing_in(bank, tmp_path, entry):
    good = bank.cards()[0]
    parts = [
        (f"{good.digest}/{n}", tarfile.REGTYPE, (bank.folder(good.digest) / n).read_bytes(), "") for n in (CONFIG, CARD)
    ]
    a_tar(tmp_path / "bad.tar", [*parts, entry])
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(BankError, match="is no export of a bank"):
        import_(Bank(tmp_path / "other", create=True), tmp_path / "bad.tar")

    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_adapter_of_an_archive_is_named_and_the_others_come_in(bank, tmp_path):
    first_one, second = bank.cards()
    (bank.folder(first_one.digest) / CARD).write_text("{}")
    with tarfile.open(tmp_path / "mixed.tar", "w") as made:
        for card in (first_one, second):
            made.add(bank.folder(card.digest), card.digest)

    done = import_(Bank(tmp_path / "other", create=True), tmp_path / "mixed.tar")

    assert [card.name for card in done.cards] == ["task-1"] and len(done.refused) == 1
    assert first_one.digest[:12] in str(done.refused[0]) and Bank(tmp_path / "other").verify() == []


def test_archives_that_are_cut_flipped_or_none_are_refused_or_named(bank, tmp_path):
    export(bank, tmp_path / "all.tar", bank.cards())
    sound, draw = (tmp_path / "all.tar").read_bytes(), random.Random(4)
    other = Bank(tmp_path / "other", create=True)

    for number in range(150):
        content = bytearray(sound)
        for _ in range(draw.choice([1, 4])):
            content[draw.randrange(min(len(content), 6000))] = draw.randrange(256)
        (tmp_path / "x.tar").write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        try:
            import_(other, tmp_path / "x.tar")
        except BankError as error:
            assert "is no export of a bank" in str(error), number

    for odd in ("fifo", "folder"):
        os.mkfifo(tmp_path / odd) if odd == "fifo" else (tmp_path / odd).mkdir()
        with pytest.raises(BankError, match="is no export"):
            import_(other, tmp_path / odd)
    assert (tmp_path / "other" / "objects").exists() is False or other.verify() == []


def test_a_bomb_is_refused(tmp_path):
    entry = tarfile.TarInfo(f"{D}/{CARD}")
    entry.size = 2**40
    (tmp_path / "bomb.tar").write_bytes(entry.tobuf(tarfile.PAX_FORMAT) + bytes(10_240))
    a_tar(tmp_path / "zip.tar", [(f"{D}/{CARD}", tarfile.REGTYPE, bytes(2**20), "")], "w:gz")

    for name, said in (("bomb.tar", "holds more than"), ("zip.tar", "is compressed")):
        with pytest.raises(BankError, match=said):
            import_(Bank(tmp_path / "bank", create=True), tmp_path / name)
    assert not (tmp_path / "bank").exists()


# Writers that are killed.

WRITER = """
import json, sys
from pathlib import Path
from strategies.adapter_bank.card import Card
from strategies.adapter_bank.exchange import import_
from strategies.adapter_bank import store
work, turn = Path(sys.argv[1]), int(sys.argv[2])
store.Adapter.corrections = lambda self: {}  # of numbers that the test made: loading torch takes longer than all else
bank = store.Bank(work / "bank", create=True)
print("ready", flush=True)
while True:
    name = f"s{turn % 4}"
    known = {card.name: card for card in bank.cards()}
    if name in known:
        bank.remove(known[name])
    else:
        bank.add(work / name, Card(name, "tiny", "b" * 64))
    if turn % 3 == 0:
        import_(bank, work / "two.tar")
    turn += 1
"""


def killed_at_random(tmp_path, times):
    draw = random.Random(5)
    for number in range(4):
        an_adapter(tmp_path / f"s{number}", number)
    other = Bank(tmp_path / "two", create=True)
    for number in (8, 9):
        other.add(an_adapter(tmp_path / f"o{number}", number), Card(f"o{number}", "tiny", "b" * 64))
    export(other, tmp_path / "two.tar", other.cards())
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    for turn in range(times):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(turn)], stdout=subprocess.PIPE, env=env)
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.3))
        for writer in writers:
            assert writer.poll() is None, "a writer ended by itself"
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()

        bank = Bank(tmp_path / "bank", create=True)
        assert bank.verify() == [] and bank.contents().damaged == []
        assert {card.name for card in bank.cards()} <= {"s0", "s1", "s2", "s3", "o8", "o9"}
    bank.add(tmp_path / "s0", Card("s0", "tiny", "b" * 64))
    assert not list((bank.path / "objects").glob(".*"))


def test_writers_that_are_killed_leave_a_bank_that_works(tmp_path):
    killed_at_random(tmp_path, 3)


@pytest.mark.slow
def test_writers_that_are_killed_a_hundred_times_leave_a_bank_that_works(tmp_path):
    killed_at_random(tmp_path, 100)


def test_who_holds_the_bank_is_waited_for_and_then_told(bank, monkeypatch):
    from strategies.adapter_bank import store

    monkeypatch.setattr(store, "_BUSY_S", 0.2)

    with bank.writing(), pytest.raises(BankError, match="another process has been writing"):
        Bank(bank.path).remove(bank.cards()[0])


def test_a_lock_that_is_a_link_or_a_folder_is_told(bank, precious):
    (bank.path / ".lock").unlink()
    (bank.path / ".lock").symlink_to(precious / "thesis.txt")
    with pytest.raises(BankError, match="cannot be opened"):
        bank.remove(bank.cards()[0])
    (bank.path / ".lock").unlink()
    (bank.path / ".lock").mkdir()
    with pytest.raises(BankError, match="cannot be opened"):
        bank.remove(bank.cards()[0])


def test_an_adapter_whose_bytes_changed_is_not_used(bank):
    card = bank.find("task-0")
    file = bank.folder(card.digest) / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    with pytest.raises(BankError, match="task-0: its bytes are not those that were added"):
        bank.adapter(card)
