"""Worker processes of a test, started quickly: forked from a server that has imported the libraries once.

Its threads are none, as nothing was computed in it: OpenMP's would not survive a fork.
"""

import multiprocessing
import socket

import torch

_LOADED = ["torch", "transformers", "peft", "orchestrator.training.workers.worker", "strategies"]


def spawned(work, size, *arguments):
    """Run `work(rank, size, port, *arguments)` in `size` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(_LOADED)
    torch.multiprocessing.start_processes(work, (size, port, *arguments), nprocs=size, start_method="forkserver")
