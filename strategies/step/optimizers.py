"""The optimizers a method may ask for by their Hugging Face names (strategies/optimizers.py says what each keeps)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from strategies.optimizers import OPTIMIZERS
from strategies.step.state import COUNTS
from strategies.train_setup import TrainSettings, TrainSetup


def build_optimizer(
    groups: list[dict[str, Any]],
    settings: TrainSettings,
    outside: Collection[torch.nn.Parameter] = (),
    undecayed: Collection[torch.nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer that `settings.optim` names over `groups`; `outside` are embeddings and output matrix.

    Weight decay spares `undecayed`.  A group may carry its own `lr_factor` (LoRA+ trains B faster than A); its
    `base_lr` is what schedules scale.  Raises ValueError for a name that is not known.
    """
    for group in groups:
        group["base_lr"] = group["lr"] = settings.learning_rate * group.pop("lr_factor", 1.0)
    name, decay = settings.optim, settings.weight_decay
    if decay:
        groups = _apart(groups, {id(parameter) for parameter in undecayed})
    if name not in OPTIMIZERS:
        raise ValueError(f"optim {name!r} is not one of {', '.join(OPTIMIZERS)}")
    if OPTIMIZERS[name].library == "bitsandbytes":
        return _of_bitsandbytes(groups, settings)
    if OPTIMIZERS[name].averages:
        return ScheduleFree(_of_schedulefree(groups, settings))
    betas = (settings.adam_beta1, settings.adam_beta2)
    if name == "muon":
        return MuonWithAdamW(groups, betas, settings.adam_epsilon, decay, outside)
    builders: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, weight_decay=decay),
        "adafactor": lambda: _adafactor(groups, decay),
        "adagrad": lambda: Adagrad(groups, weight_decay=decay),
        "rmsprop": lambda: torch.optim.RMSprop(groups, weight_decay=decay),
    }
    if build := builders.get(name):
        return build()
    fused = name == "adamw_torch_fused"
    return torch.optim.AdamW(groups, betas=betas, eps=settings.adam_epsilon, weight_decay=decay, fused=fused)


def _apart(groups: list[dict[str, Any]], undecayed: Collection[int]) -> list[dict[str, Any]]:
    """Groups whose parameters all decay or all do not; those that have none of one kind as they are."""
    found: list[dict[str, Any]] = []
    for group in groups:
        spared = [parameter for parameter in group["params"] if id(parameter) in undecayed]
        decayed = [parameter for parameter in group["params"] if id(parameter) not in undecayed]
        found.append({**group, "params": decayed})
        if spared:
            found.append({**group, "params": spared, "weight_decay": 0.0})
    return found


def _adafactor(groups: list[dict[str, Any]], decay: float) -> torch.optim.Optimizer:
    """As transformers' Trainer builds it.

    torch's own scales a step by the weight's size: LoRA's B, which begins at zero, hardly moves.
    """
    from transformers.optimization import Adafactor  # loads two thousand modules: only where it trains

    optimizer = Adafactor(groups, weight_decay=decay, scale_parameter=False, relative_step=False)
    optimizer.register_step_post_hook(_keep_as_tensors)
    return optimizer


def _keep_as_tensors(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Of each weight's state the counter as a tensor, which a checkpoint holds; its size is measured in each step."""
    for state in optimizer.state.values():
        state["step"] = torch.as_tensor(float(state["step"]))
        state.pop("RMS", None)


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


def _of_schedulefree(groups: list[dict[str, Any]], settings: TrainSettings) -> Any:
    """As transformers' Trainer builds them (trainer_optimizer.py)."""
    import schedulefree

    name, warmup = settings.optim, settings.warmup_steps
    options: dict[str, Any] = {"weight_decay": settings.weight_decay}
    if name == "schedule_free_sgd":
        return schedulefree.SGDScheduleFree(groups, warmup_steps=warmup, **options)
    options |= {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
    if name == "schedule_free_radam":
        return schedulefree.RAdamScheduleFree(groups, **options)
    return schedulefree.AdamWScheduleFree(groups, warmup_steps=warmup, **options)


class ScheduleFree(torch.optim.Optimizer):
    """An optimizer of the package `schedulefree` (Defazio et al., arXiv 2405.15682) that a checkpoint holds whole.

    The parameters are y, where gradients are taken; z lies in the state, and what is evaluated and handed back is the
    average x = (y - (1 - beta) z) / beta.  The package goes from y to x and back by rounding, so that an evaluation
    would change the training; here y is kept meanwhile.  What the package counts in its groups, the steps, the sum of
    the averages' weights and the highest rate, lies in a tensor of each weight's state.
    """

    _COUNTED = ("k", "weight_sum", "lr_max")

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._is_averaged = inner, False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert not self._is_averaged
        self._inner.param_groups, self._inner.state = self.param_groups, self.state
        before = [self._begin(group) for group in self.param_groups]
        self._inner.step()
        for group, counts in zip(self.param_groups, before, strict=True):
            self._end(group, counts)
        return None

    def _begin(self, group: dict[str, Any]) -> list[float]:
        """Bring what was counted from the state into a group; that."""
        held = (self.state.get(parameter, {}).get(COUNTS) for parameter in group["params"])
        counts = next((one.tolist() for one in held if one is not None), [0, 0.0, -1.0])
        group |= dict(zip(self._COUNTED, counts, strict=True)) | {"train_mode": True}
        group["k"] = int(group["k"])
        if group["lr"] == 0.0:
            group["lr_max"] = -1.0  # a step without a rate is no part of the average: no weight moves
        return counts

    def _end(self, group: dict[str, Any], before: list[float]) -> None:
        counts = before if group["lr"] == 0.0 else [group[key] for key in self._COUNTED]
        for parameter in group["params"]:
            if state := self.state.get(parameter):
                state[COUNTS] = torch.tensor(counts, dtype=torch.float64)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the parameters are the averages, afterwards the bits that they were."""
        return contextlib.nullcontext() if self._is_averaged else self._averaged()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        kept: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._is_averaged = True
        try:
            with torch.no_grad():
                for parameter, z, weight in self._points():
                    kept[parameter] = _copy_of(parameter)
                    parameter.lerp_(z, weight)
            yield
        finally:
            with torch.no_grad():
                for parameter, y in kept.items():
                    parameter.copy_(y)
            self._is_averaged = False

    def become_averages(self) -> None:
        """Let the parameters be the averages for good: no step follows."""
        with torch.no_grad():
            for parameter, z, weight in self._points():
                parameter.lerp_(z, weight)
        self.state.clear()

    def _points(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, float]]:
        """Each parameter with its z, and the weight of z by which it becomes the average."""
        for group in self.param_groups:
            beta = group["momentum"] if "momentum" in group else group["betas"][0]
            for parameter in group["params"]:
                if (z := self.state.get(parameter, {}).get("z")) is not None:
                    yield parameter, z, 1 - 1 / beta


def _copy_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """On its device, where gradients were that are gone between steps, or on the host."""
    try:
        return parameter.detach().clone()
    except torch.OutOfMemoryError:
        return parameter.detach().cpu()


def averages_of(setup: TrainSetup) -> ScheduleFree | None:
    """The optimizer of a training that evaluates and hands back an average; None for any other."""
    return setup.optimizer if isinstance(setup.optimizer, ScheduleFree) else None


def evaluated_weights(setup: TrainSetup) -> AbstractContextManager[None]:
    """Inside the block the trained weights are those that are evaluated and handed back."""
    averages = averages_of(setup)
    return averages.averaged() if averages else contextlib.nullcontext()


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
