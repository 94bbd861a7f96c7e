"""`probe`, `techniques`, `plan` as a user types them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.cli import called
from tests.conftest import SMALL_MODEL

HEAVY = ("torch", "ray", "transformers", "peft", "deepspeed", "mlflow")


def orchestrator(*words, cwd, code=0):
    done = called(*words, cwd=cwd, check=code)
    return done.stdout, done.stderr


@pytest.fixture
def job(tmp_path, rows_file):
    text = {"model": {"model_name_or_path": str(SMALL_MODEL)}, "data": {"train": str(rows_file), "max_length": 64}}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(text))
    return file


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"the {i} cat", "completion": "sees a bird and a dog"} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_plan_shows_what_why_how_long_and_how_much(job, tmp_path):
    shown, _ = orchestrator("plan", job, "--hardware", "home-lab", cwd=tmp_path)

    for word in ("RTX 3090", "memory", "step", "tokens/s", "EUR", "kWh", "why", "other ways"):
        assert word in shown


def test_plan_as_json_is_the_plan_file(job, tmp_path):
    from orchestrator.planning.plan import Plan

    shown, _ = orchestrator("plan", job, "--hardware", "home-lab", "--json", cwd=tmp_path)

    values = json.loads(shown)
    statistics = values.pop("statistics")
    assert "rows of about" in statistics["rough"]
    assert Plan.from_json(json.dumps(values)).nodes[0].share > 0


def test_planning_loads_no_torch(job, tmp_path):
    code = (
        "import sys\n"
        f"sys.argv = ['orchestrator', 'plan', {str(job)!r}, '--hardware', 'home-lab', '--json']\n"
        "from orchestrator.cli import app as cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)

    assert shown.stdout.strip().endswith("HEAVY []")


def test_a_70b_model_on_four_declared_machines_takes_two_seconds(job, tmp_path):
    big = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    (tmp_path / "big").mkdir()
    (tmp_path / "big/config.json").write_text(json.dumps(big))
    began = time.process_time()

    orchestrator("plan", job, "--hardware", "home-lab", "--set", "model.model_name_or_path=big", cwd=tmp_path)

    assert time.process_time() - began < 4


def test_what_does_not_fit_exits_with_3_and_a_remedy(job, tmp_path):
    _, said = orchestrator(
        "plan", job, "--hardware", "home-lab", "--set", "goal.max_hours=0.0000001", cwd=tmp_path, code=3
    )

    assert "goal.max_hours" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "model.model_name_or_path=./empty"], "holds no config.json"),
        (["--set", "model.model_name_or_path=./mamba"], "'mamba' is not known"),
        (["--hardware", "nowhere.yaml"], "nowhere.yaml"),
        (["--hardware", "bad.yaml"], "memory_gib"),
        (["--set", "goal.prefer=luck"], "goal.prefer"),
        (["--set", "model.dtype=float32", "--set", "model.attn_implementation=flash_attention_2"], "16 bits"),
        (["--set", "train.torch_compile=true", "--set", "data.packing=true"], "would recompile"),
        (["--set", "strategy.deepspeed={bf16: {enabled: true}}"], "set it by model.dtype"),
        (["--set", "strategy.mode=zero2", "--set", "strategy.local_steps=4"], "set strategy.mode to ddp"),
        (["--set", "strategy.mode=zero3", "--set", "cluster.num_workers=1"], "cluster.num_workers"),
    ],
)
def test_bad_input_exits_with_2_and_the_fix(words, message, job, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba/config.json").write_text('{"model_type": "mamba", "hidden_size": 8}')
    (tmp_path / "bad.yaml").write_text("nodes: [{name: a, cores: 4, memory_gib: -3}]\n")

    _, said = orchestrator("plan", job, *words, cwd=tmp_path, code=2)

    assert message in said
    assert "Traceback" not in said


def test_probe_shows_declared_machines_and_where_figures_come_from(tmp_path):
    shown, _ = orchestrator("probe", "--hardware", "home-lab", cwd=tmp_path)

    assert "RTX 3090" in shown and "71.2 Td" in shown and "datasheet" in shown


def test_probe_of_an_address_where_nobody_answers_exits_with_4(tmp_path):
    _, said = orchestrator("probe", "--cluster", "127.0.0.1:1", cwd=tmp_path, code=4)

    assert "no Ray cluster" in said


def test_techniques_judges_each_device(job, tmp_path):
    shown, _ = orchestrator("techniques", job, "--hardware", "home-lab", "--json", cwd=tmp_path)

    rows = json.loads(shown)
    assert len({row["device"] for row in rows}) >= 4
    assert {row["level"] for row in rows} >= {"effective", "impossible"}
    assert all(row["reason"] for row in rows)


def test_trace_agrees_with_the_plan(job, model_folder, tmp_path):
    of_model = f"model.model_name_or_path={model_folder}"
    shown, _ = orchestrator("plan", job, "--trace", "--json", "--set", of_model, cwd=tmp_path)

    found = json.loads(shown)["trace"]
    assert abs(found["apart"]) < 0.25  # a model of 110 thousand parameters: what formulas leave out is a larger part
    assert ("DISAGREE" in found["text"]) == (abs(found["apart"]) > 0.10)


def test_preflight_runs_the_longest_batch_and_leaves_nothing(job, tmp_path):
    before = set(tmp_path.iterdir())

    shown, _ = orchestrator("plan", job, "--preflight", "--json", cwd=tmp_path)

    found = json.loads(shown)["preflight"]
    assert found["longest_batch_tokens"] > 0 and found["checkpoint_bytes"] > 0
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"runs"}
    assert not list(Path(tmp_path).rglob("*preflight*"))


def test_a_dry_run_is_the_plan_and_starts_nothing(job, tmp_path):
    shown, _ = orchestrator("submit", job, "--dry-run", "--json", cwd=tmp_path)

    assert json.loads(shown)["nodes"]
    assert not [path for path in (tmp_path / "runs").glob("*") if path.name != ".cache"]


def test_a_dry_run_plans_for_the_machines_that_are_named(job, tmp_path):
    shown, _ = orchestrator("submit", job, "--dry-run", "--hardware", "home-lab", "--json", cwd=tmp_path)
    _, asked = orchestrator("submit", job, "--dry-run", "--cluster", "127.0.0.1:1", cwd=tmp_path, code=4)

    assert json.loads(shown)["nodes"][0]["node"] == "workstation"
    assert "127.0.0.1:1" in asked


def test_a_card_in_use_by_others_and_a_node_that_failed_are_named():
    from clusters.capability import ClusterCapability, DeviceCapability, NodeCapability
    from orchestrator.lifecycle.machines import notes

    card = DeviceCapability("cuda", "RTX 3090", 9 * 2**30, 24 * 2**30)
    cluster = ClusterCapability((NodeCapability("a", 8, None, (card,)),), failed={"b": "no answer in 60 s"})

    assert notes(cluster) == [
        "b could not be probed and is not used: no answer in 60 s",
        "RTX 3090 on a: 15.0 GiB are in use by others; planning with the rest",
    ]


def test_conflicts_are_named_in_the_catalogue(tmp_path):
    shown, _ = orchestrator("techniques", "--hardware", "home-lab", "--json", cwd=tmp_path)

    rows = {(row["device"], row["technique"]): row for row in json.loads(shown)}
    card = rows["RTX 3090", "activation offload"]
    assert "choose one" in card["not_with"]["gradient checkpointing"]
    assert "QLoRA nf4" in rows["RTX 3090", "ZeRO-3"]["not_with"]


def test_an_encoder_can_be_planned_and_is_refused_by_submit(job, tmp_path):
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    (tmp_path / "bert").mkdir()
    config = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, **sizes}
    (tmp_path / "bert/config.json").write_text(json.dumps(config))

    shown, _ = orchestrator(
        "plan", job, "--hardware", "home-lab", "--set", "model.model_name_or_path=bert", "--json", cwd=tmp_path
    )
    _, said = orchestrator("submit", job, "--set", "model.model_name_or_path=bert", cwd=tmp_path, code=2)

    assert json.loads(shown)["nodes"][0]["memory"]["weights_bytes"] > 2 * 109e6
    assert "is an encoder" in said
