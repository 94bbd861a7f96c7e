"""An objective trained here is one computation, however it is laid out, and the one of TRL's trainers."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from orchestrator.data.dataset import Dataset, build
from orchestrator.data.order import Order
from orchestrator.data.readers.files import read_rows
from orchestrator.data.rendering.template import Renderer
from orchestrator.data.samples import TokenizeOptions
from orchestrator.runs.events import StepReport
from orchestrator.training.evaluate import evaluate_rows
from orchestrator.training.loop import train
from orchestrator.training.model.references import compute_references
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.shares import Shares
from orchestrator.training.state import Hooks, Progress, Schedule, Training
from strategies import METHODS, OBJECTIVES
from strategies.model.heads import begin_score
from strategies.objectives.losses import build_loss
from strategies.step import document_attention
from strategies.techniques import checkpointing
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.conftest import CHAT_TEMPLATE, WORDS, question, write_jsonl
from tests.processes import run_ranks

ONE_BY_ONE = Techniques("float32", "sdpa", False, False, 1, 128)
PACKED = Techniques("float32", "document", True, False, 4, 128)
SCHEDULE = Schedule(lambda step: 1.0, 0.0, 0, 100, None, None)


def pairs(count):
    return [
        {
            "prompt": " ".join(WORDS) + " " + question(i),
            "chosen": WORDS[i % 5] + (" and " + WORDS[i % 7] if i % 3 else ""),
            "rejected": " ".join(WORDS[(i + j) % 11] for j in range(1 + i % 5)) + " no",
        }
        for i in range(count)
    ]


def labelled(count):
    """The answers of pairs, every third one a rejected one."""
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 == 0 else "chosen"], "label": i % 3 > 0}
        for i, row in enumerate(pairs(count))
    ]


def with_margins(rows):
    """Every third pair does not say how much better its chosen answer is."""
    return [row | ({"margin": 0.25 * (i % 4)} if i % 3 else {}) for i, row in enumerate(rows)]


def make_data(folder, model_folder, kind="pairs", learns_prompts=False, reads_margins=False):
    rows = labelled(16) if kind == "labelled" else with_margins(pairs(16)) if reads_margins else pairs(16)
    file = write_jsonl(folder / f"{kind}.jsonl", rows)
    renderer = Renderer(AutoTokenizer.from_pretrained(model_folder), CHAT_TEMPLATE)
    options = TokenizeOptions("auto", "", 96, "truncate", True, kind, learns_prompts, reads_margins)
    build(read_rows(file), renderer, options, folder / f"{kind}-{learns_prompts}-{reads_margins}")


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """The same pairs, with and without the prompts learnt."""
    folder = tmp_path_factory.mktemp("pairs")
    for kind in (("pairs", False), ("pairs", True), ("labelled", False), ("pairs", False, True)):
        make_data(folder, model_folder, *kind)
    return folder


def data_of(folders, objective):
    return Dataset.load(folders / f"{objective.rows}-{objective.learns_prompts}-{objective.reads_margins}")


def set_up(model_folder, techniques, objective, method="lora", learning_rate=1e-2):
    """A training as it starts."""
    document_attention.register()
    kind = AutoModelForCausalLM if objective.writes_text else AutoModelForSequenceClassification
    model = kind.from_pretrained(
        model_folder,
        dtype=torch.float32,
        attn_implementation=techniques.attn_implementation,
        **({} if objective.writes_text else {"num_labels": 1}),
        **METHODS[method]().load_arguments(techniques),
    )
    if not objective.writes_text:
        begin_score(model, 3)
    settings = TrainSettings(learning_rate, 0.0, "sgd", 0.9, 0.999, 1e-8, techniques, 3)
    setup = METHODS[method]().setup(model, settings)
    setup.objective = build_loss(objective)
    return setup


def move(setup):
    """Away from the reference."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in setup.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def run(model_folder, data, objective, techniques, group=None, shares=None, stores=False, events=None, exact=False):
    """(losses, the gradient of each step as one vector, setup) of three steps; `exact` in fp64."""
    setup = set_up(model_folder, techniques, objective)
    if exact:
        setup.model.double()
    if stores and objective.needs_reference:
        data.references = compute_references(setup, data, techniques, group or ProcessGroup())
    move(setup)
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    losses, gradients = [], []
    setup.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in setup.parameters.values()]))
    )

    def record(event):
        if isinstance(event, StepReport):
            losses.append(event.loss)
            if events is not None:
                events.append(event)

    hooks, order = Hooks(record, lambda now: "none", lambda: None), Order(len(data), 8, 5, 2.0, 3)
    train(Training(setup, data, None, order, SCHEDULE, techniques, group or ProcessGroup(), Progress(), hooks, shares))
    return losses, gradients, setup


def close(first, second, tolerance=1e-5):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert len(first[1]) == len(second[1]) == 3
    for ours, theirs in zip(first[1], second[1], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


CASES = {
    "dpo": OBJECTIVES["dpo"](),
    "ipo": OBJECTIVES["ipo"](),
    "simpo": OBJECTIVES["simpo"](),
    "cpo-simpo": OBJECTIVES["simpo"](cpo_alpha=0.7, label_smoothing=0.1),
    "orpo": OBJECTIVES["orpo"](beta=0.5),
    "kto": OBJECTIVES["kto"](beta=0.3, undesirable_weight=1.5),
    "apo_zero_unpaired": OBJECTIVES["kto"](loss_type="apo_zero_unpaired"),
    "reward": OBJECTIVES["reward"](center_rewards_coefficient=0.1),
}


@pytest.fixture(scope="module")
def one_by_one(model_folder, folders):
    """Each objective's steps, a pair at a time."""
    return {name: run(model_folder, data_of(folders, one), one, ONE_BY_ONE) for name, one in CASES.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "techniques",
    [
        dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=8),
        dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=3),
        PACKED,
        dataclasses.replace(PACKED, per_device_train_batch_size=1, gradient_checkpointing=True),
        dataclasses.replace(PACKED, share_prefixes=True),
        dataclasses.replace(PACKED, loss_type="chunked_nll"),
    ],
    ids=["8 x 1", "3 + 3 + 2", "packed", "packed and checkpointed", "beginnings shared", "chunked"],
)
def test_every_layout_gives_the_losses_and_gradients_of_one_pair_at_a_time(
    name, techniques, one_by_one, model_folder, folders
):
    objective = CASES[name]

    found = run(model_folder, data_of(folders, objective), objective, techniques)

    close(found, one_by_one[name])


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_a_stored_reference_is_the_base_with_the_adapter_off(name, one_by_one, model_folder, folders):
    objective = CASES[name]

    found = run(model_folder, data_of(folders, objective), objective, PACKED, stores=True)

    close(found, one_by_one[name])


def member(rank, size, port, model_folder, folders, out, shares, name):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    group, objective, events = ProcessGroup(rank, size, bucket_bytes=20_000), CASES[name], []
    techniques = (PACKED, dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=2))[rank]
    data = data_of(folders, objective)
    found = run(model_folder, data, objective, techniques, group, Shares(list(shares)), True, events, exact=True)
    setup, (losses, gradients, _) = found[2], found
    evaluated = evaluate_rows(setup, data, techniques, group)
    torch.save((losses, gradients, events[-1].rewards, (evaluated.loss, evaluated.rewards)), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "shares"), [("dpo", (0.7, 0.3)), ("orpo", (0.02, 0.98)), ("kto", (0.7, 0.3)), ("reward", (0.7, 0.3))]
)
def test_two_unequal_workers_give_the_gradients_and_rewards_of_one(name, shares, model_folder, folders, tmp_path):
    """In fp64: a pair's gradient is the difference of two documents', which leaves 1.05e-6 of rounding in fp32."""
    data, events = data_of(folders, CASES[name]), []
    alone = run(model_folder, data, CASES[name], ONE_BY_ONE, events=events, exact=True)
    evaluated = evaluate_rows(alone[2], data, ONE_BY_ONE, ProcessGroup())

    run_ranks(member, 2, str(model_folder), folders, str(tmp_path), shares, name)

    for rank in range(2):
        losses, gradients, rewards, (loss, held_out) = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        close((losses, gradients), alone, 1e-6)
        assert rewards == pytest.approx(events[-1].rewards, rel=1e-4)
        assert loss == pytest.approx(evaluated.loss, rel=1e-6)
        assert held_out == pytest.approx(evaluated.rewards, rel=1e-4)


@pytest.mark.parametrize("method", ["full", "qlora", "experimental_galore", "experimental_shira"])
def test_methods_train_an_objective_from_a_stored_reference(method, model_folder, folders):
    data, objective = data_of(folders, CASES["dpo"]), CASES["dpo"]

    setup = set_up(model_folder, PACKED, objective, method, learning_rate=1e-1)
    data.references = compute_references(setup, data, PACKED, ProcessGroup())
    before = evaluate_rows(setup, data, PACKED, ProcessGroup())
    order, hooks = Order(len(data), 8, 5, 50.0, 30), Hooks(lambda event: None, lambda now: "none", lambda: None)
    train(Training(setup, data, None, order, SCHEDULE, PACKED, ProcessGroup(), Progress(), hooks))
    after = evaluate_rows(setup, data, PACKED, ProcessGroup())

    assert before.loss == pytest.approx(0.6931472, rel=1e-6)
    assert before.rewards["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert after.loss < 0.9 * before.loss
    assert after.rewards["rewards/margins"] > 0


@pytest.mark.parametrize("method", ["full", "qlora", "experimental_galore"])
def test_methods_that_train_a_score_learn_which_answer_is_the_better_one(method, model_folder, folders):
    objective = CASES["reward"]
    data = data_of(folders, objective)

    setup = set_up(model_folder, PACKED, objective, method, learning_rate=3e-2)
    before = evaluate_rows(setup, data, PACKED, ProcessGroup())
    order, hooks = Order(len(data), 8, 5, 50.0, 30), Hooks(lambda event: None, lambda now: "none", lambda: None)
    train(Training(setup, data, None, order, SCHEDULE, PACKED, ProcessGroup(), Progress(), hooks))
    after = evaluate_rows(setup, data, PACKED, ProcessGroup())

    assert any("score" in name for name in setup.parameters)
    assert after.loss < 0.9 * before.loss
    assert 0 <= after.rewards["rewards/accuracies"] <= 1
