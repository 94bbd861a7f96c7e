"""Rows whose beginnings are computed once have the losses and gradients of separate rows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from strategies.reuse.attention import attend_tree, nodes_of
from strategies.reuse.row import lay_out
from strategies.step.document_attention import Scoring, attend_document, document_attention, sharing_error
from strategies.step.supervised_logits import Batch, loss_sum
from tests.strategies.test_packing_exact import FAMILIES, as_batch, tiny

BEGINNING = list(range(3, 23))
CASES = {
    "one beginning": [[*BEGINNING, 30, 31, 32], [*BEGINNING, 40, 41], [*BEGINNING, 50]],
    "two levels": [
        [*BEGINNING, *[60] * 9, 30, 31],
        [*BEGINNING, *[60] * 9, 40, 41, 42],
        [*BEGINNING, 50],
        [70, 71],
    ],
    "one is the beginning of another": [BEGINNING, [*BEGINNING, 30, 31, 32], BEGINNING[:9]],
    "equal": [[*BEGINNING, 30], [*BEGINNING, 30], [*BEGINNING, 31]],
    "nothing shared": [[30, *BEGINNING], [31, *BEGINNING], [32, 33]],
    "long": [[*BEGINNING * 8, *[30] * 150], [*BEGINNING * 8, *[40] * 20], [*BEGINNING * 8, 50, 51]],
}


def learnt(documents, first=1):
    """Masks: from the `first` token on, of every second document some tokens of the common part as well."""
    masks = [torch.arange(len(document)) >= max(1, first) for document in documents]
    for mask in masks[::2]:
        mask[2:6] = True
    return masks


def shared_batch(documents, masks):
    return Batch.of_tree(lay_out(list(map(torch.tensor, documents)), masks), tuple(range(len(documents))))


def loss_and_gradients(model, batches):
    model.zero_grad()
    loss = sum(loss_sum(model, batch) for batch in batches)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def separate(documents, masks):
    return [as_batch([torch.tensor(one)], [mask]) for one, mask in zip(documents, masks, strict=True)]


def assert_exact(model, documents, masks):
    """Against one document at a time through transformers' own plain attention."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    plain.zero_grad()
    expected = sum(
        F.cross_entropy(plain(ids[None], use_cache=False).logits[0, :-1][mask[1:]], ids[1:][mask[1:]], reduction="sum")
        for ids, mask in zip(map(torch.tensor, documents), masks, strict=True)
    )
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters()])

    loss, gradients = loss_and_gradients(model, [shared_batch(documents, masks)])

    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_losses_and_gradients_are_those_of_separate_rows(family, case):
    assert_exact(tiny(family, **FAMILIES[family]), CASES[case], learnt(CASES[case], first=15))


PIECES = st.lists(st.sampled_from([(3,), (4, 5), (6,) * 8, (7, 8, 9) * 3]), min_size=1, max_size=4)
DOCUMENTS = st.lists(PIECES.map(lambda pieces: [*sum(pieces, ()), 10]), min_size=1, max_size=6)


@settings(max_examples=40)
@given(DOCUMENTS, st.data())
def test_losses_and_gradients_of_random_trees_are_those_of_separate_rows(documents, data):
    model = tiny("llama", num_key_value_heads=2)
    masks = [torch.tensor([False, *data.draw(st.lists(st.booleans(), min_size=len(one) - 1, max_size=len(one) - 1))])
             for one in documents]  # fmt: skip
    masks[0][-1] = True

    assert_exact(model, documents, masks)


def test_the_chunked_loss_of_a_tree_is_the_same():
    model, documents = tiny("llama", num_key_value_heads=2), CASES["two levels"]
    batch = shared_batch(documents, learnt(documents))

    assert loss_sum(model, batch, "chunked_nll").item() == pytest.approx(loss_sum(model, batch).item(), rel=1e-6)


def test_a_beginning_is_computed_once():
    documents = CASES["one beginning"]

    batch = shared_batch(documents, learnt(documents))

    assert batch.input_ids_BT.numel() == 20 + 3 + 2 + 1
    assert batch.targets_S.numel() == sum(int(mask.sum()) for mask in learnt(documents))


def test_a_changed_end_leaves_the_other_documents_alone():
    model = tiny("llama", num_key_value_heads=2)
    changed = [CASES["one beginning"][0], [*BEGINNING, 90, 91], CASES["one beginning"][2]]
    only_last = [torch.zeros(len(one), dtype=torch.bool) for one in changed]
    only_last[2][1:] = True

    with torch.no_grad():
        before = loss_sum(model, shared_batch(CASES["one beginning"], only_last))
        assert loss_sum(model, shared_batch(changed, only_last)).item() == pytest.approx(before.item(), rel=1e-6)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("case", CASES)
def test_in_16_bits_nodes_that_share_a_product_have_their_own_attention(case, window):
    row = lay_out([torch.tensor(one) for one in CASES[case]], [torch.ones(len(one)) > 0 for one in CASES[case]])
    nodes = nodes_of(row.lengths, row.parents)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(row.lengths), 8) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    weights_THD = torch.randn(sum(row.lengths), 4, 8, generator=generator)

    found = attend_tree(tuple(tensors), nodes, None, window)
    exact = torch.zeros_like(found, dtype=torch.float32)
    whole = [tensor.float() for tensor in tensors]
    for node in nodes:
        places = torch.cat([torch.arange(nodes[one].start, nodes[one].start + nodes[one].length) for one in node.path])
        alone = attend_document(*(x[:, :, places] for x in whole), Scoring(sliding_window=window))
        exact[node.start : node.start + node.length] = alone[node.depth :]

    assert torch.allclose(found.float(), exact, atol=0.03)
    for mine, theirs in zip(
        torch.autograd.grad((found.float() * weights_THD).sum(), tensors),
        torch.autograd.grad((exact * weights_THD).sum(), tensors),
        strict=True,
    ):
        assert (mine - theirs).float().norm() <= 0.02 * theirs.float().norm() + 1e-6


def test_dropout_of_scores_is_refused():
    row = [torch.zeros(1, 2, 3, 4)] * 3

    with pytest.raises(ValueError, match="dropout"):
        document_attention(
            torch.nn.Module(), *row, None, document_lengths=(2, 1), document_parents=(-1, 0), dropout=0.1
        )


def test_a_node_that_continues_a_later_one_is_an_error():
    with pytest.raises(ValueError, match="does not come before"):
        nodes_of((2, 3), (1, -1))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_check_passes_for_models_that_keep_to_the_tree(family):
    assert sharing_error(tiny(family, **FAMILIES[family])) < 1e-4


def test_the_check_finds_a_kernel_that_does_not_know_trees():
    model = tiny("llama", num_key_value_heads=2)
    model.set_attn_implementation("sdpa")

    assert sharing_error(model) > 0.05
