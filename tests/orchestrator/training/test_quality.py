"""Workers of unequal speed share the held-out rows of an evaluation as they share a step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from clusters.capability import ClusterCapability
from orchestrator.data.dataset import Dataset
from orchestrator.job.job_file import parse_job
from orchestrator.planning import planner, workload
from orchestrator.progress.updates import reporting_to
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.worker_context import WorkerContext
from orchestrator.training.workers.quality import measure
from strategies import METHODS
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.orchestrator.planning.machines import TINY, machine
from tests.processes import run_ranks

SHARES = (0.75, 0.25)
JOB = (
    "model: {model_name_or_path: m, dtype: float32}\ndata: {train: a.jsonl, max_length: 64}\n"
    "eval: {max_rows: 16, max_new_tokens: 6, num_samples: 0}\n"
)


def measured(model_folder, data_folder, share=1.0, group=None):
    """What an evaluation says, and the rows whose loss and the prompts whose answer this worker computed."""
    torch.manual_seed(0)
    techniques, job = Techniques("float32", "sdpa", False, False, 2, 64), parse_job(JOB, Path())
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    setup = METHODS["lora"]().setup(model, TrainSettings(1e-2, 0.0, "sgd", 0.9, 0.999, 1e-8, techniques, 3))
    work, _, _ = workload.describe(job.spec, TINY, [64] * 32, 1024, 1)
    plan = planner.make_plan(job.spec, work, ClusterCapability((machine("a"),)), 64, None, {})
    plan, part = replace(plan, metrics=("rouge_l",), max_new_tokens=6), replace(plan.nodes[0], share=share)
    context = WorkerContext(job, plan, part, "", torch.device("cpu"), group or ProcessGroup())
    counts: dict[str, int] = {}
    with reporting_to(lambda update: counts.update({update.phase: update.total})):
        found = measure(
            context, setup, techniques, AutoTokenizer.from_pretrained(model_folder), Dataset.load(Path(data_folder))
        )
    return found, counts


def member(rank, size, port, model_folder, data_folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    torch.save(measured(model_folder, data_folder, SHARES[rank], ProcessGroup(rank, size)), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_divide_held_out_rows_as_planned_and_find_what_one_finds(model_folder, data_folder, tmp_path):
    run_ranks(member, 2, str(model_folder), str(data_folder), str(tmp_path))

    (first, mine), (second, theirs) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    whole, _ = measured(model_folder, data_folder)
    for found in (first, second):
        assert found["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
        assert (found["answers"], found["rouge_l"]) == (16, pytest.approx(whole["rouge_l"]))
    assert (mine["answers"], theirs["answers"]) == (12, 4)
    assert mine["evaluation"] + theirs["evaluation"] == 24 and mine["evaluation"] > 2 * theirs["evaluation"]
