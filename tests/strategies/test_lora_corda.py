"""CorDA's start is that of PEFT's own preparation, the base stays as it is, and what is handed back belongs to it."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import AutoModelForCausalLM

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from orchestrator.runs.events import LearningReport, Note
from orchestrator.training import checkpoint
from orchestrator.training.evaluate import look_at
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.workers import finished
from strategies import METHODS
from strategies.compatibility import conflict
from strategies.shape import ModelShape
from strategies.step.state import gather
from strategies.workload import Techniques
from tests.cases.training import trained
from tests.conftest import rows, write_jsonl
from tests.orchestrator.training.conftest import data_folder  # noqa: F401
from tests.orchestrator.training.test_loop import ONE_BY_ONE, run
from tests.processes import run_ranks
from tests.strategies.test_contract import CPU, NODE, base_model, settings, techniques, workload

OPTIONS = {"lora_r": 4, "lora_alpha": 8, "init_lora_weights": "corda", "corda_rows": 12}
PACKED = Techniques("float32", "document", True, False, 8, 64)
LAYOUTS = {
    "row by row": ({}, ONE_BY_ONE),
    "packed": ({}, PACKED),
    "a decoder layer at a time": ({"corda_layers": 1}, PACKED),
    "beginnings shared": ({}, Techniques("float32", "document", True, False, 8, 64, share_prefixes=True)),
}


def rows_of(data, steps=3):
    """The first 12 rows in the order of the training that `run` makes."""
    order = Order(len(data), 8, seed=5, num_train_epochs=1, max_steps=steps)
    return [row for step in range(steps) for row in order.sample_ids(step)][:12]


def of_peft(model_folder, data, method):
    """PEFT's preparation and model, as its example makes them: a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
        task_type="CAUSAL_LM",
    )
    names = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]
    config.target_modules = {name.rpartition(".")[2] for name in names}

    def pass_rows():
        for row in rows_of(data):
            model(collate(data, [row], packing=False).input_ids_BT)

    preprocess_corda(model, config, pass_rows)
    return get_peft_model(model, config)


def weights_of(peft_model):
    """Of each map: base weight, and the correction that trains."""
    return {
        name: (one.get_base_layer().weight.detach(), one.get_delta_weight("default").detach())
        for name, one in peft_model.named_modules()
        if hasattr(one, "lora_A")
    }


def kept_of(peft_model):
    return {
        name: one.kept_B.detach() @ one.kept_A.detach()
        for name, one in peft_model.named_modules()
        if hasattr(one, "kept_A")
    }


def still(model_folder, folder, layout, **options):
    """A training whose first step is looked at and moves nothing."""
    return run(
        model_folder, folder, layout, steps=3, options=OPTIONS | options, optim="sgd", lr_factor=lambda step: 0.0
    )


@pytest.fixture
def data(data_folder):  # noqa: F811
    return Dataset.load(data_folder)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pair_begins_with_the_part_of_the_weight_that_pefts_preparation_finds(
    layout,
    method,
    model_folder,
    data_folder,  # noqa: F811
    data,
):
    theirs = weights_of(of_peft(model_folder, data, method))
    options, how = LAYOUTS[layout]

    setup = still(model_folder, data_folder, how, corda_method=method, **options)[2]

    ours, kept = weights_of(setup.model), kept_of(setup.model)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for name, (rest_OI, part_OI) in theirs.items():
        weight_OI, correction_OI = ours[name]
        assert torch.allclose(rest_OI + part_OI, weight_OI, atol=1e-5), name  # the base is as it was
        assert (correction_OI - part_OI).norm() <= 2e-3 * part_OI.norm(), name
        assert torch.allclose(kept[name], -correction_OI, atol=1e-5), name


def test_it_is_the_base_that_training_begins_with(model_folder, data_folder):  # noqa: F811
    plain = run(model_folder, data_folder, PACKED, options={"lora_r": 4})

    started = run(model_folder, data_folder, PACKED, options=OPTIONS)

    assert started[0][0] == pytest.approx(plain[0][0], rel=1e-5)
    assert started[0][-1] != pytest.approx(plain[0][-1], rel=1e-4)


def test_a_training_is_pefts_on_the_rest_of_the_weights(model_folder, data_folder, data):  # noqa: F811
    theirs = of_peft(model_folder, data, "ipm")
    parameters = [p for name, p in theirs.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)

    setup = run(model_folder, data_folder, ONE_BY_ONE, steps=3, options=OPTIONS)[2]
    order = Order(len(data), 8, seed=5, num_train_epochs=1, max_steps=3)
    for step in range(3):
        ids = order.sample_ids(step)
        for row in ids:
            one = collate(data, [row], packing=False)
            logits_TV = theirs(one.input_ids_BT).logits[0, :-1][one.supervised_BT[0, 1:]]
            loss = torch.nn.functional.cross_entropy(logits_TV, one.targets_S, reduction="sum")
            (loss / int(data.num_supervised[ids].sum())).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ours, kept = weights_of(setup.model), kept_of(setup.model)
    for name, (rest_OI, part_OI) in weights_of(theirs).items():
        weight_OI, correction_OI = ours[name]
        moved = rest_OI + part_OI - weight_OI
        assert (weight_OI + correction_OI + kept[name] - rest_OI - part_OI).norm() < 0.02 * moved.norm(), name


def test_what_is_handed_back_is_an_adapter_of_the_untouched_base(model_folder, data_folder, tmp_path):  # noqa: F811
    setup = run(model_folder, data_folder, PACKED, steps=3, options=OPTIONS)[2]
    setup.model.eval()
    setup.export(tmp_path, None)
    ids = torch.arange(20)[None]

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), tmp_path
    ).eval()

    config = loaded.peft_config["default"]
    assert config.init_lora_weights is True and config.r == 8
    inner = setup.model.base_model.model
    inner.set_attn_implementation("sdpa")
    assert torch.allclose(loaded(ids).logits, setup.model(ids).logits, atol=1e-5)


def test_a_checkpoint_holds_the_start_and_continues_without_another_look(model_folder, data_folder, tmp_path):  # noqa: F811
    taken = []

    def save(progress):
        taken.append(copy.deepcopy(progress.as_dict()))
        return checkpoint.save(tmp_path, gather(setups[-1]), progress.as_dict() | {"step": progress.step}).name

    setups = []
    whole = run(
        model_folder,
        data_folder,
        PACKED,
        steps=4,
        options=OPTIONS,
        optim="adamw_torch",
        before=lambda setup, _: setups.append(setup),
        save=save,
        save_steps=2,
    )
    kind = METHODS["lora"](**OPTIONS)
    again = kind.setup(base_model(kind, model_folder), settings())
    checkpoint.newest(tmp_path, pytest.fail).restore(again)

    assert all(torch.equal(p, whole[2].parameters[name]) for name, p in again.parameters.items())
    assert all(torch.equal(one, whole[2].buffers[name]) for name, one in again.buffers.items())
    assert not again.learner.is_due(4) and again.buffers["kept_rank"].item() == 4


def member(rank, size, port, model_folder, folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    group = ProcessGroup(rank, size, bucket_bytes=20_000)
    losses, _, setup = run(model_folder, folder, (PACKED, ONE_BY_ONE)[rank], group, options=OPTIONS)
    torch.save((losses, [*setup.parameters.values()], [*setup.buffers.values()]), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_begin_alike_and_train_as_one(model_folder, data_folder, tmp_path):  # noqa: F811
    alone = run(model_folder, data_folder, PACKED, options=OPTIONS)

    run_ranks(member, 2, str(model_folder), data_folder, str(tmp_path))

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first[0] == pytest.approx(alone[0], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
    for one, other in zip(first[1], alone[2].parameters.values(), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_the_run_s_record_says_what_was_looked_at(model_folder, data_folder):  # noqa: F811
    events = []
    run(model_folder, data_folder, PACKED, options=OPTIONS | {"corda_method": "kpm"}, events=events)

    (told,) = [event for event in events if isinstance(event, LearningReport)]
    assert "A and B of 14 maps begin with the smallest parts" in told.text


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_hands_back_what_it_trained_and_merges_it(objective, model_folder, tmp_path):
    pairs = [{"prompt": one["prompt"], "chosen": one["completion"], "rejected": "the dog"} for one in rows(20)]
    write_jsonl(tmp_path / "train.jsonl", pairs if objective == "dpo" else rows(20))
    (tmp_path / "job.yaml").write_text(
        f"model: {{model_name_or_path: {model_folder}, dtype: float32}}\n"
        "method: {type: lora, lora_r: 4, init_lora_weights: corda, corda_rows: 12}\n"
        f"objective: {objective}\n"
        "data: {train: train.jsonl, eval: {split: 0.2}, max_length: 64}\n"
        "train: {max_steps: 3, global_batch_size: 4, learning_rate: 3e-2}\n"
    )

    run_folder, job = trained(tmp_path / "job.yaml")

    assert run_folder.result().values["handed_back"]["check"]["largest_difference"] < 1e-4
    merged = finished.merge(run_folder, job, tmp_path / "merged")
    assert merged.largest_difference is not None and merged.largest_difference < 1e-4
    assert "corda: A and B of 14 maps" in " ".join(event.text for event in run_folder.events_of(Note))


@pytest.mark.parametrize("layers", [None, 1])
def test_what_the_look_holds_is_what_is_planned(layers, model_folder, data_folder, data):  # noqa: F811
    kind = METHODS["lora"](**OPTIONS, corda_layers=layers)
    model = base_model(kind, model_folder)
    shape = ModelShape.from_config(model.config.to_dict())
    setup = kind.setup(model, settings())
    setup.learner.begin_learning(setup.learner.num_looks)
    batch = collate(data, [0, 1], packing=False)
    setup.learner.watch(batch)
    look_at(setup, data, batch, ONE_BY_ONE)

    held = sum(total.numel() * 4 for total, _ in setup.learner._sums.values())
    setup.learner.release()
    planned = kind.costs(shape, techniques()).look
    hidden, width = shape.hidden_size, shape.mlp_width
    largest = 4 * max(
        4 * i**2 + 2 * o * i + 2 * min(o, i) * (o + i) for o, i in ((hidden, width), (width, hidden), (hidden, hidden))
    )
    assert planned.held_bytes == held + largest
    assert planned.times == setup.learner.num_looks == (1 if layers is None else shape.num_layers)


def test_time_and_memory_of_the_look_are_in_the_plan(model_folder):
    shape = ModelShape.from_config(base_model(METHODS["lora"](), model_folder).config.to_dict())
    plain, started, halves = (
        METHODS["lora"](**options).estimate(workload(shape), CPU, NODE, techniques())
        for options in ({"lora_r": 4}, OPTIONS, OPTIONS | {"corda_layers": 1})
    )

    assert plain.look_s == 0 and started.look_s > 0
    assert started.memory.optimizer_bytes > plain.memory.optimizer_bytes
    assert halves.look_s > started.look_s and halves.memory.optimizer_bytes < started.memory.optimizer_bytes
    assert started.num_trainable_parameters == plain.num_trainable_parameters


@pytest.mark.parametrize(
    ("method", "options", "changes", "told"),
    [
        ("qlora", {}, {}, "a quantised base has rounded ones"),
        ("lora", {"use_dora": True}, {}, "hands back pairs of A and B alone, and use_dora trains more"),
        ("lora", {"bias": "all"}, {}, "and bias: all trains more"),
        ("lora", {"lora_target_modules": ["q_proj", "lm_head"]}, {}, "leave lm_head out of lora_target_modules"),
        ("lora", {"fused": True}, {}, "keeps a correction beside the pair"),
        ("lora", {}, {"local_merge": "product"}, "keeps a correction beside the pair"),
        ("lora", {}, {"zero_stage": 2, "num_shards": 2}, "untested with DeepSpeed"),
        ("lora", {}, {"torch_compile": True}, "untested with DeepSpeed, streamed weights, stages, torch.compile"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(method, options, changes, told, model_folder):
    kind = METHODS[method](init_lora_weights="corda", **options)
    shape = ModelShape.from_config(base_model(METHODS["lora"](), model_folder).config.to_dict())

    found = kind.refuses(techniques(**changes), shape) or conflict(kind, techniques(**changes), CPU, shape, 2)

    assert found is not None and told in found
