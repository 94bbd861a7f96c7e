"""What frozen layers make of a sample is kept on the disk, by one worker or several; no bit of a training changes."""

import dataclasses
from pathlib import Path

import pytest
import torch

from orchestrator.data.dataset import Dataset
from orchestrator.runs.events import StepReport
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.shares import Shares
from strategies.reuse.kept_states import StatesOnDisk
from strategies.reuse.lower_layers import LowerLayers
from strategies.workload import Techniques
from tests.orchestrator.training.test_loop import run
from tests.processes import run_ranks


def keeps(folder):
    """A `before` of `run`: what frozen layers make of a sample is kept on the disk."""

    def keep(setup, data):
        setup.lower = LowerLayers(setup.model, StatesOnDisk(Path(folder), pytest.fail))

    return keep


ALONE = Techniques("float32", "document", True, False, 1, 8)  # each sample is longer: a row of its own
UPPER = {"steps": 9, "options": {"layers_to_transform": [1]}, "optim": "adamw_torch_fused"}  # of three epochs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_on_the_disk_all_losses_and_weights_are_those_without(model_folder, data_folder, tmp_path, dtype):
    alone, events = dataclasses.replace(ALONE, dtype=dtype), []
    known = run(model_folder, data_folder, alone, before=keeps(tmp_path), events=events, **UPPER)

    plain = run(model_folder, data_folder, alone, **UPPER)

    assert known[0] == plain[0]
    for name, weight in plain[2].parameters.items():
        assert torch.equal(known[2].parameters[name], weight)
    steps = [event for event in events if isinstance(event, StepReport)]
    assert [event.known_tokens for event in steps] == [0, 0, 0, *(event.tokens for event in steps[3:])]


def keeping_worker(rank, size, port, model_folder, data_folder, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    events, group, shares = [], ProcessGroup(rank, 2), Shares([0.5, 0.5], is_fixed=True)
    plain, known = (
        run(model_folder, data_folder, ALONE, group, before=before, events=events, shares=shares, **UPPER)
        for before in (None, keeps(f"{out}/cache"))
    )
    counts = [event.known_tokens for event in events if isinstance(event, StepReport)][9:]
    weights = [torch.equal(known[2].parameters[name], weight) for name, weight in plain[2].parameters.items()]
    torch.save((plain[0], known[0], weights, counts), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_that_keep_what_each_has_seen_give_the_bits_of_two_that_do_not(model_folder, data_folder, tmp_path):

    run_ranks(keeping_worker, 2, str(model_folder), data_folder, str(tmp_path))

    for rank in range(2):
        plain, known, weights, counts = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert known == plain and all(weights)
        tokens = sum(Dataset.load(data_folder).lengths.tolist())
        assert counts[:3] == [0, 0, 0]
        assert 0 < sum(counts[3:6]) < tokens  # of both workers: what the other one had before is computed again
        assert sum(counts[3:6]) <= sum(counts[6:]) <= tokens
