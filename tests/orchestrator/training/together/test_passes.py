"""A job trains in a row with others as it does alone, and what becomes of the others does not reach it."""

import dataclasses
import math
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from orchestrator.errors import Diverged
from orchestrator.training.feed import Feed
from strategies import METHODS
from strategies.multi_lora.joint_model import BaseCopies, JointModel
from strategies.multi_lora.passes import JointRow
from strategies.multi_lora.turns import Turn
from tests.orchestrator.training.together.jobs import (
    PACKED,
    SmallJob,
    alone,
    differing,
    farthest,
    load,
    set_up,
    together,
)


@pytest.fixture(scope="module")
def whole(model_folder, data_folder):
    """Each of the jobs below by itself."""
    return {job.name: alone(model_folder, data_folder, job) for job in MIXED}


def warm_up(step):
    return min(1.0, (step + 1) / 5)


def decay(step):
    return 0.5 * (1 + math.cos(math.pi * step / 20))


MIXED = [
    SmallJob("plain"),
    SmallJob("wide", {"lora_r": 12, "lora_alpha": 8, "use_rslora": True}, 3e-3, 5, max_grad_norm=0.05, seed=4),
    SmallJob(
        "accumulating",
        {"lora_r": 7, "lora_target_modules": ["q_proj", "down_proj"]},
        batch_size=9,
        techniques=dataclasses.replace(PACKED, per_device_train_batch_size=1),
        lr_factor=warm_up,
        first_row=3,
        seed=9,
    ),
    SmallJob("dropping", {"lora_r": 4, "lora_dropout": 0.2}, 5e-3, 6, max_grad_norm=0.0, first_row=6),
    SmallJob(
        "upper",
        {"lora_r": 2, "layers_to_transform": [1], "loraplus_lr_ratio": 8.0, "lora_dropout": 0.1},
        learning_rate=1e-3,  # at more its loss rises, and a last bit grows to 0.6 % within thirteen steps
        batch_size=3,
        lr_factor=decay,
        seed=7,
        steps=13,
    ),
]


def test_unlike_jobs_in_one_row_train_as_each_does_alone(model_folder, data_folder, whole):
    rows, model, began = [], load(model_folder), time.perf_counter()
    found = together(model, data_folder, MIXED, watch=rows.append)
    seconds = time.perf_counter() - began

    assert max(map(len, rows)) == len(MIXED)  # they did share rows
    assert 0.5 * seconds < sum(found[job.name].own_s for job in MIXED) <= seconds  # no second is two jobs' own
    assert min(found[job.name].own_s for job in MIXED) > 0
    for job in MIXED:
        assert len(found[job.name].losses) == job.steps
        assert farthest(found[job.name], whole[job.name]) <= 1e-5, job.name


def test_the_only_job_of_a_row_trains_bit_by_bit_as_alone(model_folder, data_folder, whole):
    for job in MIXED:
        found = together(load(model_folder), data_folder, [job])

        assert farthest(found[job.name], whole[job.name]) == 0.0, job.name


def test_activations_computed_again_give_the_same(model_folder, data_folder):
    again = dataclasses.replace(PACKED, gradient_checkpointing=True)
    jobs = [differing(job, techniques=again, steps=5) for job in (MIXED[0], MIXED[3])]

    found = together(load(model_folder), data_folder, jobs)

    for job in jobs:
        assert farthest(found[job.name], alone(model_folder, data_folder, job)) <= 1e-5


def test_rows_with_shared_beginnings_meet_others_and_train_as_alone(model_folder, data_folder):
    shared = dataclasses.replace(PACKED, share_prefixes=True)
    jobs = [
        differing(MIXED[0], techniques=shared, steps=5),
        differing(MIXED[1], steps=5),
        differing(MIXED[4], techniques=shared, steps=5),
    ]
    rows = []

    found = together(load(model_folder), data_folder, jobs, watch=rows.append)

    assert max(map(len, rows)) == len(jobs)
    for job in jobs:
        assert farthest(found[job.name], alone(model_folder, data_folder, job)) <= 1e-5, job.name
    assert found["plain"].progress.computed_tokens < found["plain"].progress.tokens


def test_the_loss_in_chunks_is_the_same(model_folder, data_folder):
    chunked = dataclasses.replace(PACKED, loss_type="chunked_nll")
    jobs = [differing(job, techniques=chunked, steps=5) for job in MIXED[:2]]

    found = together(load(model_folder), data_folder, jobs)

    for job in jobs:
        assert farthest(found[job.name], alone(model_folder, data_folder, job)) <= 1e-5


def test_a_job_that_continues_from_a_checkpoint_among_others_is_as_one_that_never_stopped(
    model_folder, data_folder, whole
):
    starts = {job.name: whole[job.name].saved[7 if job.name != "wide" else 14] for job in MIXED[:4]}

    found = together(load(model_folder), data_folder, MIXED, starts)

    for job in MIXED:
        done = 0 if job.name not in starts else starts[job.name][1]["step"]
        rest = dataclasses.replace(
            whole[job.name], losses=whole[job.name].losses[done:], norms=whole[job.name].norms[done:]
        )
        assert farthest(found[job.name], rest) <= 1e-5, job.name


def spoil(step, setup):
    if step == 4:
        with torch.no_grad():
            next(iter(setup.parameters.values())).fill_(math.nan)


def test_a_loss_that_is_not_finite_ends_its_job_and_leaves_the_others_bit_equal(model_folder, data_folder):
    """The fifth pass holds its tokens in both runs: in one of them with a loss, in the other without."""
    jobs = [MIXED[0], differing(MIXED[1], name="spoilt", steps=5), MIXED[3]]
    sound = together(load(model_folder), data_folder, jobs)

    found = together(load(model_folder), data_folder, [jobs[0], differing(jobs[1], steps=20, spoil=spoil), jobs[2]])

    assert isinstance(found["spoilt"], Diverged)
    for job in (jobs[0], jobs[2]):
        assert all(map(math.isfinite, found[job.name].losses)) and len(found[job.name].losses) == 20
        assert found[job.name].losses[:5] == sound[job.name].losses[:5]
        assert farthest(found[job.name], sound[job.name]) <= 1e-5


def spoil_at_once(step, setup):
    assert step == 0  # its loss is not finite: it has no step
    with torch.no_grad():
        next(iter(setup.parameters.values())).fill_(math.nan)


def test_a_gradient_that_is_not_finite_stays_in_its_own_range(model_folder, data_folder):
    """The very pass with the loss that is none: gradients of the others are those of a pass without."""
    jobs = [differing(job, steps=1) for job in (MIXED[0], MIXED[1], MIXED[3])]
    sound = together(load(model_folder), data_folder, jobs)

    found = together(load(model_folder), data_folder, [jobs[0], differing(jobs[1], spoil=spoil_at_once), jobs[2]])

    assert isinstance(found["wide"], Diverged)
    for job in (jobs[0], jobs[2]):
        assert farthest(found[job.name], sound[job.name]) == 0.0


def test_a_job_that_stops_early_leaves_the_others_as_they_are(model_folder, data_folder, whole):
    early = differing(MIXED[0], name="early", learning_rate=0.0, patience=1)  # gains nothing, on any machine
    expected = alone(model_folder, data_folder, early)
    assert expected.progress.stopped == "early" and expected.progress.step == 6

    found = together(load(model_folder), data_folder, [early, MIXED[1]])

    assert found["early"].progress.step == expected.progress.step
    assert found["early"].progress.eval_losses == pytest.approx(expected.progress.eval_losses, rel=1e-5)
    assert farthest(found["wide"], whole["wide"]) <= 1e-5


def test_jobs_wait_for_a_place_where_not_all_have_one(model_folder, data_folder, whole):
    rows = []
    found = together(load(model_folder), data_folder, MIXED, places=2, watch=rows.append)

    assert max(map(len, rows)) == 2
    for job in MIXED:
        assert farthest(found[job.name], whole[job.name]) <= 1e-5


def test_a_pass_stays_within_the_tokens_of_a_micro_batch(model_folder, data_folder):
    full = dataclasses.replace(PACKED, per_device_train_batch_size=1, max_length=40)
    jobs, tokens = [differing(job, techniques=full, steps=3) for job in (MIXED[0], MIXED[3])], []

    def watch_tokens(model):
        model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: tokens.append(ids[0].shape[1]))

    found = together(load(model_folder), data_folder, jobs, prepare=watch_tokens)

    assert 27 < max(tokens) <= 40
    for job in jobs:
        assert farthest(found[job.name], alone(model_folder, data_folder, job)) <= 1e-5


def test_memory_that_runs_out_in_a_shared_pass_only_makes_passes_smaller(model_folder, data_folder, whole):
    """In a backward pass, when some gradients are there already."""
    rows = []

    def fail_once(model):
        def fail(_):
            if len(rows) == 3:
                rows.append(["failed"])
                raise MemoryError("no memory for three")

        def watch_gradient(_, __, made):
            if made[0].requires_grad:
                made[0].register_hook(fail)

        model.model.layers[1].self_attn.register_forward_hook(watch_gradient)

    found = together(load(model_folder), data_folder, MIXED[:3], prepare=fail_once, watch=rows.append)

    assert len(rows[2]) == 3 and rows[3] == ["failed"] and "no memory for three" in found["notes"][0]
    for job in MIXED[:3]:
        assert farthest(found[job.name], whole[job.name]) <= 1e-5


def test_memory_that_runs_out_while_a_batch_is_made_is_felt_by_its_own_job(
    monkeypatch, model_folder, data_folder, whole
):
    taken, take = [], Feed.take

    def fail_once(feed, sample_ids):
        taken.append(sample_ids)
        if len(taken) == 4:
            raise MemoryError("no memory for the batch")
        return take(feed, sample_ids)

    monkeypatch.setattr(Feed, "take", fail_once)
    found = together(load(model_folder), data_folder, MIXED[:2])

    assert len(taken) > 4
    for job in MIXED[:2]:
        assert farthest(found[job.name], whole[job.name]) <= 1e-5


def test_memory_that_runs_out_for_one_job_alone_makes_its_own_micro_batches_smaller(model_folder, data_folder):
    def never_large(model):
        def refuse(_, ids):
            if ids[0].shape[1] > 100:
                raise MemoryError("more than 100 tokens")

        model.get_input_embeddings().register_forward_pre_hook(refuse)

    jobs = [differing(job, steps=6) for job in MIXED[:3]]
    found = together(load(model_folder), data_folder, jobs, prepare=never_large)

    assert found["plain"].setup and "at most" in found["notes"][0]
    for job in jobs:
        assert farthest(found[job.name], alone(model_folder, data_folder, job, never_large)) <= 1e-5


def test_a_base_in_four_bits_is_shared_too(model_folder, data_folder):
    quantised = METHODS["qlora"]().load_arguments(PACKED)
    jobs = [differing(job, method="qlora", loaded_with=quantised, steps=4) for job in (MIXED[0], MIXED[3])]

    found = together(load(model_folder, **quantised), data_folder, jobs)

    for job in jobs:
        assert farthest(found[job.name], alone(model_folder, data_folder, job)) <= 1e-5


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("qlora", {"bnb_quant_type": "int8"}, "outliers over all tokens"),
        ("lora", {"use_dora": True}, "use_dora is more than pairs"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights: pissa is more than pairs"),
        ("full", {}, "trains weights of the base model itself"),
    ],
)
def test_what_cannot_share_says_why(method, options, why):
    assert why in METHODS[method](**options).why_alone()


@pytest.fixture(scope="module")
def conv1d_folder(tmp_path_factory):
    """A GPT-2 of two layers, whose maps are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_transposed_maps_are_corrected_as_well(conv1d_folder, data_folder):
    jobs = [differing(MIXED[0], steps=5), differing(MIXED[3], steps=5)]

    found = together(load(conv1d_folder), data_folder, jobs)

    for job in jobs:
        assert farthest(found[job.name], alone(conv1d_folder, data_folder, job)) <= 1e-5


def test_jobs_of_one_base_hold_its_weights_once(model_folder):
    base = BaseCopies(load(model_folder))
    setups = [set_up(base.copy(), job) for job in MIXED]

    held = {id(p): p.numel() for setup in setups for p in setup.model.parameters()}
    trained = sum(p.numel() for setup in setups for p in setup.parameters.values())
    assert sum(held.values()) == sum(p.numel() for p in base.copy().parameters()) + trained


def test_corrections_of_another_form_do_not_join_a_row(model_folder, data_folder):
    base = BaseCopies(load(model_folder))
    row = JointRow(JointModel(base), print)
    setup = set_up(base.copy(), SmallJob("dora", {"lora_r": 4, "use_dora": True}))

    passes, why = row.join("dora", setup, Turn(print))

    assert not passes.is_joined and "DoRA" in why
