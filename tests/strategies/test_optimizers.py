"""Optimizers by transformers' names: what each keeps is what is planned, and a checkpoint continues bit by bit."""

import copy
from typing import get_args

import pytest
import torch
from transformers.training_args import OptimizerNames

from clusters.capability import DeviceCapability
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.job.sections.training import Optimizer
from strategies import METHODS
from strategies.compatibility import conflict
from strategies.optimizers import OPTIMIZERS, REFUSED
from strategies.shape import ModelShape
from strategies.step.optimizers import build_optimizer
from strategies.step.state import restore
from tests.strategies.test_contract import CPU, base_model, settings, techniques, train

ALL = sorted(OPTIMIZERS)
UNPAGED = [name for name in ALL if not OPTIMIZERS[name].is_paged]


def test_every_name_of_transformers_is_an_optimizer_here_or_refused_with_a_reason():
    theirs = {one.value for one in OptimizerNames}

    assert theirs <= OPTIMIZERS.keys() | REFUSED.keys()
    assert OPTIMIZERS.keys() - theirs == {"muon"}
    assert set(get_args(Optimizer)) == OPTIMIZERS.keys()
    assert not OPTIMIZERS.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", UNPAGED)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_goes_the_same_way_from_a_checkpoint(name, method, model_folder):
    model, chosen = base_model(METHODS[method](), model_folder), settings(optim=name, learning_rate=1e-3)
    first, second = (METHODS[method]().setup(copy.deepcopy(model), chosen) for _ in range(2))
    first.model.train(), second.model.train()

    state = train(first, 6 if name.endswith("radam") else 2)  # whose first steps move nothing
    restore(second, state)
    resumed, straight = train(second, 1), train(first, 1)

    for name, weight in straight.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    for name, moments in straight.moments.items():
        assert moments.keys() == resumed.moments[name].keys()
        assert all(torch.equal(resumed.moments[name][key], value) for key, value in moments.items()), name
    assert any(not torch.equal(state.weights[name], weight) for name, weight in straight.weights.items())


@pytest.mark.parametrize("name", UNPAGED)
def test_the_state_of_a_matrix_and_of_other_weights_takes_what_is_planned(name):
    matrix, outside = (torch.nn.Parameter(torch.randn(512, 512)) for _ in range(2))
    optimizer = build_optimizer([{"params": [matrix, outside]}], settings(optim=name), [outside])
    for parameter in (matrix, outside):
        parameter.grad = torch.randn_like(parameter)

    optimizer.step()

    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept_bytes = sum(value.numel() * value.element_size() for value in held)
    planned = OPTIMIZERS[name].bytes_of(matrix.numel() + outside.numel(), outside.numel())
    assert kept_bytes == pytest.approx(planned, rel=0.01, abs=2e4)  # tables of 8-bit codes, rows and columns


def test_muon_moves_matrices_as_torchs_and_everything_else_as_adamw():
    drawn = torch.Generator().manual_seed(1)
    matrix, embedding, norm = (torch.nn.Parameter(torch.randn(s, generator=drawn)) for s in ((24, 16), (30, 16), (16,)))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (matrix, embedding, norm)]
    chosen = settings(optim="muon", learning_rate=1e-2, weight_decay=0.1)
    optimizer = build_optimizer([{"params": [matrix, embedding, norm]}], chosen, [embedding])
    muon = torch.optim.Muon([twins[0]], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(twins[1:], lr=1e-2, weight_decay=0.1)

    for _ in range(3):
        for one, twin in zip((matrix, embedding, norm), twins, strict=True):
            one.grad = torch.randn(one.shape, generator=drawn)
            twin.grad = one.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()

    assert all(torch.equal(one, twin) for one, twin in zip((matrix, embedding, norm), twins, strict=True))


def test_adafactor_moves_as_transformers_trainer_builds_it_a_zero_matrix_too():
    from transformers.optimization import Adafactor

    drawn = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(24, 16, generator=drawn)), torch.nn.Parameter(torch.zeros(8, 24))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = build_optimizer([{"params": ours}], settings(optim="adafactor", learning_rate=1e-2, weight_decay=0.1))
    twin = Adafactor(theirs, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False)

    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=drawn)
            other.grad = one.grad.clone()
        for each in (optimizer, twin):
            each.step()

    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert ours[1].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("lora", {"bias": "all"}),
        ("experimental_galore", {"rank": 4}),
        ("experimental_apollo", {"rank": 4}),
        ("experimental_lsp_offload", {"projection": "random", "other_weights": "train"}),
    ],
)
@pytest.mark.parametrize("optim", ["adamw_torch", "muon", "adafactor"])
def test_norms_and_biases_do_not_decay_as_in_transformers_trainer(method, options, optim):
    from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer

    if optim != "adamw_torch" and method not in ("full", "lora"):
        pytest.skip("the method has an optimizer of its own")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))  # biases in q, k, v
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    setup = METHODS[method](**options).setup(model, settings(optim=optim, learning_rate=1e-2, weight_decay=0.5))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in setup.parameters.values():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)

    if setup.streaming:
        for parameter in setup.parameters.values():
            setup.optimizer._move(parameter, torch.zeros_like(parameter), 1e-2, (0, 1))
    else:
        setup.optimizer.step()

    def own_name(name):
        return name.removeprefix("base_model.model.").replace(".base_layer", "")

    moved = {own_name(name) for name, parameter in setup.parameters.items() if (parameter < 1.0).all()}
    kept = {own_name(name) for name, parameter in setup.parameters.items() if (parameter == 1.0).all()}
    assert len(moved) + len(kept) == len(setup.parameters)
    assert kept and not kept & decayed and all("norm" in name or "bias" in name for name in kept)
    assert moved == {name for name in map(own_name, setup.parameters) if name in decayed or "lora_" in name}


def test_adagrads_state_that_is_cleared_begins_anew(model_folder):
    setup = METHODS["lora"]().setup(base_model(METHODS["lora"](), model_folder), settings(optim="adagrad"))
    train(setup, 1)
    setup.optimizer.state.clear()

    train(setup, 1)

    assert all(state["step"] == 1 for state in setup.optimizer.state.values())


@pytest.mark.parametrize(
    ("optim", "changes", "reason"),
    [
        ("paged_adamw_8bit", {}, "memory that NVIDIA's driver moves"),
        ("muon", {"zero_stage": 1, "num_shards": 2, "state_share": 0.5}, "Muon needs whole matrices"),
        ("adafactor", {"zero_stage": 2, "num_shards": 2}, "Adafactor needs whole matrices"),
        ("lion_32bit", {"zero_stage": 1, "num_shards": 2, "state_share": 0.5}, "lion_32bit is untested with ZeRO"),
        ("lion_8bit", {"zero_stage": 1, "num_shards": 2, "state_share": 0.5}, "8-bit states do not divide"),
        ("rmsprop", {"zero_stage": 2, "num_shards": 2}, "rmsprop is untested under DeepSpeed"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_words(optim, changes, reason, model_folder):
    shape = ModelShape.from_config(base_model(METHODS["lora"](), model_folder).config.to_dict())

    found = conflict(METHODS["lora"](), techniques(optim=optim, **changes), CPU, shape, num_devices=2)

    assert found is not None and reason in found


def test_what_no_kernel_runs_for_is_refused_on_that_machine(model_folder):
    shape = ModelShape.from_config(base_model(METHODS["lora"](), model_folder).config.to_dict())
    old = DeviceCapability("cuda", "an old card", 8 * 2**30, compute_capability=(5, 2))

    for name in ALL:
        found = conflict(METHODS["lora"](), techniques(optim=name), old, shape)
        assert (found is not None) == (OPTIMIZERS[name].library == "bitsandbytes"), name


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.optim=lomo", "train.optim is 'lomo': it updates weights inside the backward pass"),
        ("train.optim=galore_adamw", "method.type: experimental_galore"),
        ("train.optim=grokadamw", "train.optim is 'grokadamw': what it keeps beside tensors"),
        ("train.lr_scheduler_type=greedy", "train.lr_scheduler_type is 'greedy': it follows losses"),
        ("train.lr_scheduler_kwargs={num_cycle: 2}", "cosine has no such option; did you mean num_cycles?"),
        ("train.lr_scheduler_type=cosine_with_min_lr", "needs one of min_lr"),
        ("train.lr_scheduler_type=warmup_stable_decay", "needs num_decay_steps"),
    ],
)
def test_what_is_none_here_is_a_mistake_of_the_job_with_its_reason(override, told, job_text, tmp_path):
    (tmp_path / "job.yaml").write_text(job_text)

    with pytest.raises(JobError) as error:
        read_job(tmp_path / "job.yaml", [override])

    assert told in str(error.value)
