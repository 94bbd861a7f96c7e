"""Orders in which a linear map with a low-rank correction can be multiplied out, and which is the cheapest.

y = W x + s B A x has two forward and eight backward orders (RunLoRA, arXiv 2312.03415).  Pure arithmetic, no torch.

Legend: T tokens, I inputs and O outputs of the map, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Form:
    """One order: what is computed by way of the whole weight, in place of the two thin matrices.

    The whole weight's gradient dY^T x, where one of A and B is computed by way of it, is computed once.
    """

    merges_forward: bool = False  # y = x (W + s B A)^T, in place of x W^T + s (x A^T) B^T
    merges_backward: bool = False  # dx = dY (W + s B A), in place of dY W + s (dY B) A
    a_by_weight: bool = False  # dA = s B^T (dY^T x), in place of s (dY B)^T x
    b_by_weight: bool = False  # dB = s (dY^T x) A^T, in place of s dY^T (x A^T)

    def __str__(self) -> str:
        on = [name for name, value in vars(self).items() if value]
        return " + ".join(on) or "apart"


FORMS: tuple[Form, ...] = tuple(Form(*flags) for flags in itertools.product((False, True), repeat=4))
_FLOPS_PER_ELEMENT = 40.0  # of the order of a CPU's FLOP/s in fp32 over the elements/s that its memory gives
_UNMERGED = tuple(form for form in FORMS if not (form.merges_forward or form.merges_backward))


@dataclass(frozen=True)
class MapSizes:
    """Of one map and the tokens that pass it."""

    tokens: int
    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True)
class Product:
    """(rows, inner) times (inner, columns); `adds` where the result is added to what stands there."""

    rows: int
    inner: int
    columns: int
    adds: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    @property
    def elements(self) -> int:
        """Read and written."""
        result = self.rows * self.columns * (2 if self.adds else 1)
        return self.rows * self.inner + self.inner * self.columns + result


def forward_products(form: Form, n: MapSizes) -> Iterator[Product]:
    yield Product(n.tokens, n.inputs, n.outputs)
    if form.merges_forward:
        yield Product(n.outputs, n.rank, n.inputs, adds=True)
    else:
        yield Product(n.tokens, n.inputs, n.rank)
        yield Product(n.tokens, n.rank, n.outputs, adds=True)


def backward_products(form: Form, n: MapSizes) -> Iterator[Product]:
    """With the gradient of the input; x A^T is there from a forward pass that has computed it."""
    if not (form.a_by_weight and form.merges_backward):
        yield Product(n.tokens, n.outputs, n.rank)
    if form.a_by_weight or form.b_by_weight:
        yield Product(n.outputs, n.tokens, n.inputs)
    if form.a_by_weight:
        yield Product(n.rank, n.outputs, n.inputs)
    else:
        yield Product(n.rank, n.tokens, n.inputs)
    if form.b_by_weight:
        yield Product(n.outputs, n.inputs, n.rank)
    else:
        if form.merges_forward:
            yield Product(n.tokens, n.inputs, n.rank)
        yield Product(n.outputs, n.tokens, n.rank)
    yield Product(n.tokens, n.outputs, n.inputs)
    if form.merges_backward:
        yield Product(n.outputs, n.rank, n.inputs, adds=True)
    else:
        yield Product(n.tokens, n.rank, n.inputs, adds=True)


def products(form: Form, n: MapSizes) -> list[Product]:
    return [*forward_products(form, n), *backward_products(form, n)]


@lru_cache(maxsize=4096)
def cheapest(n: MapSizes, element_bytes: int, flops_per_element: float = _FLOPS_PER_ELEMENT) -> Form:
    """The cheapest order, of equals the plainest; an element read or written counts as so many FLOPs.

    In 16 bits W + s B A is not formed: most of a small correction would be lost to the rounding of W.
    """

    def cost(form: Form) -> float:
        return sum(one.flops + flops_per_element * one.elements for one in products(form, n))

    return min(FORMS if element_bytes >= 4 else _UNMERGED, key=cost)
