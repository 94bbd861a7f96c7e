"""What is tried, what is kept of it, where results are mirrored: search, bank, tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.job.sections.section import MOST, Anything, Finite, Metric, Section, Whole, key


class Uniform(Section):
    """Any number between two, each as likely."""

    uniform: tuple[Finite, Finite]


class LogUniform(Section):
    """Any number between two, each order of magnitude as likely."""

    loguniform: tuple[Annotated[Finite, Field(gt=0)], Annotated[Finite, Field(gt=0)]]


class RandInt(Section):
    """Any whole number from the first to the last."""

    randint: tuple[Whole, Whole]


Choices = Annotated[list[Anything], Field(min_length=1)] | Uniform | LogUniform | RandInt


class Budget(Section):
    """What a search may spend; it ends with the first that is used up."""

    trials: int = key(16, "combinations that are tried", ge=1, le=100_000)
    minutes: float | None = key(None, "wall-clock time", gt=0, le=1e7)
    node_hours: float | None = key(None, "hours of all machines together", gt=0, le=1e9)


class SearchSection(Section):
    """What `search` tries, on how much of the data, and how much it may spend."""

    space: dict[str, Choices] = key(
        {}, "job-file key: [values], or {loguniform: [low, high]}; {} = the optimizations this job leaves open"
    )
    budget: Budget = key(Budget(), "where it ends")
    sampler: Literal["planned", "optuna", "random"] = key(
        "planned", "planned = start from the plan's Pareto front and never try what cannot win; or without the plan"
    )
    scheduler: Literal["asha", "median", "none"] = key("asha", "stops trials whose held-out loss lags behind")
    metric: Literal["eval_loss"] | Metric = key("eval_loss", "quality of a trial, on the held-out rows")
    trial_steps: int = key(8, "optimizer steps of a trial", ge=1, le=MOST)
    eval_rows: int = key(40, "held-out rows that a trial is measured on", ge=1, le=MOST)
    quality_tolerance: float = key(0.02, "a quality this close to the best, relatively, is as good", ge=0, le=1000)
    share_base: Literal["auto", "never"] = key(
        "auto",
        "auto = trials of one layout (those that differ in rank, rate, initialisation, schedule ...) train over one"
        " resident base model at once, where times need not be compared; never = each trial by itself",
    )
    nodes: Literal["all", "idle"] = key("all", "idle = only machines that the job itself would not use")


class BankSection(Section):
    """Adapters that were trained already, and how `adapt` makes one of them."""

    path: str = key("~/orchestrator-bank", "folder of the bank")
    add: bool = key(False, "put the finished run's adapter into the bank")
    licence: str | None = key(None, "licence of adapters that are added, e.g. Apache-2.0")
    distance: Literal["js_parts", "js", "js_answers", "kl", "wasserstein_ids", "sliced_wasserstein", "mmd"] = key(
        "js_answers", "how far data sets are from each other; js_answers = Jensen-Shannon of the trained tokens"
    )
    coefficients: Literal["attentional", "normalised", "neural"] = key(
        "normalised", "how distances become shares: softmin, of standardised rows, or of a trained score"
    )
    temperature: float | None = key(
        None, "of the softmin; null = 1, with attentional a fifth of the median distance", gt=0, le=1e6
    )
    rule: Literal["auto", "delta", "factorwise", "learned"] = key(
        "auto",
        "delta = the exact sum of the corrections, truncated; factorwise = A and B summed apart, as published; auto ="
        " the one with the lower loss on labelled rows; learned = shares of each map by what `bank generator fit`"
        " learned from the bank",
    )
    selection_rows: int = key(
        8,
        "labelled rows that the shares are refined on, step by step; 0 = shares by distance alone",
        ge=0,
        le=MOST,
    )
    tuning_rows: int = key(
        32,
        "further labelled rows by which the shares of each map are tuned, with gradients of the shares alone; a quarter"
        " of them says when to stop; 0 = not",
        ge=0,
        le=MOST,
    )
    probe_rows: int = key(
        32, "labelled rows on which base, nearest, average and generated adapter are compared", ge=1, le=MOST
    )


class TrackingSection(Section):
    """Where results are mirrored."""

    report_to: list[Literal["mlflow", "tensorboard", "wandb"]] = key(
        ["mlflow"], "tensorboard and wandb (offline) are written beside the run; [] = the run folder only"
    )
    mlflow_uri: str | None = key(
        None, "an MLflow server; null = a SQLite file beside the runs; ${NAME} is read from the environment"
    )
    experiment: str | None = key(
        None, "MLflow experiment; null = the name of the folder in which the folder of runs lies"
    )
