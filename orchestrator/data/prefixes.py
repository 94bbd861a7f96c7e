"""How much the rows of a step have in common at their beginnings."""

from __future__ import annotations

from orchestrator.data.dataset import Dataset
from orchestrator.data.order import Order
from strategies.reuse.tree import shared_ratio

_MOST_ROWS = 256  # that are looked at for each number of rows
_MOST_TOGETHER = 64  # rows: more of the same data share little more


def tree_ratios(data: Dataset) -> dict[int, float]:
    """Rows (1, 2, 4 ...) -> tokens of so many for each token of their tree, on steps of some training's order."""
    documents: dict[int, list[list[int]]] = {}  # of each sample
    ratios, rows = {1: 1.0}, 1 if data.documents else 2  # the documents of a pair begin alike
    while rows <= min(len(data), _MOST_TOGETHER):
        order = Order(len(data), rows, 0, 1.0)
        steps = [order.sample_ids(step) for step in range(min(len(data), _MOST_ROWS) // rows)]
        new = {number for step in steps for number in step} - documents.keys()
        documents |= {number: [ids.tolist() for ids, _ in data.documents_of(number)] for number in new}
        groups = ([one for number in step for one in documents[number]] for step in steps)
        ratios[rows] = round(shared_ratio(groups), 4)
        rows *= 2
    return ratios
