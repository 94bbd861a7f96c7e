"""The verbs `bench` and `verify`: what is measured of a job or a run on its machines."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.options import (
    JsonOption,
    RunsOption,
    SetOption,
    complete_job,
    is_job,
    load_job,
    out,
    parse_numbers,
    print_json,
    say,
    show,
)
from orchestrator.cli.serving import DtypeOption, GgufOption, VllmPythonOption
from orchestrator.errors import JobError, RunFailed
from orchestrator.job.paths import resolve_path
from orchestrator.runs.run_folder import RunFolder

verbs = typer.Typer()
_KINDS = ("--serve", "--generate", "--compare")  # beside a training step, which none of them asks for
# What each kind takes beside --json: anything else would be passed over in silence.
_TAKES = {
    "--serve": {"what", "serve", "engines", "models", "concurrency", "adapters", "prompt_lengths", "new_tokens"},
    "--generate": {"what", "generate", "batch_sizes", "prompt_lengths", "new_tokens", "output", "runs"},
    "--compare": {"compare"},
    "a training step": {"what", "set_", "steps", "timeline", "bus", "output", "runs"},
}
_TAKES["--serve"] |= {"gguf", "dtype", "vllm_python", "output", "runs"}


WhatArgument = Annotated[
    str | None,
    typer.Argument(help="a job file or recipe; with --generate or --serve a run", autocompletion=complete_job),
]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="steps that are timed")]
GenerateOption = Annotated[bool, typer.Option("--generate", help="time a run's tuned model as it generates")]
BatchSizesOption = Annotated[str, typer.Option("--batch-sizes", help="of --generate")]
PromptLengthsOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-lengths",
        help="in tokens; of --generate (default: 64,256), of --serve one (default: the run's held-out prompts)",
    ),
]
NewTokensOption = Annotated[int, typer.Option("--new-tokens", min=2, help="of --generate and --serve")]
ServeOption = Annotated[
    bool, typer.Option("--serve", help="time a server of a run: engines, concurrency, mixed adapters")
]
EnginesOption = Annotated[str, typer.Option("--engines", help="of --serve; one that cannot is named with its reason")]
ModelsOption = Annotated[
    str, typer.Option("--models", help="of --serve; tuned: what the run made; merged: needs the base's size on disk")
]
ConcurrencyOption = Annotated[str, typer.Option("--concurrency", help="of --serve: requests at a time")]
AdaptersOption = Annotated[
    int, typer.Option("--adapters", min=0, help="of --serve: how many are mixed in one batch; 0: none")
]
TimelineOption = Annotated[
    bool, typer.Option("--timeline", help="draw two steps: computation and transfers, layer by layer")
]
BusOption = Annotated[
    float | None, typer.Option("--bus", min=0.001, help="GB/s of a bus to emulate, where the machine has none")
]
CompareOption = Annotated[
    tuple[Path, Path] | None, typer.Option("--compare", help="two earlier results, number by number")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", help="the result's file; default: beside the runs, of --serve in the run's folder"),
]


@verbs.command()
def bench(
    context: typer.Context,
    what: WhatArgument = None,
    set_: SetOption = [],
    steps: StepsOption = 5,
    generate: GenerateOption = False,
    batch_sizes: BatchSizesOption = "1,4",
    prompt_lengths: PromptLengthsOption = None,
    new_tokens: NewTokensOption = 32,
    serve: ServeOption = False,
    engines: EnginesOption = "transformers,llama.cpp,vllm",
    models: ModelsOption = "base,tuned,merged",
    concurrency: ConcurrencyOption = "1,2,4,8",
    adapters: AdaptersOption = 4,
    gguf: GgufOption = None,
    dtype: DtypeOption = None,
    vllm_python: VllmPythonOption = None,
    timeline: TimelineOption = False,
    bus: BusOption = None,
    compare: CompareOption = None,
    output: OutputOption = None,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Measure where the time and memory of training go, or how fast the tuned model answers, on this machine.

    Examples: orchestrator bench quickstart
              orchestrator bench latest --generate --batch-sizes 1,4,8
              orchestrator bench latest --serve --concurrency 1,4,16
              orchestrator bench job.yaml --timeline --bus 10
              orchestrator bench --compare runs/bench-a.json runs/bench-b.json
    """
    _check_options(context)
    if compare is not None:
        _compare(*compare, json_)
        return
    output = resolve_path(output, "--output", kind="new file") if output else None
    if what is None:
        raise JobError("bench: nothing to measure; give a job file, a recipe, or a run with --generate or --serve")
    if serve:
        wish = _serve_bench(context.params)
        _bench_serving(_run_of(what, runs), wish, output, json_)
        return
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.lifecycle.prepare import prepare
    from orchestrator.training.workers import bench as benchmarks

    if generate:
        run, lengths = RunFolder.find(what, runs), parse_numbers("--prompt-lengths", prompt_lengths or "64,256")
        sizes = parse_numbers("--batch-sizes", batch_sizes)
        result = benchmarks.bench_generation(run, run.job(), sizes, lengths, new_tokens, say)
    else:
        loaded = load_job(what, ["cluster.num_workers=1", *set_])
        bus_bytes_per_s = bus * 1e9 if bus else None
        ready = prepare(loaded, say, bank=BANK_HOOKS)
        result = benchmarks.bench_training(loaded, ready, steps, say, timeline, bus_bytes_per_s)
    _print_bench(result, benchmarks.save(result, runs, output), json_)


@verbs.command()
def verify(
    what: Annotated[str, typer.Argument(help="a job file or recipe, or a run", autocompletion=complete_job)],
    set_: SetOption = [],
    output: Annotated[Path | None, typer.Option("--output", help="of a job: the result's file")] = None,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Try on a job's own model, rows and machines that layouts, machines, resuming and merging change no result.

    Takes about two minutes and leaves nothing but its table.  Exit code 5: something differs by more than rounding.

    Examples: orchestrator verify job.yaml
              orchestrator verify latest
    """
    from orchestrator.bank.hooks import BANK_HOOKS
    from orchestrator.lifecycle.proofs.prove import prove_job, prove_run
    from orchestrator.runs.proofs.proof import DIFFERS, FILE, to_rows
    from orchestrator.views.proofs import proofs_view

    output = resolve_path(output, "--output", kind="new file") if output else None
    if is_job(what):
        from orchestrator.training.workers.bench import save

        job = load_job(what, set_)
        proofs = prove_job(job, say, BANK_HOOKS)
        result = {"kind": "verify", "name": job.spec.name, "time": time.time(), "checks": to_rows(proofs)}
        stamp = time.strftime("%Y%m%d-%H%M%S")
        file = save(result, runs, output or runs / f"verify-{job.spec.name}-{stamp}.json")
    else:
        if set_ or output:
            raise JobError("--set and --output belong to a job; a run is verified as it was planned, in its folder")
        run = RunFolder.find(what, runs)
        proofs, file = prove_run(run, say, BANK_HOOKS), run.path / FILE
    if json_:
        print_json({"checks": to_rows(proofs), "file": str(file)})
    else:
        out.print(proofs_view(proofs))
        show(f"wrote {file}")
    if any(one.outcome == DIFFERS for one in proofs):
        raise typer.Exit(RunFailed.exit_code)


def _check_options(context: typer.Context) -> None:
    """Raises JobError for two kinds of measurement, and for an option that the one does not use."""
    given = {one.name: one.opts[0] for one in context.command.params if one.name and _is_typed(context, one.name)}
    kinds = [kind for kind in _KINDS if kind in given.values()]
    if len(kinds) > 1:
        raise JobError(f"{' and '.join(kinds)} measure different things; give one of them")
    kind = kinds[0] if kinds else "a training step"
    if unused := [option for name, option in given.items() if name not in {*_TAKES[kind], "json_"}]:
        raise JobError(f"{', '.join(unused)}: not used by bench of {kind}; leave it out")


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line.  By name: typer brings a copy of click with its own enum."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _run_of(what: str, runs: Path) -> RunFolder:
    """Raises JobError for what is no run."""
    if Path(what).is_file():
        raise JobError(
            f"{what} is a file: --serve measures what a finished run made. Give a run, e.g. `orchestrator bench latest"
            " --serve`; `orchestrator list` shows them"
        )
    return RunFolder.find(what, runs)


def _serve_bench(given: dict[str, Any]) -> Any:
    """The options of --serve, checked before anything heavy is loaded.  Raises JobError."""
    from orchestrator.serving.bench.options import ServeBench
    from orchestrator.serving.engine_choice import EngineOptions

    lengths = parse_numbers("--prompt-lengths", given["prompt_lengths"] or "")
    if len(lengths) > 1:
        raise JobError(f"--prompt-lengths {given['prompt_lengths']}: --serve takes one length")
    gguf, python = given["gguf"], given["vllm_python"]
    options = EngineOptions(
        gguf=gguf and resolve_path(gguf, "--gguf", kind="file"),
        dtype=given["dtype"],
        vllm_python=python and resolve_path(python, "--vllm-python", kind="file"),
    )
    return ServeBench(
        _names(given["engines"]),
        _names(given["models"]),
        tuple(sorted(set(parse_numbers("--concurrency", given["concurrency"])))),
        given["new_tokens"],
        lengths[0] if lengths else None,
        given["adapters"],
        options=options,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _bench_serving(run: RunFolder, wish: Any, output: Path | None, as_json: bool) -> None:
    from orchestrator.serving.bench.benchmark import bench_serving
    from orchestrator.serving.bench.result import FILE
    from orchestrator.training.workers.bench import save

    result = asdict(bench_serving(run, wish, say))
    _print_bench(result, save(result, run.path, output or run.path / FILE), as_json)


def _compare(a: Path, b: Path, as_json: bool) -> None:
    from orchestrator.views.bench import comparison_view, flat, read

    first, second = read(a), read(b)
    if as_json:
        print_json({"a": flat(first), "b": flat(second)})
    else:
        out.print(comparison_view(first, second))


def _print_bench(result: dict[str, Any], file: Path, as_json: bool) -> None:
    from orchestrator.views.bench import bench_view

    picture = None
    if "timeline" in result:
        from orchestrator.report.bench import timeline_picture

        picture = timeline_picture(result, file)
    if as_json:
        print_json({**result, "file": str(file), **({"picture": str(picture)} if picture else {})})
        return
    out.print(bench_view(result))
    for written in (picture, file):
        if written:
            show(f"wrote {written}")
