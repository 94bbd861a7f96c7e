"""What happens when machines are lost, return or join: plan again with those that are there, from the last checkpoint.

The same pure planner serves unequal machines, growth and failure.  What decides the result (method, samples of a step,
number of steps, optimizer) stays as the first plan has it; only who does it, and how, may change.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clusters.capability import ClusterCapability, NodeCapability
from clusters.units import format_bytes, format_s
from orchestrator.errors import HardwareChanged, NothingFits, RunFailed
from orchestrator.job import model_files
from orchestrator.job.job_file import Job
from orchestrator.lifecycle import machines
from orchestrator.lifecycle.hooks import BankHooks
from orchestrator.lifecycle.prepare import plan_job, sizes_of
from orchestrator.planning import planner, workload
from orchestrator.planning.plan import Plan
from orchestrator.runs.run_folder import RunFolder

_TRIES_WITHOUT_A_STEP = 3
_LESS_MEMORY = 0.6
_MOST_SHRINKS = 4
_POLL_S = 3.0
_FREE_POLL_S = 0.5
_SILENT_S = 3.0  # what ends in this time was on its way out
_SAID_EVERY_S = 60.0
_SEEN_FOR_S = 10.0  # before a machine that came is counted on
_RESTART_S = 45.0  # what a new start costs, about
_GAIN = 1.1  # a machine that joins must make steps so much faster


@dataclass
class Recovery:
    """The machines of one run while it runs, and what to do about them."""

    run: RunFolder
    job: Job
    plan: Plan
    capability: ClusterCapability
    replan: Callable[[Plan, ClusterCapability], Plan]
    say: Callable[[str], None]
    _failures: int = 0
    _shrunk: int = 0
    _tries: int = 0
    _last_step: int = -1
    _looked_at: float = 0.0
    _seen_since: dict[str, float] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)

    @property
    def is_local(self) -> bool:
        return self.job.spec.cluster.address == "local"

    def present(self) -> dict[str, str]:
        """Ray's ids of the nodes that are there; nothing on a single embedded machine."""
        if self.is_local:
            return {}
        from clusters.ray import nodes as roster

        return roster.present()

    def node_ids(self) -> dict[str, str]:
        """Ray's id of each node of the plan; nothing on a single embedded machine."""
        if self.is_local:
            return {}
        from clusters.ray import nodes as roster

        present = roster.present()
        missing = [part.node for part in self.plan.nodes if part.node not in present]
        if missing:
            raise RunFailed(f"{', '.join(missing)} left the cluster before training started")
        return {part.node: present[part.node] for part in self.plan.nodes}

    def wait_until_free(self, slot: dict[str, float], node_ids: dict[str, str]) -> bool:
        """Until the nodes can give what the plan's workers take; says what is waited for.  False when asked to stop."""
        if self.is_local:
            return True
        from clusters.ray import nodes as roster

        wanted: dict[str, dict[str, float]] = {}
        for part in self.plan.nodes:
            of_node = wanted.setdefault(node_ids[part.node], {})
            for kind, amount in slot.items():
                of_node[kind] = of_node.get(kind, 0.0) + amount
        began, said = time.monotonic(), -math.inf
        while lacking := roster.shortage(wanted):
            now = time.monotonic()
            if now - began >= _SILENT_S and now - said >= _SAID_EVERY_S:
                self.say(f"waiting for {lacking}. Ctrl-C ends this")
                said = now
            if self.run.stop_file.exists():
                self.run.record("state", state="stopped", step=max(self.run.steps(), default=0))
                return False
            time.sleep(_FREE_POLL_S)
        return True

    def on_this_machine(self) -> Plan:
        """The plan to begin with where Ray is started here: another one where a planned GPU is no longer there."""
        from clusters.hardware.gpus import look_at_gpus

        planned = {part.uuid for part in self.plan.nodes if part.uuid}
        gone = planned - {gpu.uuid for gpu in look_at_gpus()[0]} if planned else set()
        if not gone:
            return self.plan
        began = time.monotonic()
        self.say(f"{', '.join(sorted(gone))}, which the plan is for, is no longer in this machine: planning again")
        self.capability = machines.probe("local", self.say)
        return self._go_on_with(self._planned_on(self.capability), began)

    def lock_gpus(self, stack: contextlib.ExitStack) -> bool:
        """Hold the plan's GPUs of this machine, or others as good, against other jobs of this user; False when asked to
        stop meanwhile."""
        from orchestrator.training.workers.gpu_locks import own_cards

        self.on_this_machine()
        is_over = self.run.stop_file.exists
        held = stack.enter_context(own_cards(self.plan, self.capability, self.say, is_over))
        if held is None:
            self.run.record("state", state="stopped", step=max(self.run.steps(), default=0))
            return False
        self.plan = held
        return True

    def at_start(self) -> Plan:
        """The plan to begin with: another one where a resumed run finds other machines than it left."""
        if self.is_local:
            return self.plan
        from clusters.ray import nodes as roster

        present = roster.present()
        if {part.node for part in self.plan.nodes} <= set(present):
            return self.plan
        return self._go_on_with(self._plan_with_those_there(has_failed=True), time.monotonic())

    def look(self) -> None:
        """Notice machines that came: ask the run to save and plan again where one of them makes it faster."""
        if self.is_local or time.monotonic() - self._looked_at < _POLL_S or self.run.replan_file.exists():
            return
        self._looked_at = now = time.monotonic()
        from clusters.ray import nodes as roster

        present = roster.present()
        known = {part.node for part in self.plan.nodes} | set(self.plan.left_out) | self._refused
        new = roster.trainable(present) - known
        self._seen_since = {name: self._seen_since.get(name, now) for name in new}
        ready = {name for name, since in self._seen_since.items() if now - since >= _SEEN_FOR_S}
        if not ready:
            return
        wider = self._with_those_present(set(present))
        steps_left = wider.num_steps - max(self.run.steps(), default=0)
        gain_s = steps_left * (self.plan.step_s - wider.step_s)
        joins = {part.node for part in wider.nodes} & ready
        asked = self.job.spec.cluster.num_workers
        is_short = isinstance(asked, int) and len(self.plan.nodes) < asked
        if joins and is_short:
            self.say(f"{', '.join(sorted(joins))} joined: planning again at the next step")
            self.run.replan_file.touch()
        elif joins and self.plan.step_s > _GAIN * wider.step_s and gain_s > _RESTART_S:
            self.say(f"{', '.join(sorted(joins))} joined: planning again at the next step, {format_s(gain_s)} faster")
            self.run.replan_file.touch()
        else:
            self._refused |= ready
            self.say(f"{', '.join(sorted(ready))} joined, and would not make the rest of this run faster")

    def after(self, error: BaseException | None) -> Plan | None:
        """The plan to go on with, None when the run is over.  Raises what ends it."""
        state = self.run.state_by_events()
        if error is None and state != "replanning":
            return None
        began = time.monotonic()
        if error is not None:
            if not isinstance(error, RunFailed):
                raise error
            self._count(error)
            if isinstance(error, HardwareChanged):
                self._look_at_planned_nodes()
        self.run.replan_file.unlink(missing_ok=True)
        plan = self.plan if self.is_local else self._plan_with_those_there(error is not None)
        return self._go_on_with(plan, began)

    def _go_on_with(self, plan: Plan, began: float) -> Plan:
        before = {part.node for part in self.plan.nodes}
        after = {part.node for part in plan.nodes}
        self.run.keep("plan.json", plan.to_json())
        self.run.keep("capability.json", json.dumps(self.capability.as_dict(), indent=1))
        self.run.record(
            "replanned",
            plan=plan.hash,
            nodes=sorted(after),
            lost=sorted(before - after),
            joined=sorted(after - before),
            seconds=round(time.monotonic() - began, 2),
        )
        self.plan = plan
        return plan

    def _count(self, error: RunFailed) -> None:
        """Raise the error where another try would not help."""
        told = self._of_this_try("error")
        reason = told[-1]["text"] if told else str(error)
        final = next((event for event in reversed(told) if not event.get("again", True)), None)
        if final:
            raise RunFailed(final["text"]) from error
        step = max(self.run.steps(), default=0)
        self._failures += 1
        self._tries = self._tries + 1 if step == self._last_step else 1
        self._last_step = step
        allowed = self.job.spec.cluster.max_failures
        if allowed == "auto":
            allowed = 0 if self.is_local else self._failures
        if self._failures > allowed:
            raise RunFailed(reason) from error
        killed = {event["node"] for event in self._of_this_try("killed") if event.get("node")}
        is_leaner = self._tries > 1 and self._shrunk < _MOST_SHRINKS and self._count_on_less(killed)
        if not is_leaner and self._tries >= _TRIES_WITHOUT_A_STEP:
            raise RunFailed(f"{reason} ({self._tries} tries in a row made no step)") from error
        self.run.record("failure", text=reason, step=step, failures=self._failures)
        self.say(f"a worker failed after step {step} ({reason}); going on from the last checkpoint")

    def _of_this_try(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for event in self.run.events()[0]:
            if event["event"] == name:
                found.append(event)
            elif event["event"] in ("failure", "replanned") or event.get("state") == "running":
                found = []
        return found

    def _count_on_less(self, killed: set[str]) -> bool:
        """Two tries ended at the same step: count on less memory where there is less now, or where workers were killed.

        False where nothing says that memory is what is lacking.
        """
        names = killed or {part.node for part in self.plan.nodes}
        seen = {} if self.is_local else {node.name: node for node in self._looked_at_again(names)}
        nodes, is_leaner = [], False
        for node in self.capability.nodes:
            now = seen.get(node.name)
            if now and now.memory_bytes and now.memory_bytes < _LESS_MEMORY * (node.memory_bytes or math.inf):
                node, is_leaner = now, True
                self.say(f"{node.name} has {format_bytes(now.memory_bytes)} only: planning with that")
            elif node.name in killed:
                node, is_leaner = _with_less_memory(node), True
                self.say(f"a worker on {node.name} was killed twice: planning with {_LESS_MEMORY:.0%} of its memory")
            nodes.append(node)
        if is_leaner:
            self.capability = replace(self.capability, nodes=tuple(nodes))
            self._shrunk, self._tries = self._shrunk + 1, 0
        return is_leaner

    def _look_at_planned_nodes(self) -> None:
        """Plan with the GPUs that are there now; where they are the same as before, the failures go on counting."""
        seen = {node.name: node for node in self._looked_at_again({part.node for part in self.plan.nodes})}
        nodes = tuple(seen.get(node.name, node) for node in self.capability.nodes)
        if _uuids(nodes) != _uuids(self.capability.nodes):
            self.capability, self._tries = replace(self.capability, nodes=nodes), 0

    def _looked_at_again(self, names: set[str]) -> tuple[NodeCapability, ...]:
        """The named nodes as they are now, as far as they answer."""
        from clusters.ray.probe import probe_connected

        others = tuple(node for node in self.capability.nodes if node.name not in names)
        return tuple(n for n in probe_connected(replace(self.capability, nodes=others)).nodes if n.name in names)

    def _plan_with_those_there(self, has_failed: bool) -> Plan:
        """Wait a while for lost machines; then the same plan, or one without them."""
        from clusters.ray import nodes as roster

        wanted = {part.node for part in self.plan.nodes}
        patience = self.job.spec.cluster.wait_for_nodes_s if has_failed else 0.0
        until, told = time.monotonic() + patience, False
        while True:
            present = roster.present()
            there = roster.answering(present)
            missing = wanted - there
            if not missing and has_failed:
                return self._with_those_present(wanted) if self._tries == 0 else self.plan
            if time.monotonic() >= until and there:
                return self._with_those_present(there)
            if not told:
                self.say(f"{', '.join(sorted(missing)) or 'the cluster'} does not answer; waiting {patience:.0f} s")
                told = True
            time.sleep(1.0)

    def _with_those_present(self, names: set[str]) -> Plan:
        from clusters.ray import nodes as roster
        from clusters.ray.probe import probe_connected

        if names - {node.name for node in self.capability.nodes}:
            self.capability = probe_connected(self.capability)
        trains = roster.trainable({name: node_id for name, node_id in roster.present().items() if name in names})
        there = replace(
            self.capability, nodes=tuple(node for node in self.capability.nodes if node.name in names & trains)
        )
        return self._planned_on(there)

    def _planned_on(self, there: ClusterCapability) -> Plan:
        """The plan for these nodes, or for those that remain without the smallest where it does not fit there."""
        if not there.nodes:
            raise NothingFits("no machine is left that could train")
        try:
            return self.replan(self.plan, there)
        except NothingFits:
            if len(there.nodes) < 2:
                raise
            smallest = min(there.nodes, key=lambda node: node.memory_bytes or math.inf)
            return self._planned_on(replace(there, nodes=tuple(node for node in there.nodes if node is not smallest)))


def _uuids(nodes: Sequence[NodeCapability]) -> set[str | None]:
    return {gpu.uuid for node in nodes for gpu in node.gpus}


def _with_less_memory(node: NodeCapability) -> NodeCapability:
    devices = tuple(
        replace(device, memory_bytes=int(_LESS_MEMORY * device.memory_bytes)) if device.memory_bytes else device
        for device in node.devices
    )
    return replace(node, devices=devices)


def replan(run: RunFolder, job: Job, bank: BankHooks, first: Plan, cluster: ClusterCapability) -> Plan:
    """The run's plan for other machines: the same method and steps, divided among others."""
    from orchestrator.job.sections.methods import METHOD_SECTIONS
    from orchestrator.training.model.loading import load_data

    config = model_files.read_config(Path(run.data()["model"]))
    num_slots = len(planner.slots_of(job.spec, cluster))
    fixed = fixed_job(job, first, METHOD_SECTIONS[first.method["type"]], num_slots)
    again, _ = plan_job(fixed, config, workload.model_shape(config), cluster, sizes_of(*load_data(run)), bank)
    return keep_numbers(first, again)


def fixed_job(job: Job, plan: Plan, method_section: Callable[..., Any], num_slots: int) -> Job:
    """The job with what the first plan decided written into it, so that planning again cannot change the result."""
    size, rows = plan.local_batch_size or plan.global_batch_size, job.spec.train.per_device_train_batch_size
    train = job.spec.train.model_copy(
        update={
            "global_batch_size": size,
            "per_device_train_batch_size": min(rows, size) if isinstance(rows, int) else rows,
            "optim": plan.optim,
            "gradient_accumulation_steps": "auto",
        }
    )
    asked = job.spec.cluster.num_workers
    wanted = min(asked, num_slots) if isinstance(asked, int) else asked
    cluster = job.spec.cluster.model_copy(update={"num_workers": wanted})
    goal = type(job.spec.goal)(prefer=job.spec.goal.prefer)
    # ZeRO needs companions; who is left alone goes on without it, from the same whole checkpoint.
    strategy = job.spec.strategy
    if num_slots < 2 and strategy.mode.startswith("zero"):
        strategy = strategy.model_copy(update={"mode": "auto"})
    spec = job.spec.model_copy(
        update={
            "method": method_section(**plan.method),
            "train": train,
            "cluster": cluster,
            "goal": goal,
            "strategy": strategy,
        }
    )
    return Job(spec, job.folder, job.text)


def keep_numbers(first: Plan, again: Plan) -> Plan:
    """`again` with everything that decides the result as `first` has it."""
    return replace(
        again,
        global_batch_size=first.global_batch_size,
        num_steps=first.num_steps,
        save_steps=first.save_steps,
        eval_steps=first.eval_steps,
        load_best_model_at_end=first.load_best_model_at_end,
        max_new_tokens=first.max_new_tokens,
        helper=first.helper,
        metrics=first.metrics,
    )
