"""A tree of documents as one row of token ids, with what each document predicts from it.

Legend: T tokens of the row, L of a document, S supervised tokens of all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from strategies.reuse.tree import PrefixTree, build_tree


@dataclass(frozen=True)
class SharedRow:
    """Nodes end to end.  A token after which documents part predicts the next token of each of them."""

    input_ids_1T: torch.Tensor
    supervised_1T: torch.Tensor  # bool: by any of its documents
    tree: PrefixTree
    columns_S: torch.Tensor  # places in the row that predict, in their order; several times the same where several do
    targets_S: torch.Tensor  # the tokens that they predict
    places: tuple[torch.Tensor, ...] = ()  # of each document: where in the row its tokens stand (L,)
    order_S: torch.Tensor | None = None  # of each, its place among the supervised tokens of the documents end to end

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the nodes."""
        return tuple(self.tree.lengths)

    @property
    def parents(self) -> tuple[int, ...]:
        """The node that each continues, -1 = none."""
        return tuple(self.tree.parents)


def lay_out(ids: Sequence[torch.Tensor], supervised: Sequence[torch.Tensor]) -> SharedRow:
    """The row of some documents, each with its token ids (L) and, for each, whether predicting it is trained (L)."""
    tree = build_tree([document.tolist() for document in ids])
    row_T = torch.cat([ids[one][begin : begin + size] for one, begin, size in tree.pieces()])
    starts = [0, *torch.tensor(tree.lengths).cumsum(0).tolist()]
    learnt_T = torch.zeros(len(row_T), dtype=torch.bool)
    columns, targets, places = [], [], []
    for document_L, mask_L, end in zip(ids, supervised, tree.ends, strict=True):
        places_L = torch.cat([torch.arange(starts[node], starts[node + 1]) for node in tree.path(end)])
        learnt_T[places_L[mask_L]] = True
        places.append(places_L)
        columns.append(places_L[:-1][mask_L[1:]])
        targets.append(document_L[1:][mask_L[1:]])
    columns_S, order_S = torch.cat(columns).sort(stable=True)
    return SharedRow(row_T[None], learnt_T[None], tree, columns_S, torch.cat(targets)[order_S], tuple(places), order_S)
