"""What is planned before a run starts, and from what."""

from dataclasses import replace

import pytest

from orchestrator.errors import JobError, NothingFits
from orchestrator.lifecycle.hooks import BankHooks
from orchestrator.lifecycle.prepare import Sizes, plan_without_data, sizes_of
from orchestrator.lifecycle.validate import check
from orchestrator.planning.plan import InBank

KNOWN = InBank("first", "/bank/first", (3.0, 2.0))
BANK = BankHooks(find=lambda job: (KNOWN,))


def test_a_plan_without_data_counts_the_rows_and_loads_no_model(job_with, machine):
    ready = plan_without_data(job_with(), machine, print)

    assert ready.statistics["rough"].startswith("8 rows of about ") and ready.statistics["train"] is None
    assert ready.plan.num_steps >= 1 and ready.data_files is None
    assert ready.work.num_samples == 8


def test_held_out_rows_are_taken_from_the_training_rows(job_with, machine):
    whole = plan_without_data(job_with(), machine, print)
    split = plan_without_data(job_with(data=", eval: {split: 0.25}"), machine, print)

    assert (whole.work.num_samples, split.work.num_samples) == (8, 6)


def test_a_plan_names_adapters_that_were_trained_on_the_same_data(job_with, machine):
    found = plan_without_data(job_with(), machine, print, bank=BANK).plan.in_bank
    without = plan_without_data(job_with(), machine, print).plan.in_bank

    assert found == (KNOWN,) and without == ()


def test_where_nothing_fits_the_bank_may_spare_the_training(job_with, machine):
    (node, *_) = machine.nodes
    tiny = replace(node, memory_bytes=2**20, devices=tuple(replace(one, memory_bytes=2**20) for one in node.devices))
    cluster = replace(machine, nodes=(tiny,), links=())

    with pytest.raises(
        NothingFits, match=r"already in the bank.*: first \(/bank/first, held-out loss 3.000 -> 2.000\)"
    ):
        plan_without_data(job_with(), cluster, print, bank=BANK)


def test_samples_that_are_cut_keep_their_number_and_lose_supervised_tokens_in_proportion():
    assert Sizes([100, 300], 200, None).cut(100) == Sizes([100, 100], 100, None)


def test_sizes_of_tokenised_data_count_answers_and_references():
    class Data:
        """Three samples, of which as many tokens are supervised as given."""

        def __init__(self, numpy, lengths, supervised):
            self.lengths, self.num_supervised = numpy.array(lengths), numpy.array(supervised)
            self.document_lengths, self.documents = self.lengths, None
            self.num_references, self.statistics = 3, type("S", (), {"formats": {"classification": 3}})

        def __len__(self):
            return len(self.lengths)

        def tokens(self, index):
            return numpy.arange(self.lengths[index]), None

        def documents_of(self, index):
            return [self.tokens(index)]

    numpy = pytest.importorskip("numpy")
    sizes = sizes_of(Data(numpy, [4, 5, 6], [1, 2, 3]), Data(numpy, [7, 8, 9], [2, 9, 4]))

    assert (sizes.lengths, sizes.num_supervised) == ([4, 5, 6], 6)
    assert sizes.tree_ratio == {1: 1.0, 2: 1.0}
    held_out = sizes.held_out
    assert (held_out.num_samples, held_out.num_tokens, held_out.longest_answer) == (3, 24, 9)
    assert held_out.is_classification


def test_stated_keys_without_a_use_are_said_before_anything_starts(job_with, machine):
    said = []
    plan_without_data(job_with("strategy: {shares: planned}\n"), machine, said.append)
    plan_without_data(job_with("tracking: {report_to: [], experiment: shop}\n"), machine, said.append)
    wrong = job_with("eval: {num_samples: 5}\n")

    assert ["strategy.shares is not used" in said[0], "tracking.experiment is not used" in said[1]] == [True, True]
    for looked_at in (lambda: plan_without_data(wrong, machine, print), lambda: check(wrong)):
        with pytest.raises(JobError, match="num_samples needs held-out rows"):
            looked_at()
