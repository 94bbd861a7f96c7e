"""Memory that runs out on one stage in an evaluation, an update or the preflight: all stages answer it together."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from orchestrator.data.dataset import Dataset
from orchestrator.errors import NothingFits
from orchestrator.training.evaluate import Generation, evaluate_loss, generate_answers
from orchestrator.training.workers import preflight
from strategies.workload import StagePart
from tests.orchestrator.training.test_pipeline import LAYERS, deep_model
from tests.orchestrator.training.test_stages import FP16, PLAIN, WIDE, group_of, nothing, set_up, trained
from tests.processes import run_ranks

__all__ = ["deep_model"]
ONE = ((0, 1, 2),)  # ranks of the stages of each pipeline
TWO = ((0, 1), (2, 3))
EDGES = {ONE: (0, 1, 3, LAYERS), TWO: (0, 3, LAYERS)}
ROWS, NEW_TOKENS = 4, 3


def stage_of(rank, pipelines):
    index, edges = next(ranks.index(rank) for ranks in pipelines if rank in ranks), EDGES[pipelines]
    return StagePart(index, len(edges) - 1, edges[index], edges[index + 1])


@contextlib.contextmanager
def refusing(setup, is_too_much):
    """The allocator refuses what a layer of this stage needs for some hidden states (rows, tokens)."""

    def refuse(module, inputs):
        if is_too_much(*inputs[0].shape[:2]):
            raise WIDE

    own = [module for name, module in setup.model.named_modules() if name.endswith(".mlp.down_proj.lora_A.default")]
    handle = own[-1].register_forward_pre_hook(refuse)
    yield
    handle.remove()


class Between:
    """Refuses from one number of rows on, while so many tokens go in at once."""

    def __init__(self, rows, least=1, most=10**9):
        self.rows, self.least, self.most = rows, least, most

    def __call__(self, rows, tokens):
        return rows >= self.rows and self.least <= tokens <= self.most


def shortages(data):
    """What a layer has no memory for, by name."""
    longest = max(len(data.prompt(index)[0]) for index in range(ROWS))
    return {
        "nothing": Between(10**9),
        "two rows": Between(2),
        "two rows of a further token": Between(2, most=1),
        "the longest prompt": Between(1, least=longest),
        "everything": Between(1),
    }


MIDDLE = ("nothing", "two rows", "two rows of a further token", "the longest prompt", "everything")
STRIKES = {  # what is refused, and on which worker
    ONE: [*((name, 1) for name in MIDDLE), ("two rows", 0), ("two rows", 2), ("two rows of a further token", 2)],
    TWO: [("two rows", 1), ("everything", 2)],
}


def measured(setup, group, data, tokenizer):
    """Loss and answers, or why there are none."""
    try:
        loss = evaluate_loss(setup, data, PLAIN, group)
    except NothingFits as error:
        loss = str(error)
    mine = range(ROWS)[group.replica :: group.num_replicas]
    how = Generation(NEW_TOKENS, "float32", passes=setup.passes)
    return loss, [vars(one) for one in generate_answers(setup.model, tokenizer, data, mine, how)]


def evaluating(rank, size, port, folder, data_folder, pipelines, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    data, tokenizer = Dataset.load(data_folder).select(range(ROWS)), AutoTokenizer.from_pretrained(folder)
    techniques = dataclasses.replace(PLAIN, stage=stage_of(rank, pipelines))
    setup, found = set_up(folder, techniques, "sgd", pipelines), {}
    for name, struck in STRIKES[pipelines]:
        with refusing(setup, shortages(data)[name if rank == struck else "nothing"]):
            found[name, struck] = measured(setup, group_of(rank, pipelines), data, tokenizer)
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("pipelines", [ONE, TWO], ids=["a pipeline", "two"])
def test_stages_evaluate_in_fewer_rows_together(pipelines, deep_model, data_folder, tmp_path):
    data, tokenizer = Dataset.load(data_folder).select(range(ROWS)), AutoTokenizer.from_pretrained(deep_model)
    whole, expected = set_up(deep_model, PLAIN, "sgd", None), {}
    for name, is_too_much in shortages(data).items():
        with refusing(whole, is_too_much):
            expected[name] = measured(whole, group_of(0, ((0,),)), data, tokenizer)
    size = sum(map(len, pipelines))

    run_ranks(evaluating, size, deep_model, data_folder, pipelines, tmp_path)

    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for (name, struck), rank in itertools.product(found[0], range(size)):
        replica, of_struck = (group_of(one, pipelines).replica for one in (rank, struck))
        loss, answers = found[rank][name, struck]
        fit = expected[name if replica == of_struck else "nothing"][1]
        assert answers == [one for one in expected["nothing"][1][replica :: len(pipelines)] if one in fit]
        if isinstance(expected[name][0], float):
            assert loss == pytest.approx(expected["nothing"][0], rel=1e-6)
        else:
            stage = stage_of(struck, pipelines)
            assert loss == expected[name][0].replace("fits: ", f"fits: stage {stage.index + 1} of {stage.count}: ")
    assert 0 < len(expected["the longest prompt"][1]) < ROWS == len(expected["two rows"][1])


def updating(rank, size, port, folder, data_folder, techniques, pipelines, strike, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    own = dataclasses.replace(techniques, stage=stage_of(rank, pipelines))
    here = strike if rank == 1 else nothing
    outcome = trained(folder, data_folder, own, here, optim="adamw_torch", rank=rank, pipelines=pipelines)
    torch.save(outcome.end, f"{out}/{rank}.pt")
    dist.destroy_process_group()


class InUpdate:
    """The allocator refuses in the optimizer's step of this number, before it or after weights have moved."""

    def __init__(self, number, after=False):
        self.number, self.after = number, after

    def __call__(self, setup):
        steps = itertools.count(1)

        def refuse(*_):
            if next(steps) == self.number:
                raise WIDE

        hang = setup.optimizer.register_step_post_hook if self.after else setup.optimizer.register_step_pre_hook
        hang(refuse)


class InNorm:
    """The allocator refuses when a gradient's norm is computed for the time of this number."""

    def __init__(self, number):
        self.number = number

    def __call__(self, setup):
        norms, norm_of, weight = itertools.count(1), torch.linalg.vector_norm, next(iter(setup.parameters.values()))

        def refuse(tensor, *arguments, **others):
            if tensor is weight.grad and next(norms) == self.number:
                raise WIDE
            return norm_of(tensor, *arguments, **others)

        torch.linalg.vector_norm = refuse


@pytest.mark.parametrize(
    ("techniques", "pipelines", "strike"),
    [
        (PLAIN, ONE, InUpdate(1)),
        (PLAIN, ONE, InUpdate(3, after=True)),
        (PLAIN, TWO, InUpdate(2, after=True)),
        (PLAIN, ONE, InNorm(2)),
        (PLAIN, TWO, InNorm(3)),
        (FP16, ONE, InNorm(3)),
        (FP16, ONE, InNorm(4)),
    ],
    ids=[
        "first",
        "last, weights moved",
        "second of two pipelines",
        "norm",
        "last norm of two pipelines",
        "first norm of fp16",
        "second norm of fp16",
    ],
)
def test_an_update_that_does_not_fit_on_one_stage_ends_all_workers(
    techniques, pipelines, strike, deep_model, data_folder, tmp_path
):
    size = sum(map(len, pipelines))

    run_ranks(updating, size, deep_model, data_folder, techniques, pipelines, strike, tmp_path)

    text = f"the optimizer's update does not fit: worker 1: {WIDE}. Choose a train.optim with less state, or"
    for rank in range(size):
        assert torch.load(tmp_path / f"{rank}.pt") == f"does not fit: {text} strategy.offload: optimizer"


def checking(rank, size, port, folder, data_folder, strikes, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    data, techniques = Dataset.load(data_folder), dataclasses.replace(PLAIN, stage=stage_of(rank, ONE))
    setup, found = set_up(folder, techniques, "adamw_torch", ONE), []
    for strike in strikes:
        with refusing(setup, strike) if rank == 1 and not isinstance(strike, InUpdate) else contextlib.nullcontext():
            if rank == 1 and isinstance(strike, InUpdate):
                strike(setup)
            with pytest.raises(NothingFits) as refusal:
                preflight.check(setup, data, data, techniques, 4, out / str(rank))
            found.append(str(refusal.value))
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


class InEvaluation(Between):
    """Refuses where no gradients are computed."""

    def __call__(self, rows, tokens):
        return not torch.is_grad_enabled()


def test_a_preflight_that_fails_on_one_stage_fails_on_all(deep_model, data_folder, tmp_path):
    run_ranks(checking, 3, deep_model, data_folder, [Between(2), InEvaluation(1), InUpdate(2)], tmp_path)

    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert others == [first] * 2
    passes, evaluation, update = first
    assert passes.startswith(f"preflight: the longest batch does not fit on cpu: stage 2 of 3: {WIDE}")
    assert evaluation == f"not even one held-out row at a time fits: stage 2 of 3: {WIDE}"
    assert update == passes
