"""`verify` of a job and of a run, its workers in this process or in two: Ray's door is a fake."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from orchestrator.errors import RunFailed
from orchestrator.job.job_file import read_job
from orchestrator.lifecycle.prepare import prepare
from orchestrator.lifecycle.proofs import prove
from orchestrator.lifecycle.proofs.prove import prove_job, prove_run
from orchestrator.lifecycle.run import begin_run
from orchestrator.report.run import report_of_run
from orchestrator.runs.mirror.numbers import numbers_of
from orchestrator.runs.proofs.proof import TITLES, Proof, read_table
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.proofs.work import ProofWork
from strategies.step import document_attention
from tests.processes import run_ranks


def worker_here(run, ready, wish, say, bank):
    """In place of Ray: one worker, in this process."""
    ProofWork(wish.sample, wish.finished, {"uneven": "one worker in this test"})(run, 0, 1, "", 0)


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr(prove, "_with_two_workers", lambda ready: (ready, {}))
    monkeypatch.setattr(prove, "_start", worker_here)


def by_check(proofs):
    return {one.check: one for one in proofs}


def test_a_job_is_proven_on_its_own_rows_and_leaves_nothing(place, finished, without_ray):
    job, said = read_job(place / "job.yaml"), []
    before = sorted(path.name for path in (place / "runs").iterdir())

    found = by_check(prove_job(job, said.append))

    assert {check: one.outcome for check, one in found.items()} == {
        "documents": "passed",
        "packing": "passed",
        "accumulation": "passed",
        "uneven": "not run",
        "resume": "passed",
        "saved": "passed",
        "merged": "passed",
    }
    assert found["resume"].difference == found["resume"].tolerance == 0.0
    assert found["packing"].difference < 1e-5
    assert any("4 steps of 4 rows" in line for line in said)
    assert sorted(path.name for path in (place / "runs").iterdir()) == before


def test_an_average_that_is_handed_back_is_proven_as_any_weight(place, finished, without_ray):
    job = read_job(place / "job.yaml", ["train.optim=schedule_free_adamw"])

    found = by_check(prove_job(job, lambda text: None))

    assert {one.outcome for check, one in found.items() if check != "uneven"} == {"passed"}
    assert found["resume"].difference == 0.0


def test_a_run_keeps_its_proofs_in_its_folder_and_in_its_report(finished, without_ray, put_back):
    proofs = prove_run(finished, lambda text: None)

    titles = [one.title for one in proofs]
    assert len(set(titles)) == len(titles) == len(TITLES)  # those of `submit` and those of `verify`, each its own row
    numbers = [one.name for one in numbers_of(finished.events_of(Proof), lambda: None, [])]
    assert {f"verify/{one.check}" for one in proofs if one.outcome != "not run"} <= set(numbers)
    assert by_check(proofs)["merged"].compared.count(finished.run_id) == 1  # its own adapter
    kept = json.loads((finished.path / "verify.json").read_text())["checks"]
    assert [one["check"] for one in kept] == [one.check for one in proofs]
    titles = [section.title for section in report_of_run(finished, finished.job(), "en").sections]
    assert "Verified" in titles


def test_a_run_itself_records_what_costs_nothing(finished):
    found = by_check(read_table(finished))

    assert {check: one.outcome for check, one in found.items()} == {"documents": "passed", "handed_back": "passed"}
    assert "read from disk" in found["handed_back"].compared


def test_a_layout_that_trains_otherwise_is_shown_with_its_difference(place, finished, without_ray, monkeypatch):
    """A kernel that lets packed rows see each other, of which the check with short documents knows nothing."""
    from strategies.step import supervised_logits

    def one_document(lengths, device, at=None):
        return document_attention.packed_arguments([sum(lengths)], device)

    monkeypatch.setattr(supervised_logits, "packed_arguments", one_document)

    found = by_check(prove_job(read_job(place / "job.yaml"), lambda text: None))["packing"]

    assert found.outcome == "differs"
    assert found.difference > 10 * found.tolerance
    assert "data.packing: false" in found.reason


def test_workers_that_end_without_a_proof_are_no_success(place, finished, monkeypatch):
    monkeypatch.setattr(prove, "_start", lambda *parts: None)

    with pytest.raises(RunFailed, match="without a proof"):
        prove_job(read_job(place / "job.yaml"), lambda text: None)


def member(rank, size, port, folder):
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    run = RunFolder(folder)
    sample = prove.choose_sample([20] * 16, range(16), run.plan())
    ProofWork(sample)(run, rank, size, "", rank)
    dist.destroy_process_group()


def test_two_unequal_workers_train_as_one_and_another_process_resumes(place, finished, tmp_path):
    ready = prepare(read_job(place / "job.yaml"), lambda text: None)
    half = replace(ready.plan.nodes[0], threads=1)
    parts = (replace(half, share=0.7), replace(half, share=0.3))
    run = RunFolder(tmp_path / "run")
    run.logs.mkdir(parents=True)
    begin_run(run, replace(ready, plan=replace(ready.plan, nodes=parts)), lambda text: None)

    run_ranks(member, 2, run.path)

    found = by_check(run.events_of(Proof))
    assert found["uneven"].outcome == "passed"
    assert "70% + 30%" in found["uneven"].compared
    assert "another process" in found["resume"].compared
    assert found["resume"].difference == 0.0
    assert found["merged"].outcome == "passed"
