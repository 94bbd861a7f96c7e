"""The job file's sections and keys.  Pydantic stays here, at the edge; `jobfile.py` reads files into these.

Names are Hugging Face's, PEFT's and TRL's wherever those have one.  `auto` is left as it is: the plan resolves it and
says why.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, create_model

from clusters.safe.reading import NAME_PATTERN
from strategies import METHODS

Auto = Literal["auto"]
Format = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "classification", "text"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
MOST = 10**9  # of anything that is counted
Finite = Annotated[float, Field(ge=-1e12, le=1e12)]
Whole = Annotated[int, Field(ge=-MOST, le=MOST)]
Metric = Literal["exact_match", "accuracy", "macro_f1", "rouge_l", "bleu", "chrf"]


def _has_finite_numbers(value: Any) -> Any:
    """For values of any type: refuses NaN and infinities at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("should hold finite numbers only")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _has_finite_numbers(part)
    return value


Anything = Annotated[Any, AfterValidator(_has_finite_numbers)]


class Section(BaseModel):
    """A section of the job file: unknown keys and numbers that are not finite are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _key(default: Any, doc: str, **limits: Any) -> Any:
    return Field(default, description=doc, **limits)


class ModelSection(Section):
    """Which model is tuned."""

    model_name_or_path: str = Field(
        description="a local folder, a Hugging Face name, or smollm2-135m-instruct (comes as a package, needs no hub)"
    )
    model_revision: str | None = _key(None, "revision on the hub")
    dtype: Auto | Literal["float32", "bfloat16", "float16"] = _key("auto", "precision of forward and backward")
    attn_implementation: Auto | Literal["document", "sdpa", "eager", "flash_attention_2", "flex_attention"] = _key(
        "auto", "attention kernel; document = one causal kernel a document, for rows without padding"
    )
    trust_remote_code: bool = _key(False, "run Python code that the model's repository ships")


class Source(Section):
    """One data source: a file, a folder or a hub dataset."""

    path: str = Field(description="jsonl, json, csv, tsv, parquet, arrow, a folder of them, or a Hugging Face dataset")
    format: Format = _key("auto", "how a row is read; auto looks at the first row of each file")
    split: str = _key("train", "which split: of a hub dataset, or of a folder by the names of its files")


class HeldOut(Section):
    """Hold out a part of the training rows."""

    split: float = Field(description="fraction of the training rows to hold out", gt=0, lt=1)


class DataSection(Section):
    """What is learnt from, and how rows become tokens."""

    train: str | Source | list[str | Source] = Field(description="training rows: a path, or a list of paths")
    eval: str | Source | list[str | Source] | HeldOut | None = _key(None, "held-out rows: paths, or {split: 0.05}")
    format: Format = _key("auto", "format of every source that does not state its own")
    chat_template: str = _key("tokenizer", "tokenizer, or the path of a .jinja file")
    system_prompt: str | None = _key(None, "put before conversations that have no system message")
    instruction: str = _key("", "classification: text put before each row's text")
    assistant_only_loss: bool = _key(True, "conversations: train on the assistant's words only")
    completion_only_loss: bool = _key(True, "prompt/completion rows: train on the completion only")
    max_length: Auto | Annotated[int, Field(ge=8, le=MOST)] = _key("auto", "longest sample in tokens")
    overlong: Literal["auto", "truncate", "drop", "split"] = _key(
        "auto", "what happens to longer samples; auto = conversations are cut, plain text is split"
    )
    truncate: bool = _key(False, "go on where more than 20 % of the tokens or rows are cut or dropped")
    packing: Auto | bool = _key("auto", "lay documents end to end instead of padding; never lets one see another")
    packing_strategy: Literal["bfd"] = _key("bfd", "best-fit decreasing")
    strict: bool = _key(True, "a broken row is an error; false counts it and writes it to rejected.jsonl")


class TrainSection(Section):
    """How the model is optimised."""

    global_batch_size: Auto | Annotated[int, Field(ge=1, le=MOST)] = _key("auto", "samples a step, over all workers")
    per_device_train_batch_size: Auto | Annotated[int, Field(ge=1, le=MOST)] = _key("auto", "rows of a micro-batch")
    gradient_accumulation_steps: Auto | Annotated[int, Field(ge=1, le=MOST)] = _key("auto", "micro-batches a step")
    num_train_epochs: float = _key(3.0, "passes over the data", gt=0, le=100_000)
    max_steps: int = _key(-1, "stop after so many steps; -1 = by epochs", ge=-1, le=MOST)
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = _key(2e-4, "peak learning rate")
    lr_scheduler_type: Scheduler = _key("cosine", "shape of the learning rate over time")
    warmup_ratio: float = _key(0.03, "fraction of the steps with rising learning rate", ge=0, le=1)
    warmup_steps: int = _key(0, "steps with rising learning rate; overrides warmup_ratio when above 0", ge=0, le=MOST)
    optim: Auto | Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "sgd", "adafactor"] = _key(
        "auto", "optimizer"
    )
    loss_type: Auto | Literal["nll", "chunked_nll"] = _key(
        "auto", "chunked_nll never holds all logits at once: less memory, the output matrix applied twice"
    )
    torch_compile: bool = _key(False, "compile the model: faster steps after a minute or more; not with packing")
    weight_decay: float = _key(0.0, "decoupled weight decay", ge=0, le=1000)
    adam_beta1: float = _key(0.9, "Adam's first decay", ge=0, lt=1)
    adam_beta2: float = _key(0.999, "Adam's second decay", ge=0, lt=1)
    adam_epsilon: float = _key(1e-8, "Adam's epsilon", gt=0, le=1)
    max_grad_norm: float = _key(1.0, "clip the gradient to this norm; 0 = never", ge=0, le=1e12)
    seed: int = _key(42, "order of samples, adapter initialisation, dropout", ge=0, le=2**64 - 1)
    gradient_checkpointing: Auto | bool = _key("auto", "recompute activations to save memory")
    deterministic: bool = _key(
        False,
        "the same bits in every run on one GPU, also after a resume; costs time: kernels that add in a fixed order (how"
        " much was not measured). One CPU worker repeats itself anyway",
    )


class StrategySection(Section):
    """How the work is laid on the machines."""

    mode: Auto | Literal["single", "ddp", "zero1", "zero2", "zero3"] = _key(
        "auto",
        "one worker; ddp: several, each with everything; zero1: the optimizer's state divided by memory, over any"
        " devices; zero2, zero3: gradients and weights too, by DeepSpeed, over devices of one kind",
    )
    offload: Auto | Literal["none", "optimizer", "parameters", "activations"] = _key(
        "auto", "what waits in a GPU's host: the optimizer with its step, the weights too, or activations"
    )
    shares: Literal["measured", "planned"] = _key(
        "measured", "of each worker: measured = follow its pace; planned = stay, so that a rerun is bit-equal"
    )
    local_steps: int | None = _key(
        None, "train so many steps apart, then average (DiLoCo): for slow networks; another computation", ge=2, le=MOST
    )
    sync_dtype: Literal["float32", "bfloat16"] = _key(
        "float32", "gradients between workers; bfloat16 halves what is sent"
    )
    deepspeed: dict[str, Anything] | None = _key(
        None, "DeepSpeed keys laid over the configuration that the plan makes; {} = DeepSpeed's equal parts for zero1"
    )
    nvme_path: str | None = _key(None, "offload to this folder on a fast disk instead of host memory (ZeRO-3)")
    preflight: bool = _key(True, "before the run: the longest batch, an evaluation step, a checkpoint and back")
    memory_safety: float = _key(0.08, "fraction of a device's memory the plan leaves free", ge=0, lt=1)


class GoalSection(Section):
    """What the plan should aim at, and what it must keep."""

    prefer: Literal["time", "memory", "cost", "quality"] = _key("time", "what the plan makes best among what fits")
    full_rank: bool = _key(False, "only methods that may change weights beyond a low rank: what adapters cannot learn")
    max_hours: float | None = _key(None, "longest training time in hours", gt=0, le=1e6)
    max_cost: float | None = _key(None, "most the run may cost, in cost.currency", gt=0, le=1e12)
    max_memory_fraction: float | None = _key(None, "most of a device's memory the plan may use", gt=0, le=1)
    min_quality: float | None = _key(None, "least expected score (a prior from published runs, 0 to 1)", ge=0, le=1)


class NodePrice(Section):
    """What one machine costs and draws."""

    purchase: float | None = _key(None, "price it was bought for", gt=0, le=1e12)
    years: float = _key(3.0, "over which the purchase is written off", gt=0, le=100)
    per_hour: float | None = _key(None, "rate of a rented machine", gt=0, le=1e9)
    idle_w: float | None = _key(None, "draw doing nothing, in watts", ge=0, le=1e7)
    load_w: float | None = _key(None, "draw while training, in watts", gt=0, le=1e7)


class CostSection(Section):
    """What machines and electricity cost, for the plan's price."""

    currency: str = _key("EUR", "name of the currency")
    electricity_per_kwh: float = _key(0.30, "price of a kilowatt-hour", ge=0, le=1e6)
    hours_per_year: float = _key(
        2000.0, "hours a year that an owned machine works, to write off its price", gt=0, le=8784
    )
    power_w: float | None = _key(
        None, "draw of this machine under load in watts, where nobody measured it", gt=0, le=1e7
    )
    nodes: dict[str, NodePrice] = _key(
        {}, "prices by machine: {NAME: {purchase: 1900, load_w: 480}}; the name * stands for every machine"
    )
    retrainings_per_year: float = _key(12.0, "how often the job is run, for the cost of a year", gt=0, le=1e6)
    alternatives: str | None = _key(
        None, "a hardware file whose machines are compared with these, each alone: buy a card, rent one"
    )


class ClusterSection(Section):
    """Where it runs."""

    address: str = _key("local", "local = embedded Ray; auto or HOST:PORT = a running cluster")
    num_workers: Auto | Annotated[int, Field(ge=1, le=MOST)] = _key("auto", "training processes")
    max_failures: Auto | Annotated[int, Field(ge=0, le=MOST)] = _key(
        "auto",
        "restarts from the last checkpoint after a worker dies; auto = as long as steps are made, on one machine 0",
    )
    storage: str = _key(
        "~/orchestrator-runs", "on a cluster that a job is sent to: the folder of runs, the same on every node"
    )
    shared_paths: list[str] = _key(
        [], "folders that every node of the cluster sees at the same place: what lies there is not sent"
    )
    wait_for_slots: int | None = _key(
        None,
        "slots to train on that must have joined before planning; an autoscaler is asked for them",
        ge=1,
        le=100_000,
    )
    secrets: list[str] = _key(
        [], "names of environment variables that must be set where the job runs, e.g. HF_TOKEN; values never travel"
    )
    wait_for_nodes_s: float = _key(
        20.0, "how long a lost machine is waited for before going on without it", ge=0, le=1e7
    )


class KubernetesSection(Section):
    """What a RayJob needs that no plan knows."""

    image: str = _key("orchestrator:cpu", "container image of pods that train on their CPU, and of the head")
    gpu_image: str = _key("orchestrator:cuda", "container image of pods with a GPU")
    claim: str = _key("runs", "ReadWriteMany volume claim for runs, mounted at cluster.storage (else /storage)")
    queue: str | None = _key(None, "Kueue's local queue")
    secret: str | None = _key(None, "a Secret whose keys become the pods' environment, e.g. HF_TOKEN")
    pull_secret: str | None = _key(None, "a Secret with the login of the images' registry")
    node_selector: dict[str, str] = _key({}, "labels of the nodes that pods may run on")
    tolerations: list[dict[str, Anything]] = _key([], "taints that pods bear, as Kubernetes writes them")
    runtime_class: str | None = _key(None, "RuntimeClass of pods with a GPU, e.g. nvidia")
    autoscale: bool = _key(False, "workers come when the job asks for them (Ray's autoscaler v2)")
    retries: int = _key(
        1, "new clusters after a lost head or a failed job; each goes on from the checkpoint", ge=0, le=1000
    )
    keep_s: int = _key(600, "seconds that the finished job's pods stay", ge=0, le=2**31 - 1)
    keep_failed_s: int | None = _key(
        None, "seconds that a failed job's pods stay, where not keep_s", ge=0, le=2**31 - 1
    )


class CheckpointSection(Section):
    """What is kept on disk."""

    output_dir: str = _key("runs", "folder that holds one folder a run")
    save_steps: Auto | Annotated[int, Field(ge=1, le=MOST)] = _key("auto", "steps between checkpoints")
    save_total_limit: int = _key(2, "checkpoints kept, beside the best", ge=2, le=MOST)
    load_best_model_at_end: Auto | bool = _key("auto", "hand back the weights with the lowest held-out loss")


class EvalSection(Section):
    """How quality is measured on the held-out rows."""

    eval_steps: Auto | Annotated[int, Field(ge=1, le=MOST)] | None = _key(
        "auto", "steps between held-out losses; null = end only"
    )
    metrics: Auto | list[Metric] = _key("auto", "metrics of generated answers; [] = loss only")
    max_new_tokens: Auto | Annotated[int, Field(ge=1, le=MOST)] = _key("auto", "longest generated answer in tokens")
    max_rows: int = _key(200, "most held-out rows that answers are generated for", ge=1, le=MOST)
    before: bool = _key(True, "evaluate the base model too")
    num_samples: int = _key(3, "sample outputs kept", ge=0, le=MOST)
    early_stopping_patience: int | None = _key(
        None, "stop after so many evaluations without a better loss", ge=1, le=MOST
    )


class BankSection(Section):
    """Adapters that were trained already, and how `adapt` makes one of them."""

    path: str = _key("~/orchestrator-bank", "folder of the bank")
    add: bool = _key(False, "put the finished run's adapter into the bank")
    licence: str | None = _key(None, "licence of adapters that are added, e.g. Apache-2.0")
    distance: Literal["js_parts", "js", "js_answers", "kl", "wasserstein_ids", "sliced_wasserstein", "mmd"] = _key(
        "js_answers", "how far data sets are from each other; js_answers = Jensen-Shannon of what is learnt"
    )
    coefficients: Literal["attentional", "normalised", "neural"] = _key(
        "normalised", "how distances become shares: softmin, of standardised rows, or of a trained score"
    )
    temperature: float | None = _key(
        None, "of the softmin; null = 1, with attentional a fifth of the median distance", gt=0, le=1e6
    )
    rule: Literal["auto", "delta", "factorwise"] = _key(
        "auto",
        "delta = the exact sum of the corrections, truncated; factorwise = A and B summed apart, as published; auto ="
        " the one that labelled rows like better",
    )
    selection_rows: int = _key(
        8,
        "labelled rows to train on by which the shares are moved on, step by step; 0 = as distances say",
        ge=0,
        le=MOST,
    )
    probe_rows: int = _key(
        32, "labelled rows on which base, nearest, average and generated adapter are compared", ge=1, le=MOST
    )


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

    trials: int = _key(16, "combinations that are tried", ge=1, le=100_000)
    minutes: float | None = _key(None, "wall-clock time", gt=0, le=1e7)
    node_hours: float | None = _key(None, "hours of all machines together", gt=0, le=1e9)


class SearchSection(Section):
    """What `search` tries, on how much of the data, and how much it may spend."""

    space: dict[str, Choices] = _key(
        {}, "job-file key: [values], or {loguniform: [low, high]}; {} = the optimizations this job leaves open"
    )
    budget: Budget = _key(Budget(), "where it ends")
    sampler: Literal["planned", "optuna", "random"] = _key(
        "planned", "planned = start from the plan's Pareto front and never try what cannot win; or without the plan"
    )
    scheduler: Literal["asha", "median", "none"] = _key("asha", "stops trials whose held-out loss lags behind")
    metric: Literal["eval_loss"] | Metric = _key("eval_loss", "quality of a trial, on the held-out rows")
    trial_steps: int = _key(8, "optimizer steps of a trial", ge=1, le=MOST)
    eval_rows: int = _key(40, "held-out rows that a trial is measured on", ge=1, le=MOST)
    quality_tolerance: float = _key(0.02, "a quality this close to the best, relatively, is as good", ge=0, le=1000)
    nodes: Literal["all", "idle"] = _key("all", "idle = only machines that the job itself would leave out")


class TrackingSection(Section):
    """Where results are mirrored."""

    report_to: list[Literal["mlflow"]] = _key(["mlflow"], "[] = the run folder only")
    mlflow_uri: str | None = _key(
        None, "an MLflow server; null = a SQLite file beside the runs; ${NAME} is read from the environment"
    )
    experiment: str = _key("default", "MLflow experiment")


def _method_section(name: str, method: type[Any]) -> type[Section]:
    """The job-file section of a registered method: its dataclass fields, with their own docs and limits."""
    fields: dict[str, Any] = {"type": (Literal[name], Field(name, description="training method"))}
    for knob in dataclasses.fields(method):
        limits = dict(knob.metadata)
        doc = limits.pop("doc", "")
        limits.pop("tried", None)
        factory = knob.default_factory
        default = factory() if factory is not dataclasses.MISSING else knob.default
        kind = _resolved_type(method, knob.name)
        if {int, float} & {kind, *get_args(kind)} and not {"le", "lt"} & set(limits):
            limits["le"] = MOST
        kind, limits = _limited(kind, limits)
        fields[knob.name] = (kind, Field(default, description=doc, **limits))
    return create_model(f"{method.__name__}Method", __base__=Section, __doc__=method.__doc__, **fields)


def _limited(kind: Any, limits: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A type and the limits of its field: those of a number that may also be a word belong to the number."""
    words = [part for part in get_args(kind) if get_origin(part) is Literal]
    if not limits or not words:
        return kind, limits
    numbers = [Annotated[part, Field(**limits)] for part in get_args(kind) if get_origin(part) is not Literal]
    return Union[(*words, *numbers)], {}  # type: ignore[return-value]


def _resolved_type(method: type[Any], knob: str) -> Any:
    import typing

    return typing.get_type_hints(method)[knob]


class AutoMethod(Section):
    """The plan chooses the method."""

    type: Literal["auto"] = _key("auto", "training method")


DEFAULT_METHOD = next(iter(METHODS))  # of a section that states knobs and no type
METHOD_SECTIONS: dict[str, type[Section]] = {name: _method_section(name, cls) for name, cls in METHODS.items()}
METHOD_SECTIONS["auto"] = AutoMethod


def _method_of(value: Any) -> str:
    named = value.get("type", DEFAULT_METHOD) if isinstance(value, dict) else getattr(value, "type", None)
    return named if isinstance(named, str) else ""


_AnyMethod = Annotated[
    Union[tuple(Annotated[section, Tag(name)] for name, section in METHOD_SECTIONS.items())],  # type: ignore[valid-type]  # noqa: UP007
    Discriminator(_method_of),
]


class JobSpec(Section):
    """What the user wants."""

    version: Literal[1] = _key(1, "version of this format")
    name: str = _key("job", "name of the job; run folders start with it", pattern=NAME_PATTERN)
    model: ModelSection
    data: DataSection
    method: _AnyMethod = Field(  # type: ignore[valid-type]
        default_factory=AutoMethod, description="how the model is trained"
    )
    train: TrainSection = Field(default_factory=TrainSection, description="optimisation")
    goal: GoalSection = Field(default_factory=GoalSection, description="what the plan aims at")
    cost: CostSection = Field(default_factory=CostSection, description="prices")
    strategy: StrategySection = Field(default_factory=StrategySection, description="layout on the machines")
    cluster: ClusterSection = Field(default_factory=ClusterSection, description="where it runs")
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="what is kept")
    eval: EvalSection = Field(default_factory=EvalSection, description="how quality is measured")
    tracking: TrackingSection = Field(default_factory=TrackingSection, description="where results are mirrored")
    kubernetes: KubernetesSection = Field(
        default_factory=KubernetesSection, description="what a RayJob needs that no plan knows"
    )
    search: SearchSection = Field(default_factory=SearchSection, description="what `search` tries")
    bank: BankSection = Field(default_factory=BankSection, description="adapters that were trained already")

    def methods(self) -> list[Any]:
        """The methods that may be used, with their knobs: the one the job states, or each of them for `auto`."""
        if self.method.type not in METHODS:
            known = [method() for name, method in METHODS.items() if not name.startswith("experimental_")]
            return [method for method in known if method.full_rank or not self.goal.full_rank]
        knobs = {name: getattr(self.method, name) for name in type(self.method).model_fields if name != "type"}
        return [METHODS[self.method.type](**knobs)]


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation
    for name, info in JobSpec.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
