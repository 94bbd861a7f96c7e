"""Preflight sees what a later step holds at its fullest, before the first step is made."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.data.packing import micro_batches
from orchestrator.errors import NothingFits
from orchestrator.training.workers import preflight
from strategies import METHODS
from strategies.measure.trace import LiveStorages, tensors_of
from strategies.step.step import Update, forward_backward, update
from strategies.techniques.precision import gradient_scaler
from strategies.train_setup import TrainSettings
from strategies.workload import Techniques

TWO_ROWS = Techniques("float32", "sdpa", False, False, 2, 64)
PADDED, PACKED = {"rows": 2, "max_length": 16, "packing": False}, {"rows": 1, "max_length": 16, "packing": True}


def prepared(model_folder, method, techniques=TWO_ROWS):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    return METHODS[method]().setup(model, TrainSettings(1e-2, 0.1, "adamw_torch", 0.9, 0.999, 1e-8, techniques, 3))


def watched(setup):
    live = LiveStorages()
    for tensor in tensors_of(setup):
        live.watch(tensor)
    return live


def peak_of_the_second_step(setup, data, num_samples):
    """Of the longest samples, as training lays them out."""
    longest = sorted(range(len(data)), key=lambda i: -int(data.lengths[i]))[:num_samples]
    groups = micro_batches([int(data.lengths[i]) for i in longest], TWO_ROWS.per_device_train_batch_size, 64, False)
    live, scaler = watched(setup), gradient_scaler("cpu", "float32")
    with live:
        for _ in range(2):
            live.take_peak()
            for group in groups:
                forward_backward(setup, collate(data, [longest[i] for i in group], False), 100, TWO_ROWS, scaler)
            update(setup, scaler, Update(1.0, 1.0))
    return live.take_peak()


@pytest.mark.parametrize("num_samples", [2, 6], ids=["one micro-batch", "gradients that add up"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_preflight_sees_the_peak_of_a_later_step_and_not_much_more(model_folder, data_folder, method, num_samples):
    data, setup = Dataset.load(data_folder), prepared(model_folder, method)
    live = watched(setup)
    with live:
        preflight.longest_batch(setup, data, TWO_ROWS, num_samples)
    seen = live.take_peak()

    later = peak_of_the_second_step(prepared(model_folder, method), data, num_samples)

    assert later <= 1.01 * seen
    assert seen <= 1.1 * later


@pytest.mark.parametrize(
    ("lengths", "supervised", "layout", "heaviest"),
    [
        ([9, 8, 3, 3], [1, 1, 1, 1], PADDED, [{0, 1}]),
        ([9, 2, 8, 8], [1, 1, 1, 1], PADDED, [{0, 2}]),
        ([9, 8, 3, 3], [1, 1, 3, 3], PADDED, [{0, 1}, {2, 3}]),  # the longest learn least: their logits are few
        ([9, 8, 5, 4], [4, 1, 2, 1], PACKED, [{0, 2}]),
    ],
)
def test_the_heaviest_batches_have_most_padded_tokens_and_most_supervised_positions(
    lengths, supervised, layout, heaviest
):
    found = preflight.heaviest_samples(lengths, supervised, 4, **layout)

    assert [set(members) for members in found] == heaviest


def test_every_form_of_out_of_memory_in_preflight_is_an_answer(model_folder, data_folder, tmp_path):
    setup = prepared(model_folder, "lora")

    def refuse(*_):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    setup.model.register_forward_pre_hook(refuse)

    with pytest.raises(NothingFits, match="the longest batch does not fit on cpu: CUDA error: CUBLAS"):
        preflight.check(setup, Dataset.load(data_folder), None, TWO_ROWS, 4, tmp_path / "preflight")


def test_workers_that_divide_an_optimizer_update_equally_often():
    """Of these rows the share of one worker has two heaviest micro-batches, that of the other a single one."""
    lengths, supervised = [16, 12, 8, 8], [1, 12, 2, 2]
    chosen = [
        preflight.heaviest_samples(lengths, supervised, num_samples, rows, 16, False)
        for num_samples, rows in ((4, 1), (4, 4))
    ]

    assert [len(batches) for batches in chosen] == [2, 1]
    assert [len(preflight.repeat_to_two(batches)) for batches in chosen] == [2, 2]
