"""The optimizers a method may ask for by their Hugging Face names (strategies/optimizers.py says what each keeps)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from strategies.optimizers import OPTIMIZERS
from strategies.train_setup import TrainSettings


def build_optimizer(
    groups: list[dict[str, Any]], settings: TrainSettings, outside: Collection[torch.nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer that `settings.optim` names over `groups`; `outside` are embeddings and output matrix.

    A group may carry its own `lr_factor` (LoRA+ trains B faster than A); its `base_lr` is what schedules scale.
    Raises ValueError for a name that is not known.
    """
    for group in groups:
        group["base_lr"] = group["lr"] = settings.learning_rate * group.pop("lr_factor", 1.0)
    name, decay = settings.optim, settings.weight_decay
    if name not in OPTIMIZERS:
        raise ValueError(f"optim {name!r} is not one of {', '.join(OPTIMIZERS)}")
    if OPTIMIZERS[name].library == "bitsandbytes":
        return _of_bitsandbytes(groups, settings)
    betas = (settings.adam_beta1, settings.adam_beta2)
    if name == "muon":
        return MuonWithAdamW(groups, betas, settings.adam_epsilon, decay, outside)
    builders: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, weight_decay=decay),
        "adafactor": lambda: torch.optim.Adafactor(groups, weight_decay=decay),
        "adagrad": lambda: Adagrad(groups, weight_decay=decay),
        "rmsprop": lambda: torch.optim.RMSprop(groups, weight_decay=decay),
    }
    if build := builders.get(name):
        return build()
    fused = name == "adamw_torch_fused"
    return torch.optim.AdamW(groups, betas=betas, eps=settings.adam_epsilon, weight_decay=decay, fused=fused)


def _of_bitsandbytes(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """As transformers' Trainer builds them (trainer_optimizer.py); AdEMAMix with its own third decay."""
    import bitsandbytes

    optim: Any = bitsandbytes.optim  # its classes are not exported for type checkers
    name, facts = settings.optim, OPTIMIZERS[settings.optim]
    options: dict[str, Any] = {"optim_bits": 8 if facts.has_eight_bit_state else 32}
    options["weight_decay"] = settings.weight_decay
    betas = (settings.adam_beta1, settings.adam_beta2)
    if "rmsprop" in name:
        return optim.RMSprop(groups, **options)
    options["is_paged"] = facts.is_paged
    if "lion" in name:
        return optim.Lion(groups, betas=betas, **options)
    if "ademamix" in name:
        return optim.AdEMAMix(groups, betas=(*betas, 0.9999), eps=settings.adam_epsilon, **options)
    return optim.AdamW(groups, betas=betas, eps=settings.adam_epsilon, **options)


class Adagrad(torch.optim.Adagrad):
    """Adagrad whose state begins with the first step, as every other's: what is cleared begins anew."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.state.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    begin = torch.full_like(parameter, group["initial_accumulator_value"])
                    self.state[parameter] = {"step": torch.tensor(0.0), "sum": begin}
        return super().step(closure)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for matrices of layers, AdamW for everything else.

    Updates of matrices are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        outside: Collection[torch.nn.Parameter] = (),
    ) -> None:
        left_out = {id(parameter) for parameter in outside}

        def is_matrix(parameter: torch.nn.Parameter) -> bool:
            return parameter.dim() == 2 and id(parameter) not in left_out

        parted: list[dict[str, Any]] = []
        for group in groups:
            parameters = list(group["params"])
            for kind in (True, False):
                own = [parameter for parameter in parameters if is_matrix(parameter) is kind]
                if own:
                    parted.append({**group, "params": own, "is_matrix": kind})
        self._inner: tuple[torch.optim.Optimizer, ...] = ()
        super().__init__(parted, {"lr": 1e-3, "is_matrix": False})
        nothing = torch.nn.Parameter(torch.zeros(1, 1))
        muon = torch.optim.Muon([nothing], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW([nothing], betas=betas, eps=eps, weight_decay=weight_decay)
        self._inner = (muon, adamw)
        for one in self._inner:
            one.state = self.state
        for group in self.param_groups:
            self._complete(group)

    def _complete(self, group: dict[str, Any]) -> None:
        """The inner optimizers' options, where a group does not state its own."""
        inner = self._inner[0 if group["is_matrix"] else 1]
        for key, value in inner.defaults.items():
            group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._inner:
            self._complete(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for inner, kind in zip(self._inner, (True, False), strict=True):
            inner.param_groups = [group for group in self.param_groups if group["is_matrix"] is kind]
            inner.state = self.state
            if inner.param_groups:
                inner.step()
        return None
