"""Memory runs out on one of three workers, at every place where it can: all agree, and the result is handed back."""

import contextlib
import dataclasses
import sys

import pytest
import torch

from orchestrator.errors import NothingFits
from orchestrator.runs.condition import exported_whole
from orchestrator.runs.events import Note
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.parallel import GradientSum
from orchestrator.training.workers import worker
from tests.cases.training import begun
from tests.conftest import rows, write_jsonl
from tests.processes import run_ranks

SIZE, STRUCK = 3, 1  # workers, and the one whose memory runs out
WIDE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@contextlib.contextmanager
def rows_refused(most, training):
    """The allocator refuses what more than `most` rows need, in training passes or in those of an evaluation."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    def refuse(module, inputs):
        if type(module).__name__ == "LlamaMLP" and module.training == training and inputs[0].shape[0] > most:
            raise WIDE

    hook = register_module_forward_pre_hook(refuse)
    yield
    hook.remove()


@contextlib.contextmanager
def cache_refused():
    """The allocator refuses keys and values of more than one prompt."""
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def refuse(self, keys, *rest, **named):
        if keys.shape[0] > 1:
            raise WIDE
        return update(self, keys, *rest, **named)

    DynamicLayer.update = refuse
    yield
    DynamicLayer.update = update


@contextlib.contextmanager
def update_broken_off(number):
    """The `number`-th update moves one weight, then memory runs out."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    calls = []

    def refuse(optimizer, *_):
        calls.extend([optimizer] if isinstance(optimizer, torch.optim.AdamW) else [])
        if len(calls) == number and calls[-1] is optimizer:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].add_(1.0)
            raise WIDE

    hook = register_optimizer_step_pre_hook(refuse)
    yield
    hook.remove()


@contextlib.contextmanager
def bucket_refused(number):
    """The `number`-th bucket of gradients finds no room to be put together in."""
    cat, calls = torch.cat, []

    def refuse(tensors, *rest, **named):
        if sys._getframe(1).f_code.co_name == "_send":
            calls.append(1)
            if len(calls) == number:
                raise WIDE
        return cat(tensors, *rest, **named)

    torch.cat = refuse
    yield
    torch.cat = cat


@contextlib.contextmanager
def sum_refused(number):
    """The sums of the `number`-th step find no room on the device."""
    finish, calls = GradientSum.finish, []

    def refuse(self):
        calls.append(1)
        if len(calls) != number:
            return finish(self)
        self.flush()
        for _, work in self._sent:
            work.wait()
        raise WIDE

    GradientSum.finish = refuse
    yield
    GradientSum.finish = finish


CASES = {
    "nowhere": contextlib.nullcontext,
    "forward": lambda: rows_refused(1, training=True),
    "bucket": lambda: bucket_refused(5),
    "sums": lambda: sum_refused(1),
    "first_update": lambda: update_broken_off(1),
    "later_update": lambda: update_broken_off(2),
    "evaluation": lambda: rows_refused(1, training=False),
    "any_evaluation": lambda: rows_refused(0, training=False),
    "generation": cache_refused,
    "everywhere": lambda: update_broken_off(2),
}


def member(rank, size, port, folders):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for name, folder in folders.items():
        run = RunFolder(folder)
        strikes = CASES[name] if rank == STRUCK or name == "everywhere" else contextlib.nullcontext
        with strikes():
            try:
                worker.work(run, rank, size, f"n{rank}", 0)
            except NothingFits as error:
                (run.path / f"does-not-fit-{rank}").write_text(str(error))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def among_three(plan):
    parts = [dataclasses.replace(plan.nodes[0], node=f"n{rank}", share=1 / SIZE, threads=1) for rank in range(SIZE)]
    return dataclasses.replace(plan, nodes=tuple(parts))


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Every case, trained by the same three processes."""
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(40))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32, attn_implementation: sdpa}}\n"
        "method: {type: lora, lora_r: 4}\n"
        "data: {train: train.jsonl, eval: {split: 0.2}, packing: false}\n"
        "train: {max_steps: 3, global_batch_size: 12, per_device_train_batch_size: 4, learning_rate: 1e-2}\n"
        "eval: {max_new_tokens: 3, eval_steps: 2, metrics: [exact_match]}\n"
        "strategy: {shares: planned}\n"
    )
    begun_runs = {name: begun(folder / "job.yaml", name=name, divide=among_three)[0] for name in CASES}

    run_ranks(member, SIZE, {name: run.path for name, run in begun_runs.items()})

    return begun_runs


def losses(run):
    return [event.loss for _, event in sorted(run.steps().items())]


def notes(run):
    return [event.text for event in run.events_of(Note)]


@pytest.mark.parametrize(
    "name", ["forward", "bucket", "sums", "first_update", "later_update", "evaluation", "generation"]
)
def test_memory_that_runs_out_on_one_worker_changes_neither_the_losses_nor_the_result(runs, name):
    run, plain = runs[name], runs["nowhere"]

    assert run.state_by_events() == "finished" and exported_whole(run).name == "adapter"
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5) and len(losses(run)) == 3
    ours, theirs = run.result().after, plain.result().after
    assert ours.eval_loss == pytest.approx(theirs.eval_loss, rel=1e-5)
    assert ours.answers == theirs.answers and ours.out_of_memory is None


@pytest.mark.parametrize("name", ["sums", "first_update", "later_update"])
def test_an_update_that_broke_off_is_taken_from_another_worker_and_said(runs, name):
    assert any(f"out of memory in the update; its result was taken from worker 0 (worker {STRUCK}" in note
               for note in notes(runs[name]))  # fmt: skip


def test_an_evaluation_that_does_not_fit_at_all_ends_no_run(runs):
    run = runs["any_evaluation"]

    result = run.result()
    assert run.state_by_events() == "finished" and exported_whole(run).name == "adapter"
    assert result.after is None and losses(run) == pytest.approx(losses(runs["nowhere"]), rel=1e-5)
    told = "\n".join(notes(run))
    assert "the result is handed back, but not measured: not even one held-out row at a time fits" in told
    assert "the held-out rows were not measured after step 2" in told


def test_an_update_that_fits_nowhere_is_refused_by_all_with_one_sentence(runs):
    run = runs["everywhere"]

    told = {(run.path / f"does-not-fit-{rank}").read_text() for rank in range(SIZE)}
    assert len(told) == 1 and "the optimizer's update does not fit: worker 0: CUDA out of memory" in told.pop()
    assert run.result() is None and len(losses(run)) == 1
