"""Ten minutes on a real card, what is worth most first: does what was written without one hold on it?

    python tests/first_contact.py                            every part, on cuda:0
    python tests/first_contact.py --only exact,resume        some of them
    python tests/first_contact.py --device cpu --small       a dry run, where there is no GPU

Prints a line a check as it is made, then the table.  Exit code 0 where nothing failed, else 1.  The JSON file that
`--out` names (first_contact.json) is read by `tests/benchmarks/predictions.py card FILE`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # before CUDA starts: cards are counted as the driver does
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

import torch

from clusters.capability import DeviceCapability, NodeCapability
from clusters.hardware.torch_gpus import index_of, seen_by_torch
from clusters.probe.node import probe_node
from tests.first_contact_parts import costs, facts, limits, numbers, whole
from tests.first_contact_parts.bench import Bench
from tests.first_contact_parts.checks import Check, raised, table, write

PARTS: dict[str, Callable[[Bench], Iterable[Check]]] = {
    "facts": facts.facts,
    "exact": numbers.exact,
    "memory": costs.memory,
    "streamed": numbers.streamed,
    "resume": numbers.resume,
    "divided": numbers.divided,
    "full_card": limits.full_card,
    "scaling": limits.scaling,
    "offload": costs.offload,
    "lanes": numbers.lanes,
    "packed_kernels": costs.packed_kernels,
    "quick_start": whole.quick_start,
    "two_cards": whole.two_cards,
    "mixed": whole.mixed,
}


def looked_at(device: torch.device, is_small: bool) -> Bench:
    """The device with the figures that plans are made from.  Raises SystemExit where there is no such device."""
    if device.type == "cuda":
        if device.index is None:
            sys.exit(f"--device {device}: say which one, as in cuda:0")
        if not torch.cuda.is_available():
            sys.exit(
                f"{device}: PyTorch {torch.__version__} finds no GPU; --device cpu --small is a dry run without one"
            )
        torch.cuda.set_device(device)
    node = probe_node(seconds=1.0 if is_small else 5.0)
    return Bench(device, node, _capability(node, device), is_small)


def _capability(node: NodeCapability, device: torch.device) -> DeviceCapability:
    if device.type == "cpu":
        assert node.cpu is not None  # every probed node has one
        return node.cpu
    seen = seen_by_torch().gpus
    numbers = {index_of(gpu, node.gpus, seen): gpu for gpu in node.gpus}
    if device.index not in numbers:
        found = ", ".join(f"{gpu.name} ({gpu.problem or 'usable'})" for gpu in (*node.gpus, *node.unusable)) or "no GPU"
        sys.exit(f"{device} is {torch.cuda.get_device_name(device)}, and the probe found {found}")
    return numbers[device.index]


def checks_of(name: str, bench: Bench) -> list[Check]:
    """All that one part finds; an error of its own is one more finding."""
    found: list[Check] = []
    try:
        for check in PARTS[name](bench):
            found.append(replace(check, part=name))
            print(table(found[-1:]).splitlines()[0], flush=True)
    except Exception as error:  # the next part may still tell something
        found.append(replace(raised("went through", error), part=name))
    with contextlib.suppress(RuntimeError):  # a card that an error took along refuses this too
        bench.clear()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda:0")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="sizes for a dry run; costs are not judged")
    parser.add_argument("--out", type=Path, default=Path("first_contact.json"))
    asked = parser.parse_args(arguments)
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: there is no such part; there are {', '.join(PARTS)}")
    began = time.perf_counter()
    bench = looked_at(asked.device, asked.small)
    checks = [check for name in names for check in checks_of(name, bench)]
    print(f"\n{table(checks)} in {time.perf_counter() - began:.0f} s on {bench.capability.name}")
    write(asked.out, _about(bench), checks)
    return int(any(check.verdict == "failed" for check in checks))


def _about(bench: Bench) -> dict[str, Any]:
    return {
        "card": bench.capability.name,
        "device": str(bench.device),
        "torch": torch.__version__,
        "built_for": torch.version.cuda or torch.version.hip or "cpu",
        "small": bench.is_small,
    }


if __name__ == "__main__":
    sys.exit(main())
