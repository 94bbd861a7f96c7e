"""ZeRO: divided training is undivided training, and its state can be taken up by any other number of workers."""

import copy
import math
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from strategies import METHODS
from strategies.engines import deepspeed_zero
from strategies.engines.deepspeed_zero import CannotOffload, DeepSpeedOptions, config_of, missing_piece
from strategies.engines.shard import shard
from strategies.measure.trace import Lengths
from strategies.step.state import forget, gather, restore
from strategies.step.step import Update, forward_backward, update
from strategies.techniques.precision import gradient_scaler
from strategies.techniques.sharding import refused_keys
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.processes import run_ranks

pytest.importorskip("deepspeed")

SAMPLES = ((20, 9), (25, 11), (40, 30), (12, 6))  # tokens, supervised
# (method, stage, parts of the state by memory, what waits on the host)
CASES = [
    ("full", 1, (0.7, 0.3), "none"),
    ("lora", 1, (0.97, 0.03), "none"),
    ("full", 1, None, "none"),
    ("full", 2, None, "none"),
    ("lora", 2, None, "none"),
    ("full", 3, None, "none"),
    ("lora", 3, None, "none"),
]


def built(method, stage=0, shares=None, offload="none", rank=0, size=1, options=None):
    """A small model whose widths no two workers divide evenly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=401, hidden_size=66, intermediate_size=129, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=3, initializer_range=0.2)  # fmt: skip
    techniques = Techniques("float32", "sdpa", False, False, 2, 64, offload=offload, zero_stage=stage,
                            num_shards=size if stage else 1, state_share=shares[rank] if shares else None)  # fmt: skip
    settings = TrainSettings(1e-3, 0.1, "adamw_torch_fused", 0.9, 0.999, 1e-8, techniques, 1)
    setup = METHODS[method](**({"loraplus_lr_ratio": 4.0} if method == "lora" else {})).setup(
        LlamaForCausalLM(config), settings
    )
    return shard(setup, settings, torch.device("cpu"), shares or (), options), techniques


def trained(setup, techniques, steps, rank=0, size=1):
    """Losses of the steps; every worker takes its samples one at a time."""
    supervised = sum(learnt for _, learnt in SAMPLES)
    mine = [Lengths((tokens,), (learnt,)).batch(False) for tokens, learnt in SAMPLES[rank::size]]
    scaler, losses = gradient_scaler("cpu", "float32"), []
    for _ in range(steps):
        loss = sum(forward_backward(setup, batch, supervised, techniques, scaler) for batch in mine)
        if setup.engine and len(mine) < math.ceil(len(SAMPLES) / size):  # as many passes as the others
            forward_backward(setup, mine[0], math.inf, techniques, scaler)
        if size > 1:
            dist.all_reduce(loss)
            if not setup.engine:
                for parameter in setup.parameters.values():
                    dist.all_reduce(parameter.grad)
        update(setup, scaler, Update(1.0, 1.0))
        losses.append(loss.item())
    return losses


def primed(setup, techniques, rank, size):
    """An engine's states exist after its first update, which moves nothing here."""
    if setup.engine:
        batch = Lengths((10,), (5,)).batch(False)
        scaler = gradient_scaler("cpu", "float32")
        forward_backward(setup, batch, 5, techniques, scaler)
        update(setup, scaler, Update(0.0, 1.0))
        forget(setup)
    return setup, techniques


def divided_cases(rank, size, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for number, (method, stage, shares, offload) in enumerate(CASES):
        setup, techniques = primed(*built(method, stage, shares, offload, rank, size), rank, size)
        losses = trained(setup, techniques, 2, rank, size)
        half = copy.deepcopy(gather(setup))
        losses += trained(setup, techniques, 2, rank, size)
        whole = gather(setup)
        # The rest again, from the middle, as another start of the same plan would.
        taken = [half]
        dist.broadcast_object_list(taken, 0)
        again, techniques = primed(*built(method, stage, shares, offload, rank, size), rank, size)
        restore(again, taken[0])
        rest = trained(again, techniques, 2, rank, size)
        end = gather(again)
        assert (whole is None) == (rank > 0)
        if rank == 0:
            torch.save((losses, half, whole, rest, end), f"{out}/{number}.pt")
            if (method, stage) == ("lora", 3):
                again.export(Path(out) / "adapter", end.weights)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    run_ranks(divided_cases, 2, str(out))
    return out, [torch.load(out / f"{number}.pt", weights_only=False) for number in range(len(CASES))]


@pytest.fixture(scope="module")
def undivided():
    found = {}
    for method in ("full", "lora"):
        setup, techniques = built(method)
        found[method] = trained(setup, techniques, 4), gather(setup)
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-zero{c[1]}-{c[2] or 'equal'}" for c in CASES])
def test_divided_training_is_undivided_training(results, undivided, number):
    losses, _, whole, _, _ = results[1][number]
    expected, alone = undivided[CASES[number][0]]

    assert losses == pytest.approx(expected, rel=1e-5)
    assert whole.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        assert torch.allclose(whole.weights[name], weight, rtol=1e-4, atol=1e-5), name
        for key in ("exp_avg", "exp_avg_sq"):
            error = (whole.moments[name][key] - alone.moments[name][key]).norm() / alone.moments[name][key].norm()
            assert error < 2e-3, (name, key)
        assert whole.moments[name]["step"] == 4


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-zero{c[1]}-{c[2] or 'equal'}" for c in CASES])
def test_a_resumed_divided_run_is_bit_equal(results, number):
    losses, _, whole, rest, end = results[1][number]

    assert rest == losses[2:]
    assert all(torch.equal(end.weights[name], whole.weights[name]) for name in whole.weights)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-zero{c[1]}-{c[2] or 'equal'}" for c in CASES])
def test_one_worker_takes_up_what_two_had_divided(results, number):
    losses, half, _, _, _ = results[1][number]
    setup, techniques = built(CASES[number][0])
    restore(setup, half)

    assert trained(setup, techniques, 2) == pytest.approx(losses[2:], rel=1e-5)


def three(rank, size, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for number in (0, 3, 5):  # by memory, ZeRO-2, ZeRO-3
        method, stage, shares, offload = CASES[number]
        _, half, _, _, _ = torch.load(f"{out}/{number}.pt", weights_only=False)
        parts = (0.5, 0.0, 0.5) if shares else None
        setup, techniques = primed(*built(method, stage, parts, offload, rank, size), rank, size)
        restore(setup, half)
        told = trained(setup, techniques, 2, rank, size)
        if rank == 0:
            torch.save(told, f"{out}/{number}-three.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_three_workers_take_up_what_two_had_divided(results):
    run_ranks(three, 3, str(results[0]))

    for number in (0, 3, 5):
        assert torch.load(results[0] / f"{number}-three.pt") == pytest.approx(results[1][number][0][2:], rel=1e-5)


def test_an_adapter_trained_with_zero_3_loads_into_plain_peft(results):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    bare = built("lora")[0].model.get_base_model()
    assert isinstance(bare, LlamaForCausalLM)
    fresh = built("full")[0].model
    loaded = PeftModel.from_pretrained(fresh, str(results[0] / "adapter"))

    held = {name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name}
    trained_weights = results[1][CASES.index(("lora", 3, None, "none"))][4].weights
    assert held
    for name, weight in trained_weights.items():
        assert torch.equal(held[name.replace(".default", "")], weight)


def offloaded_cases(rank, size, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for stage, offload in OFFLOADED:
        setup, techniques = primed(*built("full", stage, None, offload, rank, size), rank, size)
        losses = trained(setup, techniques, 4, rank, size)
        if rank == 0:
            torch.save(losses, f"{out}/{stage}-{offload}.pt")
    dist.destroy_process_group()


OFFLOADED = [(2, "optimizer"), (3, "optimizer"), (3, "parameters")]


@pytest.mark.slow  # DeepSpeed compiles its CPU Adam: a minute
def test_what_waits_on_the_host_trains_as_what_does_not(undivided, tmp_path):
    run_ranks(offloaded_cases, 2, str(tmp_path))

    for stage, offload in OFFLOADED:
        assert torch.load(tmp_path / f"{stage}-{offload}.pt") == pytest.approx(undivided["full"][0], rel=1e-5)


def test_a_plan_becomes_a_configuration_and_a_job_may_lay_keys_over_it():
    techniques = Techniques("bfloat16", "sdpa", True, False, 1, 64, zero_stage=3, offload="parameters")
    plain = config_of(techniques, DeepSpeedOptions({}))
    more = config_of(
        techniques, DeepSpeedOptions({"zero_optimization": {"sub_group_size": 7}, "wall_clock_breakdown": True})
    )
    on_disk = config_of(techniques, DeepSpeedOptions({}, nvme_path="/fast"))

    assert plain["bf16"]["enabled"] and plain["zero_optimization"]["stage"] == 3
    assert plain["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert more["zero_optimization"] == {**plain["zero_optimization"], "sub_group_size": 7}
    assert more["wall_clock_breakdown"]
    assert on_disk["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/fast"


def test_keys_that_the_plan_decides_are_named_with_the_jobs_own():
    asked = {"zero_optimization": {"stage": 3, "sub_group_size": 1}, "bf16": {"enabled": True}}

    assert refused_keys(asked) == {"bf16": "model.dtype", "zero_optimization.stage": "strategy.mode"}
    assert refused_keys({"zero_optimization": {"sub_group_size": 1}}) == {}


def test_a_folder_for_offload_must_be_there(monkeypatch):
    monkeypatch.setattr(deepspeed_zero, "_has_libaio", lambda: True)

    with pytest.raises(CannotOffload, match="/nowhere is not a folder"):
        built("full", stage=3, offload="optimizer", options=DeepSpeedOptions({}, nvme_path="/nowhere"))


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (RuntimeError("Ninja is required to load C++ extensions"), "pip install ninja"),
        (FileNotFoundError(2, "No such file or directory", "c++"), "apt install g++"),
        (RuntimeError("Error: CUDA_HOME does not exist, unable to compile CUDA op(s)"), "CUDA toolkit"),
        (RuntimeError("Error building extension 'cpu_adam': fatal error: Python.h: No such file"), "python3-dev"),
        (subprocess.CalledProcessError(1, ["which", "c++"]), "apt install g++"),
        (ValueError("something new"), "something new"),
    ],
)
def test_what_keeps_cpu_adam_from_compiling_is_named(error, fix):
    assert fix in missing_piece(error)


def test_without_a_compiler_torchs_adamw_updates_what_is_offloaded(monkeypatch, tmp_path):
    """A real attempt to build, in a place without a compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    setup, _ = built("full")
    settings = TrainSettings(
        1e-3, 0.0, "adamw_torch_fused", 0.9, 0.999, 1e-8, Techniques("float32", "sdpa", False, False, 1, 8), 1
    )
    chosen = deepspeed_zero._host_optimizer(setup, settings)

    assert chosen is setup.optimizer
    assert "apt install g++" in setup.notes[0] or "pip install ninja" in setup.notes[0], setup.notes
