"""Streamed frozen weights: the same numbers as resident ones, with one layer at a time where copies have no stream."""

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

from strategies.cost import streaming
from strategies.methods.lora import Lora
from strategies.methods.qlora import QLora
from strategies.methods.shira import Shira
from strategies.step import document_attention, streamed_output, weight_stream
from strategies.step.quantise import quantise_on
from strategies.step.step import Update, forward_backward, update
from strategies.step.supervised_logits import supervised_logits
from strategies.step.weight_stream import Visitor, WeightStream, stream_weights
from strategies.techniques import checkpointing
from strategies.techniques.precision import gradient_scaler
from tests.strategies.test_adapter_options import MODELS
from tests.strategies.test_contract import NUM_SUPERVISED, SAMPLES, settings, techniques

pytestmark = [  # PEFT's, as in test_adapter_options.py
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
STEPS = 3
METHODS = {
    "lora": Lora(lora_r=4),
    "lora with dropout": Lora(lora_r=4, lora_dropout=0.2),
    "some layers": Lora(lora_r=4, layers_to_transform=[1, 2]),
    "biases": Lora(lora_r=4, bias="all"),
    "dora": Lora(lora_r=4, use_dora=True),
    "nf4": QLora(lora_r=4),
    "nf4 without double quantisation": QLora(lora_r=4, bnb_4bit_use_double_quant=False),
    "int8": QLora(lora_r=4, bnb_quant_type="int8"),
    "shira": Shira(shira_r=2, mask="random"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family's tiny model, made when it is asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder_of(name):
        if name not in made:
            from tests.strategies.test_families import built

            torch.manual_seed(0)
            config = {"model_type": name.split()[0], **MODELS[name], "vocab_size": 120}
            made[name] = root / name
            built(config, "cpu").save_pretrained(made[name])
        return made[name]

    return folder_of


def set_up(folder, method, chosen, streamed, slice_bytes=None):
    document_attention.register()
    arguments = method.load_arguments(chosen)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, chosen.dtype), attn_implementation=chosen.attn_implementation, **arguments
    )
    setup = method.setup(model, settings(techniques=chosen))
    checkpointing.enable(setup.model)
    stream = stream_weights(setup, torch.device("cpu"), slice_bytes) if streamed else None
    setup.model.train()
    return setup, stream


def train(setup, chosen, steps=STEPS):
    """Losses and gradients of some clipped steps of two micro-batches, then the trained weights."""
    torch.manual_seed(1)
    seen, scaler = [], gradient_scaler("cpu", chosen.dtype)
    for _ in range(steps):
        for part in SAMPLES:
            seen.append(forward_backward(setup, part.batch(chosen.packing), NUM_SUPERVISED, chosen, scaler))
        seen += [parameter.grad.clone() for parameter in setup.summed]
        seen.append(update(setup, scaler, Update(1.0, 0.5)))
    return seen + [parameter.detach().clone() for parameter in setup.parameters.values()]


def both(folder, method, slice_bytes=None, **changes):
    chosen = techniques(**{"gradient_checkpointing": True, "packing": False, **changes})
    resident, _ = set_up(folder, method, chosen, streamed=False)
    streamed, stream = set_up(folder, method, chosen, True, slice_bytes)
    return train(resident, chosen), train(streamed, chosen), streamed, stream


def assert_equal(found, expected):
    assert len(found) == len(expected) > STEPS
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_streamed_weights_train_bit_for_bit_as_resident_ones(name, folders):
    expected, found, _, stream = both(folders("llama"), METHODS[name])

    assert_equal(found, expected)
    assert stream.counts.most_visitors == 1  # on a CPU; two where a stream copies ahead
    assert stream.counts.visits > 0


@pytest.mark.parametrize("name", MODELS)
def test_so_does_every_family(name, folders):
    expected, found, _, _ = both(folders(name), Lora(lora_r=2))

    assert_equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "attn_implementation": "document"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "packing": True, "attn_implementation": "document"},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [METHODS["lora"], METHODS["nf4"]], ids=["lora", "nf4"])
def test_so_does_every_layout(method, changes, folders):
    expected, found, _, _ = both(folders("llama"), method, **changes)

    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_an_output_matrix_in_slices_gives_the_same_gradients(name, loss_type, folders):
    expected, found, setup, _ = both(folders(name), Lora(lora_r=2), slice_bytes=16 * 4 * 50, loss_type=loss_type)

    assert len(setup.model.get_output_embeddings().streamed.rows) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_chunked_loss_in_bf16_is_the_resident_one_within_its_rounding(folders):
    chosen = {"loss_type": "chunked_nll", "dtype": "bfloat16"}
    expected, found, _, _ = both(folders("llama"), Lora(lora_r=2), slice_bytes=16 * 2 * 50, **chosen)

    for one, other in zip(found[:2], expected[:2], strict=True):  # before the first update
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["nf4", "int8", "lora"])
def test_held_out_logits_and_generated_tokens_are_the_resident_ones(name, folders):
    chosen = techniques(gradient_checkpointing=True, packing=False)
    models = [set_up(folders("llama tied"), METHODS[name], chosen, streamed)[0].model.eval() for streamed in (0, 1)]
    batch, prompt = SAMPLES[0].batch(False), torch.tensor([[5, 9, 14], [5, 7, 3]])

    with torch.no_grad():
        logits = [supervised_logits(model, batch) for model in models]
        tokens = [model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=2) for model in models]

    assert torch.equal(*logits) and torch.equal(*tokens)


@pytest.mark.parametrize("name", ["nf4", "nf4 without double quantisation", "int8"])
def test_what_another_device_quantises_is_the_same(name, folders):
    """The other device is the same one here; what is tested is the way there and back."""
    chosen, seen = techniques(gradient_checkpointing=True, packing=False), []
    plain, _ = set_up(folders("llama"), METHODS[name], chosen, streamed=False)

    with quantise_on(torch.device("cpu")):
        functional = bitsandbytes.functional
        for function in ("quantize_4bit", "int8_vectorwise_quant"):
            inner = getattr(functional, function)
            setattr(functional, function, lambda *a, inner=inner, **k: (seen.append(a[0].shape), inner(*a, **k))[1])
        moved, _ = set_up(folders("llama"), METHODS[name], chosen, streamed=False)

    assert len(seen) >= 7 * 3  # the maps of three layers
    assert functional.quantize_4bit.__module__ == functional.int8_vectorwise_quant.__module__ == functional.__name__
    expected, found = (dict(setup.model.state_dict()) for setup in (plain, moved))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_estimate_counts_the_slices_that_are_cut():
    assert streaming.LEAST_SLICE_BYTES == weight_stream.LEAST_SLICE_BYTES
    assert streaming.POSITIONS == streamed_output.POSITIONS


def test_a_layer_for_which_there_was_no_memory_comes_when_it_is_asked_for_again(monkeypatch):
    weights = [torch.full((4,), float(number)) for number in range(3)]
    visitors = [Visitor([weight], torch.device("cpu")) for weight in weights]
    stream = WeightStream(torch.device("cpu"), visitors)
    stream.need(0)

    def fails():
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as full, pytest.raises(torch.OutOfMemoryError):
        full.setattr(visitors[1], "make_room", fails)
        stream.need(1)
    for place in (0, 1, 1, 0, 2):
        stream.need(place)
        assert torch.equal(visitors[place].visiting[0], weights[place])


def test_gradients_of_a_model_in_evaluation_mode_are_refused(folders):
    setup, _ = set_up(folders("llama"), METHODS["nf4"], techniques(gradient_checkpointing=True), streamed=True)
    setup.model.eval()

    with pytest.raises(RuntimeError, match="call train"):
        supervised_logits(setup.model, SAMPLES[0].batch(False))


@pytest.mark.parametrize(("layers", "visits"), [(None, 4 + 3), ([1, 2], 4 + 2), ([2], 4 + 1)], ids=str)
def test_a_layer_visits_twice_a_micro_batch_and_below_the_trained_ones_once(layers, visits, folders):
    """Up: three layers and the output matrix.  Down, where it still is: the layers, to the lowest that trains."""
    chosen = techniques(gradient_checkpointing=True, packing=False)
    setup, stream = set_up(folders("llama"), Lora(lora_r=2, layers_to_transform=layers), chosen, streamed=True)

    forward_backward(setup, SAMPLES[0].batch(False), NUM_SUPERVISED, chosen, gradient_scaler("cpu", "float32"))

    assert stream.counts.visits == visits
