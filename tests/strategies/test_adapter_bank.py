"""The bank and its algebra, on small adapters with numbers that can be checked."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy
import pytest
import torch

from strategies.adapter_bank import algebra
from strategies.adapter_bank.adapter import Adapter, Unusable, fits_base, write
from strategies.adapter_bank.algebra import Factors
from strategies.adapter_bank.card import AdapterCard, BankError
from strategies.adapter_bank.evidence import Evidence, gather
from strategies.adapter_bank.exchange import export, import_
from strategies.adapter_bank.generation import Recipe, generate
from strategies.adapter_bank.shares import coefficients
from strategies.adapter_bank.shares.distances import DISTANCES
from strategies.adapter_bank.shares.selection import forward_selection
from strategies.adapter_bank.store import Bank
from strategies.adapter_bank.trial import Below, corrected
from strategies.methods.lora_start import start_from

MAPS = {"model.layers.0.q_proj": (12, 20), "model.layers.1.q_proj": (12, 20)}  # outputs, inputs
VOCABULARY = 50


def an_adapter(folder, seed, rank=2, maps=MAPS):
    draw = torch.Generator().manual_seed(seed)
    made = {
        name: Factors(torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw))
        for name, (outputs, inputs) in maps.items()
    }
    write(folder, made, "tiny", rank)
    return Adapter(folder)


def some_evidence(seed, low=0, high=VOCABULARY):
    draw = numpy.random.default_rng(seed)
    rows = [(draw.integers(low, high, 30).astype(numpy.int32), numpy.arange(30) > 20) for _ in range(20)]
    return gather(rows, numpy.random.default_rng(9).standard_normal((VOCABULARY, 16)).astype(numpy.float32))


def a_card(name, base="b" * 64, **rest):
    return AdapterCard(name=name, base_name="tiny", base_digest=base, **rest)


def whole(adapter, weight=1.0):
    return {name: weight * adapter.factors(name).delta() for name in adapter.targets}


@pytest.fixture
def bank(tmp_path):
    there = Bank(tmp_path / "bank", create=True)
    for seed in range(3):
        folder = tmp_path / f"source-{seed}"
        an_adapter(folder, seed)
        there.add(folder, a_card(f"task-{seed}"), some_evidence(seed, 10 * seed, 10 * seed + 20))
    return there


# Distances and coefficients.


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_data_set_is_nearest_to_itself(distance):
    evidence = [some_evidence(seed, 8 * seed, 8 * seed + 15) for seed in range(4)]

    for place, one in enumerate(evidence):
        found = DISTANCES[distance](one, evidence)

        assert found.argmin() == place
        assert found[place] == pytest.approx(0, abs=1e-3)


def test_rows_of_coefficients_sum_to_1_and_follow_a_permutation():
    distances = numpy.random.default_rng(0).random((5, 7))
    order = numpy.random.default_rng(1).permutation(7)
    scorer = coefficients.Scorer(distances[:4, :4], numpy.eye(4))

    for rule in (coefficients.attentional, coefficients.normalised, scorer):
        found = rule(distances)

        numpy.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
        numpy.testing.assert_allclose(rule(distances[:, order]), found[:, order], atol=1e-6)


def test_at_a_low_temperature_a_known_data_set_gets_its_own_adapter(bank, tmp_path):
    evidence = [bank.evidence(card) for card in bank.cards()]
    distances = DISTANCES["js_parts"](evidence[1], evidence)

    made = generate(
        [bank.adapter(c) for c in bank.cards()], coefficients.attentional(distances, 1e-6), tmp_path / "made"
    )

    for name, delta in whole(Adapter(made.folder)).items():
        assert torch.equal(delta, bank.adapter(bank.find("task-1")).factors(name).delta())


# Shares that labelled rows move.


def test_shares_move_towards_what_lowers_the_loss_and_only_as_long_as_it_does():
    wanted = numpy.array([0.36, 0.0, 0.64, 0.0])  # of the start and three adapters: two steps of 0.4 away
    asked = []

    def loss(weights):
        asked.append(weights)
        return float(((weights - wanted) ** 2).sum())

    found = forward_selection(3, loss)

    numpy.testing.assert_allclose(found.weights, wanted, atol=1e-12)
    assert list(found.losses) == sorted(found.losses, reverse=True) and found.losses[-1] == pytest.approx(0)
    assert found.num_trials == len(asked) <= 1 + 4 + 20


def test_where_every_adapter_harms_more_is_left_to_the_base():
    found = forward_selection(3, lambda weights: float(weights.sum()))

    assert found.weights.sum() == pytest.approx(0.6**4) and not found.weights[1:].any()


def test_where_no_move_helps_the_shares_stay():
    found = forward_selection(3, lambda weights: float(1 - weights[0]))

    assert found.weights.tolist() == [1, 0, 0, 0] and found.losses == (0.0,)


# Sums.


@pytest.mark.parametrize("rule", ["delta", "factorwise"])
def test_a_bank_of_one_adapter_many_times_gives_that_adapter(tmp_path, rule):
    one = an_adapter(tmp_path / "one", 0)

    made = generate([one] * 4, [0.25] * 4, tmp_path / "made", Recipe(rule))

    for name, delta in whole(Adapter(made.folder)).items():
        torch.testing.assert_close(delta, one.factors(name).delta(), atol=1e-5, rtol=1e-5)


def test_delta_is_the_exact_sum_and_says_what_a_rank_leaves_out(tmp_path):
    ranks = [2, 3, 1]
    adapters = [an_adapter(tmp_path / str(i), i, rank) for i, rank in enumerate(ranks)]
    shares = [0.5, -0.3, 0.8]

    full = generate(adapters, shares, tmp_path / "full", Recipe(rank=6))
    short = generate(adapters, shares, tmp_path / "short", Recipe(rank=2))

    left_out, size = 0.0, 0.0
    for name in MAPS:
        exact = sum(share * one.factors(name).delta() for share, one in zip(shares, adapters, strict=True))
        assert (Adapter(full.folder).factors(name).delta() - exact).norm() <= 1e-6 * exact.norm()
        left_out += float((Adapter(short.folder).factors(name).delta() - exact).square().sum())
        size += float(exact.square().sum())
    assert full.relative_error == pytest.approx(0, abs=1e-3)
    assert short.relative_error == pytest.approx((left_out / size) ** 0.5, rel=1e-3)


def test_the_random_range_is_near_the_best_truncation(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -3, 60)
    factors = Factors(
        torch.randn(60, 90, generator=draw), torch.linalg.qr(torch.randn(80, 60, generator=draw)).Q * spectrum
    )
    exact, _, _ = algebra.truncate(factors, 8)
    monkeypatch.setattr(algebra, "_EXACT_RANK", 10)
    near, left_out, size = algebra.truncate(factors, 8)

    best = (exact.delta() - factors.delta()).norm()
    reached = (near.delta() - factors.delta()).norm()
    assert reached <= 1.05 * best
    assert (left_out / size) ** 0.5 == pytest.approx(float(reached / factors.delta().norm()), rel=0.3)


def test_maps_that_only_some_adapters_have_are_kept(tmp_path):
    first, second = list(MAPS.items())
    adapters = [an_adapter(tmp_path / "a", 0, 2, dict([first])), an_adapter(tmp_path / "b", 1, 3, dict([second]))]

    made = Adapter(generate(adapters, [0.5, 0.5], tmp_path / "made").folder)

    assert set(made.targets) == set(MAPS)
    torch.testing.assert_close(made.factors(second[0]).delta(), 0.5 * adapters[1].factors(second[0]).delta())


def test_inner_products_are_those_of_the_whole_corrections(tmp_path):
    parts = [an_adapter(tmp_path / str(i), i, 2 + i).factors("model.layers.0.q_proj") for i in range(3)]

    found = algebra.gram([parts[0], None, *parts[1:]])

    for i, one in ((0, parts[0]), (2, parts[1]), (3, parts[2])):
        for j, other in ((0, parts[0]), (2, parts[1]), (3, parts[2])):
            assert float(found[i, j]) == pytest.approx(float((one.delta() * other.delta()).sum()), rel=1e-4, abs=1e-4)
    assert not found[1].any()


def test_a_task_is_taken_away_by_a_negative_weight(tmp_path):
    one, other = (an_adapter(tmp_path / str(i), i) for i in range(2))
    both = generate([one, other], [1, 1], tmp_path / "both", Recipe(rank=4))

    back = generate([Adapter(both.folder), other], [1, -1], tmp_path / "back", Recipe(rank=6))

    for name, delta in whole(Adapter(back.folder)).items():
        torch.testing.assert_close(delta, one.factors(name).delta(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_at_density_1_merges_of_one_adapter_are_that_adapter(tmp_path, how):
    one = an_adapter(tmp_path / "one", 0)

    made = generate([one], [1.0], tmp_path / "made", Recipe(how, density=1.0))

    for name, delta in whole(Adapter(made.folder)).items():
        torch.testing.assert_close(delta, one.factors(name).delta(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_below_all_adapters_run_once_and_change_nothing(tmp_path, architecture):
    model = a_model(architecture)
    first = "model.layers.2.self_attn.q_proj" if architecture == "llama" else "transformer.h.2.attn.c_attn"
    outputs, inputs = (16, 16) if architecture == "llama" else (48, 16)
    adapters = [an_adapter(tmp_path / str(seed), seed, maps={first: (outputs, inputs)}) for seed in range(2)]
    attention = model.get_submodule(first.replace(".2.", ".0."))
    ran = []
    attention.register_forward_hook(lambda *_: ran.append(1))
    below = Below(model, [first])
    batches = [torch.arange(12).view(2, 6), torch.arange(20, 28).view(2, 4)]

    def answers(adapter, passed_by=True):
        corrections = adapter.corrections()
        with corrected(model, corrections), below.keep_outputs() if passed_by else nullcontext(), torch.no_grad():
            return [model(input_ids=ids, use_cache=False).logits for ids in batches]

    expected = [answers(adapter, passed_by=False) for adapter in adapters]
    once = answers(adapters[0])
    weights = model.get_submodule(first).weight.clone()
    again = answers(adapters[1])

    assert len(ran) == 3 * len(batches)
    assert all(torch.equal(x, y) for x, y in zip(expected[0] + expected[1], once + again, strict=True))
    assert not torch.equal(once[0], again[0])
    assert torch.equal(model.get_submodule(first).weight, weights)
    below.forget()
    model.base_model.get_input_embeddings().weight.data += 1
    assert not torch.equal(answers(adapters[0])[0], once[0])


def test_dora_begins_as_the_adapter_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, ids = a_model("llama"), torch.arange(12).view(2, 6)
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.1.self_attn.q_proj"
    adapter = an_adapter(tmp_path / "made", 0, maps={name: (16, 16)})
    fits_base(adapter, tmp_path / "base")
    with corrected(model, {name: adapter.factors(name)}), torch.no_grad():
        expected = model(input_ids=ids).logits

    started = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_dora=True))
    before = {name for name, one in started.named_parameters() if one.requires_grad}
    start_from(started, tmp_path / "made")

    torch.testing.assert_close(started(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert {name for name, one in started.named_parameters() if one.requires_grad} == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_training_goes_on_where_an_adapter_is(tmp_path, architecture):
    from peft import LoraConfig, get_peft_model

    model, ids = a_model(architecture), torch.arange(12).view(2, 6)
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.1.self_attn.q_proj" if architecture == "llama" else "transformer.h.1.attn.c_attn"
    adapter = an_adapter(tmp_path / "made", 0, maps={name: (16, 16) if architecture == "llama" else (48, 16)})
    fits_base(adapter, tmp_path / "base")
    with corrected(model, {name: adapter.factors(name)}), torch.no_grad():
        expected = model(input_ids=ids).logits
    targets = ["q_proj", "v_proj"] if architecture == "llama" else ["c_attn"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=architecture == "gpt2")

    started = get_peft_model(model, config)
    start_from(started, tmp_path / "made")

    torch.testing.assert_close(started(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="corrects 1 maps that this LoRA leaves alone"):
        start_from(started, an_adapter(tmp_path / "other", 0, maps={"lm_head": (64, 16)}).folder)


def test_a_base_without_the_models_prefix_in_its_file_is_known(tmp_path):
    """As GPT-2's published file: h.0.attn for transformer.h.0.attn."""
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    save_file({"h.0.attn.c_attn.weight": torch.zeros(16, 48)}, tmp_path / "base" / "model.safetensors")

    fits_base(an_adapter(tmp_path / "own", 0, maps={"transformer.h.0.attn.c_attn": (48, 16)}), tmp_path / "base")
    for name, shape, said in (("wide", (48, 24), "as 48 x 24; in base it is 16 x 48"), ("attn.c", (48, 16), "has not")):
        maps = {"transformer.h.0.attn.c_attn" if name == "wide" else "transformer.h.0.attn.c": shape}
        with pytest.raises(Unusable, match=said):
            fits_base(an_adapter(tmp_path / name, 0, maps=maps), tmp_path / "base")


def a_model(architecture):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, **sizes)).eval()


def test_a_square_map_that_lies_transposed_is_corrected_as_peft_does(tmp_path):
    from peft import PeftModel

    model, ids = a_model("gpt2"), torch.arange(12).view(2, 6)
    adapter = an_adapter(tmp_path / "made", 0, maps={"transformer.h.1.attn.c_proj": (16, 16)})
    with corrected(model, adapter.corrections()), torch.no_grad():
        ours = model(input_ids=ids).logits

    with pytest.warns(UserWarning, match="fan_in_fan_out"), torch.no_grad():
        theirs = PeftModel.from_pretrained(model, str(tmp_path / "made"))(input_ids=ids).logits

    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        ([], (2, 20), "it is not a JSON object"),
        ({"peft_type": "LORA"}, (2, 20), "q_proj has rank 2, and its adapter_config.json says 8"),
        ({"peft_type": "LORA", "r": 2, "target_modules": ["k_proj"]}, (2, 20), "is not in target_modules"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, (2, 20), "init_lora_weights: pissa_niter_4"),
        ({"peft_type": "LORA", "use_dora": True}, (2, 20), "use_dora"),
        ({"peft_type": "LORA"}, (2, 20, 1, 1), "no factors of a linear map"),
        ({"peft_type": "LORA"}, (3, 20), "no factors of a linear map"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_the_reason(tmp_path, config, shape, said):
    from safetensors.torch import save_file

    tensors = {"A": torch.zeros(shape), "B": torch.zeros(12, 2)}
    (tmp_path / "one").mkdir()
    save_file(
        {f"base_model.model.q_proj.lora_{side}.weight": tensor for side, tensor in tensors.items()},
        tmp_path / "one" / "adapter_model.safetensors",
    )
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(Unusable, match=said):
        Adapter(tmp_path / "one")


def test_peft_reads_what_was_made(tmp_path):
    from peft import PeftModel

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
            for layer in self.model.layers:
                layer.q_proj = torch.nn.Linear(20, 12, bias=False)

        def forward(self, x):
            return self.model.layers[0].q_proj(x) + self.model.layers[1].q_proj(x)

    adapters = [an_adapter(tmp_path / str(i), i) for i in range(2)]
    made = generate(adapters, [0.5, 0.5], tmp_path / "made", Recipe(rank=4))
    config = json.loads((made.folder / "adapter_config.json").read_text()) | {"task_type": None}
    (made.folder / "adapter_config.json").write_text(json.dumps(config))
    model, x = Tiny(), torch.randn(3, 20)
    before = model(x)

    tuned = PeftModel.from_pretrained(model, str(made.folder))

    exact = sum(0.5 * one.factors(name).delta() for one in adapters for name in MAPS)
    torch.testing.assert_close(tuned(x), before + x @ exact.T, atol=1e-4, rtol=1e-4)


# The store.


def test_evidence_comes_back_as_it_was(bank):
    evidence = some_evidence(0, 0, 20)

    found = bank.evidence(bank.find("task-0"))

    assert isinstance(found, Evidence) and found.digest == evidence.digest


def test_a_flipped_byte_is_found_and_put_aside(bank):
    file = bank.folder(bank.find("task-1").digest) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)

    assert [one.name for one in bank.verify()] == ["task-1"]
    bank.verify(repair=True)
    assert bank.verify() == []
    assert [card.name for card in bank.cards()] == ["task-0", "task-2"]


def test_a_broken_card_is_named_by_its_digest_and_stops_nothing(bank):
    digest = bank.find("task-0").digest
    (bank.folder(digest) / "card.json").write_text("{")

    (wrong,) = bank.verify()

    assert wrong.name == digest[:12] and "card.json: is not JSON" in wrong.reason
    assert [card.name for card in bank.cards()] == ["task-1", "task-2"]
    with pytest.raises(BankError, match=r"is not JSON.*verify --repair"):
        bank.find(digest[:8])


def test_a_folder_that_is_gone_is_no_adapter_of_the_bank(bank):
    card = bank.find("task-2")
    os.rename(bank.folder(card.digest), bank.path / "elsewhere")

    assert [card.name for card in bank.cards()] == ["task-0", "task-1"] and bank.verify() == []
    with pytest.raises(BankError, match="is gone"):
        bank.adapter(card)


def test_weights_that_were_cut_short_are_named(bank):
    folder = bank.folder(bank.find("task-1").digest)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])

    with pytest.raises(BankError, match="task-1: its bytes are not those that were added"):
        bank.adapter(bank.find("task-1"))
    with pytest.raises(Unusable, match=r"adapter_model\.safetensors: is cut"):
        Adapter(folder)


def test_several_writers_lose_nothing(tmp_path):
    for seed in range(8):
        an_adapter(tmp_path / f"s{seed}", seed)
    errors = []

    def add(part):
        try:
            for seed in part:
                Bank(tmp_path / "bank", create=True).add(tmp_path / f"s{seed}", a_card(f"task-{seed}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(range(first, 8, 2),)) for first in (0, 1, 0)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

    there = Bank(tmp_path / "bank")
    assert not errors
    assert sorted(card.name for card in there.cards()) == [f"task-{seed}" for seed in range(8)]
    assert there.verify() == []


def test_of_two_that_take_a_name_at_once_one_is_told(tmp_path):
    for seed in range(6):
        an_adapter(tmp_path / f"s{seed}", seed)
    told, together = [], threading.Barrier(6)

    def add(seed):
        together.wait()
        try:
            told.append(Bank(tmp_path / "bank", create=True).add(tmp_path / f"s{seed}", a_card("same")).digest)
        except BankError as error:
            told.append(str(error))

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

    there = Bank(tmp_path / "bank")
    (card,) = there.cards()
    assert there.verify() == [] and told.count(card.digest) == 1
    assert sum("another adapter is called same" in line for line in told) == 5


def test_what_is_added_again_keeps_what_was_known(bank):
    before = bank.find("task-1")
    folder = bank.folder(before.digest)

    card = bank.add(folder, dataclasses.replace(a_card(bank.name_of(folder)), licence="MIT"))

    assert card == dataclasses.replace(before, licence="MIT") == bank.find("task-1")
    assert card.evidence_digest and bank.evidence(card) and bank.verify() == []
    assert len(bank.cards()) == 3


def test_a_refused_adapter_makes_no_bank(tmp_path):
    an_adapter(tmp_path / "cut", 0)
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"cut")

    with pytest.raises(Unusable):
        Bank(tmp_path / "bank", create=True).add(tmp_path / "cut", a_card("cut"))
    with pytest.raises(BankError, match="is not an export of a bank"):
        import_(Bank(tmp_path / "bank", create=True), tmp_path / "cut" / "adapter_model.safetensors")

    assert not (tmp_path / "bank").exists()


def test_an_export_comes_in_whole(bank, tmp_path):
    export(bank, tmp_path / "some.tar", bank.cards()[:2])

    taken = import_(Bank(tmp_path / "other", create=True), tmp_path / "some.tar")

    assert len(taken.cards) == 2 and taken.refused == []
    assert Bank(tmp_path / "other").cards() == bank.cards()[:2]


def test_what_does_not_belong_is_refused_and_nothing_is_written(bank, tmp_path):
    an_adapter(tmp_path / "wide", 7, maps={"model.layers.0.q_proj": (12, 24)})
    an_adapter(tmp_path / "sick", 8)
    an_adapter(tmp_path / "twin", 9)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "sick" / "adapter_model.safetensors"
    save_file({name: tensor.fill_(float("nan")) for name, tensor in load_file(file).items()}, file)

    with pytest.raises(Unusable, match=r"12 x 24 .* were trained on different models"):
        bank.add(tmp_path / "wide", a_card("wide"))
    with pytest.raises(Unusable, match="not finite"):
        bank.add(tmp_path / "sick", a_card("sick"))
    with pytest.raises(BankError, match="another adapter is called task-0"):
        bank.add(tmp_path / "twin", a_card("task-0"))
    with pytest.raises(BankError, match="has no adapter 'task-9'; it has task-"):
        bank.find("task-9")
    with pytest.raises(Unusable, match=r"no readable adapter_config\.json"):
        bank.add(tmp_path, a_card("nothing"))
    assert len(bank.cards()) == 3 and bank.verify() == [] and not list((bank.path / "objects").glob(".*"))


def test_a_sum_that_is_refused_leaves_no_folder(tmp_path):
    adapters = [an_adapter(tmp_path / "a", 0), an_adapter(tmp_path / "b", 1, maps={"model.layers.0.q_proj": (12, 24)})]

    with pytest.raises(ValueError, match="different models"):
        generate(adapters, [0.5, 0.5], tmp_path / "made")
    (tmp_path / "made").mkdir()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        generate(adapters[:1], [1.0], tmp_path / "made")
    assert not list(tmp_path.glob(".made*")) and not list((tmp_path / "made").iterdir())


def test_no_gpu_is_asked_for(tmp_path):
    an_adapter(tmp_path / "a", 0)
    script = (
        "import sys; from pathlib import Path; from strategies.adapter_bank.adapter import Adapter;"
        "from strategies.adapter_bank.generation import generate; import torch;"
        "generate([Adapter(Path(sys.argv[1]))] * 2, [0.5, 0.5], Path(sys.argv[2]));"
        "assert not torch.cuda.is_initialized()"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a"), str(tmp_path / "made")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
