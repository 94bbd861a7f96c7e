"""The verbs `bank ...` and `adapt`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from clusters.safe.reading import BadInput, checked_path, kind_of, printable
from orchestrator.cli.options import JobArgument, JsonOption, RunsOption, SetOption, load_job, out, print_json, say
from orchestrator.errors import JobError
from orchestrator.job.paths import resolve_path, write_text_file
from orchestrator.language.catalogue import tr
from orchestrator.runs.run_folder import RunFolder
from strategies.adapter_bank.adapter import CONFIG, PICKLED, WEIGHTS, Unusable
from strategies.adapter_bank.card import AdapterCard, BankError
from strategies.adapter_bank.store import Bank, Contents, Damaged

DEFAULT_BANK = Path("~/orchestrator-bank")
verbs = typer.Typer()
bank = typer.Typer(name="bank", no_args_is_help=True, help="Keep trained adapters and make new ones from them.")
generator = typer.Typer(name="generator", no_args_is_help=True, help="Learn from a bank how to make new adapters.")
bank.add_typer(generator)
verbs.add_typer(bank)


def complete_adapter(incomplete: str) -> list[str]:
    try:
        return [card.name for card in Bank(DEFAULT_BANK).cards() if card.name.startswith(incomplete)]
    except BankError:
        return []


BankOption = Annotated[Path, typer.Option("--bank", help="folder of the bank")]
NamesArgument = Annotated[
    list[str], typer.Argument(help="names, or starts of digests", autocompletion=complete_adapter)
]
NameOption = Annotated[str | None, typer.Option("--name", help="its name in the bank; default: that of the run")]
TasksOption = Annotated[
    int | None, typer.Option("--tasks", min=3, help="leave out so many, spread over the bank; default: each")
]
LicenceOption = Annotated[str | None, typer.Option("--licence", help="e.g. Apache-2.0")]


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn errors of the bank and its disk into JobErrors."""
    try:
        yield
    except (BankError, Unusable, BadInput, FileExistsError) as error:
        raise JobError(str(error)) from None
    except OSError as error:
        raise JobError(f"{printable(str(error.filename or 'the bank'))}: {error.strerror or error}") from None


def adapter_folder(value: str) -> Path | None:
    """The folder that an argument names if it holds a PEFT adapter, else None."""
    path = checked_path(value)
    is_one = any(kind_of(path / name) for name in (CONFIG, WEIGHTS, PICKLED)) if kind_of(path) == "folder" else False
    return path if is_one else None


@bank.command()
@translate_errors()
def add(
    what: Annotated[str, typer.Argument(help="a finished run, or a folder with a PEFT adapter")],
    model: Annotated[str | None, typer.Option("--model", help="of a folder: the model it was trained on")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="of a folder: what it was trained on")] = None,
    name: NameOption = None,
    licence: LicenceOption = None,
    bank: BankOption = DEFAULT_BANK,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Add the adapter of a finished run, or one that was trained elsewhere.

    Of a folder's data the bank keeps token counts and a sketch, never the rows; without --data an adapter can be
    merged, and `adapt` skips it.

    Examples: orchestrator bank add latest
              orchestrator bank add ./my-adapter --model smollm2-135m-instruct --data train.jsonl
    """
    from orchestrator.bank.library import add_folder, add_run

    if folder := adapter_folder(what):
        data = data and resolve_path(data, "--data")
        card = add_folder(Bank(bank, create=True), folder, model, data, name, licence)
    else:
        found = RunFolder.find(what, runs)
        card = add_run(Bank(bank, create=True), found, name, licence)
    _print_card(card, json_)


@bank.command(name="list")
@translate_errors()
def list_(bank: BankOption = DEFAULT_BANK, json_: JsonOption = False) -> None:
    """Show what the bank holds, oldest first, and what of it is damaged."""
    from orchestrator.views.bank import table

    found = Bank(bank).contents()
    if json_:
        print_json([*(card.as_dict() for card in found.cards), *map(_damage, found.damaged)])
        return
    out.print(table(found.cards))
    _say_damaged(found)


@bank.command()
@translate_errors()
def show(which: NamesArgument, bank: BankOption = DEFAULT_BANK, json_: JsonOption = False) -> None:
    """Show the cards of adapters."""
    there = Bank(bank)
    for name in which:
        _print_card(there.find(name), json_)


@bank.command()
@translate_errors()
def rm(which: NamesArgument, bank: BankOption = DEFAULT_BANK) -> None:
    """Remove adapters, also damaged ones by their digest."""
    there = Bank(bank)
    for found in [there.find_all(name) for name in which]:  # all are known before one goes
        there.remove(found)
        say(f"removed {found.name}")


@bank.command()
@translate_errors()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="move damaged ones into BANK/broken")] = False,
    bank: BankOption = DEFAULT_BANK,
    json_: JsonOption = False,
) -> None:
    """Read every byte again and compare it with the digests.  Exit code 2 where something is wrong."""
    there = Bank(bank)
    wrong = there.verify(repair)
    lines, left = [str(one) for one in wrong], len(there.contents().cards)
    if json_:
        print_json({"wrong": lines, "repaired": repair, "adapters": left, "damaged": [_damage(one) for one in wrong]})
    if not wrong:
        say(f"{left} adapters, nothing wrong")
    elif repair:
        say("\n".join([*lines, f"{len(wrong)} are in {there.path / 'broken'} now; {left} adapters are left"]))
    elif json_:
        raise typer.Exit(JobError.exit_code)
    else:
        count = f"{len(wrong)} of {len(wrong) + left} damaged"
        raise JobError("\n".join([*lines, f"{count}; `orchestrator bank verify --repair` moves them away"]))


@bank.command()
@translate_errors()
def export(
    file: Annotated[Path, typer.Argument(help="the tar to write")],
    which: Annotated[
        list[str] | None, typer.Argument(help="names; default: all", autocompletion=complete_adapter)
    ] = None,
    bank: BankOption = DEFAULT_BANK,
) -> None:
    """Write adapters, their cards and what is known of their data into one file.

    Example: orchestrator bank export ours.tar sst2 imdb
    """
    from strategies.adapter_bank.exchange import export as write_tar

    path = resolve_path(file, "bank export", kind="new file")
    there = Bank(bank)
    found = there.contents()
    done = write_tar(there, path, [there.find(name) for name in which] if which else found.cards)
    damaged = [*done.refused, *([] if which else found.damaged)]
    left_out = f"; {len(damaged)} damaged are not included" if damaged else ""
    say("\n".join([*map(str, damaged), f"wrote {len(done.cards)} adapters to {file}{left_out}"]))


@bank.command(name="import")
@translate_errors()
def import_(
    file: Annotated[Path, typer.Argument(help="what `bank export` wrote")],
    bank: BankOption = DEFAULT_BANK,
) -> None:
    """Import what another bank exported; each adapter is checked against its digest.

    A damaged one does not stop the others.  Exit code 2 when one was refused.
    """
    from strategies.adapter_bank.exchange import import_ as take_in

    done = take_in(Bank(bank, create=True), resolve_path(file, "bank import", kind="file"))
    added = f"imported {len(done.cards)}: {', '.join(card.name for card in done.cards)}"
    if done.refused:
        raise JobError([*map(str, done.refused), f"{added}; refused {len(done.refused)}"])
    say(added)


@bank.command()
@translate_errors()
def merge(
    output: Annotated[Path, typer.Argument(help="the folder to write")],
    which: NamesArgument,
    how: Annotated[
        str | None,
        typer.Option("--how", help="linear (default), cat, factorwise, ties, dare_linear, dare_ties, magnitude_prune"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="one for each, e.g. 1,-0.5 (negative ones subtract); default 1/N")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="of the result; default: the largest")] = None,
    density: Annotated[float, typer.Option("--density", min=0.01, max=1, help="of ties, dare, magnitude_prune")] = 0.5,
    bank: BankOption = DEFAULT_BANK,
    json_: JsonOption = False,
) -> None:
    """Merge adapters into one, exactly: as corrections dW = B A, then truncated to a rank.

    `linear` adds up and truncates (SVD), `cat` keeps the rank that the sum has.  Folders of sparse adapters (PEFT's
    SHiRA) merge entry by entry: what several have is averaged, the rest stays as it was; or by a rule without factors.

    Examples: orchestrator bank merge both sst2 imdb
              orchestrator bank merge less-of-it sst2 sms-spam --weights 1,-0.5
              orchestrator bank merge mixed sst2 imdb yelp --how ties --density 0.3
              orchestrator bank merge experts ./shira-sst2 ./shira-imdb
    """
    from orchestrator.bank.merge import MergeOptions, merge_adapters, merge_sparse

    output = resolve_path(output, "bank merge", kind="new folder")
    options = MergeOptions(how, weights, rank, density)
    folders = [folder for folder in map(adapter_folder, which) if folder]
    if folders and len(folders) == len(which):
        if rank:
            raise JobError("sparse adapters have no rank: leave out --rank")
        _print_made(merge_sparse(folders, output, options), json_)
        return
    there = Bank(bank)
    cards = [there.find(name) for name in which]
    _print_made(merge_adapters(there, cards, output, options), json_)


@bank.command()
@translate_errors()
def build(
    folder: Annotated[Path, typer.Argument(help="holds NAME/train.jsonl and NAME/eval.jsonl of each data set")],
    job: Annotated[str, typer.Option("--job", help="how each of them is trained")] = "bank",
    set_: SetOption = [],
    json_: JsonOption = False,
) -> None:
    """Train an adapter for each data set of a folder and put it into the bank; run again, it continues.

    A data set whose rows or settings have changed is reported; to train it again, delete its run and `bank rm` it.

    Example: orchestrator bank build ./datasets --job bank --set train.max_steps=50
    """
    from orchestrator.bank.build import build_bank

    folder = resolve_path(folder, "bank build", kind="folder")
    cards = build_bank(folder, lambda overrides: load_job(job, [*set_, *overrides]), say)
    if json_:
        print_json([card.as_dict() for card in cards])


@bank.command()
@translate_errors()
def evaluate(
    job: Annotated[str, typer.Option("--job", help="how the bank's adapters were trained")] = "bank",
    set_: SetOption = [],
    rows: Annotated[int, typer.Option("--rows", min=1, help="held-out rows of each task")] = 16,
    tasks: TasksOption = None,
    output: Annotated[Path, typer.Option("--output", help="folder of the table and the picture")] = Path("runs"),
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Leave each task out in turn and make its adapter from the others: every distance x coefficients x rule.

    Tasks are the bank's adapters whose run is in --runs.  Gains are shares of what the task's own adapter gains.  Run
    again after it was stopped, it measures the tasks that are left.

    Example: orchestrator bank evaluate --rows 16
    """
    from orchestrator.bank.evaluate import gains, leave_one_out, table
    from orchestrator.report.plots import heat_map

    output = resolve_path(output, "--output", kind="new folder")
    found = leave_one_out(load_job(job, set_), resolve_path(runs, "--runs", kind="folder"), rows, say, tasks)
    output.mkdir(parents=True, exist_ok=True)
    write_text_file(output / "leave-one-out.json", json.dumps(found, indent=1), "--output")
    drawn = heat_map(gains(found), "share of the own adapter's gain", -0.5, 1.0)
    write_text_file(output / "leave-one-out.svg", drawn, "--output")
    say(f"wrote {output}/leave-one-out.json and leave-one-out.svg")
    if json_:
        print_json(found)
    else:
        out.print(table(found))


@generator.command()
@translate_errors()
def fit(
    job: Annotated[str, typer.Option("--job", help="how the bank's adapters were trained")] = "bank",
    set_: SetOption = [],
    rows: Annotated[int, typer.Option("--rows", min=1, help="held-out rows of each task")] = 16,
    tasks: TasksOption = None,
    variant: Annotated[str, typer.Option("--variant", help="linear, or decoder: the network of arXiv 2506.16406")] = (
        "linear"
    ),
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Learn from a bank which of its directions a data set needs, and judge it on each task left out.

    `adapt --rule learned` uses it, where it beats `adapt` on tasks that it had not seen; the verdict is kept beside the
    bank.  Each task takes a minute or more; run again after it was stopped, it measures the tasks that are left.

    Example: orchestrator bank generator fit --rows 12
    """
    from orchestrator.bank.evaluate import table
    from orchestrator.bank.generator import VARIANTS, Variant, fit_generator

    known: dict[str, Variant] = {one: one for one in VARIANTS}
    if variant not in known:
        raise JobError(f"--variant {variant!r} is not one of {', '.join(VARIANTS)}")
    runs = resolve_path(runs, "--runs", kind="folder")
    found = fit_generator(load_job(job, set_), runs, rows, known[variant], say, tasks)
    if json_:
        print_json(found)
        return
    out.print(table(found))
    say(f"not offered: {found['refusal']}" if found["refusal"] else "offered: use it with `adapt --rule learned`")


@verbs.command()
@translate_errors()
def adapt(
    job: JobArgument,
    set_: SetOption = [],
    rule: Annotated[
        str | None, typer.Option("--rule", help="auto, delta, factorwise or learned; as bank.rule of the job")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="the folder to write; default: beside runs")] = None,
    then_train: Annotated[bool, typer.Option("--then-train", help="then train, starting from it")] = False,
    against: Annotated[
        str | None,
        typer.Option("--against", help="of --then-train: a run of the same job that started from scratch, or `fresh`"),
    ] = None,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Make an adapter for a job's data from the bank, in a minute and without training a weight.

    Shares of the bank's adapters follow from the data, then from a few labelled rows.  Others decide between the base
    model, the nearest adapter, the average of all and the one that was made; it is recommended only where it beats
    the base.

    Examples: orchestrator adapt job.yaml
              orchestrator adapt job.yaml --set bank.distance=mmd --output my-adapter
              orchestrator adapt job.yaml --then-train --against fresh
    """
    from orchestrator.bank.adapt import adapt as adapted
    from orchestrator.bank.continue_training import train_from

    if against and not then_train:
        raise JobError("--against belongs to --then-train")
    asked = load_job(job, [*set_, *([f"bank.rule={rule}"] if rule else [])])
    found = adapted(asked, output and resolve_path(output, "--output", kind="new folder"), say)
    if then_train:
        found |= {"then_train": train_from(asked, found, against, runs, say)}
    _print_made(found, json_)


def _print_card(card: AdapterCard, json_: bool) -> None:
    if json_:
        print_json(card.as_dict())
        return
    for key, value in card.as_dict().items():
        if value not in (None, [], {}, ""):
            out.print(printable(f"{key:16} {value}"), soft_wrap=True)


def _damage(one: Damaged) -> dict[str, str]:
    return {"name": one.name, "path": str(one.path), "damaged": one.reason}


def _say_damaged(found: Contents) -> None:
    """Print each damaged adapter with its reason, then the counts."""
    if found.damaged:
        counts = f"{len(found.cards)} adapters, {len(found.damaged)} damaged"
        way_out = "`orchestrator bank verify --repair` moves them away, `bank rm DIGEST` removes one"
        say("\n".join([*(f"damaged: {one}" for one in found.damaged), f"{counts}: {way_out}"]))


def _print_made(found: dict[str, Any], json_: bool) -> None:
    if json_:
        print_json(found)
        return
    from orchestrator.views.bank import describe

    for line in describe(found):
        out.print(tr(line), soft_wrap=True)
