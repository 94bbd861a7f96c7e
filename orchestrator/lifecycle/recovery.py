"""Nodes that are lost, return or join: plan again with those that are there, from the last checkpoint.

The same pure planner serves unequal machines, growth and failure.  What decides the result (method, samples of a step,
number of steps, optimizer) stays as the first plan has it; only who does it, and how, may change.  What to do is
decided in recovery_policy.py; here nodes are asked, probed and planned with.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clusters.capability import ClusterCapability, NodeCapability
from orchestrator.errors import HardwareChanged, NothingFits, RunFailed
from orchestrator.job import model_files
from orchestrator.job.job_file import Job, spec_with
from orchestrator.lifecycle import machines
from orchestrator.lifecycle import recovery_policy as policy
from orchestrator.lifecycle.hooks import BankHooks
from orchestrator.lifecycle.prepare import plan_job, sizes_of
from orchestrator.lifecycle.recovery_policy import Act, Decision, News, decide
from orchestrator.lifecycle.stages import node_layers, slow
from orchestrator.planning import planner, workload
from orchestrator.planning.plan import Plan
from orchestrator.runs.events import ErrorReport, Failure, Replan, StateChange, WorkerKilled
from orchestrator.runs.run_folder import RunFolder

_LOOK_EVERY_S = 3.0
_ASK_EVERY_S = 1.0
_FREE_POLL_S = 0.5
_SILENT_S = 3.0  # what ends in this time was about to end anyway
_REPORT_EVERY_S = 60.0
_FIXED = (  # by the first plan
    "global_batch_size",
    "num_steps",
    "save_steps",
    "eval_steps",
    "load_best_model_at_end",
    "max_new_tokens",
    "beside",
    "metrics",
)


class Recovery:
    """The nodes of one run while it runs, and what to do about them."""

    def __init__(
        self,
        run: RunFolder,
        job: Job,
        plan: Plan,
        capability: ClusterCapability,
        replan: Callable[[Plan, ClusterCapability], Plan],
        say: Callable[[str], None],
    ) -> None:
        self.run, self.job, self.capability = run, job, capability
        self.replan, self.say = replan, say
        cluster = job.spec.cluster
        self.is_local = cluster.address == "local"
        auto = 0 if self.is_local else None
        self.state = policy.State(
            planned=frozenset(),
            is_local=self.is_local,
            max_failures=auto if cluster.max_failures == "auto" else cluster.max_failures,
            patience_s=cluster.wait_for_nodes_s,
        )
        self._looked_at, self._steps = 0.0, slow.RecentSteps()
        self._use(plan)

    def _use(self, plan: Plan) -> None:
        stated, self.plan = self.job.spec.cluster.num_workers, plan
        self.state = replace(
            self.state,
            planned=frozenset(part.node for part in plan.nodes),
            excluded=frozenset(plan.left_out),
            spares=frozenset(plan.stands_by),
            judged=(),
            lacks_workers=isinstance(stated, int) and len(plan.nodes) < stated,
        )

    # Before the workers start.

    def present(self) -> dict[str, str]:
        """Ray's ids of the nodes that are there; nothing on a single embedded machine."""
        if self.is_local:
            return {}
        from clusters.ray import nodes

        return nodes.present()

    def node_ids(self) -> dict[str, str]:
        """Ray's id of each node of the plan; nothing on a single embedded machine."""
        if self.is_local:
            return {}
        present = self.present()
        if missing := [part.node for part in self.plan.nodes if part.node not in present]:
            raise RunFailed(f"{', '.join(missing)} left the cluster before training started")
        return {part.node: present[part.node] for part in self.plan.nodes}

    def wait_until_free(self, slot: dict[str, float], node_ids: dict[str, str]) -> bool:
        """Wait until the nodes have free what the plan's workers take, and say for what.  False when asked to stop."""
        if self.is_local:
            return True
        from clusters.ray import nodes

        wanted: dict[str, dict[str, float]] = {}
        for part in self.plan.nodes:
            of_node = wanted.setdefault(node_ids[part.node], {})
            for kind, amount in slot.items():
                of_node[kind] = of_node.get(kind, 0.0) + amount
        began, reported = time.monotonic(), -math.inf
        while lacking := nodes.shortage(wanted):
            now = time.monotonic()
            if now - began >= _SILENT_S and now - reported >= _REPORT_EVERY_S:
                self.say(f"waiting for {lacking}. Ctrl-C ends this")
                reported = now
            if self.run.stop_file.exists():
                self.run.record_stop()
                return False
            time.sleep(_FREE_POLL_S)
        return True

    def replace_missing_gpus(self) -> Plan:
        """The plan to begin with where Ray is started here: another one where a planned GPU is no longer there."""
        from clusters.hardware.gpus import look_at_gpus

        planned = {part.uuid for part in self.plan.nodes if part.uuid}
        gone = planned - {gpu.uuid for gpu in look_at_gpus()[0]} if planned else set()
        if not gone:
            return self.plan
        began = time.monotonic()
        self.say(f"{', '.join(sorted(gone))}, which the plan is for, is no longer in this machine: planning again")
        self.capability = machines.probe("local", self.say)
        return self._adopt(self._plan_for(self.capability.nodes), began)

    def lock_gpus(self, stack: contextlib.ExitStack) -> bool:
        """Lock the plan's GPUs of this machine, or others as good, against other jobs of this user; False when asked to
        stop meanwhile."""
        from orchestrator.training.workers.gpu_locks import hold_gpus

        self.replace_missing_gpus()
        locked = stack.enter_context(hold_gpus(self.plan, self.capability, self.say, self.run.stop_file.exists))
        if locked is None:
            self.run.record_stop()
            return False
        self._use(locked)
        return True

    def at_start(self) -> Plan:
        """The plan to begin with: another one where a resumed run finds other nodes than it left."""
        if self.is_local:
            return self.plan
        began = time.monotonic()
        decision = self._decide(policy.Started(frozenset(self.present())))
        return self.plan if decision.act is Act.CONTINUE else self._adopt(self._carry_out(decision), began)

    # While they train.

    def look(self) -> None:
        """Notice slow stages and nodes that joined: ask the run to save and plan again where that makes it faster."""
        if (now := time.monotonic()) - self._looked_at < _LOOK_EVERY_S or self.run.replan_file.exists():
            return
        self._looked_at = now
        if self.plan.techniques.stage and self._look_at_stages():
            return
        if self.is_local:
            return
        from clusters.ray import nodes

        present = nodes.present()
        decision = self._decide(policy.NodeList(frozenset(nodes.trainable(present)), now))
        if decision.act is not Act.PLAN_AHEAD:
            return
        wider = self._plan_with(frozenset(present))
        news = policy.WiderPlan(
            new=decision.nodes,
            used=frozenset(part.node for part in wider.nodes),
            step_s=self.plan.step_s,
            wider_step_s=wider.step_s,
            steps_left=wider.num_steps - self.run.last_step(),
        )
        if self._decide(news).act is Act.REPLAN_RUN:
            self.run.replan_file.touch()

    def _look_at_stages(self) -> bool:
        """Whether layers are to be cut anew: a stage is slower than planned, and others could take some of them."""
        pace = slow.find_slow_stage(self.plan, self._steps.read(self.run))
        if pace is None or self.job.spec.strategy.shares == "planned" or self.job.spec.train.deterministic:
            return False
        found = policy.SlowStage(self.plan.nodes[pace.slowest].node, pace.ratios[pace.slowest], pace.ratios)
        if self._decide(found).act is not Act.PLAN_AHEAD:
            return False
        before, self.capability = self.capability, slow.with_measured_pace(self.capability, self.plan, pace.ratios)
        other = self._plan_with(frozenset(self.present()))
        steps_left = other.num_steps - self.run.last_step()
        if self._decide(policy.OtherCut(found, pace.step_s, other.step_s, steps_left)).act is Act.REPLAN_RUN:
            self.run.replan_file.touch()
            return True
        self.capability = before
        return False

    # After they ended.

    def after(self, error: BaseException | None) -> Plan | None:
        """The plan to continue with, None when the run is over.  Raises what ends it."""
        if error is not None and not isinstance(error, RunFailed):
            raise error
        began = time.monotonic()
        decision = self._after_failure(error) if error else self._decide(policy.Ended(self.run.state_by_events()))
        if decision.act is Act.END:
            return None
        self.run.replan_file.unlink(missing_ok=True)
        return self._adopt(self._carry_out(decision), began)

    def _after_failure(self, error: RunFailed) -> Decision:
        news = self._failure(error)
        decision, probed = self._decide(news), dict[str, NodeCapability]()
        if decision.act is Act.PROBE_MEMORY:
            asked = frozenset() if self.is_local else decision.nodes
            probed = self._probe(asked) if asked else {}
            decision = self._decide(replace(news, memory=self._memory(asked, probed)))
        if decision.act is Act.FAIL:
            raise RunFailed(decision.texts[0]) from error
        self.run.record(Failure(news.reason, step=news.step, failures=self.state.failures))
        self._apply(decision, probed)
        if decision.act is Act.PROBE_GPUS:
            probed = self._probe(decision.nodes)
            now = [probed.get(node.name, node) for node in self.capability.nodes]
            decision = self._decide(policy.GpusProbed(_uuids(self.capability.nodes), _uuids(now)))
            self._apply(decision, probed)
        return decision

    def _failure(self, error: RunFailed) -> policy.Failed:
        """What the events of this try tell of its end."""
        errors = self._of_this_try(ErrorReport)
        final = next((event for event in reversed(errors) if event.again is False), None)
        return policy.Failed(
            step=self.run.last_step(),
            reason=(final or errors[-1]).text if errors else str(error),
            is_final=final is not None,
            killed=frozenset(event.node for event in self._of_this_try(WorkerKilled) if event.node),
            hardware_changed=isinstance(error, HardwareChanged),
        )

    def _of_this_try(self, kind: type[Any]) -> list[Any]:
        found: list[Any] = []
        for event in self.run.events_of(kind, Failure, Replan, StateChange):
            if isinstance(event, kind):
                found.append(event)
            elif isinstance(event, Failure | Replan) or (isinstance(event, StateChange) and event.state == "running"):
                found = []
        return found

    def _memory(self, asked: frozenset[str], probed: Mapping[str, NodeCapability]) -> dict[str, policy.NodeMemory]:
        """Of each node: what is planned with, and what was probed."""
        return {
            node.name: policy.NodeMemory(
                planned=node.memory_bytes,
                now=now.memory_bytes if (now := probed.get(node.name)) else None,
                is_silent=node.name in asked and node.name not in probed,
            )
            for node in self.capability.nodes
        }

    def _apply(self, decision: Decision, probed: Mapping[str, NodeCapability]) -> None:
        """Plan with nodes as they were probed, or with less of their memory."""

        def apply_to(node: NodeCapability) -> NodeCapability:
            if node.name in decision.measured:
                return probed.get(node.name, node)
            return machines.with_less_memory(node, policy.LESS_MEMORY) if node.name in decision.shrunk else node

        self.capability = replace(self.capability, nodes=tuple(map(apply_to, self.capability.nodes)))

    def _probe(self, names: frozenset[str]) -> dict[str, NodeCapability]:
        """The named nodes as they are now, as far as they answer."""
        from clusters.ray.probe import probe_connected

        others = tuple(node for node in self.capability.nodes if node.name not in names)
        found = probe_connected(replace(self.capability, nodes=others)).nodes
        return {node.name: node for node in found if node.name in names}

    # Deciding and planning.

    def _decide(self, news: News) -> Decision:
        """Decide, and say it; what is known then is kept."""
        decision = decide(self.state, news)
        self.state = decision.state
        for text in decision.texts if decision.act is not Act.FAIL else ():
            self.say(text)
        return decision

    def _carry_out(self, decision: Decision) -> Plan:
        """The plan that a decision comes to; the nodes are asked as often as it takes."""
        from clusters.ray import nodes

        began, slotless = time.monotonic(), {node.name for node in self.capability.nodes if node.num_slots == 0}
        while decision.act in (Act.ASK_NODES, Act.WAIT):
            if decision.act is Act.WAIT:
                time.sleep(_ASK_EVERY_S)
            answering = frozenset(nodes.answering(nodes.present())) - slotless
            decision = self._decide(policy.Answers(answering, time.monotonic() - began))
        return self.plan if decision.act is Act.CONTINUE else self._plan_with(decision.nodes)

    def _plan_with(self, names: frozenset[str]) -> Plan:
        """The plan for those of the named nodes that offer a slot; new ones are probed.  Where Ray was started here:
        for the devices that it was started with.
        """
        if self.is_local:
            used = {(part.uuid, part.device) for part in self.plan.nodes}
            return self._plan_for(machines.with_devices(node, used) for node in self.capability.nodes)
        from clusters.ray import nodes
        from clusters.ray.probe import probe_connected

        if names - {node.name for node in self.capability.nodes}:
            self.capability = probe_connected(self.capability)
        trains = nodes.trainable({name: node_id for name, node_id in nodes.present().items() if name in names})
        return self._plan_for(node for node in self.capability.nodes if node.name in names & trains)

    def _plan_for(self, nodes: Iterable[NodeCapability]) -> Plan:
        """The plan for these nodes, or for those that remain without the smallest where it does not fit there."""
        error, left = NothingFits("no machine is left that could train"), tuple(nodes)
        while left:
            try:
                return self.replan(self.plan, replace(self.capability, nodes=left))
            except NothingFits as unfit:
                error = unfit
            fewer = self._decide(policy.DoesNotFit({node.name: node.memory_bytes for node in left})).nodes
            left = tuple(node for node in left if node.name in fewer)
        raise error

    def _adopt(self, plan: Plan, began: float) -> Plan:
        """Write the plan and its nodes into the run."""
        before = self.state.planned
        self._use(plan)
        after = self.state.planned
        self.run.keep("plan.json", plan.to_json())
        self.run.keep("capability.json", json.dumps(self.capability.as_dict(), indent=1))
        replan = Replan(
            plan=plan.hash,
            nodes=sorted(after),
            lost=sorted(before - after),
            joined=sorted(after - before),
            seconds=round(time.monotonic() - began, 2),
        )
        self.run.record(replan)
        return plan


def _uuids(nodes: Iterable[NodeCapability]) -> frozenset[str | None]:
    return frozenset(gpu.uuid for node in nodes for gpu in node.gpus)


def replan(run: RunFolder, job: Job, bank: BankHooks, first: Plan, cluster: ClusterCapability) -> Plan:
    """The run's plan for other machines: the same method and steps, divided among others."""
    from orchestrator.job.sections.methods import METHOD_SECTIONS
    from orchestrator.training.model.loading import load_data

    config = model_files.read_config(Path(run.data().model))
    num_slots = len(planner.slots_of(job.spec, cluster))
    fixed = fixed_job(job, first, METHOD_SECTIONS[first.method["type"]], num_slots)
    cluster = node_layers.with_held_layers(cluster, first)
    again, _ = plan_job(fixed, config, workload.model_shape(config), cluster, sizes_of(*load_data(run)), bank)
    return keep_numbers(first, again)


def fixed_job(job: Job, plan: Plan, method_section: Callable[..., Any], num_slots: int) -> Job:
    """The job with what the first plan decided written into it, so that planning again cannot change the result."""
    size, rows = plan.local_batch_size or plan.global_batch_size, job.spec.train.per_device_train_batch_size
    stated, mode = job.spec.cluster.num_workers, job.spec.strategy.mode
    fixed = {
        "train.global_batch_size": size,
        "train.per_device_train_batch_size": min(rows, size) if isinstance(rows, int) else rows,
        "train.optim": plan.optim,
        "train.gradient_accumulation_steps": "auto",
        "cluster.num_workers": min(stated, max(1, num_slots)) if isinstance(stated, int) else stated,
        # Other modes need several workers; one that is left alone continues whole, from the same whole checkpoint.
        "strategy.mode": mode if num_slots > 1 or mode == "single" else "auto",
    }
    pipeline = job.spec.strategy.pipeline
    opened = {"stages": "auto"} if isinstance(pipeline.stages, int) and pipeline.stages > num_slots else {}
    if pipeline.replicas not in ("auto", 1) and num_slots < max(len(plan.nodes), pipeline.replicas + 1):
        opened["replicas"] = fixed["cluster.num_workers"] = "auto"
    if opened:
        fixed["strategy.pipeline"] = pipeline.model_dump(exclude_unset=True) | opened
    goal = type(job.spec.goal)(prefer=job.spec.goal.prefer, max_hours=1e6)  # what has begun continues, however slow
    spec = spec_with(job.spec, fixed).model_copy(update={"method": method_section(**plan.method), "goal": goal})
    return Job(spec, job.folder, job.text)


def keep_numbers(first: Plan, again: Plan) -> Plan:
    """`again` with everything that decides the result as `first` has it."""
    return replace(again, **{name: getattr(first, name) for name in _FIXED})
