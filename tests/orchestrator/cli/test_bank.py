"""The verbs of a bank in which one adapter is damaged: what they print, leave and return."""

import json
import sys

import numpy
import pytest
from safetensors.numpy import save_file

from orchestrator.cli import app
from strategies.adapter_bank.adapter import CONFIG, WEIGHTS
from strategies.adapter_bank.card import CARD, AdapterCard
from strategies.adapter_bank.store import Bank


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with `bank`, of whose two adapters `bad` has a card that is no JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    bank = Bank(tmp_path / "bank", create=True)
    for number, name in enumerate(("good", "bad")):
        source = tmp_path / f"source-{number}"
        source.mkdir()
        draw = numpy.random.default_rng(number)
        sides = {"A": (2, 8), "B": (6, 2)}
        tensors = {f"base_model.model.q_proj.lora_{s}.weight": draw.random(n, numpy.float32) for s, n in sides.items()}
        save_file(tensors, source / WEIGHTS)
        (source / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        bank.add(source, AdapterCard(name, "tiny [/red]", "b" * 64))
    (bank.folder(bank.find("bad").digest) / CARD).write_text("{")
    return tmp_path


@pytest.fixture
def verb(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["orchestrator", "bank", *arguments, "--bank", "bank"])
        try:
            app.main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        return code, capsys.readouterr()

    return call


def damaged_digest(folder):
    (one,) = Bank(folder / "bank").contents().damaged
    return one.path.name


def test_list_shows_the_damaged_beside_the_others_and_counts_them_last(folder, verb):
    code, shown = verb("list")

    assert code == 0 and "good" in shown.out and "tiny [/red]" in shown.out
    first, last = shown.err.strip().splitlines()
    assert first.startswith(f"damaged: {damaged_digest(folder)[:12]}: ") and "is not JSON" in first
    assert last.startswith("1 adapters, 1 damaged: `orchestrator bank verify --repair`")


def test_list_for_machines_has_both(folder, verb):
    code, shown = verb("list", "--json")

    good, bad = json.loads(shown.out)
    assert code == 0 and good["name"] == "good" and good["ranks"] == [2]
    assert "is not JSON" in bad["damaged"] and bad["path"].endswith(damaged_digest(folder))


def test_verify_counts_and_repair_puts_aside(folder, verb):
    code, shown = verb("verify", "--json")
    assert code == 2 and json.loads(shown.out)["adapters"] == 1 and len(json.loads(shown.out)["damaged"]) == 1

    code, shown = verb("verify")
    assert code == 2 and shown.err.strip().splitlines()[-1].startswith("1 of 2 damaged; `orchestrator bank verify")

    code, shown = verb("verify", "--repair")
    assert code == 0 and "1 are in" in shown.err and "1 adapters are left" in shown.err
    assert verb("verify")[0] == 0 and len(list((folder / "bank" / "broken").iterdir())) == 1


def test_the_others_are_shown_exported_and_merged(folder, verb):
    digest = damaged_digest(folder)

    assert verb("show", "good")[0] == 0
    code, shown = verb("show", digest[:8])
    assert code == 2 and "is not JSON" in shown.err
    code, shown = verb("export", "out.tar")
    assert code == 0 and shown.err.strip().splitlines()[-1] == "wrote 1 adapters to out.tar; 1 damaged are not included"
    code, shown = verb("merge", "both", "good", digest[:8])
    assert code == 2 and not (folder / "both").exists()


def test_what_is_damaged_is_removed_by_its_digest(folder, verb):
    code, shown = verb("rm", damaged_digest(folder)[:10])

    assert code == 0 and "removed" in shown.err
    assert verb("verify")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "a\0b", "good"], "null"),
        (["merge", "bank", "good"], "exists already"),
        (["merge", "x", "good", "--rank", "1000000000"], "at most 6"),
        (["export", "bank"], "is a folder"),
        (["export", "no/where/x.tar"], "cannot be written"),
        (["export", "x" * 300], ""),
        (["import", "source-0"], "is a folder"),
        (["import", "/dev/zero"], "is a device"),
        (["import", "gone.tar"], "does not exist"),
        (["add", "source-0", "--model", "no-such/model-x", "--name", "../x"], ""),
        (["add", "a\0b"], "NUL"),
        (["rm", "../../precious"], "has no adapter"),
        (["show", "\ud800" * 9], "has no adapter"),
    ],
)
def test_what_cannot_be_done_is_said_and_writes_nothing(folder, verb, arguments, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(folder.rglob("*"))

    code, shown = verb(*arguments)

    assert code == 2 and said in shown.err and "Traceback" not in shown.err
    assert sorted(folder.rglob("*")) == before
