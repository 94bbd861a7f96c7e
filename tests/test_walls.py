"""The walls of the house: imports go down only, planning is light, one owner for each heavy library."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from tests.house import FLAT, FLOORS, ROOMS, ROOT, house

# Imports that still go up and circles that are still there: this list may only shrink.
STILL_UP: set[tuple[str, str]] = set()
STILL_CIRCLES: set[str] = set()
HEAVY = ("torch", "ray", "transformers", "peft", "deepspeed", "mlflow", "kubernetes", "datasets", "numpy", "pyarrow")
HOUSE = house()
NODES = {HOUSE.files[name]: nodes for name, nodes in HOUSE.nodes.items()}


def modules(floor: str = ".") -> list[Path]:
    """Every module of ours, or of one floor."""
    found = [path for path in HOUSE.files.values() if path.is_relative_to(ROOT / floor)]
    assert len(found) > 20
    return found


@cache
def imports(path: Path) -> set[str]:
    names = set()
    for node in NODES[path]:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_lies_in_a_room():
    rooms = {room for line in ROOMS for room in line}

    assert {HOUSE.room(name) for name in HOUSE.files} <= rooms
    assert rooms <= {HOUSE.room(name) for name in HOUSE.files}, "a room that is gone stands in the list"
    assert set(HOUSE.flat) <= FLAT


def test_imports_go_down_only():
    assert len(HOUSE.arrows) > 100

    assert set(HOUSE.up) == STILL_UP


def test_no_imports_go_in_a_circle():
    assert {name for circle in HOUSE.cycles for name in circle} == STILL_CIRCLES


def test_imports_inside_functions_find_what_they_name():
    assert not HOUSE.dangling


def test_no_method_is_asked_for_words_that_it_may_lack():
    """The contract names every word: hasattr(method, ..) and getattr(method, .., default) would hide one."""
    calls = [node for tree in HOUSE.trees.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asking = [call for call in calls if ast.unparse(call.func) in ("hasattr", "getattr")]
    assert len(asking) > 30

    hidden = {ast.unparse(one) for one in asking if one.func.id == "hasattr" or len(one.args) == 3}
    assert not {text for text in hidden if text.split("(")[1].split(",")[0].rpartition(".")[2] == "method"}


def test_no_two_classes_share_a_name():
    names = [node.name for tree in HOUSE.trees.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(names) > 300

    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_each_room_says_what_its_files_hold_and_where_to_start():
    """One line a file, `start here` on one, in the docstring of the room."""
    rooms = {room: names for room, names in HOUSE.rooms.items() if room not in FLOORS}
    assert len(rooms) > 25

    for room, names in rooms.items():
        text = ast.get_docstring(HOUSE.trees[room]) or ""
        listed = re.findall(r"^(\w+)  +\S", text, flags=re.MULTILINE)
        own = [name.rpartition(".")[2] for name in names]
        below = [one.rpartition(".")[2] for one in HOUSE.rooms if one.rpartition(".")[0] == room]
        assert sorted(listed) == sorted(own + below), f"{room}: its docstring lists {listed}"
        assert text.count("start here") == 1, f"{room}: `start here` stands on {text.count('start here')} lines"


def test_what_is_too_large_only_shrinks():
    """tests/house_exceptions.json lists what is larger than its limit, and how large: no more, and no larger."""
    allowed = json.loads((ROOT / "tests/house_exceptions.json").read_text())

    grown = {name: size for name, size in HOUSE.exceptions.items() if size > allowed.get(name, 0)}
    assert not grown, "over the limit: split it"
    stale = {name: size for name, size in allowed.items() if HOUSE.exceptions.get(name) != size}
    assert not stale, "smaller now: write the new size into tests/house_exceptions.json, or take it out"


def test_strategies_use_only_capability_units_and_safe_readers_of_clusters():
    for path in modules("strategies"):
        from_clusters = {name for name in imports(path) if name.startswith("clusters")}

        allowed = {
            f"clusters.{name}"
            for name in ("capability", "units", "safe", "safe.reading", "safe.writing", "safe.archives")
        }
        assert from_clusters <= allowed, path


def test_strategies_never_import_ray():
    for path in modules("strategies"):
        assert not any(name.split(".")[0] == "ray" for name in imports(path)), path


def test_planning_path_loads_nothing_heavy():
    code = (
        "import sys, orchestrator.cli.app, orchestrator.job.job_file, orchestrator.job.schema, strategies.registry\n"
        "assert len(list(orchestrator.cli.program.GroupedVerbs().commands.values())) > 30\n"
        "import orchestrator.planning.planner, orchestrator.planning.workload\n"
        "import orchestrator.lifecycle.run, orchestrator.lifecycle.validate\n"
        "import clusters.capability, clusters.probe.machine, clusters.probe.node\n"
        "import clusters.ray.connect, clusters.ray.probe\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)

    assert shown.stdout.strip() == "[]"


def test_pydantic_stays_at_the_edge():
    owners = {
        path.relative_to(ROOT).as_posix() for path in modules() if any("pydantic" in name for name in imports(path))
    }

    edge = {
        *(
            f"orchestrator/job/sections/{name}.py"
            for name in ("section", "training", "machines", "methods", "objectives", "search")
        ),
        "orchestrator/job/spec.py",
        "orchestrator/job/job_file.py",
        "orchestrator/job/schema.py",
        "clusters/safe/reading.py",
    }
    assert owners == edge


def test_no_method_is_named_in_the_orchestrator():
    from strategies import METHODS

    assert METHODS
    for path in modules("orchestrator"):
        strings = {node.value for node in NODES[path] if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not strings & set(METHODS), f"{path} names {strings & set(METHODS)}"
        assert not any(name.startswith("strategies.") and name.split(".")[1] in METHODS for name in imports(path)), path


def test_each_heavy_library_has_one_owner():
    owners = {name: set() for name in ("ray.train", "ray.tune", "optuna", "matplotlib", "mlflow", "kubernetes", "ray")}
    for path in modules():
        for name in imports(path):
            for library, found in owners.items():
                if name == library or name.startswith(f"{library}."):
                    found.add(path.relative_to(ROOT).as_posix())

    assert owners["ray.train"] == {"orchestrator/training/workers/launch.py"}
    assert owners["ray.tune"] == {"orchestrator/search/tuning.py"}
    assert owners["optuna"] == {"orchestrator/search/sampler.py"}
    assert owners["matplotlib"] == {"orchestrator/report/plots.py"}
    assert owners["mlflow"]
    assert {Path(path).parent.as_posix() for path in owners["mlflow"]} == {"orchestrator/runs/mirror"}
    assert owners["kubernetes"] == {"clusters/kubernetes/connect.py"}
    doors = {"orchestrator/training/workers/launch.py", "orchestrator/search/tuning.py"}
    own = {
        f"clusters/ray/{name}.py"
        for name in ("connect", "remote_objects", "gpu_reservation", "probe", "jobs", "nodes", "spares")
    } | doors
    assert owners["ray"] == own


# What runs code that is found in a file, or writes wherever an archive says.
UNSAFE_MODULES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "zipimport", "code")
UNSAFE_CALLS = {
    *("torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("pandas.read_pickle", "numpy.core.multiarray._reconstruct", "numpy.lib.format.read_array"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("jinja2.Environment", "jinja2.Template", "jinja2.NativeEnvironment", "jinja2.nativetypes.NativeEnvironment"),
    *("shutil.unpack_archive", "builtins.eval", "builtins.exec"),
}
UNSAFE_METHODS = {"extractall", "extract", "read_pickle", "unpack_archive"}  # whatever they are called on
UNSAFE_OPTIONS = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True}
# (file, what): each with its reason.
UNSAFE_ALLOWED: dict[tuple[str, str], str] = {}  # (module, what) -> why it is safe


def unsafe(nodes: Iterable[ast.AST]) -> set[str]:
    """What a module calls, imports or switches on of the above."""
    nodes, found, names = list(nodes), set(), {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            names |= {alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names if not alias.asname}
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} & {module for module in [node.module] if module.split(".")[0] in UNSAFE_MODULES}
    for node in nodes:
        if isinstance(node, ast.Constant) and node.value in UNSAFE_MODULES:
            found.add(f"{node.value!r}")  # import_module("pickle")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.add(node.func.id)
        elif isinstance(node, ast.Name) and names.get(node.id) in UNSAFE_CALLS:
            found.add(names[node.id])
        elif isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            found |= {".".join([names.get(first, first), *rest])} & UNSAFE_CALLS
            found |= {node.attr} & UNSAFE_METHODS
        elif isinstance(node, ast.keyword) and node.arg in UNSAFE_OPTIONS and isinstance(node.value, ast.Constant):
            found |= {node.arg} if node.value.value is UNSAFE_OPTIONS[node.arg] else set()
    return found


def test_nothing_runs_code_from_files():
    """Neither pickles nor YAML objects, unpacked archives or open templates, in whatever spelling."""
    found = {(path.relative_to(ROOT).as_posix(), what) for path in modules() for what in unsafe(NODES[path])}

    assert found == set(UNSAFE_ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle as c",
        "from joblib import load",
        "import importlib; importlib.import_module('shelve')",
        "import torch\ndef f(x):\n    return torch.load(x, weights_only=True)",
        "import torch as t; t.load('x')",
        "from torch import load as read; read('x')",
        "from torch import serialization; serialization.load('x')",
        "read = __import__('torch'); import torch; f = torch.load",
        "import numpy; numpy.load('x', allow_pickle=True)",
        "import pandas as pd; pd.read_pickle('x')",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "import jinja2; jinja2.Environment()",
        "from jinja2 import Template; Template('x')",
        "import tarfile; tarfile.open('x').extractall()",
        "import shutil; shutil.unpack_archive('x')",
        "eval('1')",
    ],
)
def test_that_search_sees_every_spelling(source):
    text = source if "unsafe_load" not in source else f"{source}; unsafe_load(text)"

    assert unsafe(ast.walk(ast.parse(text)))


def test_that_search_passes_what_is_safe():
    for source in (
        "import yaml, torch, numpy\nyaml.safe_load(t); torch.save(a, b); numpy.load(f); model.eval()",
        "from jinja2.sandbox import SandboxedEnvironment\nSandboxedEnvironment()",
    ):
        assert not unsafe(ast.walk(ast.parse(source)))


def test_top_level_is_what_the_house_allows():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    allowed = {"pyproject.toml", "orchestrator", "strategies", "clusters", "tests", "k8s", "README.md"}
    allowed |= {"Makefile", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "README.ja.md", ".ci"}
    allowed |= {".gitignore", ".dockerignore", ".editorconfig", ".pre-commit-config.yaml"}
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}

    assert top and top <= allowed, top - allowed


def test_only_the_command_line_imports_the_report():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        if any(name.startswith("orchestrator.report.") for name in imports(path))
    }

    assert {path for path in users if not path.startswith("orchestrator/report/")} == {
        "orchestrator/cli/bank.py",
        "orchestrator/cli/bench.py",
        "orchestrator/cli/report.py",
        "orchestrator/cli/search.py",
    }


def test_a_verb_that_reads_no_job_waits_for_no_pydantic():
    """Its own modules, that is: the parser of the command line has pydantic for a verb's options."""
    code = (
        "import sys, orchestrator.cli.app, orchestrator.cli.runs, orchestrator.views.result\n"
        "print([name for name in ('pydantic', 'orchestrator.job.job_file', 'asyncio') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)

    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("verb", "most", "not_loaded"),
    [
        ("--help", 26, ("pydantic", "orchestrator.runs", "orchestrator.job.job_file", "strategies.contract")),
        (
            "list",
            68,
            ("orchestrator.planning", "strategies.contract", "clusters.capability", "clusters.ray", "asyncio"),
        ),
    ],
)
def test_a_verb_that_answers_at_once_loads_little(verb, most, not_loaded, tmp_path):
    """Seconds differ by machine; what is loaded is what they are spent on (LOG.md, "Verbs that answer at once")."""
    code = (
        f"import sys; sys.argv = ['orchestrator', {verb!r}]\n"
        "from orchestrator.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"own = [name for name in sys.modules if name.split('.')[0] in {FLOORS}]\n"
        f"print(len(own), [name for name in {not_loaded} if name in sys.modules])"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=variables, check=True
    )

    count, loaded = shown.stdout.splitlines()[-1].split(" ", 1)
    assert loaded == "[]"
    assert int(count) <= most
