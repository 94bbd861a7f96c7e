"""Three small jobs over one model, each with data of its own.  Ray's door is a fake: workers run in this process."""

import pytest

from orchestrator.job.job_file import read_job
from orchestrator.lifecycle import run as path_of_a_job
from orchestrator.lifecycle.hooks import Quiet
from orchestrator.lifecycle.together import submit as path_of_jobs
from tests.conftest import rows, write_jsonl
from tests.orchestrator.conftest import train_here

JOB = """\
name: {name}
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{train: {name}.jsonl, eval: {name}-eval.jsonl, max_length: 64, packing: true}}
cluster: {{num_workers: {workers}}}
method: {{lora_r: {rank}, lora_dropout: {dropout}}}
train: {{global_batch_size: {batch}, max_steps: {steps}, learning_rate: 1e-2, max_grad_norm: {clip}}}
eval: {{max_new_tokens: 4, max_rows: 2, eval_steps: 2}}
checkpoint: {{save_steps: 2, output_dir: {runs}}}
tracking: {{report_to: []}}
"""
UNLIKE = {  # rank, dropout, batch, steps, clip
    "one": (4, 0.0, 4, 6, 1.0),
    "two": (8, 0.1, 6, 5, 0.1),
    "three": (2, 0.0, 3, 7, 0.0),
}


@pytest.fixture(scope="session")
def folder(model_folder, tmp_path_factory):
    """Job files and their data."""
    place = tmp_path_factory.mktemp("jobs")
    for number, (name, (rank, dropout, batch, steps, clip)) in enumerate(UNLIKE.items()):
        write_jsonl(place / f"{name}.jsonl", rows(20 + number, start=50 * number))
        write_jsonl(place / f"{name}-eval.jsonl", rows(4, start=50 * number + 30))
        text = JOB.format(
            name=name, model=model_folder, rank=rank, dropout=dropout, batch=batch, steps=steps, clip=clip,
            workers=1, runs=place / "runs",
        )  # fmt: skip
        (place / f"{name}.yaml").write_text(text)
    return place


def train_together_here(workers, say):
    """In place of Ray: the workers of several runs, one after the other in this process."""
    from orchestrator.training.together.worker import SharedWork

    for worker in workers:
        folders = tuple(str(live.run.path) for live in worker.runs)
        SharedWork(folders, worker.sharing.places, worker.sharing.memory)(worker.runs[0].run, 0, 1, "", 0)
    for live in (live for worker in workers for live in worker.runs):
        live.report()
    return [None] * len(workers)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(path_of_a_job, "_train_on_ray", train_here)
    monkeypatch.setattr(path_of_jobs, "_train_on_ray", train_together_here)


@pytest.fixture(scope="session")
def alone(folder):
    """Each job's run by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_of_a_job, "_train_on_ray", train_here)
        return {
            name: path_of_a_job.submit(read_job(folder / f"{name}.yaml"), Quiet(), f"alone-{name}") for name in UNLIKE
        }
