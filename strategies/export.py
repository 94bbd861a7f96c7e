"""What a method hands back, and which engines compute with it what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

ExportFormat = Literal["peft-lora", "peft-other", "model", "own"]  # own: nobody but this program reads it
Loader = Literal["peft", "transformers", "vllm", "llama.cpp"]
LOADERS: tuple[Loader, ...] = get_args(Loader)
NAMES: dict[Loader, str] = {
    "peft": "PEFT",
    "transformers": "transformers",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp, by its converters to GGUF",
}
VLLM_RANKS = 512  # the highest of an adapter that vLLM loads
ADAPTER_FOLDER = "adapter"
EXPORT_FOLDERS = (ADAPTER_FOLDER, "model")


@dataclass(frozen=True)
class Export:
    """The form of a result, and of each engine that does not load it the reason.

    An engine counts where its own loader takes the folder as it is: `peft` is `PeftModel.from_pretrained` on the base,
    `transformers` is `from_pretrained`, for an adapter `load_adapter` on the base, llama.cpp's are its converters.
    Whether an engine knows the model's architecture is not the method's to say.
    """

    format: ExportFormat
    cannot: Mapping[Loader, str] = field(default_factory=dict)  # engine -> why, to be read after its name
    unmerged: str | None = None  # why base and adapter are never one plain model; None where they can be

    @property
    def loads_with(self) -> frozenset[Loader]:
        return frozenset(LOADERS) - self.cannot.keys()

    @property
    def is_adapter(self) -> bool:
        """Whether it belongs to a base model, which it does not hold."""
        return self.format != "model"

    @property
    def warnings(self) -> list[str]:
        """What people should know of it before they train: of what no other program loads, all of it."""
        return self.sentences if self.format == "own" else []

    def of_score(self) -> Export:
        """The same of a model that gives documents a score and has no output matrix."""
        reasons: dict[Loader, str] = {
            "vllm": "a model with a score was not tried with it",
            "llama.cpp": "a model with a score was not tried with it",
        }
        return replace(self, cannot={**reasons, **self.cannot})

    @property
    def library(self) -> str:
        """Whose loader takes it, as the hub's cards name it."""
        return {"own": "finetune-orchestrator", "model": "transformers"}.get(self.format, "peft")

    @property
    def sentences(self) -> list[str]:
        """Which engines load it, and why another one does not, a line each."""
        loads = ", ".join(NAMES[engine] for engine in LOADERS if engine in self.loads_with)
        lines = [f"Loads with: {loads}"] if loads else []
        if self.format == "own":
            lines.append("Loads with this program alone: evaluate, chat, serve --engine transformers")
        lines += [f"Not with {NAMES[one]}: {self.cannot[one]}" for one in LOADERS if one in self.cannot]
        return lines + ([f"Not merged: {self.unmerged}"] if self.unmerged else [])


def export_folder(format: ExportFormat) -> str:
    """The folder of a run that receives it."""
    return "model" if format == "model" else ADAPTER_FOLDER


WHOLE_MODEL = Export("model", {"peft": "it is a whole model, and PEFT puts adapters onto one"})
