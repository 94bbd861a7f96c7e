"""Everything that can fail before a run starts: its model, data, machines and plan."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clusters.capability import ClusterCapability
from orchestrator.data.data_files import DataFiles
from orchestrator.errors import JobError, NothingFits
from orchestrator.job import model_check, model_files
from orchestrator.job.job_file import Job, spec_with
from orchestrator.job.paths import resolve_path
from orchestrator.job.scoring import functions
from orchestrator.job.scoring.answers import extract
from orchestrator.job.sections.training import HeldOutFraction
from orchestrator.job.spec import JobSpec
from orchestrator.job.tokenizer_size import check_tokens
from orchestrator.job.weights import has_weights
from orchestrator.lifecycle import calibration, machines
from orchestrator.lifecycle.hooks import NO_BANK, BankHooks
from orchestrator.lifecycle.stages.spare import with_spares
from orchestrator.lifecycle.verify import verified_files
from orchestrator.planning import planner, price, workload
from orchestrator.planning.evaluation import HeldOutCounts
from orchestrator.planning.plan import InBank, Plan, in_bank_sentence
from orchestrator.planning.stated import unused
from orchestrator.runs.mirror.local_trackers import check_installed
from orchestrator.runs.run_folder import RunFolder
from strategies.shape import ModelShape
from strategies.workload import Workload

_Say = Callable[[str], None]
_TRIED = 8  # references that a metric of the job's own is tried on


@dataclass(frozen=True)
class Ready:
    """A job with everything it needs, checked; nothing has started and no run folder exists."""

    job: Job
    plan: Plan
    capability: ClusterCapability
    work: Workload
    data_files: DataFiles | None  # None: planned from the sizes of the files alone
    statistics: dict[str, Any]
    held_out: HeldOutCounts | None = None  # with which it was planned


@dataclass(frozen=True)
class Sizes:
    """What planning needs to know of some data: tokens of each document, all supervised ones, the held-out part."""

    lengths: Sequence[int]
    num_supervised: int
    held_out: HeldOutCounts | None
    tree_ratio: Mapping[int, float] = field(default_factory=dict)  # of `Workload`; empty where tokens are unknown

    def cut(self, max_length: int) -> Sizes:
        """The same samples at no more than `max_length` tokens; what is supervised shrinks in proportion."""
        lengths = [min(length, max_length) for length in self.lengths]
        kept = sum(lengths) / sum(self.lengths)
        return replace(self, lengths=lengths, num_supervised=max(1, round(kept * self.num_supervised)))


def output_dir(job: Job) -> Path:
    """The folder of runs: beside the caller, not beside the job file, so that a recipe's runs land where one works."""
    return resolve_path(job.spec.checkpoint.output_dir, "checkpoint.output_dir", kind="new folder")


def prepare(
    job: Job,
    say: _Say,
    declared: ClusterCapability | None = None,
    refresh: bool = False,
    bank: BankHooks = NO_BANK,
) -> Ready:
    """Find the model, tokenise the data, probe the machines and plan.  Raises JobError and NothingFits.

    `declared` machines take the place of the real ones; what only they could run may then be planned.
    """
    from orchestrator.data.prepare import cache_beside, prepare_data

    check_installed(job)
    _check_job(job, declared, say)
    model = job.spec.model
    model_folder = model_files.locate(
        model.model_name_or_path, job.folder, model.model_revision, say, model.trust_remote_code
    )
    config = model_files.read_config(model_folder)
    shape = workload.trainable_shape(config)
    check_tokens(model_folder, shape.vocab_size)
    max_length, _ = planner.resolve_max_length(job.spec, config)
    capability = declared or _probe(job, say, refresh)
    began = time.monotonic()
    data = prepare_data(job, model_folder, max_length, cache_beside(output_dir(job)), say)
    prepared_s = time.monotonic() - began
    train, held_out = data.train, data.held_out
    sizes = sizes_of(train, held_out)
    if held_out and (repeated := train.overlap(held_out)):
        say(f"{repeated} of {len(held_out)} held-out samples also occur in the training data: scores will flatter")
    plan, work = plan_job(job, config, shape, capability, sizes, bank)
    _check_plan(job, plan, work, capability, say)
    if held_out is not None:
        _check_metrics(job, plan, held_out, say)
    plan = replace(plan, phases=plan.phases.with_preparation(prepared_s))
    if declared is None or has_weights(model_folder):  # for other machines a config.json and a tokenizer are enough
        for notice in model_check.check_model(model_folder, job.spec.methods(), model.trust_remote_code):
            say(notice)
    statistics = {"train": vars(train.statistics), "eval": vars(held_out.statistics) if held_out else None}
    return Ready(job, plan, capability, work, data.files, statistics, sizes.held_out)


def _check_job(job: Job, declared: ClusterCapability | None, say: _Say) -> None:
    """Say what is worth knowing of the job by itself.  Raises JobError for what it states and rules out."""
    if mistakes := unused.job_mistakes(job.spec, model_files.is_local(job.spec.model.model_name_or_path, job.folder)):
        raise JobError(mistakes)
    for notice in [*workload.step_notices(job.spec), *unused.job_notices(job.spec, is_for_here=declared is None)]:
        say(notice)


def _check_plan(job: Job, plan: Plan, work: Workload, capability: ClusterCapability, say: _Say) -> None:
    """Say what the job states and the plan has no use for.  Raises JobError where the job rules out the use."""
    if mistakes := unused.plan_mistakes(job.spec, plan):
        raise JobError(mistakes)
    for notice in unused.plan_notices(job.spec, plan, work, capability):
        say(notice)


def _check_metrics(job: Job, plan: Plan, held_out: Any, say: _Say) -> None:
    """Raises JobError where a metric of the job's own cannot be called, or its pattern finds no answer in the rows."""
    rows = range(min(len(held_out), job.spec.eval.max_rows))
    references = [text for _, text in map(held_out.prompt, rows) if text is not None]
    functions.check(plan.metrics, job.folder, references[:_TRIED])
    if (pattern := job.spec.eval.answer_pattern) is None or not references:
        return
    without = [text for text in references if extract(pattern, text) is None]
    if len(without) == len(references):
        raise JobError(
            f"eval.answer_pattern: {pattern} finds an answer in none of the {len(references)} held-out references, the"
            f" first of which ends in {without[0][-60:]!r}"
        )
    if without:
        say(
            f"eval.answer_pattern finds no answer in {len(without)} of {len(references)} held-out references: whatever"
            " is generated for those counts as wrong"
        )


def plan_without_data(
    job: Job,
    declared: ClusterCapability | None,
    say: _Say,
    refresh: bool = False,
    bank: BankHooks = NO_BANK,
) -> Ready:
    """A plan from the model's config.json and the sizes of the data files alone: no torch, no tokenizer, in a second.

    Tokens are counted as bytes / 4 over the first rows, so times are rougher than those of `prepare`.
    """
    from orchestrator.data.sizes import rough_lengths

    config = model_files.config_of(job.spec.model.model_name_or_path, job.folder, job.spec.model.model_revision)
    _check_job(job, declared, say)
    shape = workload.model_shape(config)
    max_length, _ = planner.resolve_max_length(job.spec, config)
    sizes = _without_held_out(job, max_length, *rough_lengths(job, max_length, say=say))
    capability = declared or _probe(job, say, refresh)
    plan, work = plan_job(job, config, shape, capability, sizes, bank)
    _check_plan(job, plan, work, capability, say)
    count = len(sizes.lengths) // job.spec.build_objective().num_documents
    statistics = {"train": None, "rough": f"{count} rows of about {sum(sizes.lengths) / count:.0f} tokens"}
    return Ready(job, plan, capability, work, None, statistics, sizes.held_out)


def _without_held_out(job: Job, max_length: int, lengths: list[int], num_supervised: int) -> Sizes:
    """The sizes of the training rows, those that are held out taken from them."""
    from orchestrator.data.sizes import rough_lengths

    held_out = job.spec.data.eval
    if held_out is None:
        return Sizes(lengths, num_supervised, None)
    if isinstance(held_out, HeldOutFraction):
        several = job.spec.build_objective().num_documents
        count = several * max(1, round(len(lengths) // several * held_out.split))
        held, held_supervised = lengths[-count:], num_supervised * count // len(lengths)
        lengths, num_supervised = lengths[:-count] or lengths, num_supervised - held_supervised
    else:
        held, held_supervised = rough_lengths(job, max_length, "eval")
    mean_answer = held_supervised // len(held)
    return Sizes(lengths, num_supervised, HeldOutCounts(len(held), sum(held), 2 * mean_answer, len(held), False))


def _probe(job: Job, say: _Say, refresh: bool) -> ClusterCapability:
    cluster = job.spec.cluster
    if cluster.wait_for_slots and cluster.address != "local":
        say(f"waiting for {cluster.wait_for_slots} slots to train on ...")
    return machines.probe(cluster.address, say, refresh, cluster.wait_for_slots)


def sizes_of(train: Any, held_out: Any) -> Sizes:
    """What planning needs to know of tokenised data."""
    from orchestrator.data.prefixes import tree_ratios

    counts = None
    if held_out is not None:
        counts = HeldOutCounts(
            num_samples=len(held_out),
            num_tokens=int(held_out.lengths.sum()),
            longest_answer=int(held_out.num_supervised.max()),
            num_references=held_out.num_references,
            is_classification="classification" in held_out.statistics.formats,
        )
    return Sizes(train.document_lengths.tolist(), int(train.num_supervised.sum()), counts, tree_ratios(train))


def plan_job(
    job: Job,
    config: dict[str, Any],
    shape: ModelShape,
    capability: ClusterCapability,
    sizes: Sizes,
    bank: BankHooks = NO_BANK,
) -> tuple[Plan, Workload]:
    """The plan, calibrated by the finished runs here and priced.  Raises JobError and NothingFits."""
    spec = job.spec
    max_length, why_length = planner.resolve_max_length(spec, config)
    priced = price.priced(spec, calibration.calibrated(capability, output_dir(job)))
    found = bank.find(job)

    def plan_for(spec: JobSpec, num_workers: int, why_workers: str | None) -> tuple[Plan, Workload]:
        counted = list(sizes.lengths), sizes.num_supervised
        work, _, why_batch = workload.describe(spec, shape, *counted, num_workers, sizes.tree_ratio)
        if mistakes := workload.step_mistakes(spec, work.num_steps):
            raise JobError(mistakes)
        reasons = {
            "cluster.num_workers": why_workers,
            "data.max_length": why_length,
            "train.global_batch_size": why_batch,
            "train.num_train_epochs": next(iter(workload.step_notices(spec)), None),
        }
        known = {key: why for key, why in reasons.items() if why}
        with _with_bank(found):
            plan = planner.make_plan(spec, work, priced, max_length, sizes.held_out, known)
        return with_spares(replace(plan, in_bank=found), priced, shape), work

    num_slots = len(planner.slots_of(spec, capability))
    fixed = workload.num_workers_of_batch(spec, num_slots)
    if fixed not in (None, num_slots):
        return plan_for(spec_with(spec, {"cluster.num_workers": fixed}), fixed, "the stated parts of a step fix it")
    why = planner.resolve_workers(spec, capability.nodes[0])[1] if len(capability.nodes) == 1 else None
    plan, work = plan_for(spec, num_slots, why)
    if workload.grows_with_workers(spec) and plan.num_workers != num_slots:
        # A step is so many samples a worker that trains, and fewer of them train.
        why = plan.reasons.get("cluster.num_workers", "the devices that together are best by the goal")
        fewer = spec_with(spec, {"cluster.num_workers": plan.num_workers})
        return plan_for(fewer, plan.num_workers, why)
    return plan, work


@contextlib.contextmanager
def _with_bank(found: tuple[InBank, ...]) -> Iterator[None]:
    """Where nothing fits: names the adapters that spare the training."""
    try:
        yield
    except NothingFits as error:
        raise (NothingFits(f"{error}\n{in_bank_sentence(found)}") if found else error) from None


def held_out_of(run: RunFolder, job: Job, other: Path | None, say: _Say) -> Any:
    """The held-out samples of a run, or those of another file read as the job reads its own."""
    from orchestrator.data.prepare import cache_beside, datasets, prepare_data

    if other is None:
        held_out = datasets(verified_files(run, job, say))[1]
        if held_out is None:
            raise JobError(f"{run.run_id} has no held-out rows; give some with --data FILE")
        return held_out
    model_folder, plan = Path(run.data().model), run.plan()
    data = job.spec.data.model_copy(update={"train": str(other.absolute()), "eval": None})
    job = Job(job.spec.model_copy(update={"data": data}), job.folder, job.text)
    return prepare_data(job, model_folder, plan.max_length, cache_beside(run.path.parent), say).train
