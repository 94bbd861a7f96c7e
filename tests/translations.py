"""The messages that people read, found in the source, and the Japanese catalogue of them.

python tests/translations.py            writes new ids into the catalogue without a translation, removes dead ones,
                                        compiles it, and prints what waits for a translation as stubs of a .po file
python tests/translations.py FILE.po    first takes over the translations of such a file

An id is a text of the source; the values of an f-string are `{0}`, `{1}` ... (orchestrator/language/catalogue.py).
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tomllib
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from orchestrator.language.catalogue import DOMAIN, LOCALE, PLACE, core, num_letters
from tests.house import ROOT, house

# Texts that look like messages and are read by programs alone, or stand in files.
_NOT_MESSAGES_FILE = Path(__file__).with_name("not_messages.txt")
PO = LOCALE / "ja/LC_MESSAGES" / f"{DOMAIN}.po"
MO = PO.with_suffix(".mo")

# What is called to print, or to make what is printed: each text in it is a message, one word too.
_KEYS = {"key", "option", "Field"}
_PRINT = {*_KEYS, "tr", "w", "label", "say", "show", "new_table", "add_column"}
# Rooms and files whose texts go into files, to programs, or to people by a web page.
_NOT_SHOWN = (
    *("orchestrator/recipes/", "orchestrator/runs/model_card.py", "orchestrator/report/plots.py"),
    *("orchestrator/serving/metrics.py", "orchestrator/dashboard/site.py"),
    *("orchestrator/remote/kube_objects.py", "clusters/hardware/datasheet.py", "strategies/families"),
    "orchestrator/job/schema.py",
)
# Texts in these calls are for machines.
_NOT_MESSAGES = {
    *("compile", "search", "fullmatch", "findall", "finditer", "sub", "split", "rsplit", "partition", "rpartition"),
    *("startswith", "endswith", "removeprefix", "removesuffix", "replace", "strip", "filterwarnings", "getLogger"),
    *("debug", "info", "warning", "getattr", "environ", "from_string", "encode"),
}
# Of the library that parses the command line.
_LIBRARY = (
    *("Usage", "Example", "Examples", "Options", "Arguments", "Commands", "required", "default: {0}"),
    "Show this message and exit.",
    *("env var: {0}", "Missing command.", "No such command {0}.", "No such command {0}. Did you mean {1}?"),
    *("No such option: {0}", "{0} (Possible options: {1})", "Missing argument {0}.", "Missing option {0}."),
    *("Invalid value for {0}: {1}", "Got unexpected extra argument(s) ({0})", "Option {0} requires an argument."),
    *("Option {0} does not take a value.", "Error: {0}", "Try '{0}' for help.", "Aborted!"),
    "Install completion for the current shell.",
    "Show completion for the current shell, to copy it or customize the installation.",
    *("Input should be greater than or equal to {0}", "Input should be less than or equal to {0}"),
    *("Input should be a valid integer, unable to parse string as an integer", "Input should be {0}"),
    *("be {0}", "be greater than {0}", "be greater than or equal to {0}", "be less than {0}"),
    *("be less than or equal to {0}", "be a valid string", "be a valid list", "be a valid number"),
    *("be a valid integer", "be a valid integer, got a number with a fractional part", "be a valid dictionary"),
    *("be a valid integer, unable to parse string as an integer", "be a valid dictionary or instance of {0}"),
    *("be a valid boolean", "be a valid boolean, unable to interpret input"),
    "be a valid number, unable to parse string as a number",
)
# Values of files and figures that are printed in people's language: parts of memory and time, states, verdicts.
_VALUES = (
    *("weights", "gradients", "optimizer", "activations", "logits", "buffers", "framework", "compute", "memory"),
    *("overhead", "update", "transfer", "sync", "waits", "host", "training", "preparation", "start", "evaluation"),
    *("checkpoints", "finish", "running", "finished", "failed", "stopped", "damaged", "planned", "preparing"),
    *("truncated", "dropped", "rejected", "packing", "checkpointing", "8-bit optimizer", "step"),
    *("effective", "works", "little gain", "harmful", "impossible", "not installed"),
    *("base", "adapter", "tuned", "merged", "one", "mixed", "grouped", "before", "after", "wanted", "prompt"),
    *("usable", "preflight", "saving", "run", "started", "the adapter", "line {0}", "character n-grams"),
    *("without it {0} of the memory is used", "Run", "system", "clock", "port {0}"),
)
_WORD = re.compile(r"(?<![\w./_-])(?:[A-Za-z][a-z]+(?:[-'][a-z]+)*|[A-Z]{2,})(?![\w./_(=-])")


@cache
def messages() -> dict[str, list[str]]:
    """Id -> where it stands, in the order of the files."""
    found: dict[str, list[str]] = {}
    for file in house().files.values():
        path = file.relative_to(ROOT).as_posix()
        if not path.startswith(_NOT_SHOWN):
            for text in _Texts(path).of(ast.parse(file.read_text(encoding="utf-8"))):
                found.setdefault(text, []).append(path)
    for place, texts in (("typer", _LIBRARY), ("values", _VALUES)):
        for text in texts:
            found.setdefault(text, []).append(place)
    for path, text in [*_of_page(), *_of_techniques(), *_of_recipes(), *_of_importers(), *_of_starter()]:
        found.setdefault(text, []).append(path)
    return {text: list(dict.fromkeys(places)) for text, places in found.items()}


def _of_page() -> Iterator[tuple[str, str]]:
    path = "orchestrator/report/page.html"
    for text in re.findall(r'\bw\("([^"]+)"\)', (ROOT / path).read_text(encoding="utf-8")):
        yield path, text


def _of_techniques() -> Iterator[tuple[str, str]]:
    """Sentences of the catalogue of techniques."""
    path = "strategies/techniques/catalogue.toml"
    for one in tomllib.loads((ROOT / path).read_text(encoding="utf-8"))["technique"]:
        yield from ((path, one[name]) for name in ("about", "quality") if name in one)


def _of_recipes() -> Iterator[tuple[str, str]]:
    from orchestrator.job.schema import recipes

    yield from (("orchestrator/recipes", about) for _, about in recipes().values())


def _of_importers() -> Iterator[tuple[str, str]]:
    """What becomes of other tools' keys."""
    from orchestrator.job.importers.tables import TOOLS, tables

    for tool in TOOLS:
        table = tables()[tool]
        texts = [sentence for group in table.sentences.values() for sentence in group.values()]
        texts += [entry.note for entry in table.entries.values() if entry.note]
        texts += [str(one["sentence"]) for one in table.refuse.values()]
        texts += [rule.note for rule in table.objectives if rule.note]
        for text in texts:
            if not re.fullmatch(r"[\w.]+: auto", text):  # a key and its value
                yield f"orchestrator/job/importers/{tool}.yaml", text


def _of_starter() -> Iterator[tuple[str, str]]:
    """Comments that `init` writes beside the sentences of the keys."""
    from orchestrator.job import schema

    sections = [*schema.SECTIONS.values(), schema.METHOD_SECTIONS[schema.DEFAULT_METHOD]]
    yield from (("orchestrator/job/schema.py", text) for text in schema.STARTER.values())
    yield from (("orchestrator/job/sections", title) for section in sections if (title := schema.title_of(section)))


class _Texts(ast.NodeVisitor):
    """The messages of a module."""

    def __init__(self, path: str) -> None:
        self.found: list[str] = []
        self._is_view = path.startswith("orchestrator/views/")
        self._prints = 0  # how deep inside a call that prints

    def of(self, tree: ast.Module) -> list[str]:
        self.visit(tree)
        return self.found

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            self._docstring(node)
        super().generic_visit(node)

    def _docstring(self, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Take it out of the tree; that of a verb is its help."""
        if ast.get_docstring(node) is None:
            return
        text = ast.get_docstring(node, clean=True) or ""
        node.body = node.body[1:]
        if any(re.search(r"\.(command|callback)\(", ast.unparse(one)) for one in getattr(node, "decorator_list", ())):
            for paragraph in text.split("\n\n"):
                if not paragraph.startswith("Example"):
                    self.found.append(" ".join(paragraph.split()))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _NOT_MESSAGES or name == "Literal":
            return
        if isinstance(node.func, ast.Attribute):
            self.visit(node.func.value)
        if name in _KEYS:  # a default, then what the key is for
            node.args, node.keywords = node.args[1:2], [one for one in node.keywords if one.arg == "description"]
        self._prints += name in _PRINT
        styles = ("style", "help", "overflow", "justify")
        for value in (*node.args, *(one.value for one in node.keywords if one.arg not in styles)):
            self.visit(value)
        self._prints -= name in _PRINT
        for one in node.keywords:
            if one.arg == "help" and isinstance(one.value, (ast.Constant, ast.JoinedStr)) and _text(one.value):
                self.found += [" ".join(part.split()) for part in _text(one.value).split("\n\n")]

    def visit_Compare(self, node: ast.Compare) -> None:
        """Texts that are compared are others' texts, or names."""
        for value in (node.left, *node.comparators):
            if not isinstance(value, (ast.Constant, ast.Tuple, ast.List, ast.Set)):
                self.visit(value)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        """In a view words side by side are headings."""
        are_words = self._is_view and all(isinstance(one, ast.Constant) for one in node.elts)
        self._prints += are_words
        self.generic_visit(node)
        self._prints -= are_words

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if getattr(node.value, "id", "") == "Literal":
            return
        self.visit(node.value)
        if not isinstance(node.slice, ast.Constant):
            self.visit(node.slice)

    def visit_Assert(self, node: ast.Assert) -> None:
        """A bug's text is for us."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._add(_text(node))
        shown, self._prints = self._prints, 0
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.visit(part.value)
        self._prints = shown

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._add(_text(node))

    def _add(self, text: str) -> None:
        for line in text.split("\n"):
            if _is_message(core(line)[1], self._prints > 0):
                self.found.append(core(line)[1])


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    """A text with its values as places; `{:.2f}`, which `format` fills, is one too."""
    if isinstance(node, ast.Constant):
        return node.value if "{}" not in node.value and "{:" not in node.value else _numbered(node.value)
    parts, count = "", 0
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts += part.value
        else:
            parts, count = f"{parts}{{{count}}}", count + 1
    return parts


def _numbered(text: str) -> str:
    number = iter(range(100))
    return re.sub(r"\{(?::[^{} ]*)?\}", lambda _: f"{{{next(number)}}}", text)


@cache
def _others() -> set[str]:
    return set(_NOT_MESSAGES_FILE.read_text(encoding="utf-8").splitlines())


def _is_message(text: str, is_printed: bool) -> bool:
    if text in _others():
        return False
    if is_printed:
        return num_letters(text) >= 2 and not text.startswith(("--", "http")) and not re.fullmatch(r"\w+_\w+", text)
    words = _WORD.findall(PLACE.sub(" ", text))
    if PLACE.search(text) and text[0].isalpha() and words and " " in text and num_letters(text) >= 5:
        return True  # `imported {0}`
    if len(words) < 2 or num_letters(text) < 7 or not any(word.islower() for word in words):
        return False
    return not re.fullmatch(r"[^ ]*|orchestrator \w+ .*|pip install .*", text)


def catalogue() -> Catalog:
    """The Japanese catalogue as it is."""
    with PO.open("rb") as file:
        return read_po(file, locale="ja", domain=DOMAIN)


def missing() -> list[str]:
    """Ids without a translation."""
    known = {message.id: message.string for message in catalogue()}
    return [text for text in messages() if not known.get(text)]


def dead() -> list[str]:
    """Ids of the catalogue that the source does not have."""
    return [str(message.id) for message in catalogue() if message.id and message.id not in messages()]


def wrong_places() -> list[str]:
    """Ids whose translation has other places."""
    pairs = [(str(message.id), str(message.string)) for message in catalogue() if message.id and message.string]
    return [text for text, translation in pairs if sorted(PLACE.findall(text)) != sorted(PLACE.findall(translation))]


def updated(translations: dict[str, str]) -> Catalog:
    """The catalogue of the messages as they are now, with these translations over the earlier ones."""
    known = {message.id: message.string for message in catalogue()} if PO.exists() else {}
    known |= {core(text)[1]: translation for text, translation in translations.items() if translation}
    new = Catalog(locale="ja", domain=DOMAIN, project="orchestrator", charset="utf-8", fuzzy=False)
    new.header_comment = "# What people read, in Japanese. `python tests/translations.py` keeps it."
    for text, places in messages().items():
        new.add(text, known.get(text) or "", locations=[(place, None) for place in places])
    return new


def po_text(new: Catalog) -> bytes:
    file = io.BytesIO()
    write_po(file, new, width=0, omit_header=False, sort_output=False, include_lineno=False)
    return re.sub(
        rb'"(POT-Creation|PO-Revision)-Date: [^"]*"\n', b"", file.getvalue()
    )  # it changes by its content only


def mo_bytes() -> bytes:
    """The catalogue as gettext reads it."""
    file, found = io.BytesIO(), catalogue()
    found.creation_date = found.revision_date = datetime(2026, 1, 1)  # the same texts, the same bytes
    write_mo(file, found)
    return file.getvalue()


def main() -> None:
    translations = {}
    for name in sys.argv[1:]:
        with Path(name).open("rb") as file:
            translations |= {message.id: message.string for message in read_po(file, locale="ja")}
    PO.write_bytes(po_text(updated(translations)))
    MO.write_bytes(mo_bytes())
    waiting = missing()
    for text in waiting:
        print(f'# {", ".join(messages()[text])}\nmsgid {_quoted(text)}\nmsgstr ""\n')
    print(f"{len(messages())} messages, {len(waiting)} wait for a translation", file=sys.stderr)


def _quoted(text: str) -> str:
    from babel.messages.pofile import escape

    return escape(text)


if __name__ == "__main__":
    main()
