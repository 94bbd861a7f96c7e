"""A user's text is text on the terminal: no markup, no control sequences; a reader that goes away ends no run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from clusters.safe.reading import printable
from orchestrator.views.screen import Screen, new_table, out, print_rows

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "[red]a[/nope]\x1b[31m\x9b2J\x07 :smile: \ud800\u202eb"


def sources():
    found = [path for room in ("orchestrator", "clusters", "strategies") for path in (ROOT / room).rglob("*.py")]
    assert len(found) > 100
    return [path for path in found if "recipes" not in path.parts]


def calls(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def name_of(call):
    return ast.unparse(call.func)


def test_only_the_screen_makes_a_console_and_nothing_prints_beside_it():
    """A child process that answers on its standard output, and the screen itself, are the exceptions."""
    allowed = {"orchestrator/views/screen.py", "clusters/probe/measure.py"}
    for path in sources():
        place = path.relative_to(ROOT).as_posix()
        for call in calls(path):
            called = name_of(call)
            if place not in allowed:
                assert called not in ("Console", "print", "sys.stdout.write", "sys.stderr.write"), (place, call.lineno)
            if called.endswith("echo"):
                assert called != "typer.echo", (place, call.lineno)


def test_no_text_is_read_as_markup():
    for path in sources():
        for call in calls(path):
            assert not name_of(call).endswith("from_markup"), (path, call.lineno)
            for option in call.keywords:
                is_on = isinstance(option.value, ast.Constant) and option.value.value is True
                assert not (option.arg == "markup" and is_on), (path, call.lineno)
            if name_of(call) == "TextColumn" and not isinstance(call.args[0], ast.Constant):
                raise AssertionError((path, call.lineno))


@pytest.mark.parametrize("make", [str, Text, lambda text: table_of(text)], ids=["text", "Text", "table"])
def test_markup_and_control_characters_come_out_as_they_are_written(make, capsys):
    Screen().print(make(HOSTILE), soft_wrap=True)

    shown = capsys.readouterr().out
    for part in ("[red]a[/nope]", "\\x1b[31m", "\\x9b2J", ":smile:", "\\ud800", "\\u202e"):
        assert part in shown
    assert not any(mark in shown for mark in "\x1b\x9b\x07\u202e\ud800")


def table_of(text):
    table = Table()
    table.add_column("a")
    table.add_row(text)
    return table


def test_a_reader_that_goes_away_ends_quietly():
    """Enough lines that the pipe is closed while they are written."""
    code = "from orchestrator.cli.options import show\nfor n in range(10000): show(f'line {n}')\n"
    for program in (code, "import sys\nsys.argv = ['x', 'schema']\nfrom orchestrator.cli.app import main\nmain()\n"):
        assert first_line_alone(program) == (0, b"")


def test_a_run_outlives_its_reader():
    code = (
        "import sys\n"
        "from orchestrator.views.screen import Screen, out\n"
        "Screen.outlives_reader = True\n"
        "for n in range(10000): out.print(f'line {n}')\n"
        "sys.stderr.write('finished')\n"
    )

    assert first_line_alone(code) == (0, b"finished")


def first_line_alone(program):
    """Exit code and standard error of a program whose reader goes away after a line."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **piped) as running:
        running.stdout.readline()
        running.stdout.close()
        said = running.stderr.read()
    return running.returncode, said


ROWS = {
    "short": [("a", "b c", "1"), ("aaa", "", "22222")],
    "none": [],
    "wide": [("日本語" * 9, "b" * 30, "x"), ("é" * 20, "n" * 29, "2026-11-28 16:26:23")],
    "long": [("quickstart-20261129-220733" * 2, "finished", "4/4"), ("a", "interrupted", "2026-11-28 16:26:23")],
    "words": [("one two three four five " * 5, "finished", "4"), ("a", "b", "c")],
    "hostile": [(HOSTILE, "a\nb", "\t")],
}


@pytest.mark.parametrize("columns", ["20", "47", "80", "200"])
@pytest.mark.parametrize("name", ROWS)
def test_a_table_of_plain_cells_is_printed_as_rich_would(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    head = ("run", "a longer head", "x")
    table = new_table(*head)
    for row in ROWS[name]:
        table.add_row(*(Text(printable(cell)) for cell in row))

    out.print(table)
    wanted = capsys.readouterr().out
    print_rows(head, ROWS[name])

    assert capsys.readouterr().out == wanted


def test_a_table_in_a_narrow_window_leaves_out_columns_and_cuts_no_word():
    table = new_table("name", "place", "what it does", fold=True, dispensable=("place",))
    table.add_row("workstation", "extraordinarily-long-address", "trains the larger part of the model")
    narrow, wide = rich_text(table, 40), rich_text(table, 90)

    assert "workstation" in narrow and "larger" in narrow
    assert "extraordinarily" not in narrow and "not shown in so narrow a window: place" in narrow
    assert "extraordinarily-long-address" in wide and "not shown" not in wide


def rich_text(table, width):
    screen = Screen()
    screen.width = width
    with screen.capture() as shown:
        screen.print(table)
    return shown.get()
