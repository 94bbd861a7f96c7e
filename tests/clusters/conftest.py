"""This machine is measured once, briefly, for all tests that need real figures."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from clusters.capability import NodeCapability
from clusters.probe.machine import look_at_this_node
from clusters.probe.node import figures_file, probe_node

BRIEF_S = 0.3


@dataclass(frozen=True)
class Measured:
    """A cache folder, the file of this machine in it, and what the probe returned that wrote it."""

    xdg_cache_home: Path
    file: Path
    node: NodeCapability


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Measured:
    """Asked to measure although figures are remembered: 7 FLOP/s.

    A machine that runs these tests is busy, and figures in doubt would be measured again by each test.
    """
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        seen = look_at_this_node()
        cpu = replace(seen.cpu, flops_per_s={"float32": 7.0}, sources={"flops_per_s.float32": "measured"})
        file = figures_file(seen.hardware_hash)
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(asdict(replace(seen, devices=(*seen.gpus, cpu)))))
        assert probe_node().cpu.flops_per_s == {"float32": 7.0}
        node = probe_node(refresh=True, seconds=BRIEF_S)
        node = replace(node, devices=tuple(replace(device, doubt=None) for device in node.devices))
        file.write_text(json.dumps(asdict(node)))
        return Measured(root, file, node)
