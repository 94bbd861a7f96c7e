"""A batch that is made ahead of time is the one that is taken, and no other."""

import torch

from orchestrator.data.batches import collate
from orchestrator.data.dataset import Dataset
from orchestrator.training.feed import Feed


def test_a_prepared_batch_is_taken_once_and_only_for_its_samples(data_folder, monkeypatch):
    data, made = Dataset.load(data_folder), []

    def counted(*arguments):
        made.append(arguments[1])
        return collate(*arguments)

    monkeypatch.setattr("orchestrator.training.feed.collate", counted)
    feed = Feed(data, False, torch.device("cpu"))

    feed.prepare([0, 1])
    first, again = feed.take([0, 1]), feed.take([0, 1])
    feed.prepare([2])
    other = feed.take([3])

    assert made == [[0, 1], [0, 1], [2], [3]]
    assert first is not again and torch.equal(first.input_ids_BT, again.input_ids_BT)
    assert torch.equal(other.input_ids_BT, collate(data, [3], False).input_ids_BT)
