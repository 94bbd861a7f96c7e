"""Adapters are tried on rows end to end, common beginnings once: the same losses as row by row."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.bank.adapter_trial import AdapterTrial
from orchestrator.data.dataset import Dataset, TokenizeOptions, build
from orchestrator.data.readers.files import read_rows
from orchestrator.data.rendering.template import Renderer
from orchestrator.job.job_file import parse_job
from strategies.adapter_bank.algebra import Factors
from tests.conftest import CHAT_TEMPLATE, WORDS, rows, write_jsonl

NAMES = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def data(model_folder, tmp_path_factory):
    """Rows of unequal lengths that begin alike."""
    folder = tmp_path_factory.mktemp("rows")
    asked = [
        row | {"prompt": " ".join(WORDS[:6]) + " " + row["prompt"] * (1 + n % 3)} for n, row in enumerate(rows(12))
    ]
    renderer = Renderer(AutoTokenizer.from_pretrained(model_folder), CHAT_TEMPLATE)
    lines = read_rows(write_jsonl(folder / "rows.jsonl", asked))
    build(lines, renderer, TokenizeOptions("auto", "", 96, "truncate", True), folder / "samples")
    return Dataset.load(folder / "samples")


@pytest.fixture
def trial(model_folder, tmp_path):
    job = parse_job(f"model: {{model_name_or_path: {model_folder}}}\ndata: {{train: a.jsonl}}\n", tmp_path)
    return AdapterTrial(job, model_folder, [])


def correction(model, seed: int) -> dict[str, Factors]:
    draw, found = torch.Generator().manual_seed(seed), {}
    for name in NAMES:
        outputs, inputs = model.get_submodule(name).weight.shape
        sides = torch.randn(2, inputs, generator=draw), torch.randn(outputs, 2, generator=draw)
        found[name] = Factors(*(0.3 * side for side in sides))
    return found


def loss_row_by_row(model_folder, data, rows_, corrections) -> float:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for name, factors in corrections.items():
            model.get_submodule(name).weight += factors.b_OR @ factors.a_RI
        for row in rows_:
            ids, mask = (torch.tensor(part.tolist()) for part in data.tokens(row))
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
            wanted = mask[1:].nonzero()[:, 0]
            total -= logps[wanted, ids[1:][wanted]].sum().item()
            count += len(wanted)
    return total / count


def test_the_loss_of_a_correction_is_that_of_its_rows_one_by_one(trial, data, model_folder):
    corrections = correction(trial.model, 1)
    expected = loss_row_by_row(model_folder, data, range(len(data)), corrections)

    assert trial.loss(data, corrections) == pytest.approx(expected, rel=1e-5)
    assert trial.loss(data, corrections) == pytest.approx(expected, rel=1e-5)  # the lower layers are known now
    assert expected != pytest.approx(trial.loss(data), rel=1e-3)


def total(parts, shares) -> dict[str, Factors]:
    """The sum of parts by their shares of each map."""
    return {
        name: Factors(
            torch.cat([part[name].a_RI for part in parts]),
            torch.cat([float(share) * part[name].b_OR for part, share in zip(parts, shares[name], strict=True)], dim=1),
        )
        for name in NAMES
    }


def test_tuning_lowers_the_loss_of_rows_held_back_from_that_of_the_sum_it_begins_with(trial, data, model_folder):
    parts = [correction(trial.model, 1), correction(trial.model, 2)]  # at random, so that less of them is better

    tuned = trial.tune(data, parts, [1.0, 1.0])

    held_back = range(0, len(data), 4)
    begun = loss_row_by_row(model_folder, data, held_back, total(parts, dict.fromkeys(NAMES, (1.0, 1.0))))
    assert tuned.losses[0] == pytest.approx(begun, rel=1e-5)
    assert tuned.gained
    best = loss_row_by_row(model_folder, data, held_back, total(parts, tuned.shares))
    assert best == pytest.approx(min(tuned.losses), rel=1e-5) and best < 0.995 * begun
