"""Costs against numbers a person can check."""

from dataclasses import replace
from pathlib import Path

import pytest

from clusters.capability import ClusterCapability
from clusters.hardware.hardware_file import read_hardware
from orchestrator.errors import JobError, NothingFits
from orchestrator.job.job_file import parse_job
from orchestrator.lifecycle.prepare import Ready
from orchestrator.planning import price, workload
from orchestrator.planning.evaluation import HeldOutCounts
from orchestrator.planning.planner import make_plan
from orchestrator.report import tco
from orchestrator.report.costs import tco_of_job
from tests.orchestrator.planning.test_choice import SMALL, machine, plan

TEXT = "cost: {currency: JPY, electricity_per_kwh: 30, hours_per_year: 1000, retrainings_per_year: 4}\n"


def spec_of(text=TEXT):
    return parse_job(
        f"model: {{model_name_or_path: m}}\ndata: {{train: a.jsonl, max_length: 2048}}\n{text}", Path()
    ).spec


def test_an_owned_machine_is_written_off_and_takes_electricity():
    planned = plan(SMALL, machine("pc", "RTX 3060", purchase_price=300_000, years=3, load_w=250.0), text=TEXT)
    hours = planned.whole_s / 3600

    cost = tco.of_plan(spec_of(), "pc", planned, num_tokens=2e6)

    assert cost.machines == pytest.approx(hours * 300_000 / (3 * 1000))
    assert cost.electricity == pytest.approx(hours * 0.25 * 30)
    assert cost.per_run == pytest.approx(cost.machines + cost.electricity)
    assert cost.per_million_tokens == pytest.approx(cost.per_run / 2)
    assert cost.per_year == pytest.approx(4 * cost.per_run)
    assert cost.missing == ()


def test_a_rented_machine_costs_its_rate_and_no_electricity():
    planned = plan(SMALL, machine("cloud", "RTX 4090", price_per_hour=120.0, load_w=500.0), text=TEXT)

    cost = tco.of_plan(spec_of(), "cloud", planned, 1e6)

    assert cost.machines == pytest.approx(120 * planned.whole_s / 3600)
    assert not cost.electricity
    unmetered = plan(SMALL, machine("cloud", "RTX 4090", price_per_hour=120.0), text=TEXT)
    assert tco.of_plan(spec_of(), "cloud", unmetered, 1e6).missing == ()  # its draw is in its rate


def test_what_is_not_priced_names_the_key_to_set():
    cost = tco.of_plan(spec_of(), "pc", plan(SMALL, machine("pc", "RTX 3060"), text=TEXT), 1e6)

    assert cost.machines is None and "cost.nodes" in cost.missing


def test_measured_time_and_energy_take_the_place_of_the_plans():
    planned = plan(SMALL, machine("pc", "RTX 3060", purchase_price=300_000, years=3, load_w=250.0), text=TEXT)
    slow = tco.of_plan(spec_of(), "pc", planned, 1e6, scale=2.0)

    counted = tco.measured(spec_of(), slow, wh=100.0, source="RAPL", num_tokens=1e6, owned=True)

    assert slow.seconds == pytest.approx(2 * planned.whole_s)
    assert counted.electricity == pytest.approx(0.1 * 30) and counted.energy_source == "RAPL"
    assert counted.machines == slow.machines


def test_other_machines_stand_beside_and_those_that_cannot_say_why():
    spec = spec_of()
    nodes = (
        machine("own", "RTX 3060", purchase_price=60_000, years=3, load_w=250.0),
        machine("rented", "RTX 4090", price_per_hour=100.0),
        machine("unpriced", "RTX 4090"),
        machine("small", "GTX 1060 6GB"),
    )

    def on(cluster):
        if cluster.nodes[0].name == "small":
            raise NothingFits("needs 6 GiB, has 4\nmore")
        return plan(SMALL, *cluster.nodes, text=TEXT)

    found = {cost.what.split(" (")[0]: cost for cost in tco.alternatives(spec, ClusterCapability(nodes), on, 1e6)}

    assert set(found) == {"buy own", "rent rented", "unpriced", "small"}
    assert found["buy own"].purchase == 60_000 and found["small"].seconds is None
    assert found["small"].note == "needs 6 GiB, has 4"
    assert len(found["unpriced"].missing) == 1 and found["buy own"].missing == found["rent rented"].missing == ()
    whole = [found["buy own"], found["rent rented"]]
    assert tco.cheapest(list(found.values())) is min(whole, key=lambda cost: cost.per_run)


def test_the_jobs_own_prices_reach_the_machines():
    spec = spec_of("cost: {nodes: {pc: {purchase: 900, load_w: 300}, '*': {per_hour: 2}}}\n")
    cluster = ClusterCapability((machine("pc", "RTX 3060"), machine("other", "RTX 3060")))

    first, second = price.priced(spec, cluster).nodes

    assert (first.purchase_price, first.load_w, first.price_per_hour) == (900, 300, None)
    assert second.price_per_hour == 2
    assert price.priced(spec_of(), cluster) is cluster


def test_what_the_job_says_of_a_machine_takes_the_place_of_its_other_price():
    nodes = (
        machine("own", "RTX 3060", purchase_price=900.0, years=3),
        machine("sold", "RTX 3060", purchase_price=900.0, years=3),
        machine("bought", "RTX 3060", price_per_hour=2.0),
    )
    spec = spec_of("cost: {nodes: {own: {years: 1}, sold: {per_hour: 2}, bought: {purchase: 600}}}\n")

    own, sold, bought = price.priced(spec, ClusterCapability(nodes)).nodes

    assert (own.purchase_price, own.years) == (900, 1)
    assert (sold.purchase_price, sold.price_per_hour) == (None, 2)
    assert (bought.purchase_price, bought.price_per_hour, bought.years) == (600, None, 3)


def test_a_machine_is_not_bought_and_rented_at_once():
    with pytest.raises(JobError, match=r"cost\.nodes\.pc has purchase and per_hour; give purchase with years, or"):
        spec_of("cost: {nodes: {pc: {purchase: 900, per_hour: 2}}}\n")


def test_no_cost_is_cheapest_where_none_is_whole():
    cost = tco.Cost("a", 1.0, machines=1.0, missing=("cost.power_w",))

    assert tco.cheapest([cost]) is None
    assert tco.cheapest([replace(cost, missing=())]) is not None


def test_an_alternative_does_the_same_evaluation_as_the_job(tmp_path):
    machines = tmp_path / "machines.yaml"
    machines.write_text("nodes: [{name: same, cores: 16, memory_gib: 64, gpus: [RTX 3060 12GB]}]")
    text = "model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 512}\neval: {metrics: [rouge_l]}\n"
    job = parse_job(text, tmp_path)
    work, _, _ = workload.describe(job.spec, SMALL, [256] * 800, 100_000, 1)
    rows = HeldOutCounts(80, 20_000, longest_answer=40, num_references=80, is_classification=False)
    planned = make_plan(job.spec, work, read_hardware(machines), 512, rows, {})
    ready = Ready(job, planned, read_hardware(machines), work, None, {}, rows)

    (own, other), _ = tco_of_job(job, ready, machines, "en")

    assert other.seconds == own.seconds == planned.whole_s
    assert planned.phases.evaluation_s > 0 and "held-out rows" not in other.note
