"""The settings that one slot could train with, and which of them fit.  Pure."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from clusters.capability import DeviceCapability
from orchestrator.planning.candidates import Division, Slot, Switches
from orchestrator.planning.memory_fit import MemoryShortage, device_shortage
from strategies.compatibility import conflict
from strategies.contract import Dtype, Method, Offload, StrategyPlan, Techniques, Workload
from strategies.cost.time import product_rate

_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "rocm": 32768}  # beyond it nothing is gained: the device is full
_EQUAL = 1.01  # times this close are equal

Prefer = Literal["time", "memory"]


@dataclass(frozen=True)
class Miss:
    """A plan that does not fit, and what it lacks."""

    plan: StrategyPlan
    shortage: MemoryShortage


@dataclass
class Rejections:
    """Why combinations cannot be used."""

    reasons: dict[str, str] = field(default_factory=dict)  # combination -> reason, one combination for each reason
    nearest: dict[tuple[str, str], Miss] = field(default_factory=dict)  # by slot's label and method
    rules: defaultdict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))  # likewise: what
    # is against all settings of a precision, optimizer and kind of rows

    def add(self, label: str, reason: str) -> None:
        if reason not in self.reasons.values():
            self.reasons[label] = reason

    def offer(self, label: str, miss: Miss) -> None:
        """Keep a plan that does not fit a slot, where it comes nearer to fitting than the one that is kept."""
        key = label, miss.plan.method
        if key not in self.nearest or miss.shortage.times < self.nearest[key].shortage.times:
            self.nearest[key] = miss

    def share(self, label: str, twin: str, method: str) -> None:
        """What stands against a method on a slot stands against it on the slot's twin."""
        if miss := self.nearest.get((label, method)):
            self.offer(twin, miss)
        if rules := self.rules.get((label, method)):
            self.rules[twin, method] = rules

    def rule_of(self, label: str, method: str) -> str | None:
        """What most often rules a method out on a slot, whatever the memory."""
        reasons = self.rules.get((label, method))
        return max(reasons, key=reasons.count) if reasons else None

    def of_slot(self, label: str) -> str | None:
        """The first reason that was found for a slot."""
        return next((reason for what, reason in self.reasons.items() if what.endswith(f"on {label}")), None)


@dataclass(frozen=True)
class Assignment:
    """A share of the workload on one slot, with a method and its group's way of dividing."""

    workload: Workload
    slot: Slot
    method: Method
    division: Division
    switches: Switches

    def fitting_plans(self, rejections: Rejections) -> list[StrategyPlan]:
        """A plan for every setting that fits."""
        fitting: list[StrategyPlan] = []
        nearest: Miss | None = None
        for techniques in self._settings(rejections):
            plan = self.method.estimate(self.workload, self.slot.device, self.slot.node, techniques)
            shortage = device_shortage(plan, self.slot)
            if shortage is None:
                fitting.append(plan)
            elif nearest is None or shortage.times < nearest.shortage.times:
                nearest = Miss(plan, shortage)
        if not fitting and nearest is not None:
            rejections.offer(self.slot.label, nearest)
            combination = describe_combination(self.method, nearest.plan.techniques, self.slot)
            rejections.add(combination, nearest.shortage.reason)
        return fitting

    def _settings(self, rejections: Rejections) -> Iterator[Techniques]:
        """Settings worth an estimate: of kernels that compute the same only the best that the device has."""
        switches = self.switches
        dtypes = _worthwhile_dtypes(switches.dtypes, self.slot)
        for packing, offload, optim in itertools.product(switches.packings, switches.offloads, switches.optims):
            for dtype in dtypes:
                allowed = self._best_kernel(dtype, packing, offload, optim, rejections)
                if allowed is None:
                    continue
                rows = self._row_counts(packing)
                for checkpointing, loss, count in itertools.product(switches.checkpointings, switches.losses, rows):
                    full = replace(
                        allowed,
                        gradient_checkpointing=checkpointing,
                        loss_type=loss,
                        per_device_train_batch_size=count,
                    )
                    if (reason := self._conflict(full)) is None:
                        yield full
                    else:
                        rejections.add(describe_combination(self.method, full, self.slot), reason)

    def _best_kernel(
        self, dtype: Dtype, packing: bool, offload: Offload, optim: str, rejections: Rejections
    ) -> Techniques | None:
        """The smallest settings with the best attention kernel that may be combined with the rest; None without one."""
        switches, division = self.switches, self.division
        refused: list[tuple[str, str]] = []
        for attention in _kernels(switches.attentions, self.slot.device, packing):
            techniques = Techniques(
                dtype=dtype,
                attn_implementation=attention,
                packing=packing,
                gradient_checkpointing=switches.checkpointings[0],
                per_device_train_batch_size=1,
                max_length=switches.max_length,
                optim=optim,
                loss_type=switches.losses[0],
                torch_compile=switches.torch_compile,
                offload=offload,
                zero_stage=division.stage,
                num_shards=division.num_devices if division.stage else 1,
                state_share=division.state_share,
            )
            if (reason := self._conflict(techniques)) is None:
                for each in refused:
                    rejections.add(*each)
                return techniques
            refused.append((describe_combination(self.method, techniques, self.slot), reason))
        rejections.add(*refused[-1])  # what refuses the plainest kernel is what must change
        rejections.rules[self.slot.label, self.method.name].append(refused[-1][1])
        return None

    def _conflict(self, techniques: Techniques) -> str | None:
        return conflict(self.method, techniques, self.slot.device, self.workload.shape, self.division.num_devices)

    def _row_counts(self, packing: bool) -> list[int]:
        """Micro-batch sizes worth an estimate: the whole share, and its halvings."""
        switches, workload = self.switches, self.workload
        if switches.rows is not None:
            return [switches.rows]
        share = math.ceil(workload.global_batch_size * workload.share)
        if switches.accumulation is not None:
            share = math.ceil(share / switches.accumulation)
        if packing:  # rows of max_length tokens, each holding several samples
            share = math.ceil(share * workload.mean_length / switches.max_length)
        share = max(1, min(share, _MICRO_BATCH_TOKENS[self.slot.device.kind] // switches.max_length))
        return sorted({max(1, share >> halvings) for halvings in range(share.bit_length())}, reverse=True)


def preferred_plan(fitting: Sequence[StrategyPlan], prefer: Prefer) -> StrategyPlan | None:
    """The fastest plan or the one that needs least memory; of equals the plainest, which is listed first."""
    if not fitting:
        return None
    if prefer == "memory":
        return min(fitting, key=lambda plan: (plan.memory.total_bytes, plan.time.step_s))
    fastest = min(plan.time.step_s for plan in fitting)
    return next(plan for plan in fitting if plan.time.step_s <= _EQUAL * fastest)


def describe_combination(method: Method, techniques: Techniques, slot: Slot) -> str:
    """A combination for a person, without its micro-batch."""
    parts = [method.name, techniques.dtype, techniques.attn_implementation, *describe_techniques(techniques)]
    if techniques.zero_stage:
        parts[-1] += f" x {techniques.num_shards}"
    return f"{' + '.join(parts)} on {slot.label}"


def describe_techniques(techniques: Techniques, with_loss: bool = False) -> list[str]:
    """What is on beyond a plain training, in words; the division last."""
    is_on = {
        "checkpointing": techniques.gradient_checkpointing,
        techniques.loss_type: with_loss and techniques.loss_type != "nll",
        "8-bit optimizer": techniques.optim.startswith("adamw_bnb"),
        f"{techniques.offload} offload": techniques.offload != "none",
        f"ZeRO-{techniques.zero_stage}": techniques.zero_stage > 0,
    }
    return [word for word, on in is_on.items() if on]


def _kernels(stated: Sequence[str], device: DeviceCapability, packing: bool) -> list[str]:
    """Attention kernels, best first: on a GPU the flash-attn library before one call a document."""
    allowed = [kernel for kernel in stated if packing or kernel != "document"]
    if device.kind != "cpu" and len(allowed) > 1:
        allowed.sort(key=lambda kernel: kernel != "flash_attention_2")
    return allowed


def _worthwhile_dtypes(dtypes: Sequence[Dtype], slot: Slot) -> list[Dtype]:
    """The faster 16-bit format, of equals bfloat16 since it needs no loss scaling; and fp32 beside it."""
    half: list[Dtype] = [dtype for dtype in dtypes if dtype != "float32"]
    if len(half) > 1:
        rate = {dtype: product_rate(slot.device, slot.node, dtype)[0] for dtype in half}
        if slot.device.kind != "cpu" and slot.device.has_bf16_units is False:
            rate["bfloat16"] = 0.0
        half = [max(half, key=lambda dtype: (rate[dtype], dtype == "bfloat16"))]
    return [*half, "float32"] if "float32" in dtypes else half
