"""Adapters in memory: those that share the base's weights, the least recently used ones evicted.

shared   plain LoRA: rows of different adapters, and of the base, are one batch
in turn  DoRA: on the same weights, but in a batch of its own
alone    whole models, SHiRA, biases, modules and tokens beside A and B, a base that PEFT changes first: a model of
         its own, of which one is held at a time
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from clusters.safe.reading import BadInput, first_line
from orchestrator.errors import JobError
from orchestrator.serving.engines.kinds import Kind, kind_of_adapter
from orchestrator.serving.engines.protocol import Refused, ServedModel
from orchestrator.serving.engines.weights import Weights
from orchestrator.training.stops import Stops, stops_of
from strategies.adapter_bank.adapter import Unusable
from strategies.adapter_bank.card import CARD, BankError
from strategies.adapter_bank.folders import card_in, check_bytes
from strategies.step.supervised_logits import inner_model
from strategies.techniques.precision import autocast
from strategies.workload import Dtype

BASE = "__base__"  # PEFT's name for rows without an adapter
_FAILURES = (JobError, BadInput, BankError, Unusable, SafetensorError, OSError, ValueError, TypeError, KeyError)
_FAILURES += (RuntimeError, AttributeError)


class SharedBase:
    """A base model whose LoRA layers compute each row with its adapter."""

    def __init__(self, model: Any) -> None:
        self._base = model
        self._peft: Any = None  # from the first adapter on
        self._names: list[str] | None = None  # of the rows of the running pass
        self._routed: set[int] = set()  # layers that ask for them
        self._count = 0

    @property
    def model(self) -> Any:
        return self._base

    def add(self, folder: Path) -> str:
        """Load an adapter; the name that PEFT knows it by, in which it wants no dot."""
        self._count += 1
        name = f"adapter{self._count}"
        try:
            if self._peft is None:
                settings = PeftConfig.from_pretrained(str(folder))
                self._peft = PeftModel(self._base, settings, name, low_cpu_mem_usage=True)
            self._peft.load_adapter(str(folder), adapter_name=name, low_cpu_mem_usage=True)
        except Exception:
            if self._peft and name in self._peft.peft_config:  # half of it is there
                self.remove(name)
            raise
        self._peft.eval()
        for layer in self._peft.modules():
            if isinstance(layer, LoraLayer) and id(layer) not in self._routed:
                layer.register_forward_pre_hook(self._route, with_kwargs=True)  # type: ignore[attr-defined]
                self._routed.add(id(layer))
        return name

    def remove(self, name: str) -> None:
        assert self._peft is not None
        with warnings.catch_warnings():  # that another one is active now, which is chosen for each pass
            warnings.simplefilter("ignore")
            self._peft.delete_adapter(name)

    def use(self, names: list[str], only: str | None) -> None:
        """Compute the next passes with an adapter a row, or all rows with the one that cannot be mixed."""
        self._names = None if only else names
        if only and self._peft.active_adapters != [only]:
            self._peft.base_model.set_adapter(only, inference_mode=True)

    def _route(self, layer: Any, inputs: Any, options: dict[str, Any]) -> Any:
        return None if self._names is None else (inputs, {**options, "adapter_names": self._names})


@dataclass(frozen=True, eq=False)
class Lane:
    """Weights that compute one batch at a time."""

    model: Any
    dtype: Dtype
    shared: SharedBase | None = None
    only: str | None = None  # the adapter of all its rows

    @contextlib.contextmanager
    def computing(self, names: list[str]) -> Iterator[None]:
        """Inside the block a pass computes each row with its adapter."""
        if self.shared:
            self.shared.use(names, self.only)
        with autocast(inner_model(self.model).device.type, self.dtype):
            yield


@dataclass(frozen=True, eq=False)
class Seat:
    """Where a query is computed, and how its text is read and written."""

    lane: Lane
    tokenizer: Any
    stops: Stops
    adapter: str = BASE


class Seats:
    """The base and up to `limit` adapters, loaded when a query needs them."""

    def __init__(self, weights: Weights, limit: int) -> None:
        self._weights, self._limit = weights, limit
        model = weights.ready(weights.load(weights.base))
        self._shared = SharedBase(model)
        self._mixed = Lane(model, weights.dtype, self._shared)
        tokenizer = weights.tokenizer(Path(weights.base))
        self.base = Seat(self._mixed, tokenizer, stops_of(model, tokenizer))
        self._seats: OrderedDict[str, Seat] = OrderedDict()  # by folder; the least recently used first
        self.counts = {"adapter_hits": 0, "adapter_loads": 0, "adapter_evictions": 0}

    @property
    def num_loaded(self) -> int:
        return len(self._seats)

    def take(self, model: ServedModel, busy: Collection[Seat]) -> Seat | None:
        """The seat of a model; None while all are busy.  Raises Refused for one that cannot be loaded."""
        if model.folder is None:
            return self.base
        if seat := self._seats.get(model.folder):
            self._seats.move_to_end(model.folder)
            self.counts["adapter_hits"] += 1
            return seat
        with _refusing(model.name):
            kind = kind_of_adapter(Path(model.folder))
            if not self._make_room(kind, busy):
                return None
            check_digest(Path(model.folder))
            seat = self._seats[model.folder] = self._load(Path(model.folder), kind)
        self.counts["adapter_loads"] += 1
        return seat

    def forget(self, folder: str) -> None:
        """Drop an adapter that is no longer served."""
        if seat := self._seats.pop(folder, None):
            self._drop(seat)

    def _make_room(self, kind: Kind, busy: Collection[Seat]) -> bool:
        """Evict what was used least recently and is not in use; whether there is a place now."""
        while True:
            alone = [folder for folder, seat in self._seats.items() if seat.lane.shared is None]
            if kind == "alone" and alone:
                crowded = alone
            elif len(self._seats) >= self._limit:
                crowded = list(self._seats)
            else:
                return True
            free = next((folder for folder in crowded if self._seats[folder] not in busy), None)
            if free is None:
                return False
            self.forget(free)
            self.counts["adapter_evictions"] += 1

    def _load(self, folder: Path, kind: Kind) -> Seat:
        weights = self._weights
        if kind == "alone":
            model = weights.ready(weights.load_tuned(folder))
            lane, name = Lane(model, weights.dtype), BASE
        else:
            name = self._shared.add(folder)
            model = self._shared.model
            lane = self._mixed if kind == "shared" else Lane(model, weights.dtype, self._shared, name)
        own = (folder / "tokenizer_config.json").is_file()
        tokenizer = weights.tokenizer(folder) if own else self.base.tokenizer
        return Seat(lane, tokenizer, stops_of(inner_model(model), tokenizer), name)

    def _drop(self, seat: Seat) -> None:
        if seat.lane.shared:
            self._shared.remove(seat.adapter)


def check_digest(folder: Path) -> None:
    """Raises BankError or Unusable where an adapter of a bank is not what was added."""
    if (folder / CARD).is_file():
        check_bytes(folder, card_in(folder))


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Name a failure to load as the adapter's, whatever library found it: the others are served all the same."""
    try:
        yield
    except Refused:
        raise
    except MemoryError as error:
        raise Refused(503, f"{name} cannot be loaded: {first_line(error)}", "out_of_memory", "model") from error
    except _FAILURES as error:
        raise Refused(500, f"{name} cannot be loaded: {first_line(error)}", "model_damaged", "model") from error
