"""Values of other tools that need more than another name here; each by the name that the tables call it by."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from clusters.safe.reading import name_mistake
from orchestrator.job.aliases import targets_of
from orchestrator.job.importers.draft import JobDraft
from strategies.optimizers import OPTIMIZERS
from strategies.schedules import SCHEDULES


class NoCounterpart(ValueError):
    """The value means nothing here; the key's sentence in the table says what happens instead."""


class IsSet(Exception):
    """The value was taken already, for another key."""


OFF = (None, False, "", "none", "None", "null", "no")
_METRICS = {"sacrebleu": "bleu", "chrf": "chrf"}
_OPTIMIZERS = {
    **{name: name for name, facts in OPTIMIZERS.items() if not facts.is_paged},
    # Paging moves a state that is short of memory; what is trained is the same.
    **{name: name.removeprefix("paged_") for name, facts in OPTIMIZERS.items() if facts.is_paged},
    "adamw_torch": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "AdamW8bit", "PagedAdamW8bit"), "adamw_bnb_8bit"
    ),
    "AdamW": "adamw_torch",
    "SGD": "sgd",
    "sgd": "sgd",
    "adafactor": "adafactor",
}
_TORCHTUNE_MODULES = {"output_proj": "o_proj"}
_MLP = ["gate_proj", "down_proj", "up_proj"]


def _number(value: Any, _: JobDraft) -> Any:
    """YAML 1.1 reads 2e-4 as a text."""
    if value is None:
        raise NoCounterpart
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # validation says what it should be


def _optimizer(value: Any, _: JobDraft) -> str:
    if not isinstance(value, str) or value not in _OPTIMIZERS:
        raise NoCounterpart
    return _OPTIMIZERS[value]


def _scheduler(value: Any, _: JobDraft) -> str:
    if not isinstance(value, str) or value not in SCHEDULES:
        raise NoCounterpart
    return value


def _max_steps(value: Any, _: JobDraft) -> Any:
    return -1 if value in (0, None, False) else value


def _warmup_steps(value: Any, draft: JobDraft) -> Any:
    """A fraction is one of all steps in transformers; a number of steps overrides any fraction."""
    if isinstance(value, float) and 0 < value < 1:
        draft.set("train.warmup_ratio", value, "warmup_steps")
        raise IsSet
    if value == 0:
        draft.set("train.warmup_ratio", 0.0, "warmup_steps")
    return value


def _lowest_rate(value: Any, draft: JobDraft) -> dict[str, Any]:
    """Axolotl's cosine ends at a part of the peak: transformers' schedule of another name."""
    if draft.flat.get("lr_scheduler", "cosine") != "cosine" or not isinstance(value, int | float) or value <= 0:
        raise NoCounterpart
    draft.set("train.lr_scheduler_type", "cosine_with_min_lr", "cosine_min_lr_ratio")
    return {"min_lr_rate": value}


def _temperature(value: Any, draft: JobDraft) -> Any:
    """Without drawing a temperature says nothing."""
    for key in ("do_sample", "generation_do_sample"):
        if draft.flat.get(key) is False:
            raise IsSet
    return value


def _drawn_from(value: Any, draft: JobDraft) -> Any:
    """top_p means something where answers are drawn."""
    temperature = draft.settings.get("eval.temperature")
    if not temperature or not temperature.value:
        raise NoCounterpart
    return value


def _metrics(value: Any, draft: JobDraft) -> list[str]:
    stated = value if isinstance(value, list) else [value]
    if others := [str(one) for one in stated if str(one) not in _METRICS]:
        draft.leave(
            "matters", "eval_causal_lm_metrics", f"{', '.join(others)}: no such metric; loss is always measured"
        )
    if known := [_METRICS[str(one)] for one in stated if str(one) in _METRICS]:
        return known
    raise IsSet


def _steps_between(value: Any, _: JobDraft) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
        raise NoCounterpart  # none, or a fraction of the run
    return int(value)


def _kept_checkpoints(value: Any, draft: JobDraft) -> Any:
    if value == 1:
        draft.leave("matters", "save_total_limit", "two checkpoints are kept at least, so that one is always whole")
        return 2
    return value


def _targets(value: Any, _: JobDraft) -> Any:
    return targets_of(value)


def _torchtune_targets(value: Any, draft: JobDraft) -> Any:
    """torchtune names maps of attention, and says of the others whether they are adapted."""
    if not isinstance(value, list):
        return value
    named = list(dict.fromkeys(_TORCHTUNE_MODULES.get(str(one), str(one)) for one in value))
    mlp = _MLP if draft.flat.get("model.apply_lora_to_mlp") else []
    return [*named, *mlp, *(["lm_head"] if draft.flat.get("model.apply_lora_to_output") else [])]


def _names(value: Any, _: JobDraft) -> Any:
    return [name for name in re.split(r"[,\s]+", value) if name] if isinstance(value, str) else value


def _interpolated(value: Any, draft: JobDraft) -> Any:
    """`${output_dir}` is another key's value in OmegaConf."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{([\w.]+)\}", lambda found: str(draft.flat.get(found[1], found[0])), value)


def _path(value: Any, draft: JobDraft) -> Any:
    return draft.path(_interpolated(value, draft))


def _one_path(value: Any, draft: JobDraft) -> Any:
    return _path(value[0] if isinstance(value, list) and len(value) == 1 else value, draft)


def _trackers(value: Any, draft: JobDraft) -> list[str]:
    stated = value if isinstance(value, list) else [value]
    if all(one in OFF for one in stated):
        return []
    if others := [one for one in stated if one not in ("mlflow", "all", "none")]:
        draft.leave("matters", "report_to", f"results go to MLflow, not to {', '.join(map(str, others))}")
    return ["mlflow"]


def _name(value: Any, _: JobDraft) -> str:
    if not isinstance(value, str) or name_mistake(value):
        raise NoCounterpart
    return value


def _switch(value: Any, _: JobDraft) -> Any:
    """`offload`, `unsloth` and such: on, in a way that the plan chooses."""
    return True if isinstance(value, str) and value not in ("auto", "false") else value


CONVERSIONS: dict[str, Callable[[Any, JobDraft], Any]] = {
    "number": _number,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "max_steps": _max_steps,
    "warmup_steps": _warmup_steps,
    "lowest_rate": _lowest_rate,
    "temperature": _temperature,
    "drawn_from": _drawn_from,
    "metrics": _metrics,
    "steps_between": _steps_between,
    "kept_checkpoints": _kept_checkpoints,
    "targets": _targets,
    "torchtune_targets": _torchtune_targets,
    "names": _names,
    "interpolated": _interpolated,
    "path": _path,
    "one_path": _one_path,
    "trackers": _trackers,
    "name": _name,
    "switch": _switch,
}
