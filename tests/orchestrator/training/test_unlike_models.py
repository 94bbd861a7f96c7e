"""Base models that differ between machines, or come out wrong in stages, are refused before anything trains."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING

from orchestrator.errors import JobError
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.setup import refuse_unlike_models, refuse_wrong_family
from strategies.families import FAMILIES
from tests.processes import run_ranks


def member(rank, size, port, nodes, refuse, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    (node, folder), slot = nodes[rank], [name for name, _ in nodes[:rank]].count(nodes[rank][0])
    part = SimpleNamespace(node=node)
    context = WorkerContext(None, None, part, str(folder), torch.device("cpu"), ProcessGroup(rank, size), slot)
    try:
        refuse(context)
        said = None
    except JobError as error:
        said = str(error)
    torch.save(said, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def said_by(nodes, out, refuse=refuse_unlike_models):
    run_ranks(member, len(nodes), nodes, refuse, out)
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


@pytest.mark.parametrize(
    ("name", "config"),
    [("gpt2", {}), ("opt", {}), ("granite", {"embedding_multiplier": 12.0}), ("llama", {}), ("gemma3_text", {})],
)
def test_a_family_that_comes_out_wrong_in_stages_is_refused_by_all_workers(name, config, tmp_path):
    CONFIG_MAPPING[name](**config).save_pretrained(tmp_path / "model")
    (tmp_path / "away").mkdir()  # the others need no model for it
    nodes = [("desktop", tmp_path / "model"), ("laptop", tmp_path / "away"), ("attic", tmp_path / "away")]

    first, *others = said_by(nodes, tmp_path, refuse_wrong_family)

    assert others == [first] * 2
    if not FAMILIES[name].uncut:
        assert first is None
        return
    found = re.fullmatch(
        rf"model.model_name_or_path: {name} models are not cut into stages: a small one in two differs from itself in"
        r" one piece by (\S+) of what it computes: set strategy.mode: auto",
        first,
    )
    assert found and float(found[1]) > 0.1
