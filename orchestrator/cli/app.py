"""The command line: every error as a message with an exit code.

A verb's module loads when the verb is typed (program.py), and heavy libraries only inside the verb that needs them.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import sys
import warnings
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from orchestrator import __version__
from orchestrator.cli import program
from orchestrator.cli.options import err, print_json, show
from orchestrator.errors import EXTRAS, JobError, MissingExtra, OrchestratorError
from orchestrator.language.catalogue import tr
from orchestrator.language.choice import language_of
from orchestrator.language.help import mistake_text, print_in
from orchestrator.views.screen import Screen, accept_every_character, keep_standard_output, silence
from strategies.step import thread_waits

_MANY_OBJECTS = 100_000

app = typer.Typer(
    name="orchestrator",
    cls=program.GroupedVerbs,
    help="Fine-tune language models on the machines you have.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        show(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    lang: Annotated[
        Literal["en", "ja"] | None,
        typer.Option("--lang", expose_value=False, help="the language of what is printed; default: that of LANG"),
    ] = None,
) -> None:
    """Fine-tune language models on the machines you have."""


def _put_off_garbage() -> None:
    """Look for garbage once the modules are there: none of what they make is, and 0.1 of 0.57 s went into looking."""
    usual = gc.get_threshold()
    if usual[0] >= _MANY_OBJECTS:  # another call of this process has
        return

    def restore(phase: str, found: dict[str, int]) -> None:
        gc.callbacks.remove(restore)
        gc.set_threshold(*usual)

    gc.callbacks.append(restore)
    gc.set_threshold(_MANY_OBJECTS)


def main() -> None:
    """Run the command line; every OrchestratorError, and a disk's or a file's, becomes a message and an exit code."""
    _put_off_garbage()
    for name in ("SIGTERM", "SIGHUP"):  # the second is not everywhere
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores the second
            signal.signal(number, _interrupt)
    here = program.typed()
    Screen.spelling = staticmethod(lambda text: program.as_typed(text, here))
    os.environ |= thread_waits.environment()  # of this process and all that it starts
    _silence_libraries()
    keep_standard_output()
    accept_every_character()
    print_in(language_of(sys.argv[1:], os.environ))
    try:
        sys.exit(app(prog_name="orchestrator", standalone_mode=False))
    except typer.Abort:
        sys.exit(1)
    except TyperException as error:
        err.print(mistake_text(error), soft_wrap=True, end="")
        sys.exit(error.exit_code)
    except OrchestratorError as error:
        sys.exit(_report(error))
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        sys.exit(_report(_as_job_error(error)))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        sys.exit(_report(MissingExtra(package)))
    except KeyboardInterrupt:
        sys.exit(130)


def _as_job_error(error: OSError) -> JobError:
    """A file that vanished, a full disk, a read-only folder: a traceback would explain nothing."""
    what = "Free some space" if error.errno == errno.ENOSPC else "Check that it exists and may be read and written"
    return JobError(f"{error.filename or 'the disk'}: {(error.strerror or str(error)).lower()}. {what}, then try again")


def _silence_libraries() -> None:
    """Drop warnings meant for the libraries' developers: deprecated names, kernels that are not installed."""
    for message in ("`is_gradient_checkpointing` is deprecated", "Sparse invariant checks are implicitly disabled"):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _report(error: OrchestratorError) -> int:
    """Print an error, as JSON with --json where that can be written; its exit code."""
    if "--json" in sys.argv:
        found = {"mistakes": [one.parts() for one in error.mistakes]} if isinstance(error, JobError) else {}
        with contextlib.suppress(OSError):  # the output is full, which may be the error itself
            print_json({"error": str(error), "exit_code": error.exit_code, **found})
            return error.exit_code
    err.print(tr(str(error)), soft_wrap=True, style="red")
    try:
        sys.stdout.flush()
    except OSError:  # what could not be written would fail once more at exit, with an exit code of its own
        silence(sys.stdout)
    return error.exit_code


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
