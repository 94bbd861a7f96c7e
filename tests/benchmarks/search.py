"""How soon a search finds the best combination: the planner's against plain Optuna and chance, on one measured grid.

    python tests/benchmarks/search.py grid --out grid.json     every combination really trained, in one process
    python tests/benchmarks/search.py judge grid.json          three samplers, ten seeds, on what the grid measured
    python tests/benchmarks/search.py overhead                 what Ray Tune costs a trial, one process or many
    python tests/benchmarks/search.py together                 12 trials over rank x rate of SmolLM2-135M, over one base
                                                               and each by itself; minutes; bar: 1.5x

The grid is measured once; every sampler then sees the same truth.  "Found" means within 2 % of the grid's best; compute
is the seconds that the trials of the grid really took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

SPACE = {
    "method.type": ["lora", "full"],
    "method.lora_r": [8, 64],
    "model.dtype": ["float32", "bfloat16"],
    "data.packing": [True, False],
    "train.gradient_checkpointing": [False, True],
    "train.per_device_train_batch_size": [1, 8],
}
SEEDS = range(10)
CLOSE = 1.02


def job_in(folder: Path, prefer: str = "time", **search):
    """A job over a model of 16 million random weights and sentences of many lengths."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.job.job_file import parse_job
    from strategies.measure.techniques import SMALL_MODEL
    from tests.conftest import WORDS

    model = folder / "model"
    if not model.exists():
        torch.manual_seed(0)
        known = {key: value for key, value in SMALL_MODEL.items() if key != "model_type"}
        config = AutoConfig.for_model(
            "llama", **{**known, "vocab_size": 2048, "num_hidden_layers": 4, "eos_token_id": 2, "bos_token_id": None}
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        _tokenizer(model)
        for name, count, start in (("train", 400, 0), ("eval", 40, 1000)):
            with (folder / f"{name}.jsonl").open("w") as stream:
                for i in range(start, start + count):
                    words = [WORDS[(i * step + step) % len(WORDS)] for step in range(1, 4 + (i * i) % 44)]
                    row = {"prompt": " ".join(words), "completion": " ".join(words[::2])}
                    stream.write(json.dumps(row) + "\n")
    text = (
        f"name: bench\nmodel: {{model_name_or_path: {model}}}\n"
        f"data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 256}}\n"
        f"train: {{global_batch_size: 8, learning_rate: 2e-3}}\ngoal: {{prefer: {prefer}}}\n"
        f"checkpoint: {{output_dir: {folder}/runs}}\ntracking: {{report_to: []}}\n"
        f"search: {json.dumps({'space': SPACE, 'trial_steps': 6, 'eval_rows': 16, **search})}\n"
    )
    return parse_job(text, folder)


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(vocab=_bytes(), merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)  # fmt: skip


def _bytes() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    names = ["<|unk|>", "<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {name: place for place, name in enumerate(names)}


def grid(out: Path) -> None:
    """Train every combination of the space that can run, one after the other in this process."""
    from clusters.safe.reading import first_line
    from orchestrator.data.prepare import datasets
    from orchestrator.job.job_file import Job, spec_with
    from orchestrator.runs.search_folder import Trial
    from orchestrator.training.workers.experiment import Experiment

    with tempfile.TemporaryDirectory() as where:
        job, files, planning, space = _set_up(Path(where))
        data, held_out = datasets(files)
        train, held = data.select(files.train_rows), held_out.select(files.eval_rows)
        found = []
        for number, point in enumerate(space.points(), start=1):
            node = planning.capability.nodes[0]
            try:
                plan = planning.trial(point, node)
            except Exception as error:
                found.append(asdict(Trial(number, point, "failed", reason=first_line(error))))
                continue
            began = time.perf_counter()
            one = Job(spec_with(job.spec, point), job.folder, job.text)
            experiment = Experiment(one, plan, files.model, train, held)
            loss = experiment.train_to(plan.num_steps)
            found.append(
                asdict(
                    Trial(
                        number,
                        point,
                        "finished",
                        steps=plan.num_steps,
                        seconds=time.perf_counter() - began,
                        eval_loss=loss,
                        step_s=experiment.times()["measured_step_s"],
                        tensors_bytes=experiment.tensors_bytes,
                        predicted_step_s=plan.step_s,
                        predicted_tensors_bytes=plan.memory.tensors_bytes,
                    )
                )
            )
            last = found[-1]
            print(f"{number:3} {last['step_s']:.3f} s ({last['predicted_step_s']:.3f}) {loss:.3f} {point}", flush=True)
            del experiment
            out.write_text(json.dumps(found, indent=1))
    print(f"{len(found)} combinations, {sum(trial['seconds'] for trial in found):.0f} s")


def _set_up(folder: Path, prefer: str = "time"):
    from orchestrator.data.prepare import datasets
    from orchestrator.job.space import space_of
    from orchestrator.lifecycle.prepare import prepare
    from orchestrator.planning import planner
    from orchestrator.runs.search_folder import Samples
    from orchestrator.search.prepare import planning_of
    from orchestrator.search.subset import representative

    job = job_in(folder, prefer)
    ready = prepare(job, print)
    data, held_out = datasets(ready.data_files)
    files = Samples(
        **asdict(ready.data_files),
        train_rows=representative(data.lengths.tolist(), job.spec.search.trial_steps * 8, 0),
        eval_rows=representative(held_out.lengths.tolist(), job.spec.search.eval_rows, 0),
    )
    planning = planning_of(job, {"256": files}, ready.capability, ready.plan.global_batch_size)
    slots = planner.slots_of(job.spec, ready.capability)
    return job, files, planning, space_of(job.spec, [slot.device for slot in slots], ready.plan.global_batch_size)


def judge(file: Path) -> None:
    """Compute until found, and what was found with a tenth of the grid's compute: three samplers, ten seeds."""
    from orchestrator.planning.goal import by_goal
    from orchestrator.runs.search_folder import Trial
    from orchestrator.search.advice import advise
    from orchestrator.search.recommend import outcomes
    from orchestrator.search.sampler import Sampler

    trials = [Trial(**values) for values in json.loads(file.read_text())]
    whole_s = sum(trial.seconds for trial in trials)
    print(f"{len(trials)} combinations, {whole_s:.0f} s of compute; a tenth is {whole_s / 10:.0f} s")
    for prefer in ("time", "memory"):
        with tempfile.TemporaryDirectory() as where:
            _, _, planning, space = _set_up(Path(where), prefer)
            found = outcomes(trials, planning.real, "eval_loss")
            truth = {outcome.trial.key: outcome for outcome in found}
            best = min(by_goal(prefer, *outcome.costs, outcome.cost)[0] for outcome in found)
            advised = advise(planning, space)
            print(f"\ngoal: {prefer}; best {best:.4g}; {len(advised.worth)} worth a trial")
            for kind in ("planned", "optuna", "random"):
                needed, reached, counts = [], [], []
                for seed in SEEDS:
                    sampler = Sampler(
                        space,
                        advised if kind == "planned" else None,
                        kind,
                        prefer,
                        ["time", "memory", "quality"],
                        lambda key: None,
                        seed,
                    )
                    spent, within, until = 0.0, [], None
                    for count in range(1, len(trials) + 1):
                        point = sampler.ask()
                        if point is None:
                            break
                        outcome = truth.get(_key(point))
                        if outcome is None:
                            sampler.tell(point, None)
                            continue
                        trial = outcome.trial
                        spent += trial.seconds
                        sampler.learn(
                            trial.point,
                            (trial.step_s, trial.predicted_step_s),
                            (trial.tensors_bytes, trial.predicted_tensors_bytes),
                        )
                        sampler.tell(point, outcome.costs)
                        value = by_goal(prefer, *outcome.costs, outcome.cost)[0]
                        if spent <= whole_s / 10:
                            within.append(value)
                        if value <= CLOSE * best and until is None:
                            until = spent
                            counts.append(count)
                    needed.append((until or whole_s) / whole_s)
                    reached.append(min(within, default=float("inf")) / best)
                print(
                    f"{kind:8} compute until within 2 %: median {statistics.median(needed):.1%}, worst"
                    f" {max(needed):.1%} of the grid ({statistics.median(counts or [0]):.0f} trials); with a tenth of"
                    f" the compute: x{statistics.median(reached):.3f} of the best, worst x{max(reached):.3f};"
                    f" within 2 %: {sum(r <= CLOSE for r in reached)} of {len(reached)} seeds"
                )


def _key(point) -> str:
    from orchestrator.job.space import key_of

    return key_of(point)


def overhead() -> None:
    """Wall-clock between the ends of two trials beside the seconds the second took inside its process."""
    import orchestrator.search.tuning as tuning
    from orchestrator.search.run import search
    from orchestrator.views.search import SearchWatcher

    class Stamps(SearchWatcher):
        def __init__(self) -> None:
            super().__init__(None)
            self.seen: list[tuple[float, float]] = []  # when, seconds inside

        def ended(self, trial, fixed, progress) -> None:
            self.seen.append((time.perf_counter(), trial.seconds))

    for reuse in (True, False):
        with tempfile.TemporaryDirectory() as where:
            tuning.REUSE_WORKERS = reuse
            stamps = Stamps()
            search(job_in(Path(where), budget={"trials": 6}, scheduler="none"), stamps)
        gaps = [later - earlier - inside for (earlier, _), (later, inside) in itertools.pairwise(stamps.seen)]
        what = "one process for all trials" if reuse else "a new process for each trial"
        inside_s = statistics.median(inside for _, inside in stamps.seen[1:])
        print(
            f"{what}: {statistics.median(gaps):.2f} s a trial outside, {inside_s:.2f} s inside (set-up, training,"
            " measuring)",
            flush=True,
        )


RATES = [1e-4, 2e-4, 5e-4, 1e-3]
RANKS = [4, 8, 16]


def together(asked: argparse.Namespace) -> None:
    """Whole searches from the probe to the recommendation, in turn as planned and one trial after the other."""
    from orchestrator.search.run import search
    from orchestrator.views.search import SearchWatcher

    seconds: dict[str, list[float]] = {"auto": [], "never": []}
    found = {}
    with tempfile.TemporaryDirectory() as where:
        for number in range(asked.rounds):
            for way in ("auto", "never") if number % 2 == 0 else ("never", "auto"):
                began = time.perf_counter()
                folder = search(_small_steps(Path(where), asked, way), SearchWatcher(None))
                seconds[way].append(time.perf_counter() - began)
                found[way] = folder
                shared = sum(trial.predicted_step_s is None for trial in folder.trials())
                print(f"{way}: {seconds[way][-1]:.1f} s, {shared} of {len(folder.trials())} trials shared", flush=True)
        losses = {way: {trial.key: trial.eval_loss for trial in folder.trials()} for way, folder in found.items()}
        apart = max(abs(loss - losses["never"][key]) / loss for key, loss in losses["auto"].items())
        chosen = {way: folder.summary().recommended.point for way, folder in found.items()}
    took = {way: statistics.median(values) for way, values in seconds.items()}
    print(
        f"{len(RANKS) * len(RATES)} trials of {asked.steps} steps, {asked.dtype}: each by itself {took['never']:.1f} s,"
        f" over one base {took['auto']:.1f} s:"
        f" {took['never'] / took['auto']:.2f}x; losses differ by at most {apart:.1e};"
        f" recommended {chosen['auto']}{', the same' if chosen['auto'] == chosen['never'] else f', not {chosen}'}"
    )


def _small_steps(folder: Path, options: argparse.Namespace, way: str):
    """A search over rank and rate in steps of a few short rows."""
    from orchestrator.job.job_file import parse_job
    from tests.benchmarks import bank_tasks

    if not (folder / "train.jsonl").exists():
        rows = list(bank_tasks.rows_of("sst2"))[:260]
        for name, part in (("train", rows[20:]), ("eval", rows[:20])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    space = {"method.lora_r": RANKS, "train.learning_rate": RATES}
    asked = {
        "space": space,
        "budget": {"trials": len(RANKS) * len(RATES)},
        "trial_steps": options.steps,
        "eval_rows": 8,
        "scheduler": options.scheduler,
        "share_base": way,
    }
    return parse_job(
        f"name: bench\nmodel: {{model_name_or_path: {options.model}, dtype: {options.dtype}}}\n"
        f"data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 512}}\n"
        f"method: {{type: lora}}\ngoal: {{prefer: quality}}\n"
        f"cluster: {{num_workers: {1 if way == 'never' else 'auto'}}}\n"
        f"train: {{global_batch_size: {options.rows}, per_device_train_batch_size: {options.rows},"
        " gradient_checkpointing: false}\n"
        f"checkpoint: {{output_dir: {folder}/runs}}\ntracking: {{report_to: []}}\nsearch: {json.dumps(asked)}\n",
        folder,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grid", "judge", "overhead", "together"])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("grid.json"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=24, help="together: of a trial")
    parser.add_argument("--rows", type=int, default=1, help="together: of a step")
    parser.add_argument("--rounds", type=int, default=1, help="together: searches of each way")
    parser.add_argument("--dtype", default="float32", help="together: of the passes")
    parser.add_argument("--scheduler", default="none", help="together: none, asha, median")
    asked = parser.parse_args()
    if asked.what == "together":
        together(asked)
    elif asked.what == "grid":
        grid(asked.out)
    elif asked.what == "judge":
        judge(asked.file or asked.out)
    else:
        overhead()


if __name__ == "__main__":
    main()
