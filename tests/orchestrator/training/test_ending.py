"""The end of a run: handed back before it is measured, measured in what it was trained in, one model at a time."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.prepare import datasets
from orchestrator.errors import JobError
from orchestrator.runs.condition import exported_whole
from orchestrator.runs.events import FinalEvaluation, Note, StateChange
from orchestrator.training.determinism import deterministic, resume_note
from orchestrator.training.model import merged
from orchestrator.training.model.loading import placement_arguments
from orchestrator.training.workers import finished, quality
from orchestrator.training.workers.quality import num_cut_short
from orchestrator.training.workers.worker import work
from tests.cases.training import begun, trained
from tests.conftest import rows, write_jsonl


@pytest.fixture(scope="module")
def job_file(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_jsonl(folder / "train.jsonl", rows(20))
    (folder / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: bfloat16}}\n"
        "method: {type: lora, lora_r: 4}\n"
        "data: {train: train.jsonl, eval: {split: 0.2}}\n"
        "train: {max_steps: 2, global_batch_size: 4, learning_rate: 3e-2}\n"
        "eval: {max_new_tokens: 4, metrics: [exact_match]}\n"
    )
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def finished_run(job_file):
    return trained(job_file, name="finished")


class Killed(BaseException):
    """The end of a process, as far as its own code can see it."""


@contextlib.contextmanager
def at_every_layer(do):
    from torch.nn.modules.module import register_module_forward_pre_hook

    hook = register_module_forward_pre_hook(lambda module, _: do(module))
    try:
        yield
    finally:
        hook.remove()


def killed_in_the_last_evaluation(run, node):
    def begun_evaluations():
        return len(run.events_of(FinalEvaluation))

    before = begun_evaluations()

    def kill(module):
        if type(module).__name__ == "LlamaMLP" and begun_evaluations() > before:
            raise Killed

    with at_every_layer(kill), pytest.raises(Killed):
        work(run, 0, 1, node, 0)


def test_a_run_that_is_killed_in_its_last_evaluation_has_handed_its_result_back(job_file):
    run, job, node = begun(job_file, name="killed")

    killed_in_the_last_evaluation(run, node)

    held_out = datasets(run.data())[1]
    assert exported_whole(run).name == "adapter" and run.state_by_events() != "finished"
    assert run.result().after is None and run.result().steps == 2
    assert "28 of the 28 weights" in run.result().check
    assert finished.evaluate(run, job, held_out)["answers"] == len(held_out)

    work(run, 0, 1, node, 0)

    assert run.state_by_events() == "finished" and run.result().after.answers == len(held_out)
    assert run.result().values["handed_back"]["check"]["largest_difference"] == 0.0


# Two packed rows of 64 tokens hold all held-out rows, one does not: fewer at a time are other sums.
IN_TWO_ROWS = ("model.dtype=float32", "data.max_length=64", "train.per_device_train_batch_size=2")


@pytest.fixture(scope="module")
def undisturbed(job_file):
    return trained(job_file, *IN_TWO_ROWS, "eval.eval_steps=1", name="undisturbed")[0].result().after


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_killed_in_its_last_evaluation_a_run_ends_with_the_loss_of_one_that_was_not(job_file, undisturbed, kills):
    run, _, node = begun(job_file, *IN_TWO_ROWS, "eval.eval_steps=1", name=f"killed-{kills}-times")
    for _ in range(kills):
        killed_in_the_last_evaluation(run, node)

    work(run, 0, 1, node, 0)

    after = run.result().after
    assert after.eval_loss == undisturbed.eval_loss and after.rows == undisturbed.rows
    assert after.answers == (undisturbed.answers if kills < 3 else None)  # after three it is not tried again


def test_where_training_measured_no_loss_fewer_rows_are_evaluated_after_a_kill_and_it_is_said(job_file):
    run, _, node = begun(job_file, *IN_TWO_ROWS, "eval.eval_steps=null", name="killed-unmeasured")
    killed_in_the_last_evaluation(run, node)

    work(run, 0, 1, node, 0)

    assert [event.rows for event in run.events_of(FinalEvaluation)] == [2, 1]
    assert "at most 1 x 64 tokens at a time: its loss is equal up to rounding" in run.events_of(Note)[-1].text


def test_an_evaluation_that_ends_the_process_every_time_is_not_tried_for_ever(job_file):
    run, _, node = begun(job_file, name="killed-thrice")
    for _ in range(3):
        killed_in_the_last_evaluation(run, node)

    work(run, 0, 1, node, 0)

    notes = [event.text for event in run.events_of(Note)]
    assert run.state_by_events() == "finished" and run.result().after is None
    assert "the last evaluation ended the process 3 times and is not tried again; `orchestrator evaluate" in notes[-1]


def test_the_optimizer_is_let_go_of_before_the_result_is_measured(job_file, monkeypatch):
    """What it holds on a card is the room that an evaluation needs."""
    seen, measure = [], quality.measure_last

    def looked_at(run, context, inputs, known_loss):
        setup = inputs.setup
        gradients = [parameter.grad for parameter in setup.parameters.values() if parameter.grad is not None]
        seen.append((len(setup.parameters), len(setup.optimizer.state), len(gradients)))
        return measure(run, context, inputs, known_loss)

    monkeypatch.setattr(quality, "measure_last", looked_at)
    trained(job_file, name="let-go")

    assert seen == [(28, 0, 0)]


BEGUN, FINISHED = FinalEvaluation(rows=4), StateChange("finished")


@pytest.mark.parametrize(
    ("events", "count"),
    [([], 0), ([BEGUN], 1), ([BEGUN, BEGUN], 2), ([BEGUN, FINISHED], 0), ([BEGUN, BEGUN, FINISHED, BEGUN], 1)],
)
def test_evaluations_that_were_cut_short_are_counted_since_the_run_finished(events, count):
    assert num_cut_short(events) == count


@pytest.fixture
def loaded(monkeypatch):
    """The dtypes of the models that transformers loads from now on."""
    dtypes, load = [], AutoModelForCausalLM.from_pretrained

    def counted(*arguments, **keywords):
        dtypes.append(keywords["dtype"])
        return load(*arguments, **keywords)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    return dtypes


def test_evaluate_loads_one_model_in_the_runs_precision_and_finds_what_the_run_found(finished_run, loaded):
    run, job = finished_run

    found = finished.evaluate(run, job, datasets(run.data())[1])

    assert loaded == [torch.bfloat16]
    after = run.result().after
    assert "exact_match" in after.scores and after.scores == {key: found[key] for key in after.scores}


def test_merge_loads_no_model_in_more_precision_than_it_writes(finished_run, loaded, model_folder, tmp_path):
    run, job = finished_run

    result = finished.merge(run, job, tmp_path / "merged")

    stored = merged.stored_dtype(model_folder)
    assert loaded == [getattr(torch, stored)] * 2 and result.largest_difference <= result.tolerance


def test_generation_is_timed_in_the_precision_that_was_trained(finished_run, loaded):
    run, job = finished_run

    names = [name for name, _ in finished.variants(run, finished.context_of(run, job))]

    assert names == ["base", "adapter", "merged"] and loaded == [torch.bfloat16] * 2


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_kernels_are_chosen_for_the_run_that_asks_for_them_and_for_no_other(job_file, asked):
    seen = set()

    with at_every_layer(lambda module: seen.add(torch.are_deterministic_algorithms_enabled())):
        trained(job_file, f"train.deterministic={str(asked).lower()}", name=f"deterministic-{asked}")

    assert seen == {asked}
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("devices", "asked", "stay", "promised"),
    [
        (["cpu"], False, False, True),
        (["cuda"], False, False, False),
        (["cuda"], True, True, True),
        (["cpu", "cpu"], False, True, True),
        (["cpu", "cpu"], False, False, False),  # shares that are measured anew
        (["cpu", "cuda"], False, True, False),
        (["cuda", "cuda"], True, True, False),
    ],
)
def test_a_bit_equal_resume_is_promised_where_it_holds(devices, asked, stay, promised):
    assert resume_note(devices, asked, stay).startswith("bit-equal") == promised


def test_an_operation_without_a_deterministic_kernel_is_named_with_the_way_out():
    with pytest.raises(JobError, match=r"train.deterministic: put_.*Set it to false"), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))

    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("device", "arguments"), [("cuda:1", {"device_map": {"": torch.device("cuda:1")}}), ("cpu", {})]
)
def test_weights_go_from_their_file_straight_to_a_gpu(device, arguments):
    assert placement_arguments(torch.device(device)) == arguments


def test_transformers_takes_a_device_for_all_weights(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, device_map={"": torch.device("meta")})

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
