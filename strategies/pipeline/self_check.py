"""Whether a family's models compute in stages what they compute in one piece: a small one is tried before a run starts.

That a library lists a family as one that can be cut is no proof: Granite's stages would each multiply their input as
if it were the embedding's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from clusters.safe.reading import first_line
from strategies.families import FAMILIES
from strategies.model.architecture import architecture_of, quiet
from strategies.pipeline.cut import CannotCut, assemble, remove_other_stages
from strategies.step.out_of_memory import is_out_of_memory
from strategies.workload import StagePart

_LAYERS = 4  # or as many as it takes to have one of each kind
_ROUNDING = 1e-4  # cut_error of a family that can be cut stays below: the operations are the same
_WIDTH, _VOCABULARY, _WINDOW, _TOKENS = 16, 64, 4, 7


def check_family(folder: Path) -> None:
    """Raises CannotCut, with the family's name, where models like that of a folder come out wrong in stages.

    A tenth of a second or a few, and a few MB, whatever the model's size.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    try:
        error = cut_error(shrink(config))
    except Exception as refusal:  # model code raises whatever it likes
        if is_out_of_memory(refusal):
            raise
        why = f"a small one does not run in two ({first_line(refusal)})"
    else:
        if error < _ROUNDING:
            return
        why = f"a small one in two differs from itself in one piece by {error:.2g} of what it computes"
    raise CannotCut(f"{config.model_type} models are not cut into stages: {why}: set strategy.mode: auto")


def cut_error(config: Any) -> float:
    """How much a model of random weights in two stages differs from itself in one piece.

    The larger of the logits' and one gradient's root mean square difference over their spread: 0 where a family can be
    cut, a tenth or more where it cannot.  Raises whatever the model raises.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        whole = _built(config, "cpu").eval()
        number = architecture_of(whole).num_layers
        lower, upper = StagePart(0, 2, 0, number // 2), StagePart(1, 2, number // 2, number)
        below, above = (_stage_of(whole, stage) for stage in (lower, upper))
    ids_BT = torch.arange(2 * _TOKENS).mul(5).add(3).remainder(config.get_text_config().vocab_size).view(2, _TOKENS)

    expected = whole(ids_BT, use_cache=False).logits
    above.get_input_embeddings().hidden_BTH = below.get_decoder()(ids_BT, use_cache=False).last_hidden_state
    found = above(ids_BT, use_cache=False).logits
    gradients = [_gradient_of(model, logits) for model, logits in ((whole, expected), (below, found))]
    return max(_difference(expected, found), _difference(*gradients))


def shrink(config: Any) -> Any:
    """A configuration of the same kinds of layers and the same switches, a few layers deep and narrow.

    Heads keep their width, which rotary positions are stated for, and experts their number.
    """
    small = copy.deepcopy(config)
    small.__dict__.pop("quantization_config", None)
    text = small.get_text_config()
    family = FAMILIES[text.model_type]
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if family.kv_heads:
        setattr(text, family.kv_heads, 1 if getattr(text, family.kv_heads) != text.num_attention_heads else 2)
    text.num_attention_heads, text.hidden_size, text.vocab_size = 2, 2 * width, _VOCABULARY
    for name in {family.width, family.expert_width, family.shared_width}:
        if getattr(text, name, None):
            setattr(text, name, _WIDTH)
    if (text.pad_token_id or 0) >= _VOCABULARY:
        text.pad_token_id = None
    if getattr(text, "sliding_window", None):
        text.sliding_window = _WINDOW  # so that it matters which layers have it
    _take_layers(text)
    return small


def _take_layers(text: Any) -> None:
    """The first layers alone, at least one of each kind."""
    number = text.num_hidden_layers
    of_layers = {
        name: list(held) for name, held in vars(text).items() if isinstance(held, list) and len(held) == number
    }
    kinds = [1 + held.index(kind) for held in of_layers.values() for kind in held]
    text.num_hidden_layers = few = min(number, max([_LAYERS, *kinds]))
    for name, held in of_layers.items():
        setattr(text, name, held[:few])
    if hasattr(text, "first_k_dense_replace"):
        text.first_k_dense_replace = min(text.first_k_dense_replace, few - 1)
    if getattr(text, "mlp_only_layers", None):
        text.mlp_only_layers = [layer for layer in text.mlp_only_layers if layer < few]


def _built(config: Any, device: str) -> Any:
    """A model in fp32 with a copy of the configuration."""
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    own.dtype = torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(own)


def _stage_of(whole: Any, stage: StagePart) -> Any:
    """A stage with the weights of a model in one piece, as a worker has it."""
    weights = whole.state_dict()

    def load(kind: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
        return kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )

    def read(is_own: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in weights.items() if is_own(name)}

    part = assemble(_built(whole.config, "meta"), stage, load, read).eval()
    remove_other_stages(part, stage)
    return part


def _gradient_of(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """Of one weight of the first layer, for a loss of all logits."""
    layers = f"{architecture_of(model).layers}.0."
    weight = next(p for name, p in model.named_parameters() if name.startswith(layers) and p.dim() == 2)
    return torch.autograd.grad(logits.square().sum(), weight)[0]


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - expected).square().mean().sqrt() / expected.std()).item()
