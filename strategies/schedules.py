"""Learning rates over time: transformers' schedules by their names, each a pure function of the step.

Planning reads the table and checks a job's options; a worker asks transformers' own function (`lr_factor`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

_MIN = ("min_lr", "min_lr_rate")
SCHEDULES: dict[str, tuple[str, ...]] = {  # name -> options of its function in transformers.optimization
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", *_MIN),
    "cosine_warmup_with_min_lr": ("num_cycles", *_MIN, "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
_WORDS = {"warmup_type": ("linear", "cosine", "1-sqrt"), "decay_type": ("linear", "cosine", "1-sqrt")}
_WHOLE = ("num_decay_steps", "num_stable_steps", "timescale")  # numbers of steps
_BY_RESULTS = (
    "it follows losses that are measured meanwhile, so that another evaluation or a resume makes another training;"
    f" schedules here are functions of the step: {', '.join(SCHEDULES)}"
)
REFUSED: dict[str, str] = {"reduce_lr_on_plateau": _BY_RESULTS, "greedy": _BY_RESULTS}


def mistakes(name: str, options: Mapping[str, Any], learning_rate: float) -> list[str]:
    """What is wrong with the options of a schedule, a sentence each that begins with the key."""
    key, known, found = "train.lr_scheduler_kwargs", SCHEDULES[name], []
    for option, value in options.items():
        if option not in known:
            near = get_close_matches(option, known, 1)
            way = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            found.append(f"{key}.{option}: {name} has no such option; {way}")
        elif option in _WORDS and value not in _WORDS[option]:
            found.append(f"{key}.{option} is {value!r}; it must be one of {', '.join(_WORDS[option])}")
        elif option not in _WORDS and not _is_number(value, option in _WHOLE):
            kind = "a number of steps of at least 1" if option in _WHOLE else "a number of at least 0"
            found.append(f"{key}.{option} is {value!r}; it must be {kind}")
    if found:
        return found
    if name.endswith("_with_min_lr") and len(options.keys() & set(_MIN)) != 1:
        found.append(f"{key}: {name} needs one of min_lr (a rate) and min_lr_rate (of train.learning_rate); give one")
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        found.append(
            f"{key}: warmup_stable_decay needs num_decay_steps, the last steps in which the rate falls; add it"
        )
    lowest = options.get("min_lr", options.get("lr_end", 1e-7 if name == "polynomial" else 0.0))
    if lowest >= learning_rate:
        found.append(f"{key}: the schedule ends at {lowest:g}, and train.learning_rate is {learning_rate:g}; lower it")
    return found


def _is_number(value: Any, is_whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (isinstance(value, int) and value >= 1) if is_whole else 0 <= value < float("inf")


def step_mistakes(name: str, options: Mapping[str, Any], num_steps: int, num_warmup_steps: int) -> list[str]:
    """What is wrong with the phases of a schedule beside the steps of the training."""
    if name != "warmup_stable_decay":
        return []
    stable = options.get("num_stable_steps", 0)
    total = num_warmup_steps + stable + options["num_decay_steps"]
    if total <= num_steps and ("num_stable_steps" not in options or total == num_steps):
        return []
    parts = (
        f"{num_warmup_steps} of warm-up, {stable or 'any number'} at the peak, {options['num_decay_steps']} of decay"
    )
    return [
        f"train.lr_scheduler_kwargs: {parts} do not make the {num_steps} steps of the training; leave num_stable_steps"
        " out and lower num_decay_steps"
    ]


def lr_factor(
    name: str, options: Mapping[str, Any], learning_rate: float, num_steps: int, num_warmup_steps: int
) -> Callable[[int], float]:
    """Learning rate over its peak as a function of the step, by transformers' schedule of that name.

    A resumed run needs no scheduler state.  Step 0 of a warm-up would train with rate 0, so it begins one step later.
    """
    import torch
    from transformers import get_scheduler

    throwaway = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    throwaway.step()  # the scheduler's first step expects one
    scheduler: Any = get_scheduler(name, throwaway, num_warmup_steps, num_steps, dict(options))
    factor = scheduler.lr_lambdas[0]
    return (lambda step: factor(step + 1)) if num_warmup_steps else factor
