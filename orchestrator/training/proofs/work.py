"""What each worker does in place of training: a few steps in several layouts, compared with each other.

The first worker tries by itself what one machine can show while the others wait; then another process continues its
checkpoint, and all together train with unequal shares.  Where the model is divided among the workers, all of them take
part in everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.runs.proofs.proof import DIFFERS, PASSED, ROUNDING, Proof, judged, not_run
from orchestrator.runs.run_folder import RunFolder
from orchestrator.training.determinism import deterministic
from orchestrator.training.proofs.handed_back import prove_merged, prove_saved
from orchestrator.training.proofs.sample import ProofSample, layouts_of, uneven_shares
from orchestrator.training.proofs.trials import ShortTraining, Team, Trials, difference, without_dropout
from orchestrator.training.shares import Shares
from orchestrator.training.workers.setup import load_inputs, start_worker
from strategies.workload import Techniques

_DIVIDED = "the model is divided among the workers: none of them has all of it"


@dataclass(frozen=True)
class ProofWork:
    """The proofs of one job; Ray sends it to the workers."""

    sample: ProofSample
    finished: str | None = None  # the folder of a run whose own adapter is merged
    reasons: Mapping[str, str] = field(default_factory=dict)  # of checks that are not run here

    def __call__(self, run: RunFolder, rank: int, size: int, node: str, slot: int) -> None:
        """Record a proof for each check in the events of `run`, a folder that lives as long as this."""
        with deterministic(run.job().spec.train.deterministic):
            context = start_worker(run, rank, size, node, slot)
            context = replace(context, group=context.group.patient())  # who waits for the first worker waits long
            inputs = load_inputs(run, context, self.sample.rows)
            trials = Trials(context, inputs, self.sample, run.path)
            prover = Prover(run, trials, replace(inputs.techniques, cache_frozen_activations=False))
            prover.prove_layouts()
            prover.prove_resume()
            prover.prove_uneven(self.reasons.get("uneven"))
            if trials.is_divided:
                for check in ("saved", "merged"):
                    prover.record(not_run(check, f"{_DIVIDED}; a run compares what it hands back at its end"))
            elif context.is_first:
                finished = RunFolder(Path(self.finished)) if self.finished else None
                prover.record(_tried("saved", lambda: prove_saved(run, trials, inputs, prover.layouts.whole)))
                prover.record(_tried("merged", lambda: prove_merged(run, trials, finished)))
            context.group.gather(None)


def _tried(check: str, prove: Callable[[], Proof]) -> Proof:
    """A proof, or why it could not be made."""
    try:
        return prove()
    except OrchestratorError as error:
        return not_run(check, str(error))


class Prover:
    """One worker's part in the proofs of short trainings."""

    def __init__(self, run: RunFolder, trials: Trials, techniques: Techniques) -> None:
        context = trials.context
        self._trials, self._context, self.record = trials, context, context.record
        self._takes_part = context.is_first or trials.is_divided
        trials.setup.lower = None  # what lower layers made of a row would be taken over from one layout by the next
        self.layouts = layouts_of(techniques, trials.step_lengths())
        self._steps = f"{trials.sample.num_steps} steps of {trials.sample.rows_a_step} rows"
        self._middle = run.path / "trials-0" / f"step-{trials.sample.num_steps // 2:08d}"  # of the first worker
        self._whole: ShortTraining | None = None  # trained, as the job has it
        self._still: ShortTraining | None = None  # the same layout, weights that do not move

    def prove_layouts(self) -> None:
        """The rows of a step in one micro-batch, in several, and one row after the other."""
        if not self._takes_part:
            return
        trials, layouts = self._trials, self.layouts
        self._whole = trials.train(layouts.whole)
        with without_dropout(trials.setup.model):
            self._still = trials.step_at(self._middle, layouts.whole)
        if layouts.apart is None:
            self.record(not_run("packing", "rows are padded here, not packed"))
        else:
            self.record(_tried("packing", self._packing))
        if layouts.num_pieces < 2:
            self.record(not_run("accumulation", "a step is one row: there is nothing to add up"))
        else:
            self.record(_tried("accumulation", self._accumulation))

    def _packing(self) -> Proof:
        apart, whole = self.layouts.apart, self.layouts.whole
        assert apart
        found = self._judge("packing", apart, f"{self._numbers}: packed end to end, and one row after the other")
        if found.outcome != DIFFERS:
            return found
        where = f"{whole.attn_implementation} attention in {whole.dtype} on {self._context.part.device}"
        return replace(found, reason=f"{where} is further from row by row; data.packing: false trains row by row")

    def _accumulation(self) -> Proof:
        pieces = "several micro-batches" if self.layouts.apart else "row after row"
        return self._judge("accumulation", self.layouts.pieces, f"{self._numbers}: in one micro-batch, and in {pieces}")

    def _judge(self, check: str, layout: Techniques, compared: str) -> Proof:
        assert self._still
        with without_dropout(self._trials.setup.model):
            found = self._trials.step_at(self._middle, layout)
        dtype = layout.dtype
        return judged(check, compared, difference(found, self._still), ROUNDING[dtype], _rounding(dtype))

    @property
    def _numbers(self) -> str:
        return f"loss and gradient of {self._steps} by the same weights"

    def prove_resume(self) -> None:
        """The second half of the steps from a checkpoint, in another process where this machine has one."""
        trials, group, nodes = self._trials, self._context.group, self._context.plan.nodes
        group.gather(None)  # the checkpoint is written
        has_other = group.size > 1 and not trials.is_divided and nodes[0].node == nodes[1].node
        resumer = 1 if has_other else 0
        found = None
        if trials.is_divided or group.rank == resumer:
            found = trials.train(self.layouts.whole, since=self._middle)
        found = group.gather(found)[resumer]
        if self._context.is_first and found and self._whole:
            self.record(self._judge_resume(found, self._whole, "another process" if has_other else "this process"))

    def _judge_resume(self, found: ShortTraining, whole: ShortTraining, process: str) -> Proof:
        compared = f"the last {len(found.losses)} of {self._steps}: without a break, and from a checkpoint in {process}"
        nodes = self._context.plan.nodes if self._trials.is_divided else self._context.plan.nodes[:1]
        is_exact = self._context.job.spec.train.deterministic or all(one.torch_device == "cpu" for one in nodes)
        dtype = self.layouts.whole.dtype
        if not is_exact:
            why = f"{_rounding(dtype)}; train.deterministic: true makes it bit-equal on one GPU"
            return judged("resume", compared, difference(found, whole), ROUNDING[dtype], why)
        why = "bit by bit, with every trained weight"
        proof = judged("resume", compared, difference(found, whole), 0.0, why)
        other = sum(found.weights[name] != weight for name, weight in whole.weights.items())
        if other and proof.outcome == PASSED:
            proof = replace(proof, outcome=DIFFERS, reason=f"{other} of {len(whole.weights)} weights have other bits")
        return proof

    def prove_uneven(self, reason: str | None) -> None:
        """All workers with unequal shares, and the first one alone.  Collective."""
        context, plan = self._context, self._context.plan
        if self._trials.is_divided:
            reason = f"{_DIVIDED}, so none can train alone"
        elif plan.local_batch_size:
            reason = "with strategy.local_steps workers train apart inside a step: it is another computation"
        elif context.group.size < 2:
            reason = reason or "one machine"
        if reason:
            self.record(not_run("uneven", reason))
            return
        shares = uneven_shares([part.share for part in plan.nodes])
        with without_dropout(self._trials.setup.model):
            team = Team(context.group, Shares(list(shares), is_fixed=True))
            found = self._trials.step_at(self._middle, self.layouts.whole, team)
        if self._still:
            dtypes = [*(part.techniques.dtype for part in plan.nodes), plan.sync.dtype]
            coarsest = max(dtypes, key=lambda dtype: ROUNDING[dtype])
            parts = " + ".join(f"{share:.0%}" for share in shares)
            compared = f"{self._numbers}: {parts} of the rows on {len(shares)} workers, and all on one"
            far = difference(found, self._still)
            self.record(judged("uneven", compared, far, ROUNDING[coarsest], _rounding(coarsest)))


def _rounding(dtype: str) -> str:
    return f"another order of sums in {dtype}"
