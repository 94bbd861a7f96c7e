"""What a model is made of, known without its weights: the library's own code builds it on PyTorch's `meta` device.

Two questions are answered before anything starts: do the tensors of the files fit the model (`load_report`, by the
loader that training uses, its renamings and tied weights included), and which modules may an adapter name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.safe.reading import first_line
from strategies.model.heads import output_of

_LINEAR = ("Linear", "Conv1D")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
_DTYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


class CannotBuild(ValueError):
    """The library cannot build this model; the text is its reason in one line."""


@dataclass(frozen=True)
class LoadReport:
    """What a loader found: names that only the model has, names that only the files have, and other shapes."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, in the file, in the model
    errors: tuple[str, ...] = ()

    @classmethod
    def from_loading_info(cls, info: Mapping[str, Any]) -> LoadReport:
        """From what transformers' `from_pretrained(output_loading_info=True)` returns."""
        mismatched = ((name, tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"])
        return cls(
            tuple(sorted(info["missing_keys"])),
            tuple(sorted(info["unexpected_keys"])),
            tuple(sorted(mismatched)),
            tuple(info["error_msgs"]),
        )


@dataclass(frozen=True)
class Architecture:
    """The modules of a model by name, each with its class's name; `layers` names the list of decoder layers."""

    model_type: str
    modules: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]  # name -> shape
    layers: str
    num_layers: int
    output: str | None  # the output matrix's module
    num_parameters: int
    is_whole: bool = True  # False: only maps are named, norms are not

    @property
    def linear_maps(self) -> tuple[str, ...]:
        """Modules that low-rank adapters can correct: linear maps and GPT-2's Conv1D, the output matrix not."""
        return tuple(name for name, kind in self.modules.items() if kind in _LINEAR and name != self.output)

    def adaptable(self, name: str) -> bool:
        """Whether an adapter can correct this module: a linear map or an embedding."""
        return self.modules[name] in (*_LINEAR, "Embedding")

    def last_names(self, names: Iterable[str]) -> list[str]:
        """The last part of each name, once each, in order."""
        return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))

    def layer_of(self, name: str) -> int | None:
        """Which decoder layer a module belongs to."""
        number = name.removeprefix(f"{self.layers}.").split(".", 1)[0] if name.startswith(f"{self.layers}.") else ""
        return int(number) if number.isdigit() else None


def build(source: Path | Mapping[str, Any], trust_remote_code: bool = False) -> Any:
    """The model of a folder or of a config.json's values on `meta`: seconds and no weights, whatever its size.

    Raises CannotBuild.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if isinstance(source, Path):
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        else:
            known = {key: value for key, value in source.items() if key not in ("model_type", "auto_map")}
            config = AutoConfig.for_model(source["model_type"], **known)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # model code and configurations raise whatever they like
        raise CannotBuild(_describe(error)) from error


def architecture_of(model: Any) -> Architecture:
    """What a built model consists of."""
    import torch

    modules = {name: _kind(module) for name, module in model.named_modules() if name}
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    layers = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()), default="")
    output = output_of(model)
    return Architecture(
        getattr(model.config, "model_type", "unnamed"),
        modules,
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        layers,
        len(lists[layers]) if layers else 0,
        next((name for name, module in model.named_modules() if module is output), None) if output else None,
        sum(parameter.numel() for parameter in model.parameters()),
    )


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers of a model, with or without an adapter around it: a ModuleList of torch's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_submodule(architecture_of(inner).layers)


def _kind(module: Any) -> str:
    """The class's name; for what is a linear map or an embedding under another one (Falcon, Gemma 3, 4 bits) theirs."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return next((kind.__name__ for kind in kinds if isinstance(module, kind)), type(module).__name__)


def load_report(model: Any, stored: Mapping[str, tuple[tuple[int, ...] | None, str | None]]) -> LoadReport:
    """What loading tensors of these names, shapes and types (as safetensors spells them) into the model would give.

    A shape of None is one that is not known; it is taken to fit.  Raises CannotBuild.
    """
    import torch

    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = {
        name: torch.empty(
            shape if shape is not None else wanted.get(name, ()),
            dtype=getattr(torch, _DTYPES.get(dtype or "F32", "float32")),
            device="meta",
        )
        for name, (shape, dtype) in stored.items()
    }
    try:
        with quiet():
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=state,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # as in `build`
        raise CannotBuild(_describe(error)) from error
    report = LoadReport.from_loading_info(info)
    if any(shape is None for shape, _ in stored.values()):
        return LoadReport(report.missing, report.unexpected, ())
    return report


class quiet:
    """The library draws a bar and prints a report of its own; one sentence replaces them."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._logging, self._verbosity = logging, logging.get_verbosity()
        self._bar = logging.is_progress_bar_enabled()
        logging.set_verbosity(50)
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._verbosity)
        if self._bar:
            self._logging.enable_progress_bar()


def faults(report: LoadReport, parameters: Iterable[str], stored: Iterable[str]) -> str | None:
    """Why a model must not be trained from these files, and what usually causes it; None where it may.

    `parameters` and `stored` are the names of the model and of the files.  Tensors that belong to no part of the model
    (an image tower, a score of a reward model) are no fault: see `unused`.
    """
    ours = [name for name in report.unexpected if name not in unused(report, parameters)]
    parts = []
    if report.missing:
        parts.append(f"{_count(report.missing, 'missing in the files and would start from random values')}")
    if report.mismatched:
        name, found, wanted = report.mismatched[0]
        shapes = f"have another shape: {name} is {list(found)} in the files, {list(wanted)} by config.json"
        parts.append(f"{len(report.mismatched)} of the model's tensors {shapes}")
    if ours:
        parts.append(f"{_count(ours, 'in the files alone and would be dropped')}")
    if not parts:
        return first_line(report.errors[0]) if report.errors else None
    return f"{'; '.join(parts)}. {usual_cause(report, stored)}"


def unused(report: LoadReport, parameters: Iterable[str]) -> list[str]:
    """Tensors of the files that belong to no part of the model, so that dropping them changes nothing it computes.

    An image tower (`model.vision_tower. ...`) or a score (`score.weight`) is such; a bias of a map that the model has
    without one (`lm_head.bias`, `model.layers.0. ...`) is not.
    """
    if report.missing:  # names may only be spelt otherwise
        return []
    parts = {_part(name) for name in parameters}
    first = {part.split(".")[0] for part in parts}
    return [
        name
        for name in report.unexpected
        if _part(name) not in parts and (name.split(".")[0] not in first or name.count(".") > 2)
        if not any(mark in name for marks, _ in _MARKS for mark in marks)
    ]


def _part(name: str) -> str:
    """The first two parts of a name, e.g. model.layers, lm_head.weight."""
    return ".".join(name.split(".")[:2])


_MARKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (".lora_A", ".lora_B", ".base_layer."),
        "It was saved with an adapter in it: call merge_and_unload() before save_pretrained(), or give the base model"
        " and the adapter as method.init_adapter",
    ),
    (
        (".qweight", ".qzeros", ".g_idx", ".absmax", ".weight_scale", ".quant_map", ".weight_packed", ".SCB"),
        "Its weights are quantised, which its config.json does not say: give the model it was made from",
    ),
    (
        ("attention.wq.", "feed_forward.w1.", "tok_embeddings."),
        "The names are those of the authors' own format: give the model's version for Hugging Face",
    ),
)
_OUTPUTS = ("lm_head.", "embed_out.", "output.")
_PREFIXES = {
    "base_model.model.": "as PEFT names them: call merge_and_unload() before save_pretrained()",
    "_orig_mod.": "as torch.compile names them: save the model it was made from (model._orig_mod)",
    "module.": "as DistributedDataParallel names them: save model.module",
    "_fsdp_wrapped_module.": "as FSDP names them: gather a full state dict and save that",
    "pretrained_model.": "as a model with a value head names them: save model.pretrained_model",
}


def usual_cause(report: LoadReport, stored: Iterable[str]) -> str:
    """What mostly leads to such a report, and what to do."""
    stored = list(stored)
    for marks, cause in _MARKS:
        if any(mark in name for name in stored for mark in marks):
            return cause
    for prefix, cause in _PREFIXES.items():
        if any(f".{prefix}" in f".{name}" for name in report.unexpected):
            return f"Names hold {prefix!r}, {cause}"
    if extra := _foreign_prefix(report):
        return f"Names in the files begin with {extra!r}, which the model's do not: rename them, or save the model anew"
    if report.missing and not report.unexpected and all(name.startswith(_OUTPUTS) for name in report.missing):
        return (
            "Its output matrix was not saved: where it is the embedding's, set tie_word_embeddings: true in"
            " config.json; else save the whole model, not a part of it"
        )
    if report.mismatched and not report.missing and not report.unexpected:
        return "config.json is of another model or was edited: give the one that belongs to the weights"
    if len(report.missing) > len(stored):
        return "The download or the save is not complete, or config.json is of another model: fetch the folder again"
    return "config.json and the weights do not belong together, or the save is not complete: fetch the folder again"


def _foreign_prefix(report: LoadReport) -> str | None:
    """What all unexpected names begin with, where the rest of them is what is missing."""
    missing = set(report.missing)
    for name in report.unexpected[:50]:
        parts = name.split(".")
        for at in range(1, len(parts)):
            if ".".join(parts[at:]) in missing:
                return ".".join(parts[:at]) + "."
    return None


def _count(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what} ({shown})"


def _describe(error: Exception) -> str:
    """Its type and the first line of its text."""
    text = first_line(error)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
