"""A model in stages trains, evaluates and answers as it does in one piece: the same bits."""

import dataclasses
import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from strategies.measure.trace import Lengths
from strategies.methods.full import Full
from strategies.methods.lora import Lora
from strategies.methods.qlora import QLora
from strategies.model.sampling import Sampling
from strategies.pipeline.cut import load_stage
from strategies.pipeline.layer_randomness import LayerRandomness
from strategies.pipeline.stages import WholeExport, make_stage
from strategies.step import document_attention
from strategies.step.passes import passes_of
from strategies.step.state import gather
from strategies.step.step import Update, update
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import StepPasses, TrainSettings
from strategies.workload import StagePart, Techniques
from tests.processes import run_ranks
from tests.strategies.test_adapter_options import MODELS
from tests.strategies.test_families import built

pytestmark = [  # PEFT's, as in test_adapter_options.py
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
SAMPLES = [
    Lengths((20,), (9,)),
    Lengths((12, 9), (5, 3)),
    Lengths((31,), (9,)),
    Lengths((8,), (2,)),
    Lengths((25,), (7,)),
]
SUPERVISED = sum(sum(one.supervised) for one in SAMPLES)
PADDED = Techniques("float32", "sdpa", False, False, 4, 64)
PACKED = Techniques("float32", "document", True, False, 4, 64)
LAYERS, STEPS = 5, 3
METHODS = {
    "lora": Lora(lora_r=4),
    "dropout": Lora(lora_r=4, lora_dropout=0.3),
    "dora": Lora(lora_r=4, use_dora=True),
    "bias": Lora(lora_r=4, bias="all"),
    "upper layers": Lora(lora_r=4, layers_to_transform=[3, 4]),
    "head": Lora(lora_r=4, modules_to_save=["lm_head"]),
    "nf4": QLora(lora_r=4),
    "full": Full(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family's tiny model with five layers, made when it is asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder_of(name, **changes):
        key = f"{name} {changes}"
        if key not in made:
            torch.manual_seed(0)
            config = {"model_type": name.split()[0], **MODELS[name], "vocab_size": 120, **_layers(name), **changes}
            made[key] = root / str(len(made))
            built(config, "cpu").save_pretrained(made[key])
        return made[key]

    return folder_of


def _layers(name):
    return {"n_layer" if name.startswith("gpt2") else "num_hidden_layers": LAYERS}


def settings(techniques):
    return TrainSettings(1e-2, 0.0, "adamw_torch", 0.9, 0.999, 1e-8, techniques, seed=1)


def load(method, techniques, cls, config, tensors):
    arguments = method.load_arguments(techniques)
    return cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=getattr(torch, method.load_dtype(techniques)),
        attn_implementation=techniques.attn_implementation, **arguments,
        output_loading_info=True,
    )  # fmt: skip


def set_up(folder, method, techniques, ranks=()):
    document_attention.register()
    if techniques.stage is None:
        dtype = getattr(torch, method.load_dtype(techniques))
        attention, arguments = techniques.attn_implementation, method.load_arguments(techniques)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **arguments)
        setup = method.setup(model, settings(techniques))
    else:
        model = load_stage(folder, techniques.stage, partial(load, method, techniques))
        chosen = settings(techniques)
        setup = make_stage(method.setup(model, chosen), chosen, [ranks], WholeExport(folder, method, chosen))
    if techniques.gradient_checkpointing:
        checkpointing.enable(setup.model)
    return setup


def train(setup, techniques, samples=SAMPLES):
    """Losses, norms and, at the end, the state of three clipped steps of AdamW; a held-out loss and answers."""
    random, scaler = LayerRandomness(setup.model), gradient_scaler("cpu", techniques.dtype)
    passes, seen = passes_of(setup), []
    setup.model.train()
    for step in range(STEPS):
        how = StepPasses(
            SUPERVISED, techniques, scaler,
            take=lambda ids: samples[ids[0]].batch(techniques.packing),
            begin=lambda batch, step=step: random.begin(f"{step}/{batch.input_ids_BT.shape}"),
            filler=[0],
        )  # fmt: skip
        seen.append(passes.run([[number] for number in range(len(samples))], how))
        seen.append(update(setup, scaler, Update(1.0, 0.05)))
    setup.model.eval()
    with torch.no_grad():
        losses = []
        passes.each(
            [[0], [1]],
            lambda batch: losses.append(passes.loss_sum(samples[batch[0]].batch(techniques.packing), techniques)),
        )
    return seen, losses, gather(setup)


def stage_of(rank, cuts, **changes):
    edges = [0, *cuts, LAYERS]
    return StagePart(rank, len(edges) - 1, edges[rank], edges[rank + 1], **changes)


def member(rank, size, port, folder, method, techniques, cuts, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    techniques = dataclasses.replace(techniques, stage=stage_of(rank, cuts, ahead=len(cuts) % 2))
    setup = set_up(folder, method, techniques, range(size))
    torch.save(train(setup, techniques), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def assert_stages_equal(folder, method, techniques, cuts, out):
    expected_seen, expected_losses, expected = train(set_up(folder, method, techniques), techniques)
    run_ranks(member, len(cuts) + 1, folder, method, techniques, cuts, out)
    found = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(len(cuts) + 1)]

    assert [float(loss) for loss in found[-1][0][::2]] == [float(loss) for loss in expected_seen[::2]]
    for seen, _, _ in found:  # norms are the same everywhere
        assert [float(norm) for norm in seen[1::2]] == [float(norm) for norm in expected_seen[1::2]]
    assert [float(loss) for loss in found[-1][1]] == [float(loss) for loss in expected_losses]
    state = found[0][2]
    assert all(one is None for _, _, one in found[1:])
    assert list(state.weights) == list(expected.weights)
    assert all(torch.equal(state.weights[name], expected.weights[name]) for name in expected.weights)
    assert state.moments.keys() == expected.moments.keys()
    for name, held in expected.moments.items():
        assert all(torch.equal(state.moments[name][key], held[key]) for key in held), name


@pytest.mark.parametrize("cuts", [pytest.param((2,), marks=pytest.mark.slow), (1, 3)], ids=["two", "three"])
@pytest.mark.parametrize("name", METHODS)
def test_stages_train_bit_for_bit_as_one_process(name, cuts, folders, tmp_path):
    folder = folders("llama", tie_word_embeddings=name not in ("full", "head"))

    assert_stages_equal(folder, METHODS[name], PADDED, cuts, tmp_path)


@pytest.mark.parametrize(
    "cuts", [*(pytest.param(one, marks=pytest.mark.slow) for one in ((1,), (3,))), (4,), (1, 2, 3, 4)]
)
def test_so_does_any_cut(cuts, folders, tmp_path):
    assert_stages_equal(folders("llama tied"), METHODS["lora"], PADDED, cuts, tmp_path)


@pytest.mark.parametrize("name", ["dropout", "head", "full", "nf4"])
def test_so_does_one_device_with_all_layers_beside_pipelines(name, folders, tmp_path):
    """A matrix of its own for the output, which stages have on their last alone."""
    assert_stages_equal(folders("llama", tie_word_embeddings=False), METHODS[name], PADDED, (), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "attn_implementation": "document"},
        {"packing": True, "attn_implementation": "document", "gradient_checkpointing": True},
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
        {"dtype": "bfloat16"},
        {"loss_type": "chunked_nll"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["dropout", pytest.param("nf4", marks=pytest.mark.slow)])
def test_so_does_every_layout(name, changes, folders, tmp_path):
    assert_stages_equal(folders("llama tied"), METHODS[name], dataclasses.replace(PADDED, **changes), (2,), tmp_path)


@pytest.mark.parametrize("name", ["phi", "gemma3_text", "qwen3_moe", "mixtral"])
def test_so_does_every_family(name, folders, tmp_path):
    assert_stages_equal(folders(name), METHODS["lora"], PADDED, (2, 3), tmp_path)


PROMPT = torch.tensor([[0, 0, 5, 9, 14], [7, 3, 2, 8, 60], [0, 4, 4, 31, 2]])
ANSWER = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": [3, 77], "do_sample": False, "use_cache": True}


DRAWN = Sampling(temperature=1.5, top_p=0.9, seed=3)


def ways():
    """How answers are generated: the likeliest tokens, and drawn ones."""
    return ANSWER, {**ANSWER, "logits_processor": [DRAWN.processor([4, 0, 2], PROMPT.shape[1])]}


def answering(rank, size, port, folder, method, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    techniques = dataclasses.replace(PADDED, stage=stage_of(rank, (1, 3)))
    setup = set_up(folder, method, techniques, range(size))
    train(setup, techniques)
    with torch.no_grad():
        ids = [setup.passes.generate(input_ids=PROMPT, attention_mask=(PROMPT != 0).long(), **how) for how in ways()]
    held = gather(setup)
    if rank == 0:
        drawn = torch.manual_seed(settings(techniques).seed).get_state()
        setup.export(out / "found", held.weights)
        assert torch.equal(torch.get_rng_state(), drawn), "what is written was drawn when training began"
    torch.save(ids, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama tied", "lora"), ("gemma3_text", "lora"), ("llama tied", "dora"), ("llama", "head"), ("llama", "full")],
)
def test_stages_answer_token_for_token_and_hand_back_what_one_process_does(family, name, folders, tmp_path):
    folder, method = folders(family), METHODS[name]
    setup = set_up(folder, method, PADDED)
    train(setup, PADDED)
    with torch.no_grad():
        expected = [
            setup.model.generate(input_ids=PROMPT, attention_mask=(PROMPT != 0).long(), **how) for how in ways()
        ]
    setup.export(tmp_path / "expected", None)

    run_ranks(answering, 3, folder, method, tmp_path)

    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
    assert expected[0].tolist() != expected[1].tolist(), "drawn tokens are not the likeliest"
    stem = "model" if name == "full" else "adapter_model"
    whole, own = (load_file(tmp_path / part / f"{stem}.safetensors") for part in ("expected", "found"))
    assert whole.keys() == own.keys()
    assert all(torch.equal(whole[name], own[name]) for name in whole)
    file = "config.json" if name == "full" else "adapter_config.json"
    configs = [json.loads((tmp_path / part / file).read_text()) for part in ("expected", "found")]
    for config in configs:
        config.get("target_modules", []).sort()
        config.pop("base_model_name_or_path", None)  # the run's export writes it
    assert configs[0] == configs[1]
