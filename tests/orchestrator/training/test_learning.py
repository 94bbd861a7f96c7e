"""A method that looks at gradients before it trains (SHiRA) through the loop: restarts and workers change nothing."""

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from orchestrator.data.dataset import TokenizeOptions, build
from orchestrator.data.readers.files import read_rows
from orchestrator.data.rendering.template import Renderer
from orchestrator.training import checkpoint
from orchestrator.training.parallel import ProcessGroup
from orchestrator.training.state import Progress
from strategies.methods.shira import Shira
from strategies.model.heads import inner_model
from strategies.step.state import gather
from strategies.techniques.embedding_noise import EmbeddingNoise
from tests.conftest import CHAT_TEMPLATE, WORDS, write_jsonl
from tests.orchestrator.training.test_streaming import ONE_BY_ONE, PACKED, losses, prepared, run, weights
from tests.processes import run_ranks

METHOD = Shira(shira_r=4, calibration_rows=4)


def places(setup):
    return torch.cat(list(setup.buffers.values()))


def test_it_learns_once_and_says_what(model_folder, data_folder):
    events = run(prepared(model_folder, method=METHOD), data_folder, 3)

    (told,) = events["learnt"]
    assert told.step == 0 and told.extra["density"] < told.extra["sensitivity"] < 1
    assert "% that train carry" in events["note"][0].text
    assert losses(events)[-1] < losses(events)[0]


def test_a_resumed_run_is_bit_equal(model_folder, data_folder, tmp_path):
    kept = {}

    def save(now):
        kept[now.step] = dataclasses.replace(now)
        return "x"

    whole = prepared(model_folder, PACKED, METHOD)
    expected = losses(run(whole, data_folder, 5, PACKED, save=save, save_steps=3))
    half = prepared(model_folder, PACKED, METHOD)
    run(half, data_folder, 3, PACKED)
    checkpoint.save(tmp_path, gather(half), kept[3].as_dict())

    again = prepared(model_folder, PACKED, METHOD)
    assert not torch.equal(places(again), places(whole))
    found = checkpoint.newest(tmp_path, pytest.fail)
    found.restore(again)
    events = run(again, data_folder, 5, PACKED, progress=Progress(**found.state))

    assert "learnt" not in events and losses(events) == expected[3:]
    assert torch.equal(places(again), places(whole)) and torch.equal(weights(again), weights(whole))


def with_noise(setup):
    setup.noise = EmbeddingNoise(inner_model(setup.model).get_input_embeddings(), 5.0, 3)


def with_dropout(setup):
    for layer in inner_model(setup.model).model.layers:
        layer.self_attn.attention_dropout = 0.2


@pytest.mark.parametrize("change", [with_noise, with_dropout])
def test_a_resumed_run_chooses_the_same_entries_anew_where_passes_draw_random_numbers(
    model_folder, data_folder, tmp_path, change
):
    method, kept = dataclasses.replace(METHOD, reselect_every=1, reselections=8), {}

    def fresh():
        setup = prepared(model_folder, method=method)
        change(setup)
        return setup

    def save(now):
        kept[now.step] = dataclasses.replace(now)
        return "x"

    whole, half, again = fresh(), fresh(), fresh()
    expected = losses(run(whole, data_folder, 4, save=save, save_steps=2))
    run(half, data_folder, 2)
    checkpoint.save(tmp_path, gather(half), kept[2].as_dict())
    found = checkpoint.newest(tmp_path, pytest.fail)
    found.restore(again)

    events = run(again, data_folder, 4, progress=Progress(**found.state))

    assert losses(events) == expected[2:]
    assert torch.equal(places(again), places(whole)) and torch.equal(weights(again), weights(whole))


def test_the_entries_do_not_depend_on_how_rows_are_laid_out(model_folder, tmp_path):
    """Three rows of one supervised token and one of many: a mean of each pass's own mean would choose others."""
    data = unequal_rows(model_folder, tmp_path)
    chosen = []
    for techniques in (ONE_BY_ONE, dataclasses.replace(ONE_BY_ONE, per_device_train_batch_size=4), PACKED):
        setup = prepared(model_folder, techniques, METHOD)
        run(setup, data, 1, techniques)
        chosen.append(places(setup))

    for other in chosen[1:]:  # but for entries that are as good up to rounding
        assert (other == chosen[0]).float().mean() > 0.9
        assert len(set(other.tolist()) & set(chosen[0].tolist())) >= 0.99 * len(set(other.tolist()))


def unequal_rows(model_folder, folder):
    file = write_jsonl(
        folder / "rows.jsonl",
        [{"prompt": f"{' '.join(WORDS)} {n}", "completion": WORDS[n] if n % 4 else " ".join(WORDS)} for n in range(8)],
    )
    renderer = Renderer(AutoTokenizer.from_pretrained(model_folder), CHAT_TEMPLATE)
    build(read_rows(file), renderer, TokenizeOptions("auto", "", 64, "truncate", False), folder / "samples")
    return folder / "samples"


def worker(rank, size, port, model_folder, data_folder, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    techniques = dataclasses.replace(ONE_BY_ONE, dtype=("float32", "bfloat16")[rank])
    setup = prepared(model_folder, techniques, METHOD)
    found = losses(run(setup, data_folder, 3, techniques, group=ProcessGroup(rank, 2)))
    torch.save((found, places(setup), weights(setup)), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_train_the_same_entries_also_where_their_gradients_differ(model_folder, data_folder, tmp_path):
    """One in fp32, one in bf16, which would choose others: the first one's count, on devices of one kind too."""
    alone = prepared(model_folder, method=METHOD)
    expected = losses(run(alone, data_folder, 3))

    run_ranks(worker, 2, str(model_folder), data_folder, str(tmp_path))

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first[0] == second[0] == pytest.approx(expected, rel=0.02)
    assert torch.equal(first[1], second[1]) and torch.equal(first[1], places(alone))
    assert torch.equal(first[2], second[2])
