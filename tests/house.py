"""How the house is built, counted: modules, rooms, imports between them, cycles, sizes; test_walls.py holds it so.

python tests/house.py [FOLDER]      of this checkout, or of another one
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("clusters", "strategies", "orchestrator")  # each may import those before it
# The rooms of each floor: each imports only rooms of lines above its own.  A flat module is a room of its own.
ROOMS = (
    ("clusters.units", "clusters.capability", "clusters.job_backend", "clusters.safe"),
    ("clusters.hardware",),
    ("clusters.probe",),
    ("clusters.ray",),
    ("clusters.kubernetes",),
    ("clusters",),
    ("strategies.families", "strategies.optimizers", "strategies.schedules"),
    ("strategies.config_values",),
    ("strategies.shape_config",),
    ("strategies.shape",),
    ("strategies.quality",),
    ("strategies.workload",),
    ("strategies.stage_shape",),
    ("strategies.model",),
    ("strategies.export", "strategies.method_parts"),
    ("strategies.train_setup",),
    ("strategies.contract",),
    ("strategies.techniques",),
    ("strategies.reuse",),
    ("strategies.step",),
    ("strategies.objectives",),
    ("strategies.pipeline",),
    ("strategies.cost",),
    ("strategies.engines",),
    ("strategies.measure",),
    ("strategies.adapter_bank",),
    ("strategies.adapter_bank.shares",),
    ("strategies.lsp_offload",),
    ("strategies.sparse_memory",),
    ("strategies.multi_lora",),
    ("strategies.methods",),
    ("strategies.mixture",),
    ("strategies.pruning",),
    ("strategies.compatibility",),
    ("strategies.registry",),
    ("strategies",),
    ("orchestrator.errors", "orchestrator"),
    ("orchestrator.language", "orchestrator.progress"),
    ("orchestrator.job.sections",),
    ("orchestrator.job.scoring",),
    ("orchestrator.job",),
    ("orchestrator.job.importers",),
    ("orchestrator.doctor",),
    ("orchestrator.data.rows",),
    ("orchestrator.data.readers",),
    ("orchestrator.data.rendering",),
    ("orchestrator.data",),
    ("orchestrator.planning",),
    ("orchestrator.planning.stated",),
    ("orchestrator.runs.comparison",),
    ("orchestrator.runs",),
    ("orchestrator.runs.proofs", "orchestrator.runs.tasks"),
    ("orchestrator.runs.summary",),
    ("orchestrator.runs.mirror",),
    ("orchestrator.training",),
    ("orchestrator.training.model",),
    ("orchestrator.training.workers",),
    ("orchestrator.training.proofs",),
    ("orchestrator.training.together",),
    ("orchestrator.lifecycle.stages",),
    ("orchestrator.lifecycle",),
    ("orchestrator.lifecycle.together", "orchestrator.lifecycle.proofs"),
    ("orchestrator.serving.engines",),
    ("orchestrator.harness",),
    ("orchestrator.search", "orchestrator.bank", "orchestrator.remote", "orchestrator.export", "orchestrator.serving"),
    ("orchestrator.serving.bench",),
    ("orchestrator.views",),
    ("orchestrator.report", "orchestrator.dashboard"),
    ("orchestrator.cli",),
    ("orchestrator.__main__",),
)
FLAT = {room for line in ROOMS for room in line if room.count(".") == 1} | set(FLOORS)
FILES_A_ROOM, LINES_A_FILE, LINES_A_FUNCTION, PARAMETERS = 15, 400, 60, 6


@dataclass(frozen=True)
class Function:
    """A function or method."""

    name: str  # of its module, its class and itself
    num_lines: int
    num_parameters: int  # without self; those of a verb are its options and not counted


@dataclass(frozen=True)
class House:
    """A checkout's Python modules, by name."""

    files: Mapping[str, Path]

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse(path.read_text()) for name, path in self.files.items()}

    @cached_property
    def nodes(self) -> dict[str, list[ast.AST]]:
        """Every node of each module."""
        return {name: list(ast.walk(tree)) for name, tree in self.trees.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module -> modules of this checkout that it imports, inside functions and under TYPE_CHECKING as well."""
        return {name: set(_imported(nodes, self.files)) - {name} for name, nodes in self.nodes.items()}

    @cached_property
    def dangling(self) -> set[tuple[str, str]]:
        """Imports of modules or names of this checkout that do not exist."""
        found = set()
        for name, nodes in self.nodes.items():
            for node in nodes:
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FLOORS:
                    known = self._names(node.module)
                    found |= {(name, f"{node.module}.{one.name}") for one in node.names if one.name not in known}
        return found

    def _names(self, module: str) -> set[str]:
        if module not in self.trees:
            return set()
        below = {name.removeprefix(f"{module}.") for name in self.files if name.startswith(f"{module}.")}
        return below | {name for node in self.trees[module].body for name in _defined(node)}

    def room(self, module: str) -> str:
        """The folder a module lies in; a module that lies flat on a floor, and a floor itself, is its own room."""
        folder = module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]
        return module if folder in FLOORS else folder

    @cached_property
    def flat(self) -> list[str]:
        """Modules that lie in no room."""
        return sorted(
            name
            for name, path in self.files.items()
            if path.parent.name in FLOORS and name.count(".") == 1 and path.name != "__init__.py"
        )

    @cached_property
    def arrows(self) -> set[tuple[str, str]]:
        """(module, module) for every import that leaves a room."""
        pairs = {(name, other) for name, others in self.imports.items() for other in others}
        return {pair for pair in pairs if self.room(pair[0]) != self.room(pair[1])}

    @cached_property
    def both_ways(self) -> set[tuple[str, str]]:
        """Imports between folders that import each other; flat modules without a line in ROOMS count as one folder."""

        def place(module: str) -> str:
            room = self.room(module)
            return f"{room.split('.')[0]}, flat" if module in self.flat and room not in FLAT else room

        pairs = {pair: (place(pair[0]), place(pair[1])) for pair in self.arrows}
        return {pair for pair, (a, b) in pairs.items() if a != b and (b, a) in pairs.values()}

    @cached_property
    def up(self) -> list[tuple[str, str]]:
        """Imports that go up: to a room of the same line or of one below in ROOMS."""
        rank = {room: number for number, line in enumerate(ROOMS) for room in line}
        return sorted(
            (name, other)
            for name, other in self.arrows
            if rank.get(self.room(other), len(ROOMS)) >= rank.get(self.room(name), -1)
        )

    @cached_property
    def cycles(self) -> list[list[str]]:
        """Modules that import each other in a circle, lazily or not."""
        reach = {name: _reachable(name, self.imports) for name in self.imports}
        circles = {frozenset(o for o in reach[name] if name in reach[o]) for name in reach if name in reach[name]}
        return sorted(sorted(circle) for circle in circles)

    @cached_property
    def lines(self) -> dict[str, int]:
        return {name: len(path.read_text().splitlines()) for name, path in self.files.items()}

    @cached_property
    def num_code_lines(self) -> int:
        """Lines that hold code: neither blank nor only comment or docstring."""
        return sum(_num_code_lines(path.read_text(), self.nodes[name]) for name, path in self.files.items())

    @cached_property
    def functions(self) -> list[Function]:
        return [one for name, tree in self.trees.items() for one in _functions(name, tree)]

    @cached_property
    def rooms(self) -> dict[str, list[str]]:
        """Folder -> its modules, without __init__ and __main__."""
        found: dict[str, list[str]] = {}
        for name, path in self.files.items():
            if not path.name.startswith("__"):
                found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    @cached_property
    def exceptions(self) -> dict[str, int]:
        """What is larger than its limit -> how large."""
        found = {f"{name}: lines": size for name, size in self.lines.items() if size > LINES_A_FILE}
        found |= {f"{room}: files": len(names) for room, names in self.rooms.items() if len(names) > FILES_A_ROOM}
        for one in self.functions:
            if one.num_lines > LINES_A_FUNCTION:
                found[f"{one.name}: lines"] = one.num_lines
            if one.num_parameters > PARAMETERS:
                found[f"{one.name}: parameters"] = one.num_parameters
        return found


def house(root: Path = ROOT) -> House:
    """The modules of a checkout.  Raises AssertionError where there are none."""
    files = {}
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            if "recipes" in path.parts:
                continue
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert len(files) > 100, f"{root} holds {len(files)} modules: nothing is proven by so few"
    return House(files)


def _imported(nodes: list[ast.AST], known: Mapping[str, Path]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{one.name}" for one in node.names}
            yield from names & set(known)
            if node.module in known and names - set(known):
                yield node.module


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((one.asname or one.name).split(".")[0] for one in node.names)
    elif isinstance(node, ast.If | ast.Try):
        yield from (name for one in [*node.body, *node.orelse] for name in _defined(one))


def _functions(module: str, tree: ast.AST, at: str = "") -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{at}{node.name}"
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            is_verb = any("command" in ast.unparse(one) for one in node.decorator_list)
            yield Function(f"{module}.{name}", num_lines, 0 if is_verb else len([n for n in names if n != "self"]))
            yield from _functions(module, node, f"{name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(module, node, f"{at}{node.name}.")
        else:
            yield from _functions(module, node, at)


def _num_code_lines(text: str, nodes: list[ast.AST]) -> int:
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(text).readline) if one.type not in silent]
    docs = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            docs.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len({line for one in tokens for line in range(one.start[0], one.end[0] + 1)} - docs)


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen, waiting = set(), list(edges.get(start, ()))
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += edges.get(name, ())
    return seen


def describe(found: House) -> str:
    """The numbers, one a line."""
    longest = max(found.functions, key=lambda one: one.num_lines)
    widest = max(found.functions, key=lambda one: one.num_parameters)
    file = max(found.lines, key=lambda name: found.lines[name])
    sizes = sorted(one.num_lines for one in found.functions)
    flat = [name for name in found.flat if name.startswith("orchestrator.")]
    rows = (
        ("lines", f"{sum(found.lines.values()):,}"),
        ("lines of code, docstrings and comments aside", f"{found.num_code_lines:,}"),
        ("modules", len(found.files)),
        ("modules flat in orchestrator/", f"{len(flat)}, of all three floors {len(found.flat)}"),
        ("imports between folders that import each other", len(found.both_ways)),
        ("import cycles", f"{len(found.cycles)} of {sum(map(len, found.cycles))} modules"),
        ("most files in a folder", max(map(len, found.rooms.values()))),
        ("longest file", f"{file} {found.lines[file]}"),
        ("longest function", f"{longest.name} {longest.num_lines}"),
        ("median function", sizes[len(sizes) // 2]),
        ("most parameters", f"{widest.name} {widest.num_parameters}"),
        ("larger than a limit", len(found.exceptions)),
    )
    return "\n".join(f"{name:48} {value}" for name, value in rows)


if __name__ == "__main__":
    shown = house(Path(sys.argv[1]) if sys.argv[1:] else ROOT)
    print(describe(shown))
    if not sys.argv[1:]:
        print("\nImports that go up:", *(f"  {a} -> {b}" for a, b in shown.up), sep="\n")
        print("\nCycles:", *(" <-> ".join(circle) for circle in shown.cycles), sep="\n  ")
        print("\nLarger than a limit:", *(f"{n} {s}" for n, s in sorted(shown.exceptions.items())), sep="\n  ")
        print("\nImports of nothing:", *sorted(shown.dangling), sep="\n  ")
