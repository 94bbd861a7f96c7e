"""Damage to what the program wrote itself: the files of a bank and of a run."""

from __future__ import annotations

import io
import json
import tarfile
from random import Random
from typing import Any

from tests.fuzz import values
from tests.fuzz.case import Case
from tests.fuzz.world import World


def bank(rng: Random, world: World) -> Case:
    """Cards, adapter configurations, weights, indexes and archives of a bank."""
    files: dict[str, Any] = dict(world.bank)
    specials: dict[str, Any] = {}
    way = rng.randrange(10)
    target = rng.choice(sorted(files))
    if way < 6:
        parts = {"card.json": 3, "adapter_config.json": 4, "adapter_model.safetensors": 1}
        part = rng.choice([name for name, weight in parts.items() for _ in range(weight)])
        target = rng.choice([name for name in sorted(files) if name.endswith(part)])
        if part.endswith(".json") and rng.random() < 0.75:
            tree = json.loads(files[target])
            files[target] = values.as_json(_odd_field(rng, tree) if rng.random() < 0.7 else values.mutated(rng, tree))
        else:
            files[target] = values.mangled(rng, files[target])
    elif way == 6:
        files["bank/index.sqlite"] = rng.choice((b"", b"x" * 100, b"SQLite format 3\0" + b"\0" * 200))
    elif way == 7:
        specials[rng.choice(("bank/index.sqlite", "bank/objects", "bank", target))] = rng.choice(tuple(values.SPECIALS))
    elif way == 8:
        files["bank.tar"] = _archive(rng, world)
        return Case(("bank", "import", "bank.tar", "--bank", rng.choice(("bank", "other"))), files, writes=True)
    else:
        folder = {f"mine/{name}": content for name, content in world.adapter.items()}
        part = rng.choice(sorted(folder))
        if part.endswith(".json"):
            folder[part] = values.as_json(_odd_field(rng, json.loads(folder[part]))).encode()
        else:
            folder[part] = values.mangled(rng, folder[part])
        verb = ("bank", "add", "mine", "--model", str(world.model), "--bank", "bank", "--name", "mine")
        return Case(verb, {**files, **folder}, writes=True)
    verbs = (
        ("list",), ("list", "--json"), ("show", "first"), ("show", "second", "--json"), ("verify",), ("verify",
        "--repair"),
        ("verify", "--json"), ("rm", "first"), ("export", "out.tar"), ("merge", "out", "first", "second"),
        ("merge", "out", "first", "second", "--how", "cat"),
    )  # fmt: skip
    return Case(("bank", *rng.choice(verbs), "--bank", "bank"), files, specials, writes=True)


_PATTERNS = ("(a+)+$", "(.*)*x", "(", "[", "*", "(?P<", "a{999999999}", "\\", "((((((.*)*)*)*)*)*)*!", ".*")


def _odd_field(rng: Random, tree: dict[str, Any]) -> Any:
    """One field of a card or a configuration, of any type; patterns that never end."""
    known = [*tree, "alpha_pattern", "rank_pattern", "target_modules", "layers_pattern", "layers_to_transform",
    "use_rslora",
             "use_dora", "modules_to_save", "scores", "digest", "name"]  # fmt: skip
    key = rng.choice(known)
    pattern = rng.choice(_PATTERNS)
    if key in ("alpha_pattern", "rank_pattern"):
        return {**tree, key: {pattern: rng.choice((4, "x", None, float("nan"), values.number(rng)))}}
    if key == "target_modules" and rng.random() < 0.5:
        return {**tree, key: pattern}
    if key == "scores" and rng.random() < 0.7:
        return {**tree, key: {"before": values.value(rng), "after": {"eval_loss": values.value(rng)}}}
    return {**tree, key: values.value(rng)}


def _archive(rng: Random, world: World) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in world.bank.items():
            info = tarfile.TarInfo(name.split("/", 3)[3])
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        bad = tarfile.TarInfo(rng.choice(("../x", "/tmp/x", "a/../../x", "x" * 300, "link", "", ".", "d/card.json")))
        bad.type = rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE))
        bad.linkname = rng.choice(("/etc/passwd", "../../x", "link", ""))
        tar.addfile(bad)
    content = stream.getvalue()
    return values.mangled(rng, content) if rng.random() < 0.4 else content


def runs(rng: Random, world: World) -> Case:
    """Every file of a run folder, damaged."""
    files: dict[str, Any] = {**world.files, **world.run}
    specials: dict[str, Any] = {}
    targets = [name for name in sorted(files) if name.startswith("runs/") and "/adapter/" not in name]
    for _ in range(rng.choice((1, 1, 2))):
        target, way = rng.choice(targets), rng.randrange(10)
        if way < 5 and target.endswith((".json", ".yaml")):
            files[target] = values.as_json(values.mutated(rng, json.loads(world.run[target])))
        elif way < 5:
            lines = [json.loads(line) for line in world.run[target].splitlines()]
            files[target] = "".join(values.as_json(line) + "\n" for line in values.mutated(rng, lines))
        elif way < 8:
            files[target] = values.mangled(rng, world.run[target])
        elif way == 8:
            specials[target] = rng.choice(tuple(values.SPECIALS))
        else:
            files.pop(target, None)
            files["runs/other/job.yaml"] = rng.choice((b"", b"x", b"\xff", b"model: {}"))
    verbs = (("status", "done"), ("status", "latest"), ("status", "done", "--json"), ("list",), ("list", "--json"),
    ("logs", "done"),
             ("logs", "done", "--json"), ("report", "done"), ("report", "done", "--markdown"), ("stop", "done"),
             ("resume", "done"),
             ("bank", "add", "done", "--bank", "bank"))  # fmt: skip
    return Case(rng.choice(verbs), files, specials, writes=True)
