"""A bank by its commands: data sets in, adapters out, another one made of them."""

import json
import re
from pathlib import Path

import pytest
import torch

from orchestrator.runs import checkpoints
from orchestrator.runs.events import Note
from orchestrator.runs.run_folder import RunFolder
from strategies.adapter_bank.adapter import Adapter
from strategies.adapter_bank.generation import RULES, combine
from strategies.adapter_bank.shares.distances import DISTANCES
from strategies.adapter_bank.store import Bank
from tests.adapters import write_adapter
from tests.cli import called
from tests.conftest import needs_smollm2, rows, write_jsonl
from tests.processes import kill, orchestrator, wait_for
from tests.processes import start as start_process


def joined(text: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def a_set(folder: Path, name: str, start: int) -> None:
    (folder / "sets" / name).mkdir(parents=True)
    write_jsonl(folder / "sets" / name / "train.jsonl", rows(40, start=start))
    write_jsonl(folder / "sets" / name / "eval.jsonl", rows(8, start=start + 100))


@pytest.fixture(scope="module")
def place(model_folder, tmp_path_factory):
    """A folder with a bank of two adapters that a job built."""
    folder = tmp_path_factory.mktemp("bank")
    for name, start in (("first", 0), ("second", 200)):
        a_set(folder, name, start)
    write_jsonl(folder / "train.jsonl", rows(20, start=60))
    write_jsonl(folder / "eval.jsonl", rows(8, start=120))
    write_jsonl(folder / "other.jsonl", [{"text": "銀行に似たものはない" * 40}] * 16)
    (folder / "job.yaml").write_text(
        f"""\
name: new
model: {{model_name_or_path: {model_folder}, dtype: float32}}
data: {{train: train.jsonl, eval: eval.jsonl, max_length: 64}}
method: {{type: lora, lora_r: 4}}
train: {{global_batch_size: 8, max_steps: 30, learning_rate: 1e-2, seed: 1}}
eval: {{eval_steps: 5, metrics: []}}
tracking: {{report_to: []}}
bank: {{path: {folder / "bank"}, licence: Apache-2.0}}
"""
    )
    orchestrator("bank", "build", "sets", "--job", "job.yaml", cwd=folder, check=0)
    return folder


def test_each_data_set_is_an_adapter_with_its_scores(place):
    cards = json.loads(called("bank", "list", "--bank", "bank", "--json", cwd=place, check=0).stdout)

    assert [card["name"] for card in cards] == ["first", "second"]
    for card in cards:
        assert card["num_rows"] == 40 and card["ranks"] == [4] and card["licence"] == "Apache-2.0"
        assert card["scores"]["after"]["eval_loss"] < card["scores"]["before"]["eval_loss"]


def test_data_sets_share_their_base_model(place):
    for name in ("first", "second"):
        run = RunFolder(place / "runs" / f"bank-{name}")

        # In one worker, or where two do more in two, each with a part of the cores.
        assert run.result().time.runs_together in (1, 2) and run.result().time.formula_step_s is None
        beside = [note.text for note in run.events_of(Note) if "workers side by side: 2" in note.text]
        assert bool(beside) == (run.result().time.runs_together == 1)


@pytest.mark.slow  # tests/orchestrator/lifecycle/together stops and continues without Ray
def test_a_build_that_was_killed_continues_every_data_set(place, tmp_path):
    """And comes to the losses of one that was not."""
    build = ("bank", "build", place / "sets", "--job", place / "job.yaml")
    build += ("--set", f"bank.path={tmp_path / 'bank'}", "--set", f"checkpoint.output_dir={tmp_path / 'runs'}")
    build += ("--set", "checkpoint.save_steps=3", "--set", "cluster.num_workers=1")
    runs = [RunFolder(tmp_path / "runs" / f"bank-{name}") for name in ("first", "second")]
    process = start_process(*build, cwd=tmp_path)
    wait_for(lambda: all(checkpoints.complete(run.checkpoints) for run in runs), process)
    kill(process)
    assert not any(run.result() for run in runs)

    done = orchestrator(*build, cwd=tmp_path, check=0)

    assert "2 runs share one base model in one worker" in joined(done.stderr)
    for run in runs:
        assert any("resumed from checkpoint" in note.text for note in run.events_of(Note))
        expected = RunFolder(place / "runs" / run.run_id)
        losses = [[one.steps()[step].loss for step in range(1, 31)] for one in (run, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        ends = [one.result().values["after"]["eval_loss"] for one in (run, expected)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_what_was_built_is_not_built_again(place):
    runs = sorted((place / "runs").iterdir())

    called("bank", "build", "sets", "--job", "job.yaml", cwd=place, check=0)

    assert sorted((place / "runs").iterdir()) == runs


def test_an_adapter_of_other_rows_is_not_reused(place):
    """Neither by `build` nor by a run that is added after its file has changed."""
    file = place / "sets" / "first" / "train.jsonl"
    cards = ("bank", "show", "first", "--bank", "bank", "--json")
    kept, known = file.read_bytes(), json.loads(called(*cards, cwd=place, check=0).stdout)
    try:
        write_jsonl(file, rows(50))
        done = called("bank", "build", "sets", "--job", "job.yaml", cwd=place, check=2)
        called("bank", "add", "bank-first", "--bank", "bank", cwd=place, check=0)
    finally:
        file.write_bytes(kept)

    assert "first: data.train: the files have changed since bank-first began" in joined(done.stdout + done.stderr)
    assert "1 of 2 failed (first)" in joined(done.stderr)
    assert json.loads(called(*cards, cwd=place, check=0).stdout)["data_digest"] == known["data_digest"]


def test_an_adapter_is_made_and_judged(place, tmp_path):
    done = called("adapt", "job.yaml", "--output", tmp_path / "made", "--json", cwd=place, check=0)
    found = json.loads(done.stdout)

    assert sum(part["share"] for part in found["made_from"]) + found["base_share"] == pytest.approx(1)
    assert found["selection"]["rows"] == 8 and found["settings"]["rule"] in RULES
    assert found["selection"]["losses"] == sorted(found["selection"]["losses"], reverse=True)
    assert set(found["probe_loss"]) == {"base", "nearest", "average", "generated"}
    assert found["recommended"] == min(found["probe_loss"], key=found["probe_loss"].get) != "base"
    there, bank = Adapter(tmp_path / "made" / "adapter"), Bank(place / "bank")
    parts = [(bank.adapter(bank.find(part["name"])), part["share"]) for part in found["made_from"]]
    told = combine([one for one, _ in parts], [share for _, share in parts], found["settings"]["rule"])
    assert there.ranks == [4] and set(there.targets) == set(told)
    for name, factors in told.items():  # the card is of what lies there, whichever was the best
        torch.testing.assert_close(there.factors(name).delta(), factors.delta(), rtol=1e-3, atol=1e-5)
    assert json.loads((tmp_path / "made" / "adapt.json").read_text())["made_from"] == found["made_from"]


def test_validate_names_data_that_the_bank_holds(place, tmp_path):
    known = ["--set", f"data.train={place}/sets/second/train.jsonl"]

    done = called("adapt", "job.yaml", *known, "--output", tmp_path / "made", cwd=place, check=0)

    assert "the bank already has an adapter for exactly this data: second" in joined(done.stdout)


def test_a_plan_names_the_adapter_that_the_bank_holds_already(place):
    known = ["--set", f"data.train={place}/sets/second/train.jsonl"]

    of_known = called("plan", "job.yaml", *known, cwd=place, check=0).stdout
    (found,) = json.loads(called("plan", "job.yaml", *known, "--json", cwd=place, check=0).stdout)["in_bank"]
    of_others = called("plan", "job.yaml", cwd=place, check=0).stdout

    assert "already in the bank, trained on this very data, so nothing need be computed: second" in joined(of_known)
    assert found["name"] == "second" and Adapter(Path(found["path"])).ranks == [4]
    assert found["held_out_loss"][1] < found["held_out_loss"][0]
    assert "already in the bank" not in of_others


def test_nothing_better_than_the_base_is_not_recommended(place, tmp_path):
    """An adapter that takes away what was learnt."""
    harm = ("first", "second", "--weights", "-1,-1", "--bank", "bank")
    called("bank", "merge", tmp_path / "harm", *harm, cwd=place, check=0)
    added = ("--data", "sets/first/train.jsonl", "--bank", tmp_path / "bad")
    called("bank", "add", tmp_path / "harm", *added, cwd=place, check=0)

    bank = ["--set", f"bank.path={tmp_path}/bad"]
    done = called("adapt", "job.yaml", *bank, "--output", tmp_path / "made", cwd=place, check=0)

    assert "not recommended: none is better than the base model" in done.stdout
    assert not (tmp_path / "made" / "adapter").exists()


def test_merge_export_import_and_verify(place, tmp_path):
    bank = ("--bank", "bank")
    called("bank", "merge", tmp_path / "both", "first", "second", "--how", "cat", *bank, cwd=place, check=0)
    called("bank", "export", tmp_path / "all.tar", *bank, cwd=place, check=0)
    called("bank", "import", tmp_path / "all.tar", "--bank", tmp_path / "copy", cwd=place, check=0)
    done = called("bank", "verify", "--bank", tmp_path / "copy", cwd=place, check=0)

    assert "2 adapters, nothing wrong" in done.stderr
    runs = [Adapter(place / "runs" / f"bank-{name}" / "adapter") for name in ("first", "second")]
    both = Adapter(tmp_path / "both")
    for name in both.targets:
        exact = sum(0.5 * run.factors(name).delta() for run in runs)
        torch.testing.assert_close(both.factors(name).delta(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bank", "list", "--bank", "nowhere"], "holds no bank; `orchestrator bank add` makes one"),
        (["bank", "show", "fourth", "--bank", "bank"], "has no adapter 'fourth'"),
        (["bank", "merge", "x", "first", "second", "--weights", "1", "--bank", "bank"], "1 numbers for 2 adapters"),
        (["bank", "merge", "x", "first", "--how", "best", "--bank", "bank"], "--how best: one of linear"),
        (["bank", "merge", "x", "first", "--weights", "nan", "--bank", "bank"], "write finite numbers"),
        (["bank", "build", "runs", "--job", "job.yaml"], "holds no NAME/train.jsonl"),
        (
            ["bank", "evaluate", "--job", "job.yaml", "--runs", "sets"],
            "0 of the bank's adapters have a run with held-out",
        ),
        (["adapt", "job.yaml", "--set", "bank.path=nowhere"], "holds no bank"),
        (["adapt", "job.yaml", "--against", "fresh"], "--against belongs to --then-train"),
        (
            ["adapt", "job.yaml", "--set", "data.train=other.jsonl", "--set", "data.eval=other.jsonl"],
            "has almost no token in common with any data set of the bank",
        ),
    ],
)
def test_mistakes_name_the_fix_and_write_nothing(place, arguments, said):
    before = sorted(place.iterdir())

    done = called(*arguments, cwd=place, check=2)

    assert re.search(re.escape(said), joined(done.stdout + done.stderr))
    assert sorted(place.iterdir()) == before


@pytest.mark.slow
def test_training_starts_from_it_and_the_steps_saved_are_counted(place, tmp_path):
    asked = ("--then-train", "--against", "fresh", "--output", tmp_path / "made", "--json")
    trained = json.loads(orchestrator("adapt", "job.yaml", *asked, cwd=place, check=0).stdout)["then_train"]

    fresh = {int(step): loss for step, loss in trained["against_eval_loss"].items()}
    begun = {int(step): loss for step, loss in trained["eval_loss"].items()}
    assert begun[5] < fresh[5]
    assert begun[trained["reached_at"]] <= fresh[30]
    assert trained["steps_saved"] == 30 - trained["reached_at"] > 0
    assert Path(trained["path"]).is_dir()


@needs_smollm2
def test_an_adapter_of_a_model_of_the_same_shapes_is_refused_by_its_name(tmp_path):
    """SmolLM and SmolLM2 have the same shapes: the weights alone would not tell."""
    adapter = write_adapter(tmp_path / "adapter", "HuggingFaceTB/SmolLM-135M-Instruct")

    done = called("bank", "add", adapter, "--model", "smollm2-135m-instruct", "--bank", "b", cwd=tmp_path, check=2)

    assert "was trained on HuggingFaceTB/SmolLM-135M-Instruct, not on smollm2-135m-instruct" in joined(done.stderr)
    assert not (tmp_path / "b" / "objects").is_dir() or not list((tmp_path / "b" / "objects").iterdir())


@pytest.mark.slow  # of the parts, tests/strategies/test_shira.py and training/test_learning.py prove it
def test_sparse_experts_are_trained_merged_and_not_mistaken_for_lora(place, tmp_path, model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sparse = ["--set", "method={type: experimental_shira, shira_r: 4}", "--set", "bank.add=true"]
    done = orchestrator("submit", "job.yaml", "--json", *sparse, cwd=place, check=0)
    told = json.loads(done.stdout)
    adapter = Path(told["path"]) / "adapter"

    assert told["result"]["after"]["eval_loss"] < told["result"]["before"]["eval_loss"]
    assert "the bank keeps LoRA" in (Path(told["path"]) / "events.jsonl").read_text()
    both = [str(tmp_path / "both"), str(adapter), str(adapter)]
    assert called("bank", "merge", *both, "--how", "cat", cwd=place).returncode == 2
    called("bank", "merge", *both, cwd=place, check=0)
    once, twice = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(folder)).eval()
        for folder in (adapter, tmp_path / "both")
    )
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(once(ids).logits, twice(ids).logits)  # what both have is averaged


@pytest.mark.slow  # last: the bank has one more afterwards
def test_each_adapter_is_excluded_in_turn_and_generated_from_the_others(place, tmp_path):
    a_set(place, "third", 400)
    orchestrator("bank", "build", "sets", "--job", "job.yaml", cwd=place, check=0)
    done = orchestrator(
        "bank", "evaluate", "--job", "job.yaml", "--rows", "4", "--output", tmp_path, "--json", cwd=place, check=0
    )
    found = json.loads(done.stdout)

    assert set(found["tasks"]) == {"first", "second", "third"}
    assert found["settings"]["base"]["gain"] == 0 and found["settings"]["own"]["gap_closed"] == 1
    assert found["settings"]["adapt"]["loss"] < found["settings"]["base"]["loss"]
    asked = {f"{d} | {c} | {r}" for d in DISTANCES for c in ("normalised", "neural") for r in RULES}
    assert asked < set(found["settings"])
    for losses in found["tasks"].values():
        assert losses["own"] < losses["base"]
    assert json.loads((tmp_path / "leave-one-out.json").read_text()) == found
    assert "wasserstein_ids | attentional" in (tmp_path / "leave-one-out.svg").read_text()
