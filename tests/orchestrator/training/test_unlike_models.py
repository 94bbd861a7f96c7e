"""Machines that hold different base models are named before anything trains."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from orchestrator.errors import JobError
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.setup import refuse_unlike_models
from tests.processes import run_ranks


def member(rank, size, port, nodes, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    (node, folder), slot = nodes[rank], [name for name, _ in nodes[:rank]].count(nodes[rank][0])
    part = SimpleNamespace(node=node)
    context = WorkerContext(None, None, part, str(folder), torch.device("cpu"), ProcessGroup(rank, size), slot)
    try:
        refuse_unlike_models(context)
        said = None
    except JobError as error:
        said = str(error)
    torch.save(said, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def said_by(nodes, out):
    run_ranks(member, len(nodes), nodes, out)
    return [torch.load(out / f"{rank}.pt") for rank in range(len(nodes))]


@pytest.fixture
def other_model(model_folder, tmp_path):
    """The same model but for one digit of its configuration and one more file."""
    folder = tmp_path / "other"
    shutil.copytree(model_folder, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("1e-06", "1e-05") + " ")
    (folder / "vocab.txt").write_text("a")
    return folder


def test_all_workers_refuse_models_that_differ_by_both_names_and_the_files(model_folder, other_model, tmp_path):
    nodes = [("desktop", model_folder), ("laptop", other_model), ("laptop", other_model)]

    said = said_by(nodes, tmp_path)

    text = (
        f"model.model_name_or_path: {model_folder} on desktop is not the model of {other_model} on laptop"
        " (config.json; vocab.txt). Copy it from one machine to the others"
    )
    assert said == [text] * 3


def test_equal_models_of_other_folders_are_one_model(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "copy")

    assert said_by([("desktop", model_folder), ("laptop", tmp_path / "copy")], tmp_path) == [None, None]
