"""Proof (e): what projected training keeps of full training's gain, on a small real model; slow."""

import pytest

from tests.benchmarks import quality

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not quality.ASSETS.is_dir(), reason="needs the assets beside the checkout"),
]


def test_half_of_the_gap_is_recovered_and_learning_helps():
    """Mean of three seeds, the learning rate of full training for all of them."""
    data, names = quality.texts(), ("frozen", "full", "LSP, learned", "LSP, random")

    loss = {
        name: sum(quality.trained(quality.CONTENDERS[name](), 1e-3, seed, 200, 0.0, data)["steps"] for seed in range(3))
        / 3
        for name in names
    }

    part = {name: (loss["frozen"] - loss[name]) / (loss["frozen"] - loss["full"]) for name in names}
    assert part["LSP, learned"] >= 0.25, part
    assert part["LSP, learned"] >= part["LSP, random"], part
