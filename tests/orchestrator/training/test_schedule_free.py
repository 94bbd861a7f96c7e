"""Runs with a schedule-free optimizer: the average is what is measured, chosen, handed back and loaded again."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.runs.events import Evaluation, StepReport
from orchestrator.training import checkpoint
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.shares import Shares
from orchestrator.training.workers import finished
from orchestrator.training.workers.worker import work
from strategies.step.optimizers import evaluated_weights
from strategies.workload import Techniques
from tests.cases.training import begun, trained
from tests.conftest import rows, write_jsonl
from tests.orchestrator.training.test_loop import ONE_BY_ONE, close
from tests.orchestrator.training.test_loop import run as run_loop
from tests.processes import run_ranks

RATES = {"schedule_free_adamw": 3e-2, "schedule_free_sgd": 3.0}
PACKED = Techniques("float32", "document", True, False, 8, 64)


@pytest.fixture(scope="module")
def job_file(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(20))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "method: {type: lora, lora_r: 4}\n"
        "data: {train: train.jsonl, eval: {split: 0.2}, max_length: 64}\n"
        "train: {max_steps: 6, global_batch_size: 4, learning_rate: 3e-2, warmup_steps: 2,"
        " optim: schedule_free_adamw}\n"
        "eval: {max_new_tokens: 4, metrics: [exact_match], eval_steps: 1}\n"
        "checkpoint: {save_steps: 2, save_total_limit: 9, load_best_model_at_end: false}\n"
    )
    return folder / "job.yaml"


@pytest.fixture(scope="module", params=RATES)
def run(request, job_file):
    return trained(job_file, *as_stated(request.param), name=request.param)


def as_stated(optim):
    return f"train.optim={optim}", f"train.learning_rate={RATES[optim]}"


def exported(run):
    return load_file(run.exported() / "adapter_model.safetensors")


def average_of(run, step):
    """x of a checkpoint, by its y and z: (y - (1 - beta) z) / beta."""
    folder = run.checkpoints / f"step-{step:08d}"
    y, state = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
    named = {name.replace(".default.", "."): (y[name], state[f"{name}//z"]) for name in y}
    averages = {name: (one - 0.1 * z) / 0.9 for name, (one, z) in named.items()}
    return averages, {name: one for name, (one, _) in named.items()}


def test_the_adapter_that_is_handed_back_is_the_average_and_not_what_was_trained(run):
    found = exported(run[0])

    average, trained_weights = average_of(run[0], 6)

    assert found.keys() == average.keys()
    assert all(torch.allclose(found[name], average[name], rtol=1e-4, atol=1e-6) for name in found)
    assert any((found[name] - trained_weights[name]).abs().max() > 1e-3 for name in found)


def test_what_was_measured_in_training_is_what_the_adapter_gives_when_it_is_loaded_again(run):
    done, job = run
    measured = {event.step: event.eval_loss for event in done.events_of(Evaluation)}

    again = finished.evaluate(done, job, datasets(done.data())[1])

    assert again["eval_loss"] == pytest.approx(measured[6], rel=1e-6)
    assert done.result().after.eval_loss == measured[6]
    assert done.result().values["handed_back"]["check"]["largest_difference"] == 0.0


def test_the_rate_rises_with_the_warm_up_and_then_stays(run):
    rates = [event.learning_rate for event in run[0].events_of(StepReport)]

    highest = run[1].spec.train.learning_rate
    assert rates == pytest.approx([highest / 2, *[highest] * 5])


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(run, job_file):
    optim = run[1].spec.train.optim
    stopped, _, node = begun(job_file, *as_stated(optim), name=f"stopped-{optim}")
    save = checkpoint.save

    def saved(folder, held, state):
        if state["step"] == 2:
            stopped.stop_file.touch()
        return save(folder, held, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.training.workers.worker.checkpoint.save", saved)
        work(stopped, 0, 1, node, 0)
    assert 2 < max(stopped.steps()) < 6
    stopped.stop_file.unlink()
    work(stopped, 0, 1, node, 0)

    whole, found = exported(run[0]), exported(stopped)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert [event.eval_loss for event in stopped.events_of(Evaluation)] == [
        event.eval_loss for event in run[0].events_of(Evaluation)
    ]


def test_evaluating_changes_no_bit_of_what_is_handed_back(job_file):
    often = trained(job_file, name="measured")[0]

    never = trained(job_file, "eval.eval_steps=null", name="unmeasured")[0]

    one, other = exported(often), exported(never)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_step_s_average_is_handed_back_where_a_later_one_was_worse(job_file):
    """Losses of another order than theirs make an earlier step the best one."""
    run, _, node = begun(job_file, "checkpoint.load_best_model_at_end=true", name="best")
    save = checkpoint.save

    def saved(folder, held, state):
        losses = {step: 1.0 + abs(int(step) - 4) for step in state["eval_losses"]}
        return save(folder, held, state | {"eval_losses": losses})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.training.workers.worker.checkpoint.save", saved)
        work(run, 0, 1, node, 0)  # the losses of its own evaluations choose
    shutil.rmtree(run.exported())
    run.take_back("result.json")
    work(run, 0, 1, node, 0)  # and those of the checkpoint, as after a restart

    found, (average, _) = exported(run), average_of(run, 4)
    assert run.result().values["handed_back"]["step"] == 4
    assert all(torch.allclose(found[name], average[name], rtol=1e-4, atol=1e-6) for name in found)


def member(rank, size, port, model_folder, data_folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    group = ProcessGroup(rank, size, bucket_bytes=20_000)
    layout = (PACKED, ONE_BY_ONE)[rank]
    losses, gradients, setup = run_loop(
        model_folder, data_folder, layout, group, 6, optim="schedule_free_adamw", shares=Shares([0.7, 0.3])
    )
    with evaluated_weights(setup):
        averages = [parameter.detach().clone() for parameter in setup.parameters.values()]
    torch.save((losses, gradients, averages), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_unequal_workers_train_and_average_as_one(model_folder, data_folder, tmp_path):
    alone = run_loop(model_folder, data_folder, ONE_BY_ONE, steps=6, optim="schedule_free_adamw")
    with evaluated_weights(alone[2]):
        expected = [parameter.detach().clone() for parameter in alone[2].parameters.values()]

    run_ranks(member, 2, str(model_folder), data_folder, str(tmp_path))

    for rank in range(2):
        losses, gradients, averages = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert losses == pytest.approx(alone[0], rel=1e-4)
        close((losses[:2], gradients[:2]), (alone[0][:2], alone[1][:2]))  # later ones by what Adam makes of rounding
        for one, other in zip(averages, expected, strict=True):
            assert (one - other).norm() <= 1e-2 * other.norm() + 1e-6


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.lr_scheduler_type=cosine"], "averages its way instead of lowering the rate: remove it"),
        (["train.optim=schedule_free_radam"], "train.warmup_steps: schedule_free_radam warms up by itself"),
        (["train.adam_beta1=0"], "train.adam_beta1 is 0, and schedule_free_adamw averages by it"),
        (["strategy.local_steps=2"], "keeps another average of its own"),
    ],
)
def test_what_it_cannot_be_combined_with_is_told(overrides, told, job_file):
    with pytest.raises(JobError, match=told):
        begun(job_file, *overrides, name="refused")


def test_a_constant_schedule_may_be_stated(job_file):
    spec = read_job(job_file, ["train.lr_scheduler_type=constant_with_warmup"]).spec

    assert spec.train.lr_scheduler_type == "constant_with_warmup"


def test_the_versions_of_a_result_name_the_package(run):
    assert json.loads((run[0].path / "result.json").read_text())["versions"]["schedulefree"]
