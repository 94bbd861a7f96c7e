"""Attention over documents packed in one row, each seeing only itself.

Padding costs as much as real tokens; a row without padding needs an attention that stops at document borders.  Here the
borders arrive as `document_lengths` and every document runs through a causal kernel of its own, where torch's varlen
kernel runs through a single launch (attention.py decides); short ones in bf16 on a CPU share one batched product,
because there the kernel's backward pass takes 2 ms for 70 tokens (a step of SmolLM2-135M falls to 0.78 of its time; in
fp32 it would grow to 1.04).  Nothing of quadratic size in the row is ever built, and no document can see another: their
keys are never in the same product.

Documents that begin alike may share what they begin with: `document_lengths` are then those of a tree's nodes and
`document_parents` says which node each continues (strategies/reuse).

Legend: B documents, H query heads, K key-value heads, G = H / K, T tokens of the row, L longest document, D head width.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from strategies.model.heads import outputs
from strategies.reuse.attention import attend_tree, nodes_of
from strategies.reuse.row import lay_out
from strategies.techniques.attention import Heads, Sharing, sharing
from strategies.workload import Dtype

NAME = "document"
_SHORT = 128  # tokens; longer documents would save more scores for the backward pass than they win


@dataclass(frozen=True)
class Scoring:
    """How scores become weights, the same for all documents of a row."""

    scaling: float | None = None  # None = 1 / sqrt(D)
    dropout: float = 0.0
    sliding_window: int | None = None  # tokens that a query sees, itself included

    def window_within(self, length: int) -> int | None:
        """The sliding window where a document of this length is longer; None where it sees all of itself."""
        return self.sliding_window if self.sliding_window is not None and length > self.sliding_window else None


def document_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; returns (1, T, H, D), None.

    Cost: sum over documents of length^2 instead of T^2.  Raises ValueError where it could not be exact (no borders
    given, or a score function this kernel does not compute): a wrong border is a leak, never a slow path.
    """
    lengths: Sequence[int] | None = arguments.get("document_lengths")
    if lengths is None:
        raise ValueError("document attention needs document_lengths; this model does not pass them on")
    if any(arguments.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("document attention does not compute soft-capped, biased or sink scores; use eager")
    longest, borders_D = max(lengths), arguments.get("cu_seq_lens_q")
    scoring = Scoring(arguments.get("scaling"), arguments.get("dropout", 0.0), arguments.get("sliding_window"))
    is_windowed = scoring.window_within(longest) is not None
    shared = _choose_sharing(query_1HTD, key_1KTD, is_windowed, scoring.dropout > 0)
    parents = arguments.get("document_parents")
    if shared == "packed" and borders_D is not None and parents is None:
        return _attend_row(query_1HTD, key_1KTD, value_1KTD, borders_D, longest, scoring), None
    if shared == "expanded":
        key_1KTD, value_1KTD = expand_heads(key_1KTD, query_1HTD), expand_heads(value_1KTD, query_1HTD)
    if parents is not None:
        if scoring.dropout:
            raise ValueError("a shared prefix has one dropout mask for several documents: do not share prefixes")
        nodes = nodes_of(tuple(lengths), tuple(parents))
        row = query_1HTD, key_1KTD, value_1KTD
        return attend_tree(row, nodes, scoring.scaling, scoring.sliding_window)[None], None
    batch = find_short(lengths, query_1HTD)
    short: dict[int, torch.Tensor] = {}
    if batch:
        batch_BLHD = attend_short(query_1HTD, key_1KTD, value_1KTD, batch, scoring)
        short = {document: batch_BLHD[row, :length] for row, (document, _, length) in enumerate(batch)}
    if len(short) == len(lengths):
        return torch.cat([*short.values()])[None], None
    # Split at once: the gradient of one slice among many is a row of zeros but for its own part.
    parts = zip(*(x.split(list(lengths), 2) for x in (query_1HTD, key_1KTD, value_1KTD)), strict=True)
    outputs_tHD = [
        short[document] if document in short else attend_document(query, key, value, scoring)
        for document, (query, key, value) in enumerate(parts)
    ]
    return torch.cat(outputs_tHD)[None], None


def _choose_sharing(query_1HTD: torch.Tensor, key_1KTD: torch.Tensor, is_windowed: bool, has_dropout: bool) -> Sharing:
    heads = Heads(query_1HTD.shape[1], key_1KTD.shape[1], query_1HTD.shape[3], is_windowed, has_dropout)
    kind, capability = _device_kind(query_1HTD.device)
    dtype = cast(Dtype, str(_compute_dtype(query_1HTD)).removeprefix("torch."))
    return sharing(kind, capability, dtype, heads, _TORCH)


_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _device_kind(device: torch.device) -> Any:
    """(kind, compute capability) as the policy wants them."""
    if device.type != "cuda":
        return "cpu", None
    return ("rocm", None) if torch.version.hip else ("cuda", torch.cuda.get_device_capability(device))


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The precision a product with `tensor` has here; autocast knows torch's own operations only."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def expand_heads(x_BKTD: torch.Tensor, query_BHTD: torch.Tensor) -> torch.Tensor:
    """Keys or values copied to every query head, (B, H, T, D)."""
    return x_BKTD.repeat_interleave(query_BHTD.shape[1] // x_BKTD.shape[1], dim=1)


def _attend_row(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    borders_D: torch.Tensor,
    longest: int,
    scoring: Scoring,
) -> torch.Tensor:
    """All documents in one kernel, (1, T, H, D); the borders (documents + 1, int32) lie on the row's device."""
    from torch.nn.attention.varlen import varlen_attn

    dtype, window = _compute_dtype(query_1HTD), scoring.window_within(longest)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query_1HTD, key_1KTD, value_1KTD))
    output_THD = varlen_attn(
        query, key, value, borders_D, borders_D, longest, longest,
        scale=scoring.scaling, window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return cast(torch.Tensor, output_THD)[None]


def attend_document(
    query_1HLD: torch.Tensor, key_1KLD: torch.Tensor, value_1KLD: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """Causal attention of one document, (L, H, D)."""
    length = query_1HLD.shape[2]
    window = scoring.window_within(length)
    mask_LL = None if window is None else _visible(length, window, query_1HLD.device)
    output_1HLD = F.scaled_dot_product_attention(
        query_1HLD,
        key_1KLD,
        value_1KLD,
        attn_mask=mask_LL,
        dropout_p=scoring.dropout,
        is_causal=mask_LL is None,
        scale=scoring.scaling,
        enable_gqa=query_1HLD.shape[1] != key_1KLD.shape[1],
    )
    return output_1HLD[0].transpose(0, 1)


def find_short(lengths: Sequence[int], query: torch.Tensor) -> list[tuple[int, int, int]]:
    """(document, start, length) of those that are worth one product together."""
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return []
    starts = itertools.accumulate(lengths, initial=0)
    every = enumerate(zip(starts, lengths, strict=False))
    return [(document, start, length) for document, (start, length) in every if length <= _SHORT]


@functools.lru_cache(maxsize=4)  # every layer asks for the same; numbers, since a tensor may be a fake one
def _gather_index(short: tuple[tuple[int, int, int], ...], longest: int) -> list[list[int]]:
    """(B, L) positions in the row; beyond a document's end its last one again."""
    return [[start + min(i, length - 1) for i in range(longest)] for _, start, length in short]


def attend_short(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    short: list[tuple[int, int, int]],
    scoring: Scoring,
) -> torch.Tensor:
    """Causal attention of short documents, padded at their ends to (B, L, H, D); what stands beyond an end is void.

    A causal mask keeps every real token from the padding behind it.  Saves B H L^2 scores for the backward pass.
    """
    longest = max(length for _, _, length in short)
    index_BL = torch.tensor(_gather_index(tuple(short), longest))

    def gather(x_1HTD: torch.Tensor) -> torch.Tensor:
        return x_1HTD[0].transpose(0, 1)[index_BL].transpose(1, 2)  # (B, heads, L, D)

    query, key, value = gather(query_1HTD), gather(key_1KTD), gather(value_1KTD)
    num_documents, num_heads, _, width = query.shape
    num_keys = key.shape[1]
    query = (query * (width**-0.5 if scoring.scaling is None else scoring.scaling)).reshape(
        num_documents * num_keys, -1, width
    )
    key, value = key.reshape(-1, longest, width), value.reshape(-1, longest, width)
    scores = torch.bmm(query, key.transpose(1, 2)).view(-1, num_heads // num_keys, longest, longest).float()
    hidden_LL = ~_visible(longest, scoring.sliding_window, query.device)
    weights = F.dropout(scores.masked_fill(hidden_LL, -torch.inf).softmax(-1).to(query.dtype), scoring.dropout)
    output = torch.bmm(weights.view(num_documents * num_keys, -1, longest), value)
    return output.view(num_documents, num_heads, longest, width).transpose(1, 2)


def _visible(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """(length, length) bool: which keys (columns) a query (row) may look at."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if sliding_window is None else causal.triu(1 - sliding_window)


def register() -> None:
    """Make `document` known to transformers; without a mask function of its own it is handed no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)
    AttentionInterface.register("sdpa", _sdpa)


def _sdpa(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own, which asks for shared keys and values wherever there is no mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    if is_grouped and attention_mask is None and query_BHTD.shape[2] > 1:
        has_dropout = bool(others.get("dropout"))
        if _choose_sharing(query_BHTD, key_BKTD, False, has_dropout) == "expanded":
            key_BKTD, value_BKTD = expand_heads(key_BKTD, query_BHTD), expand_heads(value_BKTD, query_BHTD)
    return sdpa_attention_forward(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, **others)


def packing_error(model: Any) -> float:
    """How much three short documents packed in one row differ from the same run one by one.

    The logits' root mean square difference over their spread: rounding (1e-6 in fp32, up to 0.05 in bf16) where nothing
    leaks, half or more where the model sees across a border.  Costs four forward passes of 3 to 12 tokens.  Raises
    whatever the model raises for arguments it does not know.
    """
    lengths = (5, 4, 3)
    ids_1T = (torch.arange(sum(lengths), device=model.device) * 7 + 3).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        packed = outputs(model, ids_1T, **packed_arguments(lengths, model.device), use_cache=False)[0]
        alone = [
            outputs(model, part, **packed_arguments([part.shape[1]], model.device), use_cache=False)[0]
            for part in ids_1T.split(lengths, dim=1)
        ]
    return difference(packed, torch.cat(alone))


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Their root mean square difference over the spread of the first."""
    return ((logits - expected).float().square().mean().sqrt() / logits.float().std()).item()


def sharing_error(model: Any) -> float:
    """How much three documents that share 9 tokens, computed as a tree, differ from the same run one by one.

    As `packing_error`, of the logits that predict something.
    """
    common = torch.arange(9) * 7 + 3
    ends = [torch.arange(length) * 5 + 11 * length for length in (6, 4, 1)]  # none begins as another one
    documents = [torch.cat([common, end]).remainder(model.config.vocab_size) for end in ends]
    row = lay_out(documents, [torch.arange(len(one)) > 0 for one in documents])
    with torch.no_grad():
        arguments = tree_arguments(row.lengths, row.parents, model.device)
        logits = outputs(model, row.input_ids_1T.to(model.device), **arguments, use_cache=False)[0]
        alone = [
            outputs(model, one[None].to(model.device), **packed_arguments([len(one)], model.device), use_cache=False)[0]
            for one in documents
        ]
    own = logits[9:].split(row.lengths[1:])  # behind the shared node, in the tree's order
    found = [next(part for part in own if len(part) == len(one) - 9) for one in documents]
    return difference(torch.cat(found), torch.cat([part[9:] for part in alone]))


def tree_arguments(
    lengths: Sequence[int], parents: Sequence[int], device: torch.device, positions_1T: torch.Tensor | None = None
) -> dict[str, Any]:
    """The forward arguments of a row whose nodes continue each other; only the `document` kernel knows them."""
    positions_1T = tree_positions(lengths, parents) if positions_1T is None else positions_1T
    return {
        "position_ids": positions_1T.to(device),
        "document_lengths": tuple(lengths),
        "document_parents": tuple(parents),
    }


def tree_positions(lengths: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
    """(1, T) positions of a row's tokens in their documents."""
    nodes = nodes_of(tuple(lengths), tuple(parents))
    return torch.cat([torch.arange(node.depth, node.depth + node.length) for node in nodes])[None]


def packed_arguments(
    lengths: Sequence[int], device: torch.device, at: tuple[torch.Tensor, torch.Tensor] | None = None
) -> dict[str, Any]:
    """The forward arguments that tell a model where documents of `lengths` begin in one row.

    Positions, borders and the longest length are all passed: a kernel that has to find them out waits for the device in
    every layer.  `at` is what `borders` made of the same lengths, on `device` already.
    """
    positions_1T, borders_D = (tensor.to(device) for tensor in at or borders(lengths))
    return {
        "position_ids": positions_1T,
        "document_lengths": tuple(lengths),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders_D),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }


def borders(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, T) positions inside packed documents; (documents + 1) where each begins and the last ends, int32."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    return positions[None], torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def first_layers(model: Any, device: torch.device) -> Any:
    """A copy on `device` of a model's first layers, one of each kind: enough to see whether documents leak."""
    kinds = getattr(model.config, "layer_types", None) or [None]
    num_layers = 1 + max(kinds.index(kind) for kind in set(kinds))
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    name, layers = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    excluded = {id(layer): torch.nn.Identity() for layer in layers[num_layers:]}
    copied = copy.deepcopy(model, excluded)
    copied.config.num_hidden_layers = num_layers
    parent, _, own_name = name.rpartition(".")
    setattr(copied.get_submodule(parent), own_name, copied.get_submodule(name)[:num_layers])
    return copied.to(device)
