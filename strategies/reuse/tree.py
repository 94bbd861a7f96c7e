"""Documents that begin alike as a tree: each node's tokens stand in all documents below it.  Pure integer arithmetic.

A document is the path from a root to the node in which it ends.  Causal attention makes a hidden state depend on what
comes before it and on nothing else, so that a token of a shared node has the same one in every document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

LEAST = 8  # tokens: a shorter common part is computed again, since a border costs more

Documents = Sequence[list[int]] | Sequence[tuple[int, ...]]  # token ids


@dataclass
class PrefixTree:
    """Nodes of a tree, by their number; a node comes after the one that it continues."""

    ends: list[int]  # of each document: the node in which it ends, -1 for a document without tokens
    parents: list[int] = field(default_factory=list)  # the node that it continues, -1 = none
    depths: list[int] = field(default_factory=list)  # where in its documents it begins, in tokens
    lengths: list[int] = field(default_factory=list)  # tokens
    documents: list[int] = field(default_factory=list)  # one that holds it

    @classmethod
    def of_apart(cls, lengths: Sequence[int]) -> PrefixTree:
        """Documents of so many tokens that share nothing."""
        numbers = list(range(len(lengths)))
        return cls(list(numbers), [-1] * len(lengths), [0] * len(lengths), list(lengths), numbers)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return sum(self.lengths)

    def path(self, node: int) -> list[int]:
        """The nodes from a root to this one, both included; none for -1."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(a document that holds it, where in it the node begins, tokens) of each node."""
        return zip(self.documents, self.depths, self.lengths, strict=True)

    def append(self, other: PrefixTree) -> None:
        """Take in the nodes and documents of another tree, behind one's own."""
        nodes, documents = len(self.lengths), len(self.ends)
        self.ends += [end + nodes if end >= 0 else -1 for end in other.ends]
        self.parents += [parent + nodes if parent >= 0 else -1 for parent in other.parents]
        self.depths += other.depths
        self.lengths += other.lengths
        self.documents += [document + documents for document in other.documents]

    def add(self, document: int, depth: int, length: int, parent: int) -> int:
        """A new node's number."""
        for values, value in (
            (self.parents, parent),
            (self.depths, depth),
            (self.lengths, length),
            (self.documents, document),
        ):
            values.append(value)
        return len(self.lengths) - 1


def build_tree(documents: Documents, least: int = LEAST) -> PrefixTree:
    """The tree of some documents, in which at least `least` tokens are common to those below an inner node.

    Cost O(n log n) comparisons of n documents, and their tokens once.
    """
    order = sorted(range(len(documents)), key=lambda number: documents[number])
    common = common_lengths(documents, order)
    tree = PrefixTree([-1] * len(documents))
    open_groups = [(0, len(order), 0, -1)]  # places in the order, tokens that stand above, the node that holds them
    while open_groups:
        begin, end, depth, parent = open_groups.pop()
        if end - begin < 2:
            for document in order[begin:end]:
                left = len(documents[document]) - depth
                tree.ends[document] = tree.add(document, depth, left, parent) if left else parent
            continue
        shared = min(common[begin + 1 : end])
        if shared - depth >= least:
            parent = tree.add(order[begin], depth, shared - depth, parent)
            depth, below = shared, shared + 1
        else:
            below = depth + least
        cuts = [begin, *(place for place in range(begin + 1, end) if common[place] < below), end]
        open_groups += [(*pair, depth, parent) for pair in itertools.pairwise(cuts)][::-1]
    return tree


def common_lengths(documents: Documents, order: Sequence[int]) -> list[int]:
    """How many tokens each document of an order has in common with the one before it; 0 for the first."""
    pairs = itertools.pairwise(order)
    return [0, *(_common_length(documents[one], documents[other]) for one, other in pairs)][: len(order)]


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def group_alike(documents: Documents, capacity: int, least: int = LEAST) -> list[list[int]]:
    """Numbers of the documents in groups whose trees hold at most `capacity` tokens, alike ones together.

    Documents in the order of their tokens fill one group after the other: neighbours have most in common, so that what
    a document adds to a tree is at most what it does not share with its neighbour, and a border's tokens.  A document
    longer than `capacity` has a group of its own.
    """
    order = sorted(range(len(documents)), key=lambda number: (documents[number], number))
    groups: list[list[int]] = []
    used = 0
    for number, common in zip(order, common_lengths(documents, order), strict=True):
        length = len(documents[number])
        added = min(length, length - common + least - 1)
        if groups and used + added <= capacity:
            groups[-1].append(number)
            used += added
        else:
            groups.append([number])
            used = length
    return groups


def shared_ratio(groups: Iterable[Documents]) -> float:
    """Tokens of documents over those of the trees of their groups: 1 where nothing is shared."""
    tokens = computed = 0
    for documents in groups:
        tokens += sum(map(len, documents))
        computed += build_tree(documents).num_tokens
    return tokens / computed if computed else 1.0
