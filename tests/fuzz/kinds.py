"""The kinds of input: each is a function of a random generator and the world that gives one case."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from random import Random
from typing import Any

from tests.fuzz import values
from tests.fuzz.case import Case
from tests.fuzz.folders import bank, runs
from tests.fuzz.world import HARDWARE, ROWS, World

PLAN = ("plan", "job.yaml", "--hardware", "hardware.yaml")
PATH_KEYS = ("data.train", "data.eval", "data.chat_template", "model.model_name_or_path", "checkpoint.output_dir",
             "bank.path", "cost.alternatives", "strategy.nvme_path")  # fmt: skip
FORMATS = ("messages", "prompt_completion", "alpaca", "sharegpt", "classification", "text")
KEYS = (
    *PATH_KEYS, "name", "version", "model.dtype", "model.model_revision", "data.format", "data.max_length",
    "data.instruction",
    "data.system_prompt", "method", "method.type", "method.lora_r", "method.lora_alpha", "method.lora_dropout",
    "method.lora_target_modules", "method.use_rslora", "train.num_train_epochs", "train.max_steps",
    "train.learning_rate",
    "train.seed", "train.global_batch_size", "train.per_device_train_batch_size", "train.gradient_accumulation_steps",
    "train.warmup_ratio", "train.warmup_steps", "train.weight_decay", "train.adam_epsilon", "train.max_grad_norm",
    "goal.max_hours", "goal.max_cost", "goal.min_quality", "cost.currency", "cost.electricity_per_kwh", "cost.power_w",
    "cost.hours_per_year", "cost.nodes", "cost.retrainings_per_year", "strategy.local_steps", "strategy.memory_safety",
    "strategy.deepspeed", "cluster.num_workers", "cluster.max_failures", "cluster.secrets", "cluster.shared_paths",
    "cluster.wait_for_nodes_s", "checkpoint.save_steps", "checkpoint.save_total_limit", "eval.eval_steps",
    "eval.metrics",
    "eval.max_rows", "eval.max_new_tokens", "eval.num_samples", "eval.early_stopping_patience", "search",
    "search.space",
    "search.budget", "search.budget.trials", "search.budget.minutes", "search.trial_steps", "search.quality_tolerance",
    "tracking.mlflow_uri", "tracking.experiment", "kubernetes.tolerations", "kubernetes.node_selector",
    "bank.temperature",
    "bank.probe_rows", "x", "", ".", "a.b.c", "method.x", "train", "data.train.path", "data.train.0",
)  # fmt: skip


def jobs(rng: Random, world: World) -> Case:
    """Job files: paths at every key, YAML that breaks readers, values of any type."""
    way, job = rng.randrange(10), world.job
    if way < 3:
        return _a_path(rng, world)
    if way < 5:
        text = _with_key(job, rng.choice(KEYS), _Raw(values.yaml_trick(rng)))
        if rng.random() < 0.2:
            text = rng.choice((values.yaml_trick(rng), text + "\nx: " + values.yaml_trick(rng) + "\n"))
    elif way == 5:
        text = values.mangled(rng, _block(job).encode())
    elif way == 6 and rng.random() < 0.1:
        many = rng.choice((3000, 100_000, 600_000))
        text = _with_key(job, rng.choice(KEYS), ["x"] * many)
    elif way < 9:
        text = _with_key(job, rng.choice(KEYS), values.value(rng))
    else:
        text = values.as_yaml(values.mutated(rng, job))
    verb = ("validate", "job.yaml") if rng.random() < 0.7 else rng.choice((
        PLAN, PLAN, ("tco", *PLAN[1:]), ("techniques", *PLAN[1:]), ("validate", "job.yaml", "--json")))  # fmt: skip
    return Case(verb, {**world.files, "job.yaml": text})


def _a_path(rng: Random, world: World) -> Case:
    """A path that leads nowhere, or to no file, at a key or an option."""
    place, path, job = rng.randrange(20), rng.choice(values.PATHS), world.job
    files: dict[str, Any] = dict(world.files)
    verb: tuple[str, ...] = rng.choice((("validate", "job.yaml"), ("validate", "job.yaml"), PLAN))
    if place < 13:
        key = rng.choice(PATH_KEYS)
        kind = rng.randrange(4) if key in ("data.train", "data.eval") else 3
        found = [path, ["train.jsonl", path], {"path": path}, path][kind]
        files["job.yaml"] = _with_key(job, key, found)
        return Case(verb, files, dict(values.SPECIALS))
    files["job.yaml"] = values.as_yaml(job)
    path = _argument(path)
    new = path if path.startswith("/dev/") else path.lstrip("/")  # nothing is to be written elsewhere
    verbs = (
        ("validate", path), ("plan", path), ("plan", "job.yaml", "--hardware", path), ("probe", "--hardware", path),
        ("tco", "job.yaml", "--hardware", "hardware.yaml", "--against", path), ("inspect", path), ("techniques", path),
        ("bench", "--compare", path, path), ("init", new), ("init", new, "--force"), ("search", path), ("submit", path),
        ("init", "new.yaml", "--train", path), ("bank", "list", "--bank", path), ("bank", "import", path), ("adapt",
        path), ("import", path), ("import", path, "--from", "axolotl", "--output", new),
        ("list", "--runs", path), ("search", "job.yaml", "--study", path, "--dry-run", "--set", "data.train=none"),
        ("bank", "add", path), ("bank", "export", new, "--bank", path), ("bank", "evaluate", "--job", path),
        ("bench", path), ("submit", "job.yaml", "--cluster", "kuberay", "--render", new, "--hardware", path),
        ("bank", "build", path), ("evaluate", path), ("merge", new, path), ("report", path, "--output", new),
    )  # fmt: skip
    writes = path in ("", ".") or path.startswith("~")
    return Case(rng.choice(verbs), files, dict(values.SPECIALS), writes)


def settings(rng: Random, world: World) -> Case:
    """`--set` with any key and value; search spaces."""
    job = world.job
    if rng.random() < 0.4:
        return Case(("validate", "job.yaml"), {**world.files, "job.yaml": _with_key(job, "search.space", _space(rng))})
    given: list[str] = []
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(KEYS) if rng.random() < 0.9 else values.text(rng)
        way = rng.randrange(4)
        if way == 0:
            said = values.yaml_trick(rng)
        elif way == 1:
            said = rng.choice(values.PATHS)
        else:
            said = values.as_yaml(values.value(rng)) if way == 2 else str(values.value(rng))
        joint = "=" if rng.random() < 0.95 else rng.choice(("", ":", "==", " = "))
        given += ["--set", _argument(f"{key}{joint}{said}")[:100_000]]
    verb = ("validate", "job.yaml") if rng.random() < 0.7 else PLAN
    return Case((*verb, *given), {**world.files, "job.yaml": values.as_yaml(job)}, dict(values.SPECIALS))


def _space(rng: Random) -> Any:
    keys = (
        *KEYS,
        "train.learning_rate",
        "method.lora_r",
        "train.per_device_train_batch_size",
        "data.packing",
        "model.dtype",
    )
    space: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        way, key = rng.randrange(6), rng.choice(keys)
        if way < 3:
            space[key] = [values.value(rng) for _ in range(rng.randrange(4))]
        elif way < 5:
            form = rng.choice(("uniform", "loguniform", "randint", "choice"))
            space[key] = {form: [values.value(rng, 0) if rng.random() < 0.3 else values.number(rng)
                                 for _ in range(rng.choice((2, 2, 2, 0, 1, 3)))]}  # fmt: skip
        else:
            space[key] = values.value(rng)
    return space


def hardware(rng: Random, world: World) -> Case:
    """Hardware files: rates that are nothing or too much, counts, names, types, YAML."""
    way = rng.randrange(10)
    if way < 6:
        tree = _odd_figures(rng)
        text = values.as_yaml(tree)
    elif way < 8:
        text = values.as_yaml(values.mutated(rng, HARDWARE))
    elif way == 8:
        mark = "q7q7"
        place = rng.choice(values.places(HARDWARE))
        text = values.as_yaml(_put(HARDWARE, place, mark)).replace(json.dumps(mark), values.yaml_trick(rng))
    else:
        text = values.mangled(rng, _block(HARDWARE).encode())
    verb = rng.choice((PLAN, PLAN, PLAN, ("probe", "--hardware", "hardware.yaml"), ("techniques", *PLAN[1:]),
                       ("tco", *PLAN[1:], "--against", "hardware.yaml")))  # fmt: skip
    return Case(verb, {**world.files, "job.yaml": values.as_yaml(world.job), "hardware.yaml": text})


def _odd_figures(rng: Random) -> Any:
    tree = HARDWARE
    numbers = [place for place in values.places(HARDWARE) if isinstance(_at(HARDWARE, place), int | float)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        way = rng.randrange(8)
        if way < 5:
            odd = rng.choice((*values.NUMBERS, 1e-12, 1e-9, 1e-6, 1e6, 1e9, 1e12, None))
            tree = _put(tree, rng.choice(numbers), odd)
        elif way == 5:
            names = (
                ("nodes", 0, "name"),
                ("nodes", 0, "gpus", 0, "name"),
                ("nodes", 0, "cpu", "name"),
                ("nodes", 1, "name"),
            )
            tree = _put(tree, rng.choice(names), values.text(rng))
        elif way == 6:
            counts = (("nodes", 0, "gpus", 0, "count"), ("nodes", 1, "count"))
            tree = _put(tree, rng.choice(counts), rng.choice((2, 8, 64, 65, 100, 1000, 1001, 10**9)))
        else:
            gpu = {"name": values.text(rng), "memory_gib": values.number(rng), "fp32_tflops": values.number(rng)}
            tree = _put(tree, ("nodes", 0, "gpus", 0), gpu)
    return tree


def rows(rng: Random, world: World) -> Case:
    """Data files: rows of any type in every format, bytes that are no text."""
    job, files = world.job, dict(world.files)
    ending = rng.choice(("jsonl",) * 6 + ("json", "csv", "parquet", "jsonl.gz"))
    train = [_row(rng) for _ in range(rng.choice((1, 3, 3)))]
    if rng.random() < 0.5:
        train = [*ROWS[:2], *train]
    content: Any
    if ending == "parquet":
        content = _parquet(rng)
    elif ending == "csv":
        cells = [("prompt", "completion"), *((values.text(rng), values.text(rng)) for _ in range(3))]
        content = "\n".join(",".join(line) for line in cells)
    elif ending == "json":
        content = values.as_json(train if rng.random() < 0.8 else values.value(rng))
    else:
        content = "".join(values.as_json(row) + "\n" for row in train)
    if rng.random() < 0.25:
        content = values.mangled(rng, _bytes(content))
    if ending == "jsonl.gz":
        content = gzip.compress(_bytes(content))
    files[f"train.{ending}"] = content
    job["data"]["train"] = f"train.{ending}"
    if rng.random() < 0.3:
        job["data"]["strict"] = False
    if rng.random() < 0.2:
        job["data"]["format"] = rng.choice(FORMATS)
    verb = rng.choice((("validate", "job.yaml"), ("inspect", "job.yaml"), ("inspect", "job.yaml", "--json"), PLAN))
    return Case(verb, {**files, "job.yaml": values.as_yaml(job)})


def _row(rng: Random) -> Any:
    def said() -> Any:
        return values.text(rng) if rng.random() < 0.6 else rng.choice(("a cat", "b", values.value(rng)))

    turn = {"role": rng.choice(("user", "assistant", "system", "tool", "", said())), "content": said()}
    row: Any = rng.choice((
        {"prompt": said(), "completion": said()},
        {"messages": [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]},
        {"messages": [turn, {"role": "user", "content": "x"}, {**turn, "role": "assistant", "tool_calls": said()}]},
        {"prompt": [turn], "completion": [{"role": "assistant", "content": said()}]},
        {"conversations": [{"from": "human", "value": said()}, {"from": rng.choice(("gpt", said())), "value": said()}]},
        {"instruction": said(), "input": said(), "output": said(), "system": said(), "history": said()},
        {"text": said()},
        {"text": said(), "label": said()},
        {"prompt": said(), "completion": said(), values.text(rng): said()},
    ))  # fmt: skip
    return values.mutated(rng, row) if rng.random() < 0.4 else row


def _parquet(rng: Random) -> bytes:
    import pyarrow
    import pyarrow.parquet

    unit = rng.choice(("s", "ms", "us", "ns"))
    most = 2**50 if unit == "s" else 2**62
    columns = {
        "date": pyarrow.array([date(1, 1, 1), date(9999, 12, 31)]),
        "beyond": pyarrow.array([-(2**31), 2**31 - 1], pyarrow.int32()).cast(pyarrow.date32()),
        "moment": pyarrow.array([most, -most], pyarrow.timestamp(unit)),
        "zone": pyarrow.array([0, 2**40], pyarrow.timestamp("s", tz=rng.choice(("UTC", "+09:00", "No/Where")))),
        "span": pyarrow.array([most, -most], pyarrow.duration(unit)),
        "clock": pyarrow.array([time(1, 2), None]),
        "bytes": pyarrow.array([b"\xff\x00", b"text"]),
        "decimal": pyarrow.array([Decimal("1.5"), None]),
        "struct": pyarrow.array([{"a": 1, "b": [datetime(2000, 1, 1)]}, None]),
        "lists": pyarrow.array([[timedelta(1)], []]),
        "map": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "float": pyarrow.array([float("nan"), float("inf")]),
        "null": pyarrow.nulls(2),
        "texts": pyarrow.array(["a", "b"]).dictionary_encode(),
        "big": pyarrow.array(["x", "y"], pyarrow.large_string()),
    }
    chosen = [rng.choice(list(columns)) for _ in range(2)]
    table = pyarrow.table({"prompt": columns[chosen[0]], "completion": columns[chosen[1]]})
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()


def names(rng: Random, world: World) -> Case:
    """Verbs with names and numbers that nobody has: runs, banks, recipes, addresses, options."""
    name = _argument(rng.choice((*values.PATHS, *values.TEXTS)))
    files = {**world.files, **world.run, "job.yaml": values.as_yaml(world.job)}
    none = {**files, "job.yaml": _with_key(world.job, "model.model_name_or_path", "./none")}  # nothing is to start
    count = str(rng.choice((0, -1, 10**30, 1.5, "x", "nan", "")))
    away = ("--address", "203.0.113.1")  # not of this machine, so that nothing is started
    cases = (
        *((verb, name) for verb in ("status", "logs", "report", "stop", "resume", "evaluate", "sync", "fetch",
        "recipes", "send")),
        *((verb, "done", "--runs", name) for verb in ("status", "logs", "report", "resume", "sync")),
        ("list", "--runs", name), ("merge", "out", name), ("submit", "job.yaml", "--run-id", name), ("bench", name,
        "--generate"),
        ("schema", "--field", name), ("init", "new.yaml", "--model", name), ("init", "new.yaml", "--recipe", name),
        ("init", "new.yaml", "--train", name), ("bank", "show", name, "--bank", "bank"), ("bank", "rm", name,
        "--bank", "bank"),
        ("bank", "add", "done", "--name", name), ("bank", "add", name), ("bank", "merge", "out", name, name, "--bank",
        "bank"),
        ("bank", "merge", "out", "first", "second", "--bank", "bank", "--how", name),
        ("bank", "merge", "out", "first", "second", "--bank", "bank", "--weights", name),
        ("head", "--name", name, *away), ("head", "--interface", name), ("head", "--token-file", name, *away),
        ("head", "--address", f"203.0.113.{name}"), ("join", name, *away), ("join", "127.0.0.1:1", "--name", name,
        *away), ("report", "done", "--lang", name),
        ("inspect", "job.yaml", "--rows", count), ("inspect", "job.yaml", "--row", count), ("bench", "job.yaml",
        "--steps", count),
        ("bench", "done", "--generate", "--batch-sizes", name), ("search", "job.yaml", "--trials", count),
        ("search", "job.yaml", "--minutes", count, "--sampler", name), ("search", "job.yaml", "--study", name),
        ("search", "job.yaml", "--lengths", name, "--study", "default"), ("search", "job.yaml", "--models", name,
        "--study", "default"),
        ("submit", "job.yaml", "--cluster", "kuberay", "--run-id", name, "--hardware", "hardware.yaml", "--render",
        "x.yaml"),
        ("plan", "job.yaml", "--hardware", name), ("techniques", "job.yaml", "--hardware", name), (name,), ("bank",
        name),
        ("status", "done", name), ("validate", "job.yaml", name), ("report", "done", "--markdown", "--output", name),
        ("bank", "export", "x.tar", name, "--bank", "bank"), ("adapt", "job.yaml", "--against", name),
    )  # fmt: skip
    chosen = rng.choice(cases)
    must_not_start = chosen[0] in ("search", "submit", "bench", "adapt") and "kuberay" not in chosen
    bank = world.bank if "bank" in chosen else {}
    return Case(chosen, {**(none if must_not_start else files), **bank}, dict(values.SPECIALS), writes=True)


KINDS: dict[str, Callable[[Random, World], Case]] = {
    "jobs": jobs,
    "settings": settings,
    "hardware": hardware,
    "rows": rows,
    "names": names,
    "bank": bank,
    "runs": runs,
}


def case_of(kind: str, seed: int, number: int, world: World) -> Case:
    """The input of that kind, seed and number: always the same one."""
    return KINDS[kind](Random(f"{seed}/{kind}/{number}"), world)


class _Raw(str):
    """YAML that goes into a file as it stands."""


def _with_key(job: dict[str, Any], key: str, new: Any) -> str:
    """The job as YAML with a dotted key at another value."""
    mark = "q7-here-7q"
    *way, last = key.split(".")
    parent: Any = job
    for step in way:
        if not isinstance(parent.get(step), dict):
            parent[step] = {}
        parent = parent[step]
    parent[last] = mark if isinstance(new, _Raw) else new
    text = values.as_yaml(job)
    return text.replace(json.dumps(mark), str(new)) if isinstance(new, _Raw) else text


def _block(tree: dict[str, Any]) -> str:
    """Block YAML, as people write it."""
    import yaml

    return yaml.safe_dump(tree, sort_keys=False)


def _argument(text: str) -> str:
    """A text as a shell can pass it: no NUL, and bytes that are no UTF-8 as Python shows them."""
    return (
        text.replace("\0", "")
        .encode("utf-8", "surrogateescape" if _is_escaped(text) else "replace")
        .decode("utf-8", "surrogateescape")
    )


def _is_escaped(text: str) -> bool:
    return all(not 0xD800 <= ord(letter) <= 0xDFFF or 0xDC80 <= ord(letter) <= 0xDCFF for letter in text)


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        tree = tree[step]
    return tree


def _put(tree: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; as it was where the place is gone."""
    if not place:
        return new
    step, *rest = place
    if isinstance(tree, dict) and step in tree:
        return {**tree, step: _put(tree[step], tuple(rest), new)}
    if isinstance(tree, list) and isinstance(step, int) and step < len(tree):
        return [*tree[:step], _put(tree[step], tuple(rest), new), *tree[step + 1 :]]
    return tree
