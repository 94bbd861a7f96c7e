"""An MLP with experts: each token is corrected by the pairs of A and B that a router chooses for it (MixLoRA).

    y = sum_k w_k FFN_k(x)      FFN_e: the MLP with maps W + s B_e A_e      w: the K largest of softmax(R x), sum 1

No expert repeats what all have in common.  Gate and up of the base are computed once for all tokens, and so is down:
it is linear and the weights sum to 1, so that sum_k w_k W h_k = W sum_k w_k h_k.  Tokens are sorted by expert, and each
pair multiplies a range of them.

Legend: N tokens, H hidden size, F width of the MLP, E experts, K chosen by a token, M = N K rows sorted by expert, R
rank, I inputs and O outputs of a map.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from strategies.mixture.balance import LoadBalance
from strategies.model.architecture import decoder_layers
from strategies.multi_lora.linear import over_ranges

MAPS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")  # what the families call it


@dataclass(frozen=True)
class MixtureSizes:
    """How many experts, how many of them a token passes, and the pairs' rank and scale."""

    num_experts: int
    top_k: int
    rank: int
    scale: float
    attention: tuple[str, ...] = ()  # maps of attention with a pair of their own


@dataclass(frozen=True)
class Routes:
    """Which experts each token passes, with what weight, and where its rows stand when they are sorted by expert."""

    chosen_NK: torch.Tensor
    weights_NK: torch.Tensor  # fp32, of a token summing to 1
    order_M: torch.Tensor  # of each sorted row, its place among tokens x choices
    place_NK: torch.Tensor  # the reverse: where in the sorted rows each stands
    sizes: list[int]  # rows of each expert

    @classmethod
    def of(cls, probabilities_NE: torch.Tensor, top_k: int) -> Routes:
        weights_NK, chosen_NK = probabilities_NE.topk(top_k)
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        order_M = chosen_NK.flatten().argsort(stable=True)
        place_NK = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
        return cls(chosen_NK, weights_NK, order_M, place_NK.view_as(chosen_NK), _sizes(chosen_NK, probabilities_NE))

    def to_experts(self, x_NI: torch.Tensor) -> torch.Tensor:
        """A row for each expert that a token passes (M, I)."""
        return _ToExperts.apply(x_NI, self.order_M // self.chosen_NK.shape[1], self.place_NK)

    def to_tokens(self, x_MI: torch.Tensor) -> torch.Tensor:
        """The rows of each token, in the order in which it chose (N, K, I)."""
        return _ToTokens.apply(x_MI, self.place_NK, self.order_M)

    def summed(self, x_MI: torch.Tensor) -> torch.Tensor:
        """The sum of each token's rows (N, I)."""
        return _Summed.apply(x_MI, self.order_M // self.chosen_NK.shape[1], self.place_NK)


def _sizes(chosen_NK: torch.Tensor, probabilities_NE: torch.Tensor) -> list[int]:
    """Rows of each expert; on tensors without content, whose memory alone is looked at, as many for each."""
    count, rows = probabilities_NE.shape[1], chosen_NK.numel()
    if isinstance(chosen_NK, FakeTensor):
        return [rows // count + (expert < rows % count) for expert in range(count)]
    return torch.bincount(chosen_NK.flatten(), minlength=count).tolist()


def _sums(x_MI: torch.Tensor, place_NK: torch.Tensor) -> torch.Tensor:
    """Of each token's rows, in one order whatever the device."""
    total_NI = x_MI.index_select(0, place_NK[:, 0])
    for k in range(1, place_NK.shape[1]):
        total_NI += x_MI.index_select(0, place_NK[:, k])
    return total_NI


class _ToExperts(torch.autograd.Function):
    """Copies of tokens, sorted; the gradients of a token's copies are added."""

    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, token_M: torch.Tensor, place_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_NK)
        return x_NI.index_select(0, token_M)

    @staticmethod
    def backward(ctx: Any, grad_MI: torch.Tensor) -> Any:  # type: ignore[override]
        (place_NK,) = ctx.saved_tensors
        return _sums(grad_MI, place_NK), None, None


class _Summed(torch.autograd.Function):
    """The reverse: a token's sorted rows are added, and all have the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x_MI: torch.Tensor, token_M: torch.Tensor, place_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_M)
        return _sums(x_MI, place_NK)

    @staticmethod
    def backward(ctx: Any, grad_NI: torch.Tensor) -> Any:  # type: ignore[override]
        (token_M,) = ctx.saved_tensors
        return grad_NI.index_select(0, token_M), None, None


class _ToTokens(torch.autograd.Function):
    """Sorted rows back at their tokens: a permutation, and so is the way of the gradients."""

    @staticmethod
    def forward(ctx: Any, x_MI: torch.Tensor, place_NK: torch.Tensor, order_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order_M)
        return x_MI.index_select(0, place_NK.flatten()).view(*place_NK.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad_NKI: torch.Tensor) -> Any:  # type: ignore[override]
        (order_M,) = ctx.saved_tensors
        return grad_NKI.flatten(0, 1).index_select(0, order_M), None, None


class Mixture(torch.nn.Module):
    """The router and the experts of one MLP; its weights are made on `meta` and filled by `fill`."""

    def __init__(self, mlp: Any, sizes: MixtureSizes, layer: int, balance: LoadBalance | None) -> None:
        super().__init__()
        self.sizes, self._layer, self._balance = sizes, layer, balance
        self.router = _empty(sizes.num_experts, mlp.gate_proj.in_features)
        self.gate, self.up, self.down = (ExpertPairs(getattr(mlp, name), sizes) for name in MAPS)

    def choose(self, x_NH: torch.Tensor) -> Routes:
        """The experts of each token, in fp32 whatever the rest is computed in."""
        with torch.autocast(x_NH.device.type, enabled=False):
            probabilities_NE = F.linear(x_NH.float(), self.router.float()).softmax(dim=-1)
            routes = Routes.of(probabilities_NE, self.sizes.top_k)
        if self._balance is not None and self.training:
            self._balance.note(self._layer, probabilities_NE, routes.chosen_NK)
        return routes


class ExpertPairs(torch.nn.Module):
    """The pairs of one map, an expert's after the other's."""

    def __init__(self, base: Any, sizes: MixtureSizes) -> None:
        super().__init__()
        self.a_ERI = _empty(sizes.num_experts, sizes.rank, base.in_features)
        self.b_EOR = _empty(sizes.num_experts, base.out_features, sizes.rank)
        self._scale = sizes.scale

    def forward(self, x_MI: torch.Tensor, sizes: Sequence[int], weights_M1: torch.Tensor | float = 1.0) -> torch.Tensor:
        """s w B_e A_e x of each row, by the pair of the expert whose range it stands in (M, O)."""
        first, second = (whole.to(x_MI.dtype).unbind() for whole in (self.a_ERI, self.b_EOR))
        z_MR = over_ranges(lambda expert, x: F.linear(x, first[expert]), sizes, x_MI) * (self._scale * weights_M1)
        return over_ranges(lambda expert, z: F.linear(z, second[expert]), sizes, z_MR)


class MapPair(torch.nn.Module):
    """One pair of A and B beside a linear map, for all tokens: LoRA."""

    def __init__(self, base: Any, sizes: MixtureSizes) -> None:
        super().__init__()
        self.a_RI = _empty(sizes.rank, base.in_features)
        self.b_OR = _empty(base.out_features, sizes.rank)
        self._scale = sizes.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.a_RI.to(x.dtype)) * self._scale, self.b_OR.to(x.dtype))


def _empty(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, device="meta"))


def _forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of an MLP with a `mixture`; (..., H) of (..., H)."""
    mixture, x_NH = mlp.mixture, x.flatten(0, -2)
    routes = mixture.choose(x_NH)
    x_MH, ranges = routes.to_experts(x_NH), routes.sizes
    gate_MF = routes.to_experts(mlp.gate_proj(x_NH)) + mixture.gate(x_MH, ranges)
    up_MF = routes.to_experts(mlp.up_proj(x_NH)) + mixture.up(x_MH, ranges)
    h_MF = activation_of(mlp)(gate_MF) * up_MF
    weights_NK = routes.weights_NK.to(h_MF.dtype)
    weights_M1 = weights_NK.flatten()[routes.order_M][:, None]
    y_NH = mlp.down_proj(weighted_mean(routes.to_tokens(h_MF), weights_NK))
    correction_NH = routes.summed(mixture.down(h_MF, ranges, weights_M1))
    return (y_NH + correction_NH.to(y_NH.dtype)).view_as(x)


def weighted_mean(rows_NKI: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """sum_k w_k x_k of weights that sum to 1; equal rows come out bit by bit, so that training starts as the base."""
    mean_NI, total_N1 = rows_NKI[:, 0], weights_NK[:, :1]
    for k in range(1, rows_NKI.shape[1]):
        total_N1 = total_N1 + weights_NK[:, k : k + 1]
        mean_NI = torch.lerp(mean_NI, rows_NKI[:, k], weights_NK[:, k : k + 1] / total_N1)
    return mean_NI


def _add_pair(base: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + base.pair(inputs[0]).to(output.dtype)


def activation_of(mlp: Any) -> Any:
    """The function between gate and product.  Raises ValueError."""
    found = next((one for name in _ACTIVATIONS if (one := getattr(mlp, name, None)) is not None), None)
    if found is None:
        raise ValueError(f"{type(mlp).__name__} has no activation under a known name: experts of it cannot be computed")
    return found


def attach(model: Any, sizes: MixtureSizes, balance: LoadBalance | None = None) -> dict[str, torch.nn.Parameter]:
    """Give every MLP of a model its router and experts, still without content; what is new, by name.

    The base's weights keep their names.  Raises ValueError for an MLP that is not down(act(gate(x)) * up(x)) of plain
    linear maps.
    """
    known = {id(parameter) for parameter in model.parameters()}
    for number, layer in enumerate(decoder_layers(model)):
        mlp = _mlp_of(layer, number)
        mlp.mixture = Mixture(mlp, sizes, number, balance)
        mlp.forward = MethodType(_forward, mlp)
        for module in _maps_of(layer, sizes.attention, number):
            module.pair = MapPair(module, sizes)
            module.register_forward_hook(_add_pair)
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in known}


def _maps_of(layer: Any, names: Sequence[str], number: int) -> list[Any]:
    """The maps of a layer with these last names, one of each.  Raises ValueError."""
    found = [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] in names]
    if len(found) != len(names) or any(type(module) is not torch.nn.Linear for module in found):
        raise ValueError(
            f"layer {number}: {', '.join(names)} are no plain linear maps: set method.adapt_attention: false"
        )
    return found


def _mlp_of(layer: Any, number: int) -> Any:
    """The MLP of a decoder layer, proven to be what experts are computed of."""
    found = [module for module in layer.modules() if all(hasattr(module, name) for name in MAPS)]
    if len(found) != 1:
        raise ValueError(f"layer {number} has {len(found)} MLPs of {', '.join(MAPS)}, and experts belong to one")
    mlp = found[0]
    if other := [name for name in MAPS if type(getattr(mlp, name)) is not torch.nn.Linear]:
        kinds = ", ".join(f"{name} ({type(getattr(mlp, name)).__name__})" for name in other)
        raise ValueError(f"layer {number}: {kinds}: experts correct plain linear maps, no quantised or adapted ones")
    act = activation_of(mlp)
    weight = mlp.gate_proj.weight
    if weight.is_meta or isinstance(weight, FakeTensor):
        return mlp
    with torch.no_grad():
        x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(2, -1)
        if not torch.allclose(mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x)), mlp(x), rtol=1e-2, atol=1e-5):
            raise ValueError(f"{type(mlp).__name__} is not down(act(gate(x)) * up(x)), and experts are computed so")
    return mlp


def fill(model: Any, tensors: Mapping[str, torch.Tensor], trains: bool) -> dict[str, torch.nn.Parameter]:
    """Put content into weights that `attach` made, on their layer's device; the parameters by name."""
    filled = {}
    for name, tensor in tensors.items():
        place, _, own = name.rpartition(".")
        device = _device_beside(model, place)
        filled[name] = parameter = torch.nn.Parameter(tensor.to(device), trains)
        setattr(model.get_submodule(place), own, parameter)
    return filled


def _device_beside(model: Any, place: str) -> torch.device:
    """Where the base's map or MLP lies that a module of ours belongs to."""
    owner = model.get_submodule(place.split(".mixture")[0].removesuffix(".pair"))
    return next(parameter.device for name, parameter in owner.named_parameters() if name.endswith("weight"))


def drawn(parameters: Mapping[str, torch.nn.Parameter], seed: int, router_range: float) -> dict[str, torch.Tensor]:
    """What training begins with, the same on every worker: A as PEFT draws it, B zero, the router normal."""
    found = {}
    for name, parameter in parameters.items():
        own, draw = name.rpartition(".")[2], torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        tensor = torch.zeros(parameter.shape)
        if own == "router":
            tensor.normal_(0.0, router_range, generator=draw)
        elif own.startswith("a_"):
            bound = parameter.shape[-1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
            tensor.uniform_(-bound, bound, generator=draw)
        found[name] = tensor
    return found
