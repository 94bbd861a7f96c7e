"""The settings that one slot could train with, and which of them fit.  Pure."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from clusters.capability import DeviceCapability
from orchestrator.planning.candidates import Division, Slot, Switches, step_s_of
from orchestrator.planning.memory_fit import MemoryShortage, device_shortage, disk_usable_bytes
from strategies.compatibility import conflict
from strategies.contract import Method, StrategyPlan
from strategies.cost.micro_batches import SPREAD
from strategies.cost.network import Network
from strategies.cost.reuse import WORTH, WORTH_KEEPING, keeps_by_itself, ratio_of_step
from strategies.cost.time import disk_read_rate, product_rate
from strategies.workload import Dtype, Kept, Offload, Techniques, Workload

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "rocm": 32768}  # beyond it nothing is gained: the device is full
_EQUAL = 1.01  # times this close are equal
_MISSES = 2  # counts of rows that gain nothing
_SLOWER = 0.8  # of another's rate
_KEPT = 0.1  # of a device's memory: so much may be kept for later epochs

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

    def fitting_plans(self, rejections: Rejections) -> FittingPlans:
        """A plan for every setting worth one that fits."""
        switches, estimates, fitting = self.switches, Estimates(self, rejections), list[StrategyPlan]()
        offloads: Sequence[Offload] = switches.offloads
        if self.slot.device.kind == "cpu" and len(offloads) > 1:  # streams from files: where the job says so
            offloads = [offload for offload in offloads if offload != "weights"]
        for packing, offload, optim in itertools.product(switches.packings, offloads, switches.optims):
            found: list[StrategyPlan] = []
            for dtype in worthwhile_dtypes(switches.dtypes, self.slot):
                for base in self.best_kernels(dtype, packing, offload, optim, rejections):
                    # A slower number format is worth its leanest form where a faster one fits.
                    lean = bool(found) and _is_slower(self.slot, dtype, found[0].techniques.dtype)
                    found += self._with_and_without(base, lean, estimates)
            fitting += found
        if not fitting:
            estimates.explain()
        single = [one for one in estimates.refused if one.per_device_train_batch_size == 1]
        nearest = estimates.nearest.plan if estimates.nearest else None
        return FittingPlans(fitting, nearest, estimates.may_fit_whole(single))

    def fastest_like(
        self, known: Iterable[Techniques], rejections: Rejections, network: Network | None = None
    ) -> list[StrategyPlan]:
        """The fastest plan that fits with each of known settings: micro-batch and division are this assignment's."""
        estimates = Estimates(self, rejections)
        found = (estimates.fastest(self._divided(one), self._row_counts(one.packing), network) for one in known)
        return [plan for plan in found if plan]

    def find_leanest(self, known: Iterable[Techniques], rejections: Rejections) -> list[StrategyPlan]:
        """The plans that fit with known settings and the smallest micro-batch."""
        estimates = Estimates(self, rejections)
        found = (estimates.fitting(self._divided(one), self._row_counts(one.packing)[-1:]) for one in known)
        return list(itertools.chain.from_iterable(found))

    def _divided(self, techniques: Techniques) -> Techniques:
        shards = self.division.num_devices if self.division.stage else 1
        return replace(techniques, num_shards=shards, state_share=self.division.state_share)

    def _with_and_without(self, base: Techniques, lean: bool, estimates: Estimates) -> list[StrategyPlan]:
        """Settings that save memory for time, the plainest first: where one fits whole, others in their leanest form.

        Where the leanest of all does not fit, none does.
        """
        switches, rows, allowed = self.switches, self._row_counts(base.packing), list[Techniques]()
        for checkpointing, loss in itertools.product(switches.checkpointings, switches.losses):
            techniques = replace(base, gradient_checkpointing=checkpointing, loss_type=loss)
            if (reason := self._conflict(techniques)) is None:
                allowed.append(techniques)
            else:
                estimates.rejections.add(describe_combination(self.method, techniques, self.slot), reason)
        leanest = estimates.fitting(allowed[-1], rows[-1:]) if allowed else []
        if lean or not leanest:
            return leanest or (
                estimates.fitting(allowed[-1], rows[:1]) if estimates.may_fit_whole(allowed[-1:]) else []
            )
        fitting: list[StrategyPlan] = []
        for techniques in allowed:
            found = estimates.fitting(techniques, rows)
            fitting += found
            if any(plan.techniques.per_device_train_batch_size == rows[0] for plan in found):
                break
        return [*fitting, *(plan for plan in leanest if plan.techniques not in [one.techniques for one in fitting])]

    def best_kernels(
        self, dtype: Dtype, packing: bool, offload: Offload, optim: str, rejections: Rejections
    ) -> list[Techniques]:
        """The smallest settings with the attention kernels that may be combined with the rest: the best one.

        Beside one call a document also the next best: of many short documents one call with a mask is faster.
        """
        found: list[Techniques] = []
        switches, division = self.switches, self.division
        refused: list[tuple[str, str]] = []
        for attention in _kernels(switches.attentions, self.slot.device, packing):
            techniques = Techniques(
                dtype=dtype,
                attn_implementation=attention,
                packing=packing,
                gradient_checkpointing=switches.checkpointings[-1 if offload == "weights" else 0],  # which need it
                per_device_train_batch_size=1,
                max_length=switches.max_length,
                optim=optim,
                loss_type=switches.losses[0],
                torch_compile=switches.torch_compile,
                liger_kernel=switches.liger_kernel,
                local_merge=switches.local_merge,
                offload=offload,
                zero_stage=division.stage,
                num_shards=division.num_devices if division.stage else 1,
                state_share=division.state_share,
                share_prefixes=switches.share_prefixes is True,
                cache_frozen_activations=switches.cache_frozen_activations or False,
            )
            if (reason := self._conflict(techniques)) is None:
                found.append(self._with_reuse(techniques))
                if attention != "document":
                    break
                continue
            refused.append((describe_combination(self.method, techniques, self.slot), reason))
        if found or not refused:  # or no stated kernel is for such rows
            for each in refused:
                rejections.add(*each)
            return found
        rejections.add(*refused[-1])  # what refuses the plainest kernel is what must change
        rejections.rules[self.slot.label, self.method.name].append(refused[-1][1])
        return []

    def _with_reuse(self, techniques: Techniques) -> Techniques:
        """Without what need not be computed again, where that is open, can be and is worth it."""
        shared = replace(techniques, share_prefixes=True)
        is_open = self.switches.share_prefixes is None and ratio_of_step(self.workload) >= WORTH
        found = shared if is_open and self._conflict(shared) is None else techniques
        if self.switches.cache_frozen_activations is not None or not keeps_by_itself(self.slot.device):
            return found
        places: tuple[Kept, ...] = (True, "disk")
        kept = (replace(found, cache_frozen_activations=place) for place in places)
        return next((one for one in kept if self._conflict(one) is None and self._is_faster(one, found)), found)

    def _is_faster(self, techniques: Techniques, than: Techniques) -> bool:
        """Whether steps become clearly shorter, in memory that is a small part of the device's, or a known disk's."""
        slot, estimate = self.slot, self.method.estimate
        with_it, without = (estimate(self.workload, slot.device, slot.node, one) for one in (techniques, than))
        added = with_it.memory.total_bytes - without.memory.total_bytes
        is_small = added <= _KEPT * slot.memory_bytes
        if with_it.disk_bytes:
            is_small = None not in (slot.node.disk_free_bytes, disk_read_rate(slot.node))
            is_small &= with_it.disk_bytes <= disk_usable_bytes(slot.node)
        return is_small and with_it.time.step_s <= without.time.step_s / WORTH_KEEPING

    def _conflict(self, techniques: Techniques) -> str | None:
        return conflict(self.method, techniques, self.slot.device, self.workload.shape, self.division.num_devices)

    def _row_counts(self, packing: bool) -> list[int]:
        """Micro-batch sizes worth an estimate, largest first: the share, even parts of it and the powers of two."""
        switches, workload = self.switches, self.workload
        if switches.rows is not None:
            return [switches.rows]
        part = workload.share / (switches.accumulation or 1)
        share = part * workload.global_batch_size
        usual = part * workload.tokens_per_step / workload.mean_length  # an epoch's last step has fewer
        if packing:  # rows of max_length tokens, each holding several samples
            share, usual = (each * workload.mean_length / switches.max_length for each in (share, usual))
        most = max(1, MICRO_BATCH_TOKENS[self.slot.device.kind] // switches.max_length)
        whole = max(1, min(math.ceil(share), most))
        fewest = max(1, math.ceil(usual / most - SPREAD))
        even = {math.ceil(usual / ((fewest << power) + SPREAD)) for power in range(whole.bit_length())}
        powers = {2**power for power in range(whole.bit_length())}
        return sorted({min(rows, most) for rows in even} | powers | {whole}, reverse=True)


@dataclass(frozen=True)
class FittingPlans:
    """Of all settings those that fit, and of the others what comes nearest to it."""

    plans: list[StrategyPlan]
    nearest_refused: StrategyPlan | None
    may_fit_whole: bool  # some of the others may, where a share is one micro-batch: no gradients wait for the next

    @property
    def leanest(self) -> StrategyPlan | None:
        """What needs least memory, whether it fits or not."""
        return preferred_plan(self.plans, "memory") or self.nearest_refused


@dataclass
class Estimates:
    """The plans for settings of an assignment: those that fit, and what the others lack."""

    assignment: Assignment
    rejections: Rejections
    refused: dict[Techniques, Miss] = field(default_factory=dict)
    known: dict[Techniques, StrategyPlan] = field(default_factory=dict)

    @property
    def nearest(self) -> Miss | None:
        """Of those that do not fit, what comes nearest to it."""
        return min(self.refused.values(), key=lambda miss: miss.shortage.times, default=None)

    def fitting(self, techniques: Techniques, rows: Sequence[int]) -> list[StrategyPlan]:
        """The plans that fit by the rows of a micro-batch, which are given and come out largest first.

        Where some rows do not fit, more do not either; but for the whole share, with which nothing is accumulated.
        """
        found: list[StrategyPlan] = []
        for count in reversed(rows):
            here = replace(techniques, per_device_train_batch_size=count)
            if plan := self._estimate(here):
                found.append(plan)
                continue
            if count < rows[0] and self.may_fit_whole([here]):
                whole = self._estimate(replace(techniques, per_device_train_batch_size=rows[0]))
                found += [whole] if whole else []
            return [*found[::-1], *self._between(found, count)]
        return found[::-1]

    def _between(self, fitting: Sequence[StrategyPlan], refused: int) -> list[StrategyPlan]:
        """The most rows that fit between those that do and those that do not, where there are any."""
        best = [plan for plan in fitting if plan.techniques.per_device_train_batch_size < refused][-1:]
        found: list[StrategyPlan] = []
        while best and refused - (fits := best[0].techniques.per_device_train_batch_size) > 1:
            middle = (fits + refused) // 2
            if plan := self._estimate(replace(best[0].techniques, per_device_train_batch_size=middle)):
                best = found = [plan]
            else:
                refused = middle
        return found

    def fastest(
        self, techniques: Techniques, rows: Sequence[int], network: Network | None = None
    ) -> StrategyPlan | None:
        """The fastest that fits by the rows of a micro-batch, largest first: until fewer of them gain nothing.

        Padding grows in steps, so that one count may gain nothing where the next does.
        """
        best: StrategyPlan | None = None
        refused, misses = 0, 0
        for count in rows:
            plan = self._estimate(replace(techniques, per_device_train_batch_size=count))
            if plan and best and step_s_of([plan], network) >= step_s_of([best], network):
                misses += 1
                if misses > _MISSES:
                    break
                continue
            if plan and not best and refused:
                between = self._between([plan], refused)
                plan = min([plan, *between], key=lambda one: step_s_of([one], network))
            best, refused = plan or best, refused if plan else count
        return best

    def may_fit_whole(self, refused: Sequence[Techniques]) -> bool:
        """Whether settings that do not fit could without gradients beside the activations."""
        plans = [self.refused[one].plan.memory for one in refused if one in self.refused]
        usable = self.assignment.slot.memory_bytes
        return any(memory.total_bytes - memory.gradients_bytes < usable for memory in plans)

    def explain(self) -> None:
        """Note why the nearest of those that do not fit does not."""
        if (miss := self.nearest) is not None:
            slot = self.assignment.slot
            self.rejections.offer(slot.label, miss)
            combination = describe_combination(self.assignment.method, miss.plan.techniques, slot)
            self.rejections.add(combination, miss.shortage.reason)

    def _estimate(self, techniques: Techniques) -> StrategyPlan | None:
        if techniques in self.known or techniques in self.refused:
            return self.known.get(techniques)
        slot = self.assignment.slot
        plan = self.assignment.method.estimate(self.assignment.workload, slot.device, slot.node, techniques)
        shortage = device_shortage(plan, slot)
        if shortage is None:
            self.known[techniques] = plan
            return plan
        self.refused[techniques] = Miss(plan, shortage)
        return None


def preferred_plan(
    fitting: Sequence[StrategyPlan], prefer: Prefer, network: Network | None = None
) -> StrategyPlan | None:
    """The fastest plan or the one that needs least memory; of equals the plainest, which is listed first."""
    if not fitting:
        return None
    if prefer == "memory":
        return min(fitting, key=lambda plan: (plan.memory.total_bytes, plan.time.step_s))
    seconds = [step_s_of([plan], network) for plan in fitting]
    enough_s = _EQUAL * min(seconds)
    return next(plan for plan, each in zip(fitting, seconds, strict=True) if each <= enough_s)


def describe_combination(method: Method, techniques: Techniques, slot: Slot) -> str:
    """A combination for a person, without its micro-batch."""
    parts = [method.name, techniques.dtype, techniques.attn_implementation, *describe_techniques(techniques)]
    if techniques.zero_stage:
        parts[-1] += f" x {techniques.num_shards}"
    return f"{' + '.join(parts)} on {slot.label}"


def describe_techniques(techniques: Techniques, with_loss: bool = False) -> list[str]:
    """What is on beyond a plain training, in words; the division last."""
    is_on = {
        "shared beginnings": techniques.share_prefixes,
        "checkpointing": techniques.gradient_checkpointing,
        techniques.loss_type: with_loss and techniques.loss_type != "nll",
        "8-bit optimizer": techniques.optim.startswith("adamw_bnb"),
        f"{techniques.offload} offload": techniques.offload != "none",
        f"ZeRO-{techniques.zero_stage}": techniques.zero_stage > 0,
        f"{techniques.stage.count if techniques.stage else 0} stages": techniques.stage is not None,
    }
    return [word for word, on in is_on.items() if on]


def _kernels(stated: Sequence[str], device: DeviceCapability, packing: bool) -> list[str]:
    """Attention kernels, best first: on a GPU the flash-attn library before one call a document."""
    allowed = [kernel for kernel in stated if packing or kernel != "document"]
    if device.kind != "cpu" and len(allowed) > 1:
        allowed.sort(key=lambda kernel: kernel != "flash_attention_2")
    return allowed


def _is_slower(slot: Slot, dtype: Dtype, than: Dtype) -> bool:
    """Whether products of a number format are clearly slower than those of another."""
    rate, other = (product_rate(slot.device, slot.node, each)[0] for each in (dtype, than))
    return rate < _SLOWER * other


def worthwhile_dtypes(dtypes: Sequence[Dtype], slot: Slot) -> list[Dtype]:
    """The faster 16-bit format, of equals bfloat16 since it needs no loss scaling; and fp32 beside it."""
    half: list[Dtype] = [dtype for dtype in dtypes if dtype != "float32"]
    if len(half) > 1:
        rate = {dtype: product_rate(slot.device, slot.node, dtype)[0] for dtype in half}
        if slot.device.kind != "cpu" and slot.device.has_bf16_units is False:
            rate["bfloat16"] = 0.0
        half = [max(half, key=lambda dtype: (rate[dtype], dtype == "bfloat16"))]
    found: list[Dtype] = [*half, "float32"] if "float32" in dtypes else half
    return sorted(found, key=lambda dtype: _is_slower(slot, dtype, "float32"))
