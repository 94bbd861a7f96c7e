"""A plan on a terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.job.job_file import parse_job
from orchestrator.views.plan import plan_view
from tests.orchestrator.planning.machines import SMALL, machine
from tests.orchestrator.planning.test_choice import plan

ONLY_ELECTRICITY = "(electricity only: the machine's price is unknown)"
NO_ELECTRICITY = "(without electricity: the draw is unknown)"


def bare(name, **costs):
    """A machine whose card's draw is unknown."""
    return machine(name, cores=16, **costs)


@pytest.mark.parametrize(
    ("node", "shown"),
    [
        (machine("a", "RTX 3090"), ONLY_ELECTRICITY),
        (machine("a", "RTX 3090", price_per_hour=1.0), None),
        (bare("a", price_per_hour=1.0), None),  # rented: its draw is in its rate
        (bare("a", purchase_price=900.0), NO_ELECTRICITY),
    ],
)
def test_the_price_says_what_it_is_without(node, shown):
    job = parse_job("model: {model_name_or_path: m}\ndata: {train: a.jsonl, max_length: 2048}\n", Path())
    out = io.StringIO()
    Console(file=out, width=300, force_terminal=False).print(
        plan_view(job, plan(SMALL, node, samples=64), {}, full=False)
    )

    found = [text for text in (ONLY_ELECTRICITY, NO_ELECTRICITY) if text in out.getvalue()]
    assert found == ([shown] if shown else [])
