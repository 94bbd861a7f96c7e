"""How a job will run: what the planner decided, as it is written down and read again.  No torch, no ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from clusters.capability import Kind
from clusters.safe.reading import BadInput, load_json, printable, record
from clusters.units import format_s
from orchestrator.errors import JobError, RunFailed
from orchestrator.planning.price import Price
from strategies import METHODS, OBJECTIVES
from strategies.contract import MemoryEstimate, Method, TimeEstimate
from strategies.cost.phases import Phases
from strategies.cost.pipeline import PlannedPasses
from strategies.objectives.contract import Objective
from strategies.workload import StagePart, Techniques

VERSION = 4
_DEFAULT_OBJECTIVE = {"type": next(iter(OBJECTIVES))}


@dataclass(frozen=True)
class Sync:
    """How the workers' gradients are added up, and what each way was predicted to cost."""

    dtype: str = "float32"  # on the wire
    bucket_bytes: int = 4 * 2**20
    options: dict[str, float] = field(default_factory=dict)  # way -> seconds a step waits for it


@dataclass(frozen=True)
class NodePlan:
    """What one device of one node does, and what that is predicted to cost."""

    node: str
    device: str  # its name
    torch_device: str  # "cpu" or "cuda"
    memory_usable_bytes: float | None
    threads: int
    techniques: Techniques
    memory: MemoryEstimate
    time: TimeEstimate
    share: float  # of each step's samples
    kind: Kind = "cpu"  # whose device it is
    uuid: str | None = None  # of the GPU; None = its driver reports none
    replica: int | None = None  # the copy of the model of which it is a stage; None = it has one of its own

    @property
    def share_text(self) -> str:
        """Its part of the work: of the samples, of the layers, or of both."""
        stage, share = self.techniques.stage, f"{self.share:.0%}"
        return share if stage is None else str(stage) if self.share == 1.0 else f"{stage}, {share}"


@dataclass(frozen=True)
class Beside:
    """A node that does not train, and what it does for the run meanwhile.

    One that measures evaluates the base model; one that stands by reads a stage, to take it over if its node is lost.
    """

    node: str
    does: Literal["measures", "stands by"]
    part: NodePlan | None = None  # of one that measures: with what and on which device; its share is 0
    stage: StagePart | None = None  # of one that stands by
    num_bytes: float = 0.0  # of that stage in the model's files


@dataclass(frozen=True)
class Alternative:
    """A candidate that was not chosen: what it would cost, and why not."""

    what: str
    total_s: float
    peak_bytes: float
    quality: float | None
    why_not: str
    on_front: bool  # nothing beats it in time, memory and expected quality at once


@dataclass(frozen=True)
class InBank:
    """An adapter of the bank that was trained for this model on this very data."""

    name: str
    path: str  # its folder
    held_out_loss: tuple[float | None, float | None]  # before and after its training


@dataclass(frozen=True)
class Plan:
    """How a job will run: nothing in it is `auto`.  Written to plan.json; its hash goes into every checkpoint."""

    method: dict[str, Any]  # {"type": name, option: value ...}
    nodes: tuple[NodePlan, ...]  # one for each device that trains, the fastest first
    sync: Sync
    sync_s: float  # of each step, waiting for the network
    step_s: float
    tokens_per_s: float
    price: Price
    calibration: float  # what earlier runs on the first device multiplied the predicted times by
    is_guess: bool  # a figure of a machine was unknown and a typical one stood in
    quality_prior: dict[str, Any] | None
    num_trainable_parameters: int
    flops_per_token: float
    checkpoint_bytes: float
    global_batch_size: int  # samples
    local_batch_size: int | None  # samples of a local step; None = gradients are summed every step
    num_steps: int
    save_steps: int
    eval_steps: int | None
    load_best_model_at_end: bool
    max_new_tokens: int
    metrics: tuple[str, ...]
    reasons: dict[str, str]  # key of the job file -> why it was resolved so
    alternatives: tuple[Alternative, ...] = ()
    rejected: dict[str, str] = field(default_factory=dict)  # combination -> why it cannot be
    left_out: dict[str, str] = field(default_factory=dict)  # node or device -> why it is excluded, and what it does
    if_installed: dict[str, str] = field(default_factory=dict)  # absent library -> what it would bring, and its command
    beside: tuple[Beside, ...] = ()  # excluded nodes that do something for the run
    in_bank: tuple[InBank, ...] = ()
    phases: Phases = Phases()  # seconds of the whole job
    computed_part: float = 1.0  # of the rows' tokens, on the first device: `StrategyPlan.computed_part`
    pipelines: tuple[PlannedPasses, ...] = ()  # by `replica`; empty = no stages
    objective: dict[str, Any] = field(default_factory=lambda: dict(_DEFAULT_OBJECTIVE))  # as `method`
    stores_reference: bool = False  # log-probabilities under the reference are computed before the first step
    notes: tuple[str, ...] = ()  # what people should know of the result before it is trained
    version: int = VERSION

    @property
    def techniques(self) -> Techniques:
        """Those of the first device; the only ones where all devices are alike."""
        return self.nodes[0].techniques

    @property
    def measuring(self) -> NodePlan | None:
        """What the excluded node does that evaluates the base model while the others train; None without one."""
        return next((beside.part for beside in self.beside if beside.does == "measures"), None)

    @property
    def stands_by(self) -> dict[str, StagePart]:
        """Excluded nodes that read a stage of the pipeline, and which."""
        return {one.node: one.stage for one in self.beside if one.does == "stands by" and one.stage}

    def part_of(self, node: str, slot: int) -> NodePlan:
        """What the `slot`-th worker on a node does; on a single unnamed machine, that machine's."""
        parts = [part for part in self.nodes if part.node == node or not node]
        if slot >= len(parts):
            raise RunFailed(f"the plan has {len(parts)} workers for {node or 'this machine'}, and this is one more")
        return parts[slot]

    @property
    def replica_of(self) -> tuple[int, ...]:
        """Of each worker the copy of the model that it is a stage of; empty where each has its own."""
        return tuple(part.replica or 0 for part in self.nodes) if self.techniques.stage else ()

    @property
    def backend(self) -> str:
        """The collective backend: nccl among GPUs of one maker (RCCL has that name too), gloo among others.

        Stages send hidden states by way of the host, so that unlike machines understand each other.
        """
        kinds = {part.kind for part in self.nodes}
        if self.techniques.stage:
            return "gloo"
        return "nccl" if len(self.nodes) > 1 and len(kinds) == 1 and "cpu" not in kinds else "gloo"

    @property
    def memory(self) -> MemoryEstimate:
        return self.nodes[0].memory

    @property
    def device(self) -> str:
        return self.nodes[0].torch_device

    @property
    def num_workers(self) -> int:
        return len(self.nodes)

    @property
    def threads_per_worker(self) -> int:
        return self.nodes[0].threads

    @property
    def optim(self) -> str:
        return self.techniques.optim

    @property
    def total_s(self) -> float:
        """Of the training itself, without start and evaluation."""
        return self.step_s * self.num_steps

    @property
    def whole_s(self) -> float:
        """Of the whole job; of the training, where an earlier version wrote the plan."""
        return self.phases.total_s or self.total_s

    def build_method(self) -> Method:
        """The method's dataclass with the options of this plan."""
        return METHODS[self.method["type"]](**{key: value for key, value in self.method.items() if key != "type"})

    def build_objective(self) -> Objective:
        """The objective's dataclass with the options of this plan."""
        options = {key: value for key, value in self.objective.items() if key != "type"}
        return OBJECTIVES[self.objective["type"]](**options)

    @property
    def max_length(self) -> int:
        """The longest document in tokens; `techniques.max_length` is that of a sample."""
        return self.techniques.max_length // self.build_objective().num_documents

    @property
    def hash(self) -> str:
        """What decides the numbers of a run: two plans with one hash give bit-equal losses on one machine."""
        deciding = {
            "version": self.version,
            "method": self.method,
            "nodes": [
                (part.node, part.device, part.share, part.threads, _deciding(part.techniques)) for part in self.nodes
            ],
            "sync": (self.sync.dtype, self.local_batch_size),
            "steps": (self.global_batch_size, self.num_steps, self.eval_steps, self.load_best_model_at_end),
        }
        if self.objective != _DEFAULT_OBJECTIVE:
            deciding["objective"] = (self.objective, self.stores_reference)
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        values = asdict(self)
        if not self.pipelines:
            del values["pipelines"]
        if self.objective == _DEFAULT_OBJECTIVE:
            del values["objective"], values["stores_reference"]
        if not self.notes:
            del values["notes"]
        return json.dumps({**values, "total_s": self.total_s, "hash": self.hash}, indent=1)

    @classmethod
    def from_json(cls, text: str, label: str = "plan.json") -> Plan:
        """Read plan.json.  Raises JobError with file and fault: another version, a wrong type, an edited plan."""
        try:
            values = load_json(text, label)
            if isinstance(values, dict) and values.get("version") != VERSION:
                raise JobError(
                    f"{label}: has version {printable(str(values.get('version')))}, this program writes {VERSION};"
                    " submit the job again"
                )
            plan = record(cls, _of_this_version(values), label)
            plan.build_method()
            plan.build_objective()
        except BadInput as error:
            raise JobError(str(error)) from None
        except (KeyError, TypeError, ValueError) as error:
            raise JobError(f"{label}: method: {printable(str(error))}") from None
        if not plan.nodes:
            raise JobError(f"{label}: nodes is empty")
        if (written := values.get("hash")) is not None and written != plan.hash:
            raise JobError(f"{label}: was edited: its values have the hash {plan.hash}, and it says {written}")
        return plan


def _of_this_version(values: Any) -> Any:
    """The values of plan.json, of an earlier program's too: its `helper` is the node beside that measures, its
    `pipeline` the only one.
    """
    if not isinstance(values, dict):
        return values
    if values.get("pipeline") is not None:
        values = {**values, "pipelines": [values["pipeline"]]}
    if "beside" in values or values.get("helper") is None:
        return values
    helper = values["helper"]
    node = helper.get("node") if isinstance(helper, dict) else None
    return {**values, "beside": [{"node": node, "does": "measures", "part": helper}]}


def _deciding(techniques: Techniques) -> dict[str, Any]:
    """The switches that are in use: a plan without later ones keeps the hash it had before there were any."""
    values = asdict(techniques)
    later = ("stage", "share_prefixes", "cache_frozen_activations", "liger_kernel")
    found = {key: value for key, value in values.items() if key not in later or value}
    if techniques.local_merge == "factors":
        del found["local_merge"]
    return found


def settings_of(plan: Plan) -> dict[str, Any]:
    """The resolved values by job-file key, for printing and tracking."""
    techniques, stage, threads = plan.techniques, plan.techniques.stage, plan.threads_per_worker
    counts = [
        one.techniques.stage.count for one in plan.nodes if one.techniques.stage and one.techniques.stage.is_first
    ]
    stages = " + ".join(map(str, counts)) if len(set(counts)) > 1 else stage and stage.count
    pipeline = {"stages": stages, "wire": stage.wire, "ahead": stage.ahead, "replicas": len(counts)} if stage else {}
    return {
        "method.type": plan.method["type"],
        **({"objective.type": plan.objective["type"]} if plan.objective != _DEFAULT_OBJECTIVE else {}),
        "cluster.num_workers": plan.num_workers,
        "model.dtype": techniques.dtype,
        "model.attn_implementation": techniques.attn_implementation,
        "data.packing": techniques.packing,
        "data.share_prefixes": techniques.share_prefixes,
        "data.max_length": plan.max_length,
        "train.global_batch_size": plan.global_batch_size,
        "train.per_device_train_batch_size": techniques.per_device_train_batch_size,
        "train.gradient_checkpointing": techniques.gradient_checkpointing,
        "train.cache_frozen_activations": techniques.cache_frozen_activations,
        "train.loss_type": techniques.loss_type,
        "train.optim": plan.optim,
        **({"train.threads": threads} if plan.nodes[0].torch_device == "cpu" and threads > 1 else {}),
        "strategy.offload": techniques.offload,
        **({"strategy.mode": "pipeline"} if stage else {}),
        **{f"strategy.pipeline.{key}": value for key, value in pipeline.items()},
        "checkpoint.save_steps": plan.save_steps,
        "checkpoint.load_best_model_at_end": plan.load_best_model_at_end,
        "eval.eval_steps": plan.eval_steps,
        "eval.max_new_tokens": plan.max_new_tokens,
        "eval.metrics": list(plan.metrics),
    }


def in_bank_sentence(found: Sequence[InBank]) -> str:
    """One sentence on the adapters that make the run unnecessary."""
    names = []
    for one in found:
        before, after = one.held_out_loss
        losses = f", held-out loss {before:.3f} -> {after:.3f}" if before is not None and after is not None else ""
        names.append(f"{one.name} ({one.path}{losses})")
    return f"already in the bank, trained on this very data, so nothing need be computed: {'; '.join(names)}"


def summary(plan: Plan) -> str:
    """The plan in one sentence."""
    where = ", ".join(dict.fromkeys(f"{part.device} ({part.node})" for part in plan.nodes))
    return f"{plan.method['type']} on {where}: {format_s(plan.whole_s)}, {plan.tokens_per_s:.0f} tokens/s"
