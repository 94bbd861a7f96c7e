"""The tree holds each document whole, every long common beginning once, and groups that keep to their capacity."""

from hypothesis import given
from hypothesis import strategies as st

from strategies.reuse.tree import build_tree, group_alike, shared_ratio

# Few kinds of tokens and repeated pieces: common beginnings are frequent, and documents end inside others.
PIECES = st.lists(st.sampled_from([(1,), (2, 1), (1, 2, 3), (5,) * 8, (6,) * 9]), max_size=5)
DOCUMENTS = st.lists(PIECES.map(lambda pieces: sum(pieces, ())), max_size=9)


def read(tree, documents, number):
    """The tokens of a document as its path holds them."""
    return [
        token
        for node in tree.path(tree.ends[number])
        for token in documents[tree.documents[node]][tree.depths[node] :][: tree.lengths[node]]
    ]


@given(DOCUMENTS, st.integers(1, 9))
def test_each_document_is_the_path_to_its_end(documents, least):
    tree = build_tree(documents, least)

    assert [read(tree, documents, number) for number in range(len(documents))] == list(map(list, documents))
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert all(tree.lengths)


@given(DOCUMENTS)
def test_with_single_tokens_shared_the_tree_holds_each_beginning_once(documents):
    beginnings = {document[:end] for document in documents for end in range(1, len(document) + 1)}

    assert build_tree(documents, 1).num_tokens == len(beginnings)


@given(DOCUMENTS, st.integers(1, 9))
def test_no_inner_node_is_shorter_than_the_least(documents, least):
    tree = build_tree(documents, least)
    inner = [tree.lengths[node] for node in set(tree.parents) - {-1}]

    assert all(length >= least for length in inner)


@given(DOCUMENTS, st.integers(1, 9), st.integers(1, 60))
def test_groups_hold_every_document_and_keep_to_their_capacity(documents, least, capacity):
    groups = group_alike(documents, capacity, least)

    assert sorted(number for group in groups for number in group) == list(range(len(documents)))
    for group in groups:
        tokens = build_tree([documents[number] for number in group], least).num_tokens
        assert tokens <= capacity or len(group) == 1


def test_alike_documents_share_a_group_whatever_their_order():
    one, other = (1,) * 20, (2,) * 20
    documents = [(*one, 3), (*other, 3), (*one, 4), (*other, 4)]

    groups = group_alike(documents, 30)

    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3]]
    assert shared_ratio([[documents[number] for number in group] for group in groups]) == 84 / 44


def test_documents_that_are_equal_end_in_one_node():
    tree = build_tree([(1,) * 8, (2,), (1,) * 8, (1,) * 8 + (3,)])

    assert tree.num_tokens == 10
    assert tree.ends[0] == tree.ends[2] == tree.parents[tree.ends[3]]


def test_a_short_common_beginning_is_not_worth_a_border():
    assert build_tree([(1,) * 7 + (2,), (1,) * 7 + (3,)]).num_tokens == 16
    assert build_tree([(1,) * 8 + (2,), (1,) * 8 + (3,)]).num_tokens == 10


def test_many_nested_documents_need_no_deep_recursion():
    documents = [(1,) * 8 * (count + 1) for count in range(600)]

    assert build_tree(documents).num_tokens == 8 * 600


def test_nothing_shared_leaves_the_ratio_at_one():
    assert shared_ratio([[(1, 2), (2, 2)], [()], []]) == 1.0
    assert shared_ratio([]) == 1.0
