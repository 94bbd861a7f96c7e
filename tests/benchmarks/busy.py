"""What a training step takes while other programs use the machine, by how waiting threads wait, and how many compute.

python tests/benchmarks/busy.py [--seconds 6]: a small and a middling Llama in fp32 on all cores; none, one and two
programs that never rest beside it.  Then the middling one as the program waits, by its niceness (15 is what Ray gives
its workers) and threads.  Each figure takes a process, since OpenMP reads its policy once.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from strategies.step import thread_waits

MODELS = {"tiny": (64, 128, 2, 8, 32), "middling": (576, 1536, 6, 4, 128)}  # width, MLP, layers, samples, tokens


def step_ms(name: str, seconds: float, threads: int | None = None) -> float:
    """The median of a step's milliseconds in this process."""
    import statistics

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    thread_waits.use_threads(threads or len(os.sched_getaffinity(0)))
    width, mlp, layers, samples, tokens = MODELS[name]
    config = LlamaConfig(
        vocab_size=4000, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    model, ids_BT = LlamaForCausalLM(config), torch.randint(0, 4000, (samples, tokens))
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        model(ids_BT, labels=ids_BT).loss.backward()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken[1:])


def step_ms_apart(environment: dict[str, str], *options: object) -> float:
    """The same in a process of its own."""
    command = [sys.executable, __file__, *map(str, options)]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    return float(done.stdout)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Programs that never rest, for the length of the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--nice", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        os.nice(asked.nice)
        print(step_ms(asked.one, asked.seconds, asked.threads))
        return
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_"))]:
        del os.environ[name]
    print("model     others  spinning       as we wait  sleeping  ms a step")
    for name in MODELS:
        for others in (0, 1, 2):
            with busy(others):
                policies = ({}, thread_waits.environment(), {"OMP_WAIT_POLICY": "passive"})
                taken = [step_ms_apart(policy, "--one", name, "--seconds", asked.seconds) for policy in policies]
            print(f"{name:9} {others:6}  {taken[0]:8.1f}  {taken[1]:15.1f}  {taken[2]:8.1f}", flush=True)
    most = len(os.sched_getaffinity(0))
    print(f"\nmiddling, as we wait: ms a step with {most} threads and with {most - 1}")
    for others, nice in itertools.product((0, 1), (0, 15)):
        row = ["--one", "middling", "--seconds", asked.seconds, "--nice", nice, "--threads"]
        with busy(others):
            taken = [step_ms_apart(thread_waits.environment(), *row, count) for count in (most, most - 1)]
        print(f"others {others}, nice {nice:2}: {taken[0]:8.1f}  {taken[1]:8.1f}", flush=True)


if __name__ == "__main__":
    main()
