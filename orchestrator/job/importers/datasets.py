"""The data sources of other tools' files as `data.train` and `data.eval`, each with its format where that is stated."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clusters.safe.reading import BadInput, read_json
from orchestrator.errors import bad_input_as_job_error
from orchestrator.job.importers.draft import JobDraft
from orchestrator.job.importers.objectives import compares_answers
from orchestrator.job.importers.sources import Said, columns_beside, listed, read_entry, sources_of
from orchestrator.job.importers.tables import KeyTable

_TEMPLATE = (
    "the rows become turns of the model's own chat template, without the tool's headings. Compare with `inspect`"
)
_OWN_TEMPLATE = "the rows are found by their columns and become turns of the model's own chat template"
_COPIED = "this stage copies answers, and `validate` refuses such rows: stage dpo, kto or rm trains on them"
_ANSWERS_ONLY = ("data.assistant_only_loss", "data.completion_only_loss")


def _set_sources(draft: JobDraft, key: str, sources: list[Any], theirs: str) -> None:
    if sources:
        draft.set(key, sources[0] if len(sources) == 1 else sources, theirs)


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

_AXOLOTL_DATA = {"pretraining_dataset": "data.train", "datasets": "data.train", "test_datasets": "data.eval"}
_AXOLOTL_KINDS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": None,
    **dict.fromkeys(("completion", "pretrain"), "text"),
}
_AXOLOTL_OWN = {"prompt": "instruction", "input": "input", "completion": "output", "system": "system"}


def _axolotl(draft: JobDraft, table: KeyTable) -> None:
    for theirs, key in _AXOLOTL_DATA.items():
        entries = [one for one in listed(draft.values.get(theirs)) if isinstance(one, dict)]
        if theirs == "pretraining_dataset":  # texts, which it reads as a stream
            named = [{"path": one} for one in listed(draft.values.get(theirs)) if isinstance(one, str)]
            entries = [{"type": "completion", **one} for one in (*named, *entries)]
        found = [
            source for at, one in enumerate(entries) for source in _axolotl_sources(draft, table, one, f"{theirs}.{at}")
        ]
        _set_sources(draft, key, found, theirs)
    if not draft.values.get("test_datasets"):
        _hold_out(draft, "val_set_size")
    if draft.flat.get("train_on_inputs"):
        _train_on_everything(draft, "train_on_inputs")
        if (ends := draft.settings.get("data.train_on_eos")) and ends.value in ("last", "none"):
            del draft.settings["data.train_on_eos"]
            draft.leave("matters", "train_on_inputs", f"train_on_eos {ends.value}: every token is trained, ends too")
    elif "train_on_inputs" in draft.flat:
        draft.leave("default", "train_on_inputs", "prompts are not trained")
    if draft.flat.get("chat_template") not in (None, "", "tokenizer_default"):
        draft.leave("matters", "chat_template", "the tokenizer's own is used; data.chat_template takes a .jinja file")
    if draft.flat.get("dataset_exact_deduplication"):
        draft.leave("matters", "dataset_exact_deduplication", "equal rows are counted by `validate`, and stay")


def _axolotl_sources(draft: JobDraft, table: KeyTable, entry: Mapping[str, Any], where: str) -> list[Any]:
    said = read_entry(draft, table, entry, where)
    name = said.options.pop("type", None)
    base = re.split(r"[.:]", name)[0] if isinstance(name, str) else None
    kind = _AXOLOTL_KINDS.get(base or "")
    if compares_answers(draft):  # such rows are told by their columns
        kind = None
        if isinstance(name, str) and base not in ("chat_template", "passthrough"):
            draft.leave("matters", f"{where}.type", _OWN_TEMPLATE)
    elif isinstance(entry.get("type"), dict):  # rows of its own: columns and a text to put them into
        kind, said.columns = "alpaca", _AXOLOTL_OWN | said.columns
    elif base == "alpaca":
        draft.leave("matters", f"{where}.type", _TEMPLATE)
    elif name is not None and base not in _AXOLOTL_KINDS:
        draft.leave("matters", f"{where}.type", "rows of this kind are read by their columns; compare with `inspect`")
    return sources_of(draft, kind, said, where)


# --- LLaMA-Factory


def _llama_factory(draft: JobDraft, table: KeyTable) -> None:
    folder, info = _dataset_info(draft)
    for theirs, key in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        found = []
        for name in map(str, listed(draft.flat.get(theirs))):
            if isinstance(said := info.get(name), dict):
                entry = read_entry(draft, table, said, theirs, name)
                found += _llama_factory_sources(draft, entry, folder / name, theirs)
                continue
            why = "dataset_info.json does not name it" if info else f"{folder}/dataset_info.json was not found"
            draft.leave("matters", theirs, f"{name}: {why}: set data.train to the path of its rows")
            found.append(name)
        _set_sources(draft, key, found, theirs)
    if not draft.flat.get("eval_dataset"):
        _hold_out(draft, "val_size")
    if draft.flat.get("train_on_prompt"):
        _train_on_everything(draft, "train_on_prompt")
    if draft.flat.get("mask_history"):
        draft.leave("matters", "mask_history", "every answer of a conversation is trained, not the last alone")
    if draft.flat.get("streaming"):
        draft.leave("default", "streaming", "rows are read from files as they are needed")
    if "stage" in draft.flat and not compares_answers(draft):
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


def _llama_factory_sources(draft: JobDraft, said: Said, place: Path, theirs: str) -> list[Any]:
    file = said.options.pop("file_name", place.name)
    said.options.setdefault("path", place.parent / str(file))
    is_ranking, kind = said.options.pop("ranking", False), "alpaca"
    if compares_answers(draft):  # such rows are told by their columns
        said.options.pop("formatting", None)
        return sources_of(draft, None, said, theirs)
    if compared := [name for name in ("chosen", "rejected", "label") if said.columns.pop(name, None)] or is_ranking:
        named = ", ".join(compared) if isinstance(compared, list) else "ranking"
        draft.leave("matters", theirs, f"{place.name}: {named}: answers that are compared; {_COPIED}")
    if said.options.pop("formatting", None) in ("sharegpt", "openai"):
        kind = "messages" if said.columns.get("role") == "role" else "sharegpt"
    elif draft.flat.get("stage") == "pt" or set(said.columns) == {"prompt"}:
        kind, said.columns = "text", {"text": said.columns.get("prompt", "instruction")}
    elif said.columns and "input" not in said.columns:  # a column of that name is not read
        kind = "prompt_completion"
        said.columns = {"prompt": "instruction", "completion": "output"} | said.columns
    return sources_of(draft, kind, said, theirs)


# --- TRL, ms-swift, Unsloth, torchtune

_TRL_KINDS = (("messages", {"messages"}), ("prompt_completion", {"prompt", "completion"}), ("text", {"text"}))


def _trl(draft: JobDraft, table: KeyTable) -> None:
    name, field = draft.flat.get("dataset_name"), draft.flat.get("dataset_text_field")
    # TRL reads rows as conversations or prompts first; of its default, text, rows say themselves that they have it.
    is_stated = field not in (None, "", "text") and not compares_answers(draft)
    kind, columns = ("text", {"text": field}) if is_stated else (None, {})
    hub = {"path": name, "config": draft.flat.get("dataset_config")}
    hub = {key: one for key, one in hub.items() if one}
    train = draft.flat.get("dataset_train_split") or draft.flat.get("train_split") or "train"
    sources = sources_of(draft, kind, Said(hub | {"split": train}, columns), "dataset_config") if name else []
    for at, one in enumerate(listed(draft.values.get("datasets"))):
        if isinstance(one, dict) and "path" in one:
            said = read_entry(draft, table, one, f"datasets.{at}")
            chosen = {str(column) for column in listed(said.options.pop("columns", None))}
            own = (
                None
                if compares_answers(draft)
                else next((form for form, needed in _TRL_KINDS if needed <= chosen), None)
            )
            said.columns |= {} if own else columns
            sources += sources_of(draft, own or kind, said, f"datasets.{at}")
    if draft.flat.get("dataset_train_split") == "train":
        draft.leave("default", "dataset_train_split", "the same here")
    theirs = "dataset_name" if name else "datasets"
    _set_sources(draft, "data.train", sources, theirs)
    for key in ("dataset_config", "dataset_text_field", "dataset_train_split", "train_split"):
        if sources and draft.flat.get(key) not in (None, "", "train"):
            draft.set("data.train", draft.settings["data.train"].value, key)  # it has a say too
    measured = draft.flat.get("eval_strategy", draft.flat.get("evaluation_strategy"))
    test = draft.flat.get("dataset_test_split")
    if name and (test or measured not in (None, False, "no")):
        key = "dataset_test_split" if test else "eval_strategy"
        held_out = sources_of(draft, kind, Said(hub | {"split": test or "test"}, columns), "dataset_config")
        _set_sources(draft, "data.eval", held_out, key)
    if not compares_answers(draft) and any(not isinstance(one, dict) or "format" not in one for one in sources):
        draft.leave(
            "matters", theirs, "rows of a text and a label train the label here; data.format: text trains the text"
        )


def _ms_swift(draft: JobDraft, table: KeyTable) -> None:
    for theirs, key in (("dataset", "data.train"), ("val_dataset", "data.eval")):
        names = map(str, listed(draft.flat.get(theirs)))
        found = [source for name in names for source in _ms_swift_sources(draft, name, theirs)]
        _set_sources(draft, key, found, theirs)
    if columns := columns_beside(None, _ms_swift_columns(draft, table)):
        draft.set("data.columns", columns, "columns")
    if not draft.flat.get("val_dataset"):
        _hold_out(draft, "split_dataset_ratio")
    loss = draft.flat.get("loss_scale")
    if compares_answers(draft):
        if loss not in (None, "default", "last_round"):
            draft.leave("matters", "loss_scale", "every token of an answer counts the same")
    elif loss == "all":
        _train_on_everything(draft, "loss_scale")
    elif loss not in (None, "default"):
        draft.leave("matters", "loss_scale", "every answer counts the same")


def _ms_swift_sources(draft: JobDraft, text: str, theirs: str) -> list[Any]:
    """`HF::name:subset/subset#rows`."""
    text = re.sub(r"^(HF|MS)::", "", text)
    count = None if draft.is_here(text) else re.search(r"#(\d{1,9})$", text)
    text = text[: count.start()] if count else text
    is_path = draft.is_here(text) or Path(text).is_absolute() or "://" in text
    path, _, subsets = (text, "", "") if is_path else text.partition(":")
    configs = [{"config": one.strip()} for one in subsets.split("/") if one.strip()] or [{}]
    options = {"path": path} | ({"max_samples": int(count[1])} if count else {})
    if count and len(configs) > 1:
        draft.leave("matters", theirs, f"{text}: {count[1]} rows are drawn of each of its subsets, not of all together")
    return [one for config in configs for one in sources_of(draft, None, Said(options | config), theirs)]


def _ms_swift_columns(draft: JobDraft, table: KeyTable) -> Mapping[str, Any]:
    """Our name -> theirs, of a mapping or of one in JSON that names theirs first."""
    stated = draft.values.get("columns")
    with contextlib.suppress(ValueError, RecursionError):
        stated = json.loads(stated) if isinstance(stated, str) and stated else stated
    if isinstance(stated, dict):
        by_meaning = {str(meaning): column for column, meaning in stated.items()}
        for meaning in () if compares_answers(draft) else ("label", "rejected_response"):
            if by_meaning.pop(meaning, None):
                draft.leave("matters", "columns", f"columns: {meaning}: {table.sentences['matters']['source']}")
        found = read_entry(draft, table, by_meaning, "columns", "columns").columns
        if "rejected" in found and "completion" in found:  # the answer beside it is the chosen one
            found["chosen"] = found.pop("completion")
        return found
    if stated:
        draft.leave("matters", "columns", "is no mapping of columns; they are found by their usual names")
    return {}


_UNSLOTH_KINDS = {"alpaca": "alpaca", "chatml": "messages", "sharegpt": "sharegpt", "raw": "text"}


def _unsloth(draft: JobDraft, _: KeyTable) -> None:
    kind = _UNSLOTH_KINDS.get(str(draft.flat.get("data.format_type")))
    local = listed(draft.flat.get("data.local_dataset"))
    hub = listed(draft.flat.get("data.dataset"))
    sources = [source for one in [*hub, *local] for source in sources_of(draft, kind, Said({"path": one}), "data")]
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
    "instruct_dataset": (None, "prompt_completion"),
    "chat_dataset": (None, "messages"),
    "text_completion_dataset": (None, "text"),
}


def _torchtune(draft: JobDraft, table: KeyTable) -> None:
    for theirs, key in (("dataset", "data.train"), ("dataset_val", "data.eval")):
        stated = draft.values.get(theirs)
        entries = stated if isinstance(stated, list) else [stated] if stated else []
        found = []
        for at, one in enumerate(entries):
            if isinstance(one, dict):
                where = f"{theirs}.{at}" if isinstance(stated, list) else theirs
                found += _torchtune_sources(draft, table, one, where)
        _set_sources(draft, key, found, theirs)
    if draft.flat.get("run_val_every_n_steps"):
        draft.set("eval.eval_steps", draft.flat["run_val_every_n_steps"], "run_val_every_n_steps")


def _torchtune_sources(draft: JobDraft, table: KeyTable, entry: Mapping[str, Any], where: str) -> list[Any]:
    said = read_entry(draft, table, entry, where)
    name = str(said.options.pop("component", "")).rpartition(".")[2]
    path, kind = _TORCHTUNE_SETS.get(name, (None, None))
    if kind == "alpaca":
        draft.leave("matters", f"{where}._component_", _TEMPLATE)
    if said.options.pop("train_on_input", entry.get("train_on_input") is None and kind == "alpaca"):
        _train_on_everything(draft, f"{where}.train_on_input")
    if said.options.pop("packed", False):
        draft.set("data.packing", True, f"{where}.packed")
    if kind == "prompt_completion":  # `input` is all of the question there
        asked = said.columns.pop("input", "input")
        said.columns = {"prompt": asked, "completion": said.columns.pop("completion", "output")} | said.columns
    said.options = {"path": path or name} | said.options
    return sources_of(draft, kind, said, where)


READERS: dict[str, Callable[[JobDraft, KeyTable], None]] = {
    "axolotl": _axolotl,
    "llama_factory": _llama_factory,
    "trl": _trl,
    "ms_swift": _ms_swift,
    "unsloth": _unsloth,
    "torchtune": _torchtune,
}
