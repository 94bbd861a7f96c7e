"""Where and how the work is laid out: strategy, goal, cost, cluster, kubernetes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.job.sections.section import MOST, Anything, Auto, Section, key
from strategies.workload import LocalMerge


class PipelineSection(Section):
    """How layers lie on devices in turn, which micro-batches pass one behind the other (strategy.mode: pipeline)."""

    stages: Auto | Annotated[int, Field(ge=2, le=6)] = key(
        "auto", "devices in turn, each with layers of its own; auto = those with which a step is shortest"
    )
    wire: Auto | Literal["float32", "bfloat16", "int8"] = key(
        "auto",
        "form of hidden states and their gradients between stages; auto = as they are computed; int8 is for links"
        " below 50 Mbit/s and rounds gradients by about 1 %",
    )
    ahead: Auto | Annotated[int, Field(ge=0, le=16)] = key(
        "auto", "micro-batches that wait at each boundary beyond the fewest: they hide a slow link and take memory"
    )
    replicas: Auto | Annotated[int, Field(ge=1, le=MOST)] = key(
        "auto", "pipelines beside each other, which share a step's samples; auto = several where that is 5 % faster"
    )


class StrategySection(Section):
    """How the work is laid on the machines."""

    mode: Auto | Literal["single", "ddp", "zero1", "zero2", "zero3", "pipeline"] = key(
        "auto",
        "one worker; ddp: several, each with everything; zero1: the optimizer's state divided by memory, over any"
        " devices; zero2, zero3: gradients and weights too, by DeepSpeed, over devices of one kind; pipeline: layers"
        " divided, over any devices",
    )
    pipeline: PipelineSection = key(PipelineSection(), "how a pipeline is made, where the mode is pipeline or auto")
    offload: Auto | Literal["none", "optimizer", "parameters", "activations", "weights"] = key(
        "auto",
        "what is kept in host memory: the optimizer with its step; parameters: the weights too; activations; weights:"
        " frozen ones, which visit the device layer by layer",
    )
    shares: Literal["measured", "planned"] = key(
        "measured", "of each worker: measured = follow its pace; planned = stay, so that a rerun is bit-equal"
    )
    local_steps: int | None = key(
        None, "train so many steps apart, then average (DiLoCo): for slow networks; another computation", ge=2, le=MOST
    )
    local_steps_merge: Literal["factors", "product"] = key(
        "factors",
        "how workers that trained apart average LoRA: A and B by themselves, or their products B A (LTE, arXiv"
        " 2402.16828), of which each worker sends its own to all others",
    )
    local_steps_reset: bool = key(
        False,
        "with local_steps_merge: product: what was averaged is kept beside the adapter, up to eight times its rank, and"
        " a new one begins",
    )
    sync_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "gradients between workers; bfloat16 halves what is sent"
    )
    deepspeed: dict[str, Anything] | None = key(
        None, "DeepSpeed keys laid over the configuration that the plan makes; {} = DeepSpeed's equal parts for zero1"
    )
    nvme_path: str | None = key(None, "offload to this folder on a fast disk instead of host memory (ZeRO-3)")
    preflight: bool = key(True, "before the run: the longest batch, an evaluation step, a checkpoint and back")
    memory_safety: float = key(0.05, "fraction of a device's memory the plan leaves free", ge=0, lt=1)

    @property
    def local_merge(self) -> LocalMerge:
        """How workers that train apart come together."""
        return "reset" if self.local_steps_reset else self.local_steps_merge


class GoalSection(Section):
    """What the plan should aim at, and what it must keep."""

    prefer: Literal["time", "memory", "cost", "quality"] = key("time", "what the plan makes best among what fits")
    full_rank: bool = key(False, "only methods that may change weights beyond a low rank: what adapters cannot learn")
    max_hours: float | None = key(
        None, "longest time of the whole job in hours: start, evaluation, training, saving", gt=0, le=1e6
    )
    max_cost: float | None = key(None, "most the whole job may cost, in cost.currency", gt=0, le=1e12)
    max_memory_fraction: float | None = key(None, "most of a device's memory the plan may use", gt=0, le=1)
    min_quality: float | None = key(None, "least expected score (a prior from published runs, 0 to 1)", ge=0, le=1)


class NodePrice(Section):
    """What one machine costs and draws."""

    purchase: float | None = key(None, "price it was bought for", gt=0, le=1e12)
    years: float = key(3.0, "over which the purchase is written off", gt=0, le=100)
    per_hour: float | None = key(None, "rate of a rented machine", gt=0, le=1e9)
    idle_w: float | None = key(None, "draw doing nothing, in watts", ge=0, le=1e7)
    load_w: float | None = key(None, "draw while training, in watts", gt=0, le=1e7)


class CostSection(Section):
    """What machines and electricity cost, for the plan's price."""

    currency: str = key("EUR", "name of the currency")
    electricity_per_kwh: float = key(0.30, "price of a kilowatt-hour", ge=0, le=1e6)
    hours_per_year: float = key(
        2000.0, "hours a year that an owned machine works, to write off its price", gt=0, le=8784
    )
    power_w: float | None = key(
        None, "draw of this machine under load in watts, where it was not measured", gt=0, le=1e7
    )
    nodes: dict[str, NodePrice] = key(
        {}, "prices by machine: {NAME: {purchase: 1900, load_w: 480}}; the name * stands for every machine"
    )
    retrainings_per_year: float = key(12.0, "how often the job is run, for the cost of a year", gt=0, le=1e6)
    alternatives: str | None = key(
        None, "a hardware file whose machines are compared with these, each alone: buy a card, rent one"
    )


class ClusterSection(Section):
    """Where it runs."""

    address: str = key(
        "local", "local = this machine, in an embedded Ray or a resident one; auto or HOST:PORT = a running cluster"
    )
    resident: bool = key(
        True,
        "a job of address: local starts in the Ray of an `orchestrator head` that this user runs on this machine; false"
        " = always in one of its own",
    )
    num_workers: Auto | Annotated[int, Field(ge=1, le=MOST)] = key("auto", "training processes")
    nice: int | None = key(
        None,
        "niceness of the workers of address: local, 15 without it: other programs get the cores first, on Linux those"
        " of the same login session (sched_autogroup shares cores equally between sessions); at 0 they share",
        ge=0,
        le=19,
    )
    max_failures: Auto | Annotated[int, Field(ge=0, le=MOST)] = key(
        "auto",
        "restarts from the last checkpoint after a worker dies; auto = as long as steps are made, on one machine 0",
    )
    storage: str = key(
        "~/orchestrator-runs", "on a cluster that a job is sent to: the folder of runs, the same on every node"
    )
    shared_paths: list[str] = key(
        [], "folders that every node of the cluster sees at the same place: what lies there is not sent"
    )
    wait_for_slots: int | None = key(
        None,
        "slots to train on that must have joined before planning; requested of an autoscaler",
        ge=1,
        le=100_000,
    )
    secrets: list[str] = key(
        [], "names of environment variables that must be set where the job runs, e.g. HF_TOKEN; values never travel"
    )
    wait_for_nodes_s: float = key(
        20.0, "how long to wait for a lost machine before continuing without it", ge=0, le=1e7
    )


class KubernetesSection(Section):
    """What a RayJob needs that no plan knows."""

    image: str = key("orchestrator:cpu", "container image of pods that train on their CPU, and of the head")
    gpu_image: str = key("orchestrator:cuda", "container image of pods with a GPU")
    claim: str = key("runs", "ReadWriteMany volume claim for runs, mounted at cluster.storage (else /storage)")
    queue: str | None = key(None, "Kueue's local queue")
    secret: str | None = key(None, "a Secret whose keys become the pods' environment, e.g. HF_TOKEN")
    pull_secret: str | None = key(None, "a Secret with the login of the images' registry")
    node_selector: dict[str, str] = key({}, "labels of the nodes that pods may run on")
    tolerations: list[dict[str, Anything]] = key([], "taints that pods bear, as Kubernetes writes them")
    runtime_class: str | None = key(None, "RuntimeClass of pods with a GPU, e.g. nvidia")
    autoscale: bool = key(False, "workers come when the job asks for them (Ray's autoscaler v2)")
    retries: int = key(
        1, "new clusters after a lost head or a failed job; each continues from the checkpoint", ge=0, le=1000
    )
    keep_s: int = key(600, "seconds that the finished job's pods stay", ge=0, le=2**31 - 1)
    keep_failed_s: int | None = key(None, "seconds that a failed job's pods stay, where not keep_s", ge=0, le=2**31 - 1)
