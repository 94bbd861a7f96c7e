"""Tokens for each that is computed when common beginnings count once, by how a step's rows become micro-batches.

    python tests/benchmarks/trees.py quickstart
    python tests/benchmarks/trees.py JOB --rows 64 --tokens 2048

`by length` fills micro-batches as rows without trees are (best-fit decreasing), `alike` as training does it, `one tree`
puts the whole step into one: no division of its rows shares more.  Over the first steps of the training's order.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--rows", type=int, default=64, help="samples of a step")
    parser.add_argument("--tokens", type=int, default=2048, help="that a micro-batch may hold")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments), indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The ratio of each way, with the rows that were looked at and their mean length."""
    from orchestrator.cli.options import load_job
    from orchestrator.data.order import Order
    from orchestrator.data.packing import best_fit_decreasing
    from orchestrator.data.prepare import prepare_data
    from orchestrator.job.model_files import locate
    from strategies.reuse.tree import build_tree, group_alike

    job = load_job(arguments.job, arguments.changes)
    with tempfile.TemporaryDirectory() as cache:
        model = locate(job.spec.model.model_name_or_path, job.folder)
        data = prepare_data(job, model, arguments.tokens, Path(cache), print).train
        order = Order(len(data), arguments.rows, 0, 1.0)
        steps = [order.sample_ids(step) for step in range(min(arguments.steps, order.steps_per_epoch))]
        rows = [[data.tokens(number)[0].tolist() for number in step] for step in steps]
        documents = [[[ids.tolist() for ids, _ in data.documents_of(number)] for number in step] for step in steps]
    ways = {
        "by length": lambda step: best_fit_decreasing([len(row) for row in step], arguments.tokens),
        "alike": lambda step: group_alike(step, arguments.tokens),
        "one tree": lambda step: [list(range(len(step)))],
    }
    tokens, num_rows = sum(len(row) for step in rows for row in step), sum(map(len, rows))
    found: dict[str, float] = {"rows": num_rows, "mean length": round(tokens / num_rows, 1)}
    for way, groups in ways.items():
        computed = 0
        for step, parts in zip(rows, documents, strict=True):
            for group in groups(step):
                computed += build_tree([one for number in group for one in parts[number]]).num_tokens
        found[way] = round(tokens / computed, 3)
    return found


if __name__ == "__main__":
    main()
