"""Boosted LoRA: pairs of a low rank train one after the other, each added to those before (XGBLoRA, BoostLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from strategies.contract import option
from strategies.cost.plan import Costs, PredictedMethod
from strategies.export import Export
from strategies.methods.kept_pairs import keep_pairs, kept_costs, pairs_of
from strategies.methods.lora import Lora
from strategies.model import targets
from strategies.model.architecture import Architecture, architecture_of
from strategies.shape import ModelShape
from strategies.train_setup import TrainSettings, TrainSetup
from strategies.workload import Techniques


@dataclass(frozen=True)
class BoostedLora(PredictedMethod):
    """y = (W + sum_t s B_t A_t) x: a pair of rank lora_r trains for a round, is kept, and a fresh one begins.

    The rounds of XGBLoRA (arXiv 2410.19694), with directions and samples of BoostLoRA (arXiv 2604.27308) as options.
    Memory: LoRA's of one pair, and 4 bytes for each number that is kept.  Kept corrections lie beside the weights, not
    in them, so that nothing is rounded and one adapter of PEFT's holds all of it.
    """

    lora_r: int = option(1, "rank of the pair that trains", tried=(1, 4), ge=1)
    lora_alpha: float = option(2.0, "scale: the correction is multiplied by lora_alpha / lora_r", gt=0)
    lora_target_modules: str | list[str] = option(
        "all-linear", "which linear maps: all-linear, a regex, or module names"
    )
    restart_every: int = option(
        60, "steps of a round; where nothing else is said, lora_r is 1 here and lora_alpha 2", tried=(20, 60), ge=1
    )
    restart_warmup_steps: int = option(0, "steps in which a round's learning rate rises", ge=0)
    layers_per_round: int | None = option(None, "random layers that train in a round; null = all", ge=1)
    basis: Literal["random", "rotate_svd"] = option(
        "random", "what A begins with: random rows, or for each round the next right singular vectors of the weight"
    )
    samples: Literal["all", "hard"] = option(
        "all", "hard = from the second round on samples count by what is still wrong of them: a pass over all rows"
    )
    kept_rank: int = option(32, "ranks that are kept; of more the largest", ge=1)

    name: ClassVar[str] = "experimental_boosted_lora"
    full_rank: ClassVar[bool] = False
    keeps_base_frozen: ClassVar[bool] = True

    @cached_property
    def _lora(self) -> Lora:
        return Lora(self.lora_r, self.lora_alpha, lora_target_modules=self.lora_target_modules)

    @property
    def acts_between(self) -> bool:
        return True

    @property
    def starts_as_base(self) -> bool:
        return True

    @property
    def adapter_rank(self) -> int:
        return self.kept_rank

    @property
    def weighs_samples(self) -> bool:
        return self.samples == "hard"

    def why_alone(self) -> str:
        return "its pairs start again while others train on"

    def why_no_pairs(self) -> str:
        return f"{self.name} starts its pairs again by itself"

    def refuses(self, techniques: Techniques, shape: ModelShape) -> str | None:
        chosen = targets.adapted_maps(shape, targets.AdapterChoice(self._targets))
        if self._lora.trains_outside_layers(shape) or chosen.stacks:
            return (
                "boosted LoRA keeps corrections of linear maps in layers: leave embedding, output matrix and stacked"
                " experts out of lora_target_modules"
            )
        if (self.layers_per_round or 1) > shape.num_layers:
            return f"method.layers_per_round is {self.layers_per_round}, the model has {shape.num_layers}: lower it"
        if self.kept_rank < self.lora_r:
            return f"method.kept_rank is {self.kept_rank}, less than one round's {self.lora_r}: raise it"
        if self.weighs_samples and techniques.share_prefixes:
            return "method.samples: hard weighs each row by itself: set data.share_prefixes: false, or samples: all"
        if techniques.torch_compile or techniques.streams_weights:
            return (
                "boosted LoRA is untested with torch.compile and streamed weights: set train.torch_compile: false and"
                " strategy.offload: none"
            )
        return self._lora.refuses(techniques, shape)

    @property
    def _targets(self) -> str | tuple[str, ...]:
        named = self.lora_target_modules
        return named if isinstance(named, str) else tuple(named)

    def find_misfits(self, architecture: Architecture) -> list[str]:
        return self._lora.find_misfits(architecture)

    def exports(self, shape: ModelShape) -> Export:
        """One LoRA adapter of PEFT's with the ranks of all rounds."""
        whole = Lora(self.kept_rank + self.lora_r, lora_target_modules=self.lora_target_modules)
        return whole.exports(shape)

    def costs(self, shape: ModelShape, techniques: Techniques) -> Costs:
        chosen = targets.adapted_maps(shape, targets.AdapterChoice(self._targets, takes_earlier_names=True))
        return kept_costs(self._lora.costs(shape, techniques), self.kept_rank, chosen, techniques)

    def setup(self, model: Any, settings: TrainSettings) -> TrainSetup:
        from strategies.methods.boosted_rounds import BoostedRounds, HardSamples, RoundSchedule, right_directions

        layer_of = architecture_of(model).layer_of
        setup = self._lora.setup(model, settings)
        setup.pairs = pairs_of(setup.model, setup.parameters)
        kept = keep_pairs(setup, self.kept_rank)
        names = {pair.name: pair.name.removeprefix("base_model.model.") for pair in setup.pairs}
        layers = {name: layer for name, plain in names.items() if (layer := layer_of(plain)) is not None}
        rounds = RoundSchedule(self.restart_every, self.layers_per_round, self.restart_warmup_steps, settings.seed)
        directions = {}
        if self.basis == "rotate_svd" and not any(pair.a_RI.is_meta for pair in setup.pairs):
            for pair in setup.pairs:
                layer: Any = pair.layer
                weight = layer.base_layer.weight
                weight_OI = weight.T if weight.shape[0] == pair.a_RI.shape[1] != weight.shape[1] else weight
                directions[pair.name] = right_directions(weight_OI, self.kept_rank, settings.seed)
        setup.between = BoostedRounds(setup, kept, rounds, layers, directions)
        if self.weighs_samples:
            setup.weighing = HardSamples(rounds, settings.num_samples, setup.device)
            setup.buffers["sample_weights"] = setup.weighing.weights_N
        return setup
