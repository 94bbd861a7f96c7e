"""Stages whose frozen weights stay on the host train as resident ones do: the same bits."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from strategies.methods.lora import Lora
from strategies.methods.qlora import QLora
from strategies.pipeline.cut import Received
from strategies.step.supervised_logits import inner_model
from strategies.step.weight_stream import stream_weights
from tests.processes import run_ranks
from tests.strategies.pipeline.test_stages import PADDED, SAMPLES, STEPS, folders, set_up, stage_of, train

__all__ = ["folders"]
pytestmark = [  # PEFT's, as in test_adapter_options.py
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
CHECKPOINTED = dataclasses.replace(PADDED, gradient_checkpointing=True)
STREAMED = dataclasses.replace(CHECKPOINTED, offload="weights")
METHODS = {
    "lora": Lora(lora_r=4),
    "dropout": Lora(lora_r=4, lora_dropout=0.2),
    "nf4": QLora(lora_r=4),
    "int8": QLora(lora_r=4, bnb_quant_type="int8"),
    "upper layers": Lora(lora_r=4, layers_to_transform=[3, 4]),
    "lowest and highest": Lora(lora_r=4, layers_to_transform=[0, 4]),
}


def member(rank, size, port, folder, method, techniques, cuts, ahead, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    techniques = dataclasses.replace(techniques, stage=stage_of(rank, cuts))
    setup = set_up(folder, method, techniques, range(size))
    stream = stream_weights(setup, torch.device("cpu"), ahead=ahead)
    seen, losses, state = train(setup, techniques)
    model = inner_model(setup.model)
    ends = isinstance(model.get_input_embeddings(), Received), hasattr(model.get_output_embeddings(), "streamed")
    torch.save((seen, losses, state, stream.counts, ends), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def in_stages(folder, method, cuts, out, techniques=STREAMED, ahead=None):
    run_ranks(member, len(cuts) + 1, folder, method, techniques, cuts, ahead, out)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(len(cuts) + 1)]


def assert_streams_as_resident(folder, method, cuts, out, **changes):
    resident, streamed = (dataclasses.replace(one, **changes) for one in (CHECKPOINTED, STREAMED))
    expected_seen, expected_losses, expected = train(set_up(folder, method, resident), resident)

    found = in_stages(folder, method, cuts, out, streamed)

    assert [float(loss) for loss in found[-1][0][::2]] == [float(loss) for loss in expected_seen[::2]]
    for seen, *_ in found:
        assert [float(norm) for norm in seen[1::2]] == [float(norm) for norm in expected_seen[1::2]]
    assert [float(loss) for loss in found[-1][1]] == [float(loss) for loss in expected_losses]
    state = found[0][2]
    assert list(state.weights) == list(expected.weights)
    assert all(torch.equal(state.weights[name], expected.weights[name]) for name in expected.weights)
    for *_, counts, _ in found:
        assert counts.most_visitors == 1 <= counts.visits  # on a CPU; two where a stream copies ahead
    assert [ends for *_, ends in found] == [(rank > 0, rank == len(cuts)) for rank in range(len(cuts) + 1)]
    return found


@pytest.mark.parametrize("name", METHODS)
def test_streamed_stages_train_bit_for_bit_as_one_resident_process(name, folders, tmp_path):
    assert_streams_as_resident(folders("llama"), METHODS[name], (1, 3), tmp_path)


@pytest.mark.parametrize("name", ["lora", "nf4"])
def test_so_do_stages_that_share_a_tied_matrix(name, folders, tmp_path):
    assert_streams_as_resident(folders("llama tied"), METHODS[name], (1, 3), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "attn_implementation": "document"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_so_does_every_layout(changes, folders, tmp_path):
    name = "nf4" if "dtype" not in changes else "lora"
    assert_streams_as_resident(folders("llama tied"), METHODS[name], (2,), tmp_path, **changes)


@pytest.mark.parametrize("name", ["phi", "gemma3_text"])
def test_so_does_every_family(name, folders, tmp_path):
    assert_streams_as_resident(folders(name), METHODS["lora"], (2, 3), tmp_path)


def test_a_stage_sends_its_layers_twice_a_micro_batch_and_those_below_all_that_trains_once(folders, tmp_path):
    """Layers 3 and 4 train, of stages with layer 0, layers 1 and 2, layers 3 and 4 with the output matrix."""
    chosen = dataclasses.replace(STREAMED, per_device_train_batch_size=1)

    found = in_stages(folders("llama"), METHODS["upper layers"], (1, 3), tmp_path, chosen)

    trained, held_out = STEPS * len(SAMPLES), 2  # micro-batches
    last = trained * (3 + 2) + held_out * 3 - trained  # up and down; a layer that is there is not sent for
    assert [counts.visits for *_, counts, _ in found] == [1, 2 * (trained + held_out), last]


def copies(num_visitors, order, lowest=0):
    """Of a line of visitors in these forward (F) and backward (B) passes: a turn finds its first two there."""
    up, down = num_visitors, num_visitors - lowest
    turns = min(2, down) * order.count("FB") + (2 * order.count("BF") if lowest == 0 else 0)
    return order.count("F") * up + order.count("B") * down - turns - (order.count("BB") if down == 1 else 0)


@pytest.mark.parametrize(("name", "lowest"), [("lora", 0), ("upper layers", 3)])
def test_a_stage_that_copies_ahead_copies_no_layer_in_vain(name, lowest, folders, tmp_path):
    """Layers 0 to 3 of five in the order of the first of two stages; layer 4 and the output matrix always fit."""
    found = in_stages(folders("llama"), METHODS[name], (4,), tmp_path, ahead=True)

    order = "FFBFBFBFBB" * STEPS + "FF"  # five micro-batches a step, then two held-out samples
    begun = 1  # the first layer of a forward pass that does not come any more
    assert [counts.most_visitors for *_, counts, _ in found] == [2, 2]
    assert [counts.visits for *_, counts, _ in found] == [copies(4, order, lowest) + begun, 2]
