"""Attention over a tree of documents in one row: a node sees itself causally and all of the nodes that it continues.

Each node's keys and values are those on its path; a token that several nodes look at gets the sum of their gradients.
In 16 bits on a CPU nodes of about one size share one batched product, as short documents do (document_attention.py).

Legend: N nodes of a product, H query heads, K key-value heads, T tokens of the row, L longest node, P longest path, D
head width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_SHORT = 128  # tokens of a path; longer ones would save more scores for the backward pass than they win
_PADDED = 2.0  # times the tokens of a product's shortest node that its longest one may have


@dataclass(frozen=True)
class Node:
    """Where a node's tokens stand in the row, and those of all nodes on its path."""

    start: int
    length: int
    path: tuple[int, ...]  # node numbers from a root to this one
    depth: int  # tokens before its first one


@functools.lru_cache(maxsize=8)  # every layer asks for the same
def nodes_of(lengths: tuple[int, ...], parents: tuple[int, ...]) -> tuple[Node, ...]:
    """The nodes of a row by their lengths and the node that each continues (-1 = none), which comes before it.

    Raises ValueError for a node that continues one that does not come before it.
    """
    nodes: list[Node] = []
    starts = itertools.accumulate(lengths, initial=0)
    for number, (start, length, parent) in enumerate(zip(starts, lengths, parents, strict=False)):
        if not -1 <= parent < number:
            raise ValueError(f"node {number} of a row continues node {parent}, which does not come before it")
        before = nodes[parent] if parent >= 0 else Node(0, 0, (), 0)
        nodes.append(Node(start, length, (*before.path, number), before.depth + before.length))
    return tuple(nodes)


def attend_tree(
    row: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    nodes: Sequence[Node],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of all nodes, (T, H, D); `row` holds queries (1, H, T, D), keys and values (1, K, T, D).

    Cost: sum over nodes of length x path, in place of the sum over documents of length^2.
    """
    is_half_on_cpu = row[0].device.type == "cpu" and row[0].dtype != torch.float32
    outputs: dict[int, torch.Tensor] = {}
    for batch in _products(tuple(nodes)) if is_half_on_cpu else ():
        found = _attend_together(row, [nodes[one] for one in batch], nodes, scaling, sliding_window)
        outputs |= zip(batch, found, strict=True)
    lengths = [node.length for node in nodes]
    parts = [x.split(lengths, dim=2) for x in row] if len(outputs) < len(nodes) else []
    for number, node in enumerate(nodes):
        if number not in outputs:
            query = parts[0][number]
            key, value = (torch.cat([x[one] for one in node.path], dim=2) for x in parts[1:])
            outputs[number] = _attend_node((query, key, value), node, scaling, sliding_window)
    return torch.cat([outputs[number] for number in range(len(nodes))])


def _attend_node(
    part: tuple[torch.Tensor, torch.Tensor, torch.Tensor], node: Node, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one node over its path, (length, H, D)."""
    query, key, value = part
    whole = node.depth + node.length
    is_plain = node.depth == 0 and (window is None or whole <= window)
    output_1HLD = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if is_plain else _visible(node, node.length, whole, window, query.device),
        is_causal=is_plain,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_1HLD[0].transpose(0, 1)


def _visible(node: Node, rows: int, columns: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(rows, columns) bool: which keys of its path a node's queries may look at; rows beyond its end as its last."""
    place = torch.arange(rows, device=device).clamp(max=node.length - 1)[:, None] + node.depth
    key = torch.arange(columns, device=device)[None]
    causal = key <= place
    return causal if window is None else causal & (key > place - window)


@functools.lru_cache(maxsize=8)
def _products(nodes: tuple[Node, ...]) -> tuple[tuple[int, ...], ...]:
    """Numbers of short nodes that share a product: of about one length, and all with or all without a path before."""
    short = [number for number, node in enumerate(nodes) if node.depth + node.length <= _SHORT]
    groups: list[list[int]] = []
    for number in sorted(short, key=lambda one: (nodes[one].depth > 0, nodes[one].length)):
        first = nodes[groups[-1][0]] if groups else None
        alike = first and (first.depth > 0) == (nodes[number].depth > 0)
        if first and alike and nodes[number].length <= _PADDED * max(8, first.length):
            groups[-1].append(number)
        else:
            groups.append([number])
    return tuple(map(tuple, groups))


def _attend_together(
    row: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    batch: Sequence[Node],
    nodes: Sequence[Node],
    scaling: float | None,
    window: int | None,
) -> list[torch.Tensor]:
    """Attention of some nodes in one product, each (length, H, D).  Saves N H L P scores for the backward pass."""
    longest, path = max(node.length for node in batch), max(node.depth + node.length for node in batch)
    asked_NL, seen_NP = _places(tuple(batch), tuple(nodes))
    query, key, value = (
        _gather(x, places) for x, places in zip(row, (asked_NL, seen_NP, seen_NP), strict=True)
    )  # (N, heads, L or P, D)
    num_nodes, num_heads, _, width = query.shape
    num_keys = key.shape[1]
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(num_nodes * num_keys, -1, width)
    key, value = key.reshape(-1, path, width), value.reshape(-1, path, width)
    scores = torch.bmm(query, key.transpose(1, 2)).view(num_nodes, num_heads, longest, path).float()
    hidden_NLP = _hidden(tuple(batch), window)
    weights = scores.masked_fill(hidden_NLP[:, None], -torch.inf).softmax(-1).to(query.dtype)
    output = torch.bmm(weights.view(num_nodes * num_keys, -1, path), value)
    output = output.view(num_nodes, num_heads, longest, width).transpose(1, 2)
    return [found[: node.length] for found, node in zip(output.unbind(), batch, strict=True)]


@functools.lru_cache(maxsize=8)
def _hidden(batch: tuple[Node, ...], window: int | None) -> torch.Tensor:
    """(N, L, P) bool: which places of its path a node's queries must not look at."""
    longest, path = max(node.length for node in batch), max(node.depth + node.length for node in batch)
    return ~torch.stack([_visible(node, longest, path, window, torch.device("cpu")) for node in batch])


def _gather(x_1HTD: torch.Tensor, places_NL: torch.Tensor) -> torch.Tensor:
    """Tokens of a row at some places, (N, heads, L, D)."""
    found = x_1HTD[0].transpose(0, 1).index_select(0, places_NL.flatten())
    return found.view(*places_NL.shape, *found.shape[1:]).transpose(1, 2)


@functools.lru_cache(maxsize=8)
def _places(batch: tuple[Node, ...], nodes: tuple[Node, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the row of nodes' own tokens (N, L) and of their paths' (N, P); beyond an end the last again."""
    own = [list(range(node.start, node.start + node.length)) for node in batch]
    seen = [[place for one in node.path for place in _tokens(nodes[one])] for node in batch]
    return _padded(own), _padded(seen)


def _tokens(node: Node) -> range:
    return range(node.start, node.start + node.length)


def _padded(places: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, places))
    return torch.tensor([[*each, *[each[-1]] * (longest - len(each))] for each in places])
