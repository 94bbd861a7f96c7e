"""A model in stages over emulated links, beside other ways to use the same three machines (`pipeline.py links`).

Each machine has a network namespace of its own (tests/cluster/emulator.py) and layers that take a stated time: its
own computation is filled up by sleep, so that two cores can stand for three unequal machines.  Weights, messages,
executor, DeepSpeed and the stream of weights are real.

A layer has 4 MB, a hidden state 4 MB.  In real models layers are heavier beside their hidden states (Qwen2.5-14B in
nf4 at 2048 tokens: 140 beside 21 MB), so ZeRO-3 is shown from its better side.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from strategies.cost.pipeline import Arrangement, Boundary, Line, Pass, Search, Way, orders_of, simulate
from strategies.measure.trace import Lengths
from strategies.methods.lora import Lora
from strategies.model.architecture import decoder_layers
from strategies.pipeline.wire_size import message_bytes
from strategies.step import host_memory
from strategies.step.supervised_logits import inner_model
from strategies.techniques.precision import gradient_scaler
from strategies.workload import StagePart
from tests.cluster.emulator import EmulatedCluster, Machine
from tests.processes import ROOT

LAYERS, WIDTH, TOKENS = 24, 8192, 128
NAMES = ("fast", "middle", "slow")
LAYER_MS = (30.0, 45.0, 90.0)  # of a forward pass of a layer on each; a backward pass takes twice as long
MICRO_BATCHES = 24  # eight a stage
THIN = Lora(lora_r=2, lora_target_modules=["q_proj"])
PORT = 29_400
PATIENCE_S = 900
_LATE_S = 5e-4


@dataclass(frozen=True)
class Links:
    """Every machine's link to the switch."""

    name: str
    bits_per_s: float
    delay_s: float  # one way, on each side
    least_efficiency: float  # of a pipeline: parts of the machines' summed speed

    @property
    def boundary(self) -> Boundary:
        return Boundary(message_bytes(TOKENS, WIDTH, "float32"), self.bits_per_s / 8, 2 * self.delay_s)


LINKS = (Links("1 Gbit", 1e9, 1e-4, 0.90), Links("100 Mbit, 4 ms", 1e8, 2e-3, 0.80))


@dataclass(frozen=True)
class Work:
    """What the machines of one case do; `layers` of each stage, in order of `machines`."""

    way: str  # stages, streamed, zero3
    machines: tuple[int, ...]
    layers: tuple[int, ...] = ()
    ahead: int = 0
    steps: int = 2
    warm_up: int = 1  # steps before


# What a machine runs.


class _Mark(torch.autograd.Function):
    """A place in a forward pass; the backward pass calls when it comes by."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.call()
        return gradients[0], None


class _Clock:
    """Fills up the time of one layer.  Hooks are not called again where a layer is computed again.

    A layer begins where its neighbour ended, so that layers of a stage take together what is stated.
    """

    def __init__(self, forward_s: float, below: _Clock | None) -> None:
        self.forward_s, self.began_s, self.ended_s = forward_s, 0.0, 0.0
        self.below: _Clock | None = below
        self.above: _Clock | None = None
        if below:
            below.above = self

    def before(self, _module: Any, arguments: Any) -> Any:
        hidden = arguments[0]
        self.began_s = self.below.ended_s if self.below else time.perf_counter()
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # so that the first layer's backward pass comes to its begin
        return (_Mark.apply(hidden, self.fill_backward), *arguments[1:])

    def behind(self, _module: Any, _arguments: Any, hidden: torch.Tensor) -> Any:
        self._fill(self.forward_s)
        return _Mark.apply(hidden, self.start_backward)

    def start_backward(self) -> None:
        self.began_s = self.above.ended_s if self.above else time.perf_counter()

    def fill_backward(self) -> None:
        self._fill(2 * self.forward_s)

    def _fill(self, seconds: float) -> None:
        """A virtual machine wakes up late, by up to 2 % of the shortest layer, so the end is not slept through."""
        self.ended_s = self.began_s + seconds
        time.sleep(max(0.0, self.ended_s - _LATE_S - time.perf_counter()))
        while time.perf_counter() < self.ended_s:
            pass


def _set_up(folder: Path, work: Work, rank: int) -> Any:
    from strategies.engines.shard import shard
    from strategies.step.weight_stream import stream_weights
    from tests.benchmarks.pipeline import TECHNIQUES, set_up, settings_of

    cpu = torch.device("cpu")
    if work.way == "zero3":
        techniques = replace(TECHNIQUES, zero_stage=3, num_shards=len(work.machines))
        setup = shard(set_up(folder, THIN, None), settings_of(techniques), cpu)
    elif work.way == "streamed":
        setup = set_up(folder, THIN, None)
        model: Any = setup.model
        model.gradient_checkpointing_enable()
        stream_weights(setup, cpu)
    else:
        edges = [0, *itertools.accumulate(work.layers)]
        stage = StagePart(rank, len(edges) - 1, edges[rank], edges[rank + 1], work.ahead)
        setup = set_up(folder, THIN, stage)
    return setup


class _Nothing(torch.nn.Module):
    """Stands for a part of a layer."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_zeros(())


def _thin_out(model: Any) -> None:
    """Leave out most of what layers compute, whose time is stated: in stages three processes share two cores."""
    inner_model(model).get_decoder().norm = torch.nn.Identity()
    for layer in decoder_layers(model):
        layer.input_layernorm = layer.post_attention_layernorm = torch.nn.Identity()
        layer.mlp = _Nothing()


def _machine(folder: Path, rank: int, address: str) -> None:
    """One machine's part of a case, in a process of its own."""
    from tests.benchmarks.pipeline import step_of

    work = Work(**json.loads((folder / "work.json").read_text()))
    torch.set_num_threads(1)
    host_memory.keep()  # as a worker does
    size = len(work.machines)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{PORT}", rank=rank, world_size=size)
    setup = _set_up(folder / "model", work, rank)
    setup.model.train()
    if work.way == "stages":
        _thin_out(setup.model)
    edges = [0, *itertools.accumulate(work.layers)]
    own = (
        slice(edges[rank], edges[rank + 1]) if work.layers else slice(None)
    )  # in the places of others nothing computes
    clock = None
    for layer in list(decoder_layers(setup.model))[own]:
        clock = _Clock(LAYER_MS[work.machines[rank]] / 1e3, clock)
        layer.register_forward_pre_hook(clock.before)  # behind DeepSpeed's, which gathers the layer's weights
        layer.register_forward_hook(clock.behind, prepend=True)
    batch, took, busy = Lengths((TOKENS,), (TOKENS // 2,)).batch(False), [], []
    count = MICRO_BATCHES // size if work.way == "zero3" else MICRO_BATCHES
    for _ in range(work.warm_up + work.steps):
        dist.barrier()
        began = time.perf_counter()
        step_of(setup, [batch] * count, gradient_scaler("cpu", "float32"))
        dist.barrier()
        took.append(time.perf_counter() - began)
        if work.way == "stages":
            passes = setup.passes.times().passes
            busy.append([statistics.mean(e - b for f, _, b, e in passes if f == way) for way in (True, False)])
    (folder / f"{rank}.json").write_text(json.dumps([took[work.warm_up :], busy[work.warm_up :]]))
    dist.destroy_process_group()


# What drives them.


@dataclass(frozen=True)
class Measured:
    """One case: seconds of a step, and of each stage the passes that it made."""

    step_s: float
    passes: tuple[Pass, ...] = ()


def _measure(cluster: EmulatedCluster, folder: Path, work: Work) -> Measured:
    (folder / "work.json").write_text(json.dumps(asdict(work)))
    names = [NAMES[machine] for machine in work.machines]
    address, processes = cluster.address(names[0]), []
    for rank, name in enumerate(names):
        command = [sys.executable, "-m", "tests.benchmarks.pipeline_links", str(folder), str(rank), address]
        with (folder / f"{rank}.log").open("wb") as log:
            environment = {**host_memory.process_environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            processes.append(cluster.run(name, command, environment, ROOT, stdout=log, stderr=log))
    codes = [process.wait(PATIENCE_S) for process in processes]
    if any(codes):
        raise RuntimeError("".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(len(names))))
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(names))]
    step_s = statistics.median(found[0][0])
    return Measured(step_s, tuple(Pass(*map(statistics.median, zip(*busy, strict=True))) for _, busy in found if busy))


def planned(links: Links) -> Arrangement:
    """The planner's own search over the machines as they are stated."""

    def ways(device: int, _role: Any) -> list[Way]:
        forward_s = LAYER_MS[device] / 1e3
        return [Way(Line(0.0, forward_s), Line(0.0, 2 * forward_s), LAYERS)]

    search = Search(LAYERS, MICRO_BATCHES, ways, lambda _one, _other: links.boundary)
    found = search.best(orders_of(range(len(NAMES)), range(2, len(NAMES) + 1)))
    assert found is not None
    return found


@dataclass(frozen=True)
class Findings:
    """What one kind of links gave."""

    best: Arrangement
    pipeline: Measured
    equal: Measured
    alone: Measured
    zero3: Measured

    @property
    def efficiency(self) -> float:
        """Of the summed speeds of the machines."""
        ideal_s = MICRO_BATCHES * LAYERS * 3e-3 / sum(1 / milliseconds for milliseconds in LAYER_MS)
        return ideal_s / self.pipeline.step_s

    @property
    def simulated_s(self) -> float:
        """The step by the simulation, of passes as they were measured."""
        return simulate(self.pipeline.passes, self.best.boundaries, MICRO_BATCHES, self.best.ahead).step_s


def measure(links: Links, alone: Measured | None = None) -> Findings:
    """What these links give; how fast the fastest machine is alone, where that is known."""
    best, count = planned(links), len(NAMES)
    machines = [Machine(name, rate_bits_per_s=links.bits_per_s, delay_s=links.delay_s) for name in NAMES]
    with tempfile.TemporaryDirectory() as out, EmulatedCluster(machines, Path(out, "machines")) as cluster:
        folder = Path(out)
        _thin_llama(folder / "model")
        return Findings(
            best,
            _measure(cluster, folder, Work("stages", best.devices, best.partition.layers, best.ahead)),
            _measure(cluster, folder, Work("stages", best.devices, (LAYERS // count,) * count, best.ahead, 1)),
            alone or _measure(cluster, folder, Work("streamed", (0,), steps=1)),
            _measure(cluster, folder, Work("zero3", tuple(range(count)), steps=1, warm_up=0)),
        )


def _thin_llama(folder: Path) -> None:
    """Wide hidden states, and layers that compute little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def report() -> None:
    print(
        f"{LAYERS} layers of {', '.join(f'{one:g}' for one in LAYER_MS)} ms forward on {', '.join(NAMES)};"
        f" {MICRO_BATCHES} micro-batches, {LINKS[0].boundary.message_bytes / 1e6:.1f} MB a message"
    )
    alone: Measured | None = None
    for links in LINKS:
        found = measure(links, alone)
        alone = found.alone
        order = ", ".join(
            f"{NAMES[one]} {layers}"
            for one, layers in zip(found.best.devices, found.best.partition.layers, strict=True)
        )
        print(f"\n{links.name}: {order} layers, {found.best.ahead} ahead")
        step_s = found.pipeline.step_s
        for name, seconds, remark in (
            ("pipeline", step_s, f"{found.efficiency:.1%} of summed speeds"),
            ("  the planner's", found.best.step_s, f"{found.best.step_s / step_s - 1:+.1%}"),
            ("  of measured passes", found.simulated_s, f"{found.simulated_s / step_s - 1:+.1%}"),
            ("layers divided equally", found.equal.step_s, f"{found.equal.step_s / step_s:.1f}x"),
            ("fast alone, streamed", found.alone.step_s, f"{found.alone.step_s / step_s:.1f}x"),
            ("ZeRO-3 (DeepSpeed)", found.zero3.step_s, f"{found.zero3.step_s / step_s:.1f}x"),
        ):
            print(f"  {name:<24}{seconds:>8.2f} s a step  {remark}", flush=True)


if __name__ == "__main__":
    _machine(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
