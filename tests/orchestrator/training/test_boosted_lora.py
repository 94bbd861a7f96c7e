"""Boosted LoRA through the loop: rounds, what is kept of them, weights of samples, resuming inside a round."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.training import checkpoint
from orchestrator.training.evaluate import evaluate_loss, sample_losses
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Progress
from strategies.compatibility import refuses_local_steps
from strategies.methods.boosted_lora import BoostedLora
from strategies.methods.boosted_rounds import HardSamples, RoundSchedule, right_directions
from strategies.shape import ModelShape
from strategies.step.state import gather
from strategies.step.step import forward
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques
from tests.orchestrator.training.test_loop import ONE_BY_ONE
from tests.orchestrator.training.test_product_steps import losses, run

SHORT = BoostedLora(restart_every=3)
PACKED = Techniques("float32", "document", True, False, 8, 64)


def prepared(model_folder, method=SHORT, techniques=ONE_BY_ONE):
    from strategies.step import document_attention

    document_attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation=techniques.attn_implementation
    )
    settings = TrainSettings(1e-2, 0.1, "adamw_torch", 0.9, 0.999, 1e-8, techniques, 3, num_samples=24)
    return method.setup(model, settings)


def boosted(setup, data_folder, steps, techniques=ONE_BY_ONE, **how):
    return run(setup, data_folder, techniques, steps, local=None, size=8, **how)


def kept(setup):
    return {pair.name: setup.kept.correction(pair.name) for pair in setup.pairs}


def test_the_end_of_a_round_leaves_the_loss_as_it_is(model_folder, data_folder):
    setup, data, found = prepared(model_folder), Dataset.load(data_folder), []
    step_done = setup.between.step_done

    def measured(step):
        found.append(evaluate_loss(setup, data, ONE_BY_ONE, ProcessGroup()))
        said = step_done(step)
        found.append(evaluate_loss(setup, data, ONE_BY_ONE, ProcessGroup()))
        return said

    setup.between.step_done = measured
    events = boosted(setup, data_folder, 6)

    assert [one.step for one in events["between"]] == [3, 6]
    assert events["between"][1].text.startswith("round 2 ended: 14 corrections are kept, of 2 ranks")
    assert abs(found[4] - found[5]) < 1e-5 and abs(found[10] - found[11]) < 1e-5
    assert found[11] < found[0]
    assert not any(pair.b_OR.any() for pair in setup.pairs) and all(one.b_OR.any() for one in kept(setup).values())


@pytest.mark.parametrize("basis", ["random", "rotate_svd"])
def test_the_rank_of_a_correction_is_the_number_of_its_rounds_and_their_sum_is_it(model_folder, data_folder, basis):
    setup, pairs = prepared(model_folder, dataclasses.replace(SHORT, basis=basis)), {}
    add = setup.kept.add

    def noted(parts):
        for name, part in parts.items():
            pairs.setdefault(name, []).append(part.delta())
        return add(parts)

    setup.kept.add = noted
    boosted(setup, data_folder, 12)

    for name, correction in kept(setup).items():
        delta = correction.delta().double()
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 4 == len(pairs[name])
        assert (sum(pairs[name]) - delta).abs().max() < 1e-6


def test_only_the_layers_of_a_round_train_in_it(model_folder, data_folder):
    setup = prepared(model_folder, dataclasses.replace(SHORT, layers_per_round=1))
    boosted(setup, data_folder, 15)
    rounds = setup.between._rounds

    touched = [rounds.layers(number, [0, 1]) for number in range(5)]

    assert all(len(chosen) == 1 for chosen in touched) and touched != [touched[0]] * 5
    for name, correction in kept(setup).items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        used = correction.b_OR.any(dim=0).tolist()
        assert used == [layer in chosen for chosen in touched], name


def test_a_resumed_run_goes_on_inside_a_round_bit_by_bit(model_folder, data_folder, tmp_path):
    method = dataclasses.replace(SHORT, samples="hard", layers_per_round=1, restart_warmup_steps=1)
    whole, notes = prepared(model_folder, method), {}
    expected = boosted(whole, data_folder, 8, save=lambda now: notes.setdefault(now.step, copy.copy(now)), save_steps=5)
    half = prepared(model_folder, method)
    boosted(half, data_folder, 5)
    checkpoint.save(tmp_path, gather(half), notes[5].as_dict())

    again = prepared(model_folder, method)
    found = checkpoint.newest(tmp_path, pytest.fail)
    found.restore(again)
    events = boosted(again, data_folder, 8, progress=Progress.from_dict(found.state))

    assert losses(events) == losses(expected)[5:]
    assert not torch.equal(gather(whole).weights["sample_weights"], torch.ones(24))
    for name, weight in gather(whole).weights.items():
        assert torch.equal(weight, gather(again).weights[name]), name


def test_the_rate_rises_anew_in_each_round(model_folder, data_folder):
    method = dataclasses.replace(SHORT, restart_warmup_steps=1)

    events = boosted(prepared(model_folder, method), data_folder, 6)

    assert [step.learning_rate for step in events["step"]] == pytest.approx([5e-3, 1e-2, 1e-2] * 2)


@pytest.mark.parametrize("techniques", [ONE_BY_ONE, dataclasses.replace(ONE_BY_ONE, loss_type="chunked_nll"), PACKED])
def test_hard_samples_count_by_what_is_wrong_of_them(model_folder, data_folder, techniques):
    setup = prepared(model_folder, dataclasses.replace(SHORT, samples="hard"), techniques)
    data = Dataset.load(data_folder)
    by_itself = [evaluate_loss(setup, data.select([one]), techniques, ProcessGroup()) for one in range(24)]
    counts_N = torch.as_tensor(data.num_supervised).double()

    losses_N = sample_losses(setup, data, techniques, ProcessGroup(), [1.0])
    said = setup.weighing.weigh(losses_N, counts_N)

    assert torch.allclose(losses_N / counts_N, torch.tensor(by_itself, dtype=torch.float64), atol=1e-5)
    weights_N = setup.weighing.weights_N.double()
    wrong_N = 1 - torch.exp(-torch.tensor(by_itself, dtype=torch.float64))
    assert torch.allclose(weights_N, wrong_N * counts_N.sum() / (wrong_N * counts_N).sum(), atol=1e-4)
    assert said["text"].startswith("samples weighed by what is still wrong of them: from ")
    batch = collate(data, [3, 1, 7], techniques.packing)
    expected = (weights_N * losses_N)[[3, 1, 7]].sum()
    assert forward(setup, batch, 1, techniques).item() == pytest.approx(float(expected), rel=1e-4)


def test_samples_are_weighed_before_every_round_but_the_first(model_folder, data_folder):
    setup = prepared(model_folder, dataclasses.replace(SHORT, samples="hard"))

    events = boosted(setup, data_folder, 7)

    assert [one.step for one in events["learnt"]] == [3, 6]
    right = HardSamples(RoundSchedule(3, None, 0, 0), 2, torch.device("cpu"))
    right.weigh(torch.tensor([0.0, 4.0]), torch.tensor([2, 2]))
    assert right.weights_N.tolist() == [0.0, 2.0]


def test_directions_are_the_weights_largest_right_singular_vectors():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 12, generator=draw) @ torch.diag(torch.arange(12, 0, -1.0)) @ torch.randn(12, 30)

    found = right_directions(weight, 6, seed=0)

    _, _, vh = torch.linalg.svd(weight)
    assert torch.allclose((found @ vh[:6].T).abs(), torch.eye(6), atol=1e-3)
    assert (found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_what_it_hands_back_is_one_adapter_with_the_ranks_of_all_rounds(model_folder, data_folder, tmp_path):
    from peft import PeftModel

    setup, ids = prepared(model_folder), torch.arange(20)[None]
    boosted(setup, data_folder, 8)
    setup.export(tmp_path / "out", None)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))

    assert loaded.peft_config["default"].r == 3 and setup.model.peft_config["default"].r == 1
    with torch.no_grad():
        setup.model.eval(), loaded.eval()
        assert torch.allclose(setup.model(ids).logits, loaded(ids).logits, rtol=0, atol=1e-5)


SHAPE = ModelShape(64, 2, 4, 2, 16, 128, 500, True)


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"layers_per_round": 3}, {}, "method.layers_per_round is 3, the model has 2: lower it"),
        ({"kept_rank": 2, "lora_r": 4}, {}, "method.kept_rank is 2, less than one round's 4: raise it"),
        ({"samples": "hard"}, {"share_prefixes": True}, "set data.share_prefixes: false"),
        ({"lora_target_modules": ["embed_tokens"]}, {}, "leave embedding, output matrix"),
        ({}, {"torch_compile": True}, "untested with torch.compile"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_start(options, changes, words):
    assert words in str(BoostedLora(**options).refuses(dataclasses.replace(ONE_BY_ONE, **changes), SHAPE))


def test_ranks_beyond_vllms_and_local_steps_are_named():
    assert "vllm" in BoostedLora().exports(SHAPE).loads_with
    assert "its ranks end at 512, this is 601" in BoostedLora(kept_rank=600).exports(SHAPE).cannot["vllm"]
    assert "which local steps let drift apart" in str(refuses_local_steps(BoostedLora()))
