"""NEFTune's noise and smoothed labels: the same whatever the layout, and only where rows are trained."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.errors import JobError
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.training.evaluate import evaluate_loss
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.shares import Shares
from strategies.step import document_attention
from strategies.step.supervised_logits import inner_model, loss_sum
from strategies.techniques.embedding_noise import EmbeddingNoise
from strategies.workload import Techniques
from tests.orchestrator.training.test_loop import ONE_BY_ONE, close, run
from tests.processes import run_ranks

PACKED = Techniques("float32", "document", True, False, 8, 64)
LAYOUTS = {
    "3 + 3 + 2": dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=3),
    "packed": PACKED,
    "packed and checkpointed": dataclasses.replace(PACKED, gradient_checkpointing=True),
    "chunked": dataclasses.replace(PACKED, loss_type="chunked_nll"),
}


def regularise(setup, data):
    setup.noise = EmbeddingNoise(inner_model(setup.model).get_input_embeddings(), 5.0, 3)
    setup.label_smoothing = 0.2


@pytest.fixture(scope="module")
def reference(model_folder, data_folder):
    return run(model_folder, data_folder, ONE_BY_ONE, before=regularise)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_losses_and_gradients_of_one_sample_at_a_time(
    layout, reference, model_folder, data_folder
):
    close(run(model_folder, data_folder, LAYOUTS[layout], before=regularise), reference)


def test_both_change_what_is_trained_and_nothing_that_is_measured(reference, model_folder, data_folder):
    plain = run(model_folder, data_folder, ONE_BY_ONE, steps=1)
    setup, data = plain[2], Dataset.load(data_folder)
    before = evaluate_loss(setup, data, PACKED, ProcessGroup())
    regularise(setup, data)

    assert evaluate_loss(setup, data, PACKED, ProcessGroup()) == before
    assert (reference[1][0] - plain[1][0]).norm() > 0.01 * plain[1][0].norm()


def member(rank, size, port, model_folder, data_folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    group = ProcessGroup(rank, size, bucket_bytes=20_000)
    techniques = (PACKED, LAYOUTS["3 + 3 + 2"])[rank]
    found = run(model_folder, data_folder, techniques, group, shares=Shares([0.7, 0.3]), before=regularise)
    torch.save(found[:2], f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_unequal_workers_give_the_gradients_of_one(reference, model_folder, data_folder, tmp_path):
    run_ranks(member, 2, str(model_folder), data_folder, str(tmp_path))

    for rank in range(2):
        close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), reference)


def test_noise_is_uniform_scaled_by_the_rows_own_length_and_another_in_every_step(data_folder):
    data, noise = Dataset.load(data_folder), EmbeddingNoise(torch.nn.Embedding(9, 512), 5.0, 3)
    batch = collate(data, [4], packing=True)
    length = int(data.lengths[4])

    first = noise.of(batch, 512)
    noise.begin(1)
    second = noise.of(batch, 512)

    limit = 5.0 / math.sqrt(length * 512)
    assert first.abs().max() <= limit and first.abs().max() > 0.99 * limit
    assert first.mean().item() == pytest.approx(0.0, abs=0.05 * limit)
    assert first.var().item() == pytest.approx(limit**2 / 3, rel=0.05)
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.05
    assert torch.equal(noise.of(collate(data, [2, 4], packing=True), 512)[:, -length:], second)
    assert torch.equal(noise.of(collate(data, [2, 4], packing=False), 512)[1:, :length], second)


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
@pytest.mark.parametrize("packing", [True, False])
def test_smoothed_labels_are_those_of_transformers(loss_type, packing, model_folder, data_folder):
    document_attention.register()
    attention = "document" if packing else "sdpa"
    model, other = (
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=kind)
        for kind in (attention, "sdpa")
    )
    data, rows = Dataset.load(data_folder), [1, 5, 6]
    padded = collate(data, rows, packing=False)
    labels = padded.input_ids_BT.masked_fill(~padded.supervised_BT, -100)
    theirs = other(padded.input_ids_BT, attention_mask=padded.attention_mask_BT)
    expected = LabelSmoother(epsilon=0.1)(theirs, labels, shift_labels=True)
    expected.backward()
    wanted = other.model.layers[0].mlp.up_proj.weight.grad

    batch = collate(data, rows, packing)
    found = loss_sum(model, batch, loss_type, 0.1) / batch.targets_S.numel()
    found.backward()

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    own = model.model.layers[0].mlp.up_proj.weight.grad
    assert (own - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.neftune_noise_alpha=5", "data.share_prefixes=true"], "beside data.share_prefixes: true"),
        (["train.neftune_noise_alpha=5", "strategy.offload=weights"], "beside strategy.offload: weights"),
        (["train.label_smoothing_factor=0.1", "strategy.mode=pipeline"], "beside strategy.mode: pipeline"),
        (["train.label_smoothing_factor=0.1", "objective=dpo"], "objective.type dpo is of whole documents"),
    ],
)
def test_what_they_cannot_be_combined_with_is_refused(overrides, told, job_text, tmp_path):
    (tmp_path / "job.yaml").write_text(job_text)
    if "objective=dpo" in overrides:
        rows = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8
        (tmp_path / "train.jsonl").write_text(rows), (tmp_path / "eval.jsonl").write_text(rows)

    with pytest.raises(JobError, match=told):
        prepare(read_job(tmp_path / "job.yaml", overrides), lambda text: None)


def test_a_job_with_both_is_planned_without_shared_beginnings(job_text, tmp_path):
    (tmp_path / "job.yaml").write_text(job_text)
    overrides = ["train.neftune_noise_alpha=5", "train.label_smoothing_factor=0.1"]

    plan = prepare(read_job(tmp_path / "job.yaml", overrides), lambda text: None).plan

    assert not plan.techniques.share_prefixes
    assert not plan.techniques.cache_frozen_activations
