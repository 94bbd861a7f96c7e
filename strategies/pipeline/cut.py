"""Cuts a model by its layers: a worker reads the tensors of its stage alone, whatever their quantisation.

What is loaded is a smaller model, this stage's layers renumbered from 0; its layers then take their places among those
of the whole, which stay on `meta`.  So a method sets up the whole: every name, target and random number is that of a
model in one piece.  Afterwards layers of other stages pass the hidden state through.

In all stages but the first a module in place of the embedding returns the hidden state that arrived; all but the last
have neither the final norm nor the output matrix.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from clusters.safe.reading import read_json
from strategies.model.architecture import Architecture, architecture_of, build
from strategies.step.supervised_logits import inner_model
from strategies.train_setup import TrainSetup
from strategies.workload import StagePart

# (class of a model, config, tensors by name) -> the model and its loading info: transformers' `from_pretrained` with
# the dtype, device and quantisation of the caller
Loader = Callable[[Any, Any, dict[str, torch.Tensor]], tuple[Any, Mapping[str, Any]]]
_PAGE_BYTES = 4096
_FEW_ROWS = 8  # rows of an embedding that no stage in the middle looks at
_FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")


class CannotCut(ValueError):
    """A model that cannot be divided into stages; the text says why."""


class Received(torch.nn.Module):
    """In place of the embedding: returns the hidden state of the stage before, whatever the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_BTH: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.hidden_BTH is not None
        return self.hidden_BTH


class PassThrough(torch.nn.Module):
    """In place of a layer of another stage: returns the hidden state as it is."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, str)}
        vars(self).update(plain)  # e.g. which of the masks a layer of its kind sees

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def load_stage(folder: Path, stage: StagePart, load: Loader) -> Any:
    """The whole model with this stage's weights in it, everything else on `meta`.  Raises CannotCut."""
    from transformers import GenerationConfig

    whole = build(folder)
    if (folder / "generation_config.json").exists():  # what ends an answer
        whole.generation_config = GenerationConfig.from_pretrained(folder)
    return assemble(whole, stage, load, read_tensors(folder))


def read_tensors(folder: Path) -> Callable[[Callable[[str], bool]], dict[str, torch.Tensor]]:
    """Reads the tensors of a model folder whose names are wanted, mapped into memory.  Raises CannotCut.

    Of the files that transformers would load: a folder may hold the same weights in its authors' form as well.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    else:
        raise CannotCut(f"{folder} holds no safetensors: a stage reads only its own tensors, which needs that form")

    def read(is_wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys() if is_wanted(name)}  # noqa: SIM118
        return found

    return read


def touch_tensors(folder: Path, stage: StagePart) -> int:
    """Bring a stage's tensors into the page cache: read them and keep none; their bytes.  Raises CannotCut."""
    built = architecture_of(build(folder))
    tensors = read_tensors(folder)(lambda name: _is_own(name, built, stage))
    for tensor in tensors.values():  # mapped: what nobody looks at is not read
        tensor.flatten().view(torch.uint8)[::_PAGE_BYTES].sum()
    return sum(tensor.nbytes for tensor in tensors.values())


def assemble(
    whole: Any,
    stage: StagePart,
    load: Loader,
    read: Callable[[Callable[[str], bool]], dict[str, torch.Tensor]],
) -> Any:
    """As `load_stage`, into a model on `meta`, from any source of tensors."""
    built = architecture_of(whole)
    if stage.end_layer > built.num_layers:
        raise CannotCut(f"a stage ends with layer {stage.end_layer}, and the model has {built.num_layers}")
    config = _config_of(whole.config, stage)
    tensors = _rename(read(lambda name: _is_own(name, built, stage)), built, stage)
    if stage.is_last and not stage.is_first and (output := f"{built.output}.weight") in tensors:
        tensors[_embedding_of(whole)] = tensors.pop(output)  # tied to what then stands for both
    part, info = load(type(whole), config, tensors)
    others = tuple(f"{name}." for name, owns in owners(whole, built).items() if not owns(stage))
    if missing := [name for name in info["missing_keys"] if not name.startswith(others)]:
        raise CannotCut(f"{len(missing)} tensors of the stage are missing in the files, e.g. {min(missing)}")
    _move(part, whole, built, stage)
    return whole


def _config_of(config: Any, stage: StagePart) -> Any:
    """The configuration of a model that is this stage's layers alone."""
    own = copy.deepcopy(config)
    text = own.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == config.get_text_config().num_hidden_layers:
            setattr(text, name, value[stage.first_layer : stage.end_layer])  # e.g. layer_types
    _shift_dense_layers(text, stage)
    text.num_hidden_layers = stage.num_layers
    if not (stage.is_first and stage.is_last):  # one matrix is loaded: the embedding, or in its place the output matrix
        for one in {id(c): c for c in (own, text)}.values():
            one.tie_word_embeddings = True
    if not stage.is_first and not stage.is_last:
        text.vocab_size = _FEW_ROWS
        text.pad_token_id = None
    return own


def _shift_dense_layers(text: Any, stage: StagePart) -> None:
    """Renumber the layers without experts: a stage's layers begin at 0."""
    if hasattr(text, "first_k_dense_replace"):
        text.first_k_dense_replace = max(0, text.first_k_dense_replace - stage.first_layer)
    if hasattr(text, "decoder_sparse_step"):
        named, every = text.mlp_only_layers or (), text.decoder_sparse_step
        dense = [n for n in range(stage.first_layer, stage.end_layer) if n in named or (n + 1) % every]
        text.mlp_only_layers, text.decoder_sparse_step = [number - stage.first_layer for number in dense], 1


def _embedding_of(whole: Any) -> str:
    """The name of the embedding's weight."""
    names = {id(module): name for name, module in whole.named_modules()}
    return f"{names[id(whole.get_input_embeddings())]}.weight"


def _layer_pattern(built: Architecture) -> re.Pattern[str]:
    """Where a tensor's name has the number of its layer: files may lack the prefix of the model."""
    return re.compile(rf"(^|\.){re.escape(built.layers.rpartition('.')[2])}\.(\d+)\.")


def _is_own(name: str, built: Architecture, stage: StagePart) -> bool:
    """Whether a stage needs a tensor of the files."""
    if found := _layer_pattern(built).search(name):
        return stage.first_layer <= int(found[2]) < stage.end_layer
    return stage.is_first or stage.is_last


def _rename(tensors: Mapping[str, torch.Tensor], built: Architecture, stage: StagePart) -> dict[str, torch.Tensor]:
    """The tensors under the names of a model whose first layer is this stage's."""
    pattern = _layer_pattern(built)

    def rename(name: str) -> str:
        if found := pattern.search(name):
            return f"{name[: found.start(2)]}{int(found[2]) - stage.first_layer}{name[found.end(2) :]}"
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def _move(part: Any, whole: Any, built: Architecture, stage: StagePart) -> None:
    """Move the loaded modules to their places in the whole model, which is on `meta`."""
    layers, loaded = whole.get_submodule(built.layers), part.get_submodule(built.layers)
    for number, layer in enumerate(loaded):
        layers[stage.first_layer + number] = layer
    for name, owns in owners(whole, built).items():
        if owns(stage):
            whole.set_submodule(name, _rebuild_for_whole(part.get_submodule(name), whole.config.get_text_config()))
    whole.set_attn_implementation(part.config._attn_implementation)
    whole.config.dtype = part.config.dtype
    for module in whole.modules():  # kernels are chosen by one configuration
        if getattr(module, "config", None) is part.config:
            module.config = whole.config
    for flag in _FLAGS:
        if hasattr(part, flag):
            setattr(whole, flag, getattr(part, flag))


def _rebuild_for_whole(module: torch.nn.Module, config: Any) -> torch.nn.Module:
    """A module without weights, such as rotary positions, built again for the kinds of layers of the whole model."""
    buffers = list(module.buffers())
    if list(module.parameters()) or not buffers or not hasattr(module, "config"):
        return module
    return type(module)(config).to(buffers[0].device)


def owners(whole: Any, built: Architecture) -> dict[str, Callable[[StagePart], bool]]:
    """Modules beside the layers, by name: which stages need each."""
    names = {id(module): name for name, module in whole.named_modules()}
    embedding = names[id(whole.get_input_embeddings())]
    parent = built.layers.rpartition(".")[0]
    found: dict[str, Callable[[StagePart], bool]] = {embedding: lambda stage: stage.is_first}
    for name, module in whole.get_submodule(parent).named_children():
        full = f"{parent}.{name}" if parent else name
        if full not in (built.layers, embedding):
            is_final = "norm" in type(module).__name__.lower()
            found[full] = (lambda stage: stage.is_last) if is_final else (lambda _: True)
    if built.output:
        found[built.output] = lambda stage: stage.is_last
    return found


def keep_own(setup: TrainSetup, stage: StagePart) -> None:
    """Remove from a training of the whole model what other stages train; `names` still lists all of it."""
    setup.names = frozenset(setup.parameters.keys() | setup.buffers.keys())
    setup.parameters = {name: p for name, p in setup.parameters.items() if not p.is_meta}
    setup.buffers = {name: held for name, held in setup.buffers.items() if not held.is_meta}
    for group in setup.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if not p.is_meta]
    remove_other_stages(inner_model(setup.model), stage)


def remove_other_stages(model: Any, stage: StagePart) -> None:
    """Replace the modules of other stages: layers by PassThrough, the embedding by Received, the rest by Identity.

    Raises CannotCut where a module that this stage needs has no weights.
    """
    built = architecture_of(model)
    layers = model.get_submodule(built.layers)
    for number, layer in enumerate(layers):
        if not stage.first_layer <= number < stage.end_layer:
            layers[number] = PassThrough(layer)
    for name, owns in owners(model, built).items():
        if not owns(stage):
            is_embedding = model.get_submodule(name) is model.get_input_embeddings()
            model.set_submodule(name, Received() if is_embedding else torch.nn.Identity())
    if left := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise CannotCut(f"the stage of {stage} lacks {left[0]}")
