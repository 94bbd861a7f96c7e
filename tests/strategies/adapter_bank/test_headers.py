"""Headers of weight files that lie are refused."""

import json
import random
import struct

import pytest

from clusters.safe.reading import BadInput
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS, Adapter, Unusable
from strategies.model.tensor_file import read_header
from tests.adapters import write_adapter
from tests.strategies.adapter_bank.parts import MAP, an_adapter, mutated


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
