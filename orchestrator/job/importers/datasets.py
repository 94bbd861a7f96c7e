"""The data sources of other tools' files as `data.train` and `data.eval`, each with its format where that is stated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, read_json
from orchestrator.errors import bad_input_as_job_error
from orchestrator.job.importers.draft import JobDraft

_RENAME = "columns and turns are found by their usual names: rename those of the rows"
_SLICE = "all rows are used: cut the file, or end earlier with train.max_steps"
_TEMPLATE = (
    "the rows become turns of the model's own chat template, without the tool's headings. Compare with `inspect`"
)
_ANSWERS_ONLY = ("data.assistant_only_loss", "data.completion_only_loss")


def _source(path: str, kind: str | None = None, split: Any = None) -> Any:
    """A source of the job: its path alone where nothing else is stated."""
    stated = {"path": path, "format": kind, "split": None if split == "train" else split}
    return path if kind is None and stated["split"] is None else {key: one for key, one in stated.items() if one}


def _set_sources(draft: JobDraft, key: str, sources: list[Any], theirs: str) -> None:
    if sources:
        draft.set(key, sources[0] if len(sources) == 1 else sources, theirs)


def _listed(value: Any) -> list[Any]:
    """A list, names with commas, or one value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def _hold_out(draft: JobDraft, key: str) -> None:
    """A fraction of the rows; a number of rows has no counterpart."""
    size = draft.flat.get(key)
    if not size:
        draft.unset.append(key) if key in draft.flat else None
    elif isinstance(size, int | float) and size < 1:
        draft.set("data.eval", {"split": size}, key)
    else:
        draft.leave("matters", key, "held out by a fraction only: data.eval: {split: 0.05}. Nothing is held out")


def _train_on_everything(draft: JobDraft, their_key: str) -> None:
    for key in _ANSWERS_ONLY:
        draft.set(key, False, their_key)


# --- Axolotl

_AXOLOTL_KINDS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text", "chat_template": None}
_AXOLOTL_USUAL = {
    "field_messages": ("messages", "conversations"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "roles": (
        {"user": ["user"], "assistant": ["assistant"]},
        {"user": ["user", "human"], "assistant": ["assistant", "gpt"]},
    ),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "field": ("text",),
    "chat_template": ("tokenizer_default",),
    "trust_remote_code": (False,),
    "conversation": (),
}


def _axolotl(draft: JobDraft) -> None:
    for theirs, key in (("datasets", "data.train"), ("test_datasets", "data.eval")):
        entries = [one for one in _listed(draft.values.get(theirs)) if isinstance(one, dict)]
        found = [source for at, one in enumerate(entries) for source in _axolotl_sources(draft, one, f"{theirs}.{at}")]
        _set_sources(draft, key, found, theirs)
    if not draft.values.get("test_datasets"):
        _hold_out(draft, "val_set_size")
    if draft.flat.get("train_on_inputs"):
        _train_on_everything(draft, "train_on_inputs")
    elif "train_on_inputs" in draft.flat:
        draft.leave("default", "train_on_inputs", "prompts are not trained")
    if draft.flat.get("chat_template") not in (None, "", "tokenizer_default"):
        draft.leave("matters", "chat_template", "the tokenizer's own is used; data.chat_template takes a .jinja file")
    if draft.flat.get("dataset_exact_deduplication"):
        draft.leave("matters", "dataset_exact_deduplication", "equal rows are counted by `validate`, and stay")


def _axolotl_sources(draft: JobDraft, entry: Mapping[str, Any], where: str) -> list[Any]:
    kind = entry.get("type")
    base = re.split(r"[.:]", kind)[0] if isinstance(kind, str) else None
    if base == "alpaca":
        draft.leave("matters", f"{where}.type", _TEMPLATE)
    elif kind is not None and base not in _AXOLOTL_KINDS:
        draft.leave("matters", f"{where}.type", "rows of this kind are read by their columns; compare with `inspect`")
    for key, value in entry.items():
        if key in ("path", "type", "data_files", "split", "ds_type", "name") or value in (None, "", False):
            continue
        if value not in _AXOLOTL_USUAL.get(key, ()):
            draft.leave("matters", f"{where}.{key}", _RENAME)
    if entry.get("name"):
        draft.leave("matters", f"{where}.name", "a data set's default configuration is read")
    files = _listed(entry.get("data_files")) or [entry.get("path")]
    return [_source(draft.path(one), _AXOLOTL_KINDS.get(base or ""), entry.get("split")) for one in files]


# --- LLaMA-Factory

_COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


def _llama_factory(draft: JobDraft) -> None:
    folder, info = _dataset_info(draft)
    for theirs, key in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        found = [_llama_factory_source(draft, name, folder, info, theirs) for name in _listed(draft.flat.get(theirs))]
        _set_sources(draft, key, found, theirs)
    if not draft.flat.get("eval_dataset"):
        _hold_out(draft, "val_size")
    if draft.flat.get("train_on_prompt"):
        _train_on_everything(draft, "train_on_prompt")
    if draft.flat.get("mask_history"):
        draft.leave("matters", "mask_history", "every answer of a conversation is trained, not the last alone")
    if draft.flat.get("streaming"):
        draft.leave("default", "streaming", "rows are read from files as they are needed")
    if "stage" in draft.flat:
        draft.leave("default", "stage", "the rows decide: texts are trained whole, answers alone")


def _dataset_info(draft: JobDraft) -> tuple[Path, dict[str, Any]]:
    """The folder of the data and what its dataset_info.json says: beside the file, above it, or where one stands.

    Raises JobError for a file that cannot be read.
    """
    stated = Path(str(draft.flat.get("dataset_dir") or "data"))
    for place in (draft.source, *draft.source.parents[:3], Path.cwd()):
        file = place / stated / "dataset_info.json"
        if file.is_file():
            with bad_input_as_job_error("dataset_dir"):
                info = read_json(file)
                if not isinstance(info, dict):
                    raise BadInput(f"{file}: holds no object with a data set a name")
            return file.parent, info
    return stated, {}


def _llama_factory_source(draft: JobDraft, name: str, folder: Path, info: dict[str, Any], theirs: str) -> Any:
    said = info.get(str(name))
    if not isinstance(said, dict):
        why = "dataset_info.json does not name it" if info else f"{folder}/dataset_info.json was not found"
        draft.leave("matters", theirs, f"{name}: {why}: set data.train to the path of its rows")
        return name
    is_chat = said.get("formatting") == "sharegpt"
    columns, tags = (one if isinstance(one, dict) else {} for one in (said.get("columns"), said.get("tags")))
    is_openai = is_chat and {**_TAGS, **tags}["role_tag"] == "role"
    usual = _COLUMNS["sharegpt" if is_chat else "alpaca"]
    odd = [
        one for key, one in columns.items() if one not in (usual.get(key), "messages" if key == "messages" else None)
    ]
    wanted = _OPENAI_TAGS if is_openai else _TAGS
    odd += [one for key, one in tags.items() if one != wanted.get(key)]
    if said.get("ranking") or "kto_tag" in columns:
        draft.leave("matters", theirs, f"{name}: preferences are not trained on; `validate` refuses such rows")
    kind = "messages" if is_openai else "sharegpt" if is_chat else "alpaca"
    if columns == {"prompt": "text"} or draft.flat.get("stage") == "pt":
        kind, odd = "text", [one for one in columns.values() if one != "text"]
    if odd:
        draft.leave("matters", theirs, f"{name}: {', '.join(map(str, odd))}: {_RENAME}")
    if said.get("num_samples"):
        draft.leave("matters", theirs, f"{name}: num_samples: {_SLICE}")
    place = said.get("hf_hub_url") or said.get("ms_hub_url")
    path = str(place) if place else draft.beside(folder / str(said.get("file_name", name)))
    return _source(path, kind, said.get("split"))


# --- TRL, ms-swift, Unsloth, torchtune


def _trl(draft: JobDraft) -> None:
    name, field = draft.flat.get("dataset_name"), draft.flat.get("dataset_text_field")
    kind = "text" if field == "text" else None
    train = draft.flat.get("dataset_train_split") or draft.flat.get("train_split")
    sources = [_source(draft.path(name), kind, train)] if name else []
    for at, one in enumerate(_listed(draft.values.get("datasets"))):
        if isinstance(one, dict) and "path" in one:
            sources.append(_source(draft.path(one["path"]), kind, one.get("split")))
            if others := sorted(set(one) - {"path", "split"}):
                draft.leave("matters", f"datasets.{at}", f"{', '.join(others)}: {_RENAME}")
    if draft.flat.get("dataset_train_split") == "train":
        draft.leave("default", "dataset_train_split", "the same here")
    theirs = "dataset_name" if name else "datasets"
    _set_sources(draft, "data.train", sources, theirs)
    measured = draft.flat.get("eval_strategy", draft.flat.get("evaluation_strategy"))
    test = draft.flat.get("dataset_test_split")
    if name and (test or measured not in (None, False, "no")):
        key = "dataset_test_split" if test else "eval_strategy"
        draft.set("data.eval", _source(draft.path(name), kind, test or "test"), key)
    if draft.flat.get("dataset_config"):
        draft.leave("matters", "dataset_config", "a data set's default configuration is read")
    if field is None and sources:
        draft.leave(
            "matters", theirs, "rows of a text and a label train the label here; data.format: text trains the text"
        )
    elif field not in (None, "text"):
        draft.leave("matters", "dataset_text_field", _RENAME)


def _ms_swift(draft: JobDraft) -> None:
    for theirs, key in (("dataset", "data.train"), ("val_dataset", "data.eval")):
        names = _listed(draft.flat.get(theirs))
        found = [re.sub(r"^(HF|MS)::|#\d+$", "", str(name)) for name in names]
        if any("#" in str(name) for name in names):
            draft.leave("matters", theirs, f"#N: {_SLICE}")
        _set_sources(draft, key, [draft.path(one) for one in found], theirs)
    if not draft.flat.get("val_dataset"):
        _hold_out(draft, "split_dataset_ratio")
    loss = draft.flat.get("loss_scale")
    if loss == "all":
        _train_on_everything(draft, "loss_scale")
    elif loss not in (None, "default"):
        draft.leave("matters", "loss_scale", "every answer counts the same")


_UNSLOTH_KINDS = {"alpaca": "alpaca", "chatml": "messages", "sharegpt": "sharegpt", "raw": "text"}


def _unsloth(draft: JobDraft) -> None:
    kind = _UNSLOTH_KINDS.get(str(draft.flat.get("data.format_type")))
    local = _listed(draft.flat.get("data.local_dataset"))
    hub = _listed(draft.flat.get("data.dataset"))
    sources = [_source(draft.path(one), kind) for one in [*hub, *local]]
    _set_sources(draft, "data.train", sources, "data.local_dataset" if local else "data.dataset")
    if "training.train_on_completions" in draft.flat:
        for key in _ANSWERS_ONLY:
            draft.set(key, bool(draft.flat["training.train_on_completions"]), "training.train_on_completions")
    if kind == "alpaca":
        draft.leave("matters", "data.format_type", _TEMPLATE)


_TORCHTUNE_SETS = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca"),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca"),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt"),
}


def _torchtune(draft: JobDraft) -> None:
    for theirs, key in (("dataset", "data.train"), ("dataset_val", "data.eval")):
        stated = draft.values.get(theirs)
        entries = stated if isinstance(stated, list) else [stated] if stated else []
        found = [
            source for one in entries if isinstance(one, dict) for source in _torchtune_sources(draft, one, theirs)
        ]
        _set_sources(draft, key, found, theirs)
    if draft.flat.get("run_val_every_n_steps"):
        draft.set("eval.eval_steps", draft.flat["run_val_every_n_steps"], "run_val_every_n_steps")


def _torchtune_sources(draft: JobDraft, entry: Mapping[str, Any], theirs: str) -> list[Any]:
    name = str(entry.get("_component_", "")).rpartition(".")[2]
    path, kind = _TORCHTUNE_SETS.get(name, (None, None))
    if kind == "alpaca":
        draft.leave("matters", f"{theirs}._component_", _TEMPLATE)
    if entry.get("train_on_input", kind == "alpaca"):
        _train_on_everything(draft, f"{theirs}.train_on_input")
    if entry.get("packed"):
        draft.set("data.packing", True, f"{theirs}.packed")
    if entry.get("new_system_prompt"):
        draft.set("data.system_prompt", entry["new_system_prompt"], f"{theirs}.new_system_prompt")
    read = ("_component_", "source", "data_files", "split", "packed", "train_on_input", "new_system_prompt")
    if others := [key for key in entry if key not in read and entry[key] is not None]:
        draft.leave("matters", theirs, f"{', '.join(others)}: {_RENAME}")
    source = entry.get("source", path)
    files = _listed(entry.get("data_files")) or [source or name]
    return [_source(draft.path(one), kind, entry.get("split")) for one in files]


READERS: dict[str, Callable[[JobDraft], None]] = {
    "axolotl": _axolotl,
    "llama_factory": _llama_factory,
    "trl": _trl,
    "ms_swift": _ms_swift,
    "unsloth": _unsloth,
    "torchtune": _torchtune,
}
