"""How this program is typed where the user stands, and its verbs in groups, each built when it is asked for."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import typer

from orchestrator.language.catalogue import tr
from orchestrator.language.help import Verbs

NAME = "orchestrator"
GROUPS = {
    "Write and check a job": {
        "init": "write a commented starter, or copy a recipe",
        "recipes": "list the ready-made jobs, or print one",
        "import": "make a job of an Axolotl, LLaMA-Factory, TRL ... file",
        "validate": "check a job file, its model and its rows",
        "inspect": "show rows as the model will see them",
        "schema": "explain the job file's keys",
    },
    "Know the machines": {
        "doctor": "what is installed here, what is missing, and the fix",
        "probe": "what the machines can do",
        "techniques": "what each optimization does on each device",
        "plan": "will it fit, how long, what does it cost",
        "search": "try combinations, write the job to submit",
    },
    "Run": {
        "verify": "try that layouts and machines change no result",
        "submit": "plan, train, measure, hand back the tuned model",
        "list": "list the runs of a folder",
        "status": "how far a run is, how good its result",
        "logs": "what happened in a run",
        "stop": "save a checkpoint and stop",
        "resume": "continue a run that was stopped or failed",
        "evaluate": "measure a finished run's model again",
    },
    "Use the result": {
        "chat": "chat with a tuned model in the terminal",
        "serve": "serve runs and models as an OpenAI API",
        "merge": "base model + adapter as one plain model",
        "export": "for llama.cpp, Ollama, the hub",
        "bank": "keep adapters, make new ones of them",
        "adapt": "make an adapter from the bank, in seconds",
    },
    "Look back": {
        "dashboard": "watch the runs of a folder in the browser",
        "report": "one page about a run or a search",
        "tco": "what a job costs: machines, electricity, cloud",
        "bench": "where time and memory go; a server's pace",
        "sync": "send a run to MLflow again",
    },
    "Several machines": {
        "head": "make this machine the head of a cluster",
        "join": "give this machine's devices to a cluster",
        "nodes": "the machines of a cluster, what each does",
        "fetch": "bring a run that was sent to a cluster here",
    },
}
MODULES = {  # of this room -> the verbs that it holds
    "jobs": ("recipes", "validate", "inspect", "schema", "plan", "submit"),
    "imports": ("init", "import"),
    "runs": ("list", "status", "logs", "stop", "resume", "evaluate", "merge", "sync"),
    "export": ("export",),
    "remote": ("fetch", "send"),
    "search": ("search",),
    "serving": ("serve", "chat"),
    "bench": ("bench", "verify"),
    "report": ("report", "tco", "dashboard"),
    "machines": ("doctor", "probe", "techniques", "head", "join", "nodes"),
    "bank": ("bank", "adapt"),
}
EXAMPLES = """\
Examples:
  orchestrator submit quickstart        a first model in minutes, without a GPU
  orchestrator init job.yaml --train rows.jsonl
  orchestrator plan job.yaml --hardware home-lab
  orchestrator submit job.yaml --set train.learning_rate=1e-4
  orchestrator VERB --help              its options, with examples"""


class _Commands(MutableMapping[str, Any]):
    """Verb -> its command.  A module is imported, and its commands are built, when one of its verbs is asked for."""

    def __init__(self, group: GroupedVerbs) -> None:
        self._group = group
        self._places = {verb: module for module, verbs in MODULES.items() for verb in verbs}
        self._built: dict[str, Any] = {}

    def __getitem__(self, verb: str) -> Any:
        if verb not in self._built and verb in self._places:
            built = commands_of(importlib.import_module(f"orchestrator.cli.{self._places[verb]}"))
            for command in built.values():
                self._group.add_language_to(command)
            self._built = built | self._built
        return self._built[verb]

    def __setitem__(self, verb: str, command: Any) -> None:
        self._built[verb] = command

    def __delitem__(self, verb: str) -> None:
        del self._built[verb]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._places, *self._built]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def commands_of(module: Any) -> dict[str, Any]:
    """The commands of a module of verbs."""
    groups = [module.verbs, *(one.typer_instance for one in module.verbs.registered_groups)]
    for command in [command for group in groups for command in group.registered_commands]:
        if command.callback and command.callback.__doc__:
            # The parser would join the lines of examples to one paragraph; the mark is Click's
            # (https://click.palletsprojects.com, "\\b").
            command.callback.__doc__ = command.callback.__doc__.replace("    Example", "    \b\n    Example")
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.add_typer(module.verbs)
    return dict(typer.main.get_group(app).commands)


class GroupedVerbs(Verbs):
    """Lists the verbs in groups with whole sentences, then examples."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands(self)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, verbs in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(list(verbs.items()))
        first, *rest = as_typed(EXAMPLES, typed()).splitlines()
        formatter.write("\n" + "\n".join([f"{tr(first[:-1])}:", *rest]) + "\n")


def typed() -> str:
    """How this program is called here: `orchestrator`, or the path of its script, or `python -m orchestrator`.

    A hint that is typed as it is printed has to work in a shell in which no environment is activated.
    """
    called = Path(sys.argv[0])
    if called.name == NAME:
        return NAME if str(called) == NAME or _is_found(NAME, called) else _shown(called)
    script = Path(sys.executable).with_name(NAME)
    if script.is_file():
        return NAME if _is_found(NAME, script) else _shown(script)
    interpreter = Path(sys.executable)
    return f"{'python' if _is_found('python', interpreter) else _shown(interpreter)} -m {NAME}"


def as_typed(text: str, program: str) -> str:
    """A text whose commands are spelt as they have to be typed here."""
    return text if program == NAME else _COMMAND.sub(f"{program} ", text)


_VERBS = "|".join(name for verbs in GROUPS.values() for name in verbs)
_COMMAND = re.compile(rf"(?<![\w/.-]){NAME} (?=(?:{_VERBS}|VERB)\b)")


def _is_found(name: str, file: Path) -> bool:
    found = shutil.which(name)
    return found is not None and file.exists() and file.samefile(found)


def _shown(path: Path) -> str:
    """A path relative to where the user stands, where it lies below."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
