"""What a file of another tool trains for: copied answers, or preferred ones.  Its rows and options are read by that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from orchestrator.errors import JobError
from orchestrator.job.importers.conversions import OFF
from orchestrator.job.importers.draft import JobDraft, Setting
from orchestrator.job.importers.tables import KeyTable, ObjectiveRule, spelt
from orchestrator.job.sections.objectives import DEFAULT_OBJECTIVE, OBJECTIVE_SECTIONS
from strategies import OBJECTIVES
from strategies.objectives.contract import Objective

_TYPE = "objective.type"
_OF_TOKENS = {  # keys of jobs that copy answers, which an objective over whole documents has no use for
    "data.assistant_only_loss": "the answers that are compared are what is trained",
    "data.completion_only_loss": "the answers that are compared are what is trained",
    "data.train_on_eos": "the answers that are compared are what is trained",
    "train.label_smoothing_factor": "no token's label is trained",
}
_OF_DRAWN_ANSWERS = dict.fromkeys(
    ("eval.temperature", "eval.top_p"), "answers are generated where eval.metrics names a metric"
)
_OF_TEXT = {  # and keys that a model with a score has no use for
    "eval.metrics": "a model with a score writes no answers",
    "eval.max_new_tokens": "a model with a score writes no answers",
    "eval.num_samples": "a model with a score writes no answers",
    "train.loss_type": "a score is of the whole document",
}


def set_objective(draft: JobDraft, table: KeyTable, stated: str | None) -> None:
    """Take the objective of a file; `stated` is said beside it, where the tool's command says it and not the file.

    Raises JobError where the file says another, or one that is not here.
    """
    rule = next((one for one in table.objectives if _fits(one, draft)), None)
    if stated is not None and stated not in OBJECTIVES:
        raise JobError(f"--objective {stated}: is not known here; known: {', '.join(OBJECTIVES)}")
    if rule and rule.name not in OBJECTIVES:
        key = next(iter(rule.when))
        raise JobError(f"line {draft.line(key)}: {key} is {draft.flat[key]!r}: {rule.note}")
    if stated and rule and not rule.is_guess and stated != rule.name:
        keys = ", ".join(f"{key} (line {draft.line(key)})" for key in rule.when)
        raise JobError(f"--objective {stated}: the file says {rule.name} by {keys}; leave the option out")
    if stated and (rule is None or rule.is_guess):
        draft.settings[_TYPE] = Setting(stated, "--objective")
    elif rule:
        for key in rule.when:
            draft.set(_TYPE, rule.name, key)
        if rule.note:
            draft.leave("matters", list(rule.when)[-1], rule.note)


def _fits(rule: ObjectiveRule, draft: JobDraft) -> bool:
    for key, values in rule.when.items():
        value = draft.flat.get(key)
        if value in OFF or (values is not None and spelt(value) not in values):
            return False
    return True


def objective_of(draft: JobDraft) -> type[Objective]:
    """The objective of the job that is being made."""
    return OBJECTIVES[_name_of(draft)]


def _name_of(draft: JobDraft) -> str:
    return draft.settings[_TYPE].value if _TYPE in draft.settings else DEFAULT_OBJECTIVE


def compares_answers(draft: JobDraft) -> bool:
    """Whether rows hold answers that are compared or judged, instead of copied."""
    return objective_of(draft).rows != "answers"


def fit_to_objective(draft: JobDraft, table: KeyTable) -> None:
    """Leave what the job's objective has no use for, and drop nothing out where the tool does not."""
    name = _name_of(draft)
    kind = objective_of(draft)
    fields = OBJECTIVE_SECTIONS[name].model_fields
    for key in [key for key in draft.settings if key.startswith("objective.") and key != _TYPE]:
        field, value = fields.get(key.removeprefix("objective.")), draft.settings[key].value
        words = get_args(field.annotation) if field else ()
        if field is None or (words and isinstance(value, str) and value not in words):
            draft.drop(key, "default", f"objective.type {name} has no such option")
    _leave_what_contradicts(draft, name)
    if not compares_answers(draft):
        return
    unused = _OF_TOKENS | ({} if "eval.metrics" in draft.settings else _OF_DRAWN_ANSWERS)
    for key, why in (unused | ({} if kind.head == "tokens" else _OF_TEXT)).items():
        if key in draft.settings:
            draft.drop(key, "default", why)
    _without_dropout(draft, table, name)


def _leave_what_contradicts(draft: JobDraft, name: str) -> None:
    """A number that the objective's other options give no meaning: with what the objective says of it."""
    options = {
        key.removeprefix("objective."): setting.value
        for key, setting in draft.settings.items()
        if key.startswith("objective.") and key != _TYPE
    }
    for option in [option for option, value in options.items() if isinstance(value, int | float)]:
        rest = {key: value for key, value in options.items() if key != option}
        if (fault := _fault_of(name, options)) and _fault_of(name, rest) is None:
            draft.drop(f"objective.{option}", "matters", f"it is not used: {fault}")
            options = rest


def _fault_of(name: str, options: Mapping[str, Any]) -> str | None:
    try:
        OBJECTIVES[name](**options)
    except ValueError as error:
        return str(error)
    except TypeError:  # a value of another kind: validation says what it should be
        return None
    return None


def _without_dropout(draft: JobDraft, table: KeyTable, name: str) -> None:
    """TRL's trainers of preferences switch every dropout off, the adapter's too, unless `disable_dropout` is false."""
    if name not in table.without_dropout or draft.flat.get("disable_dropout") is False:
        return
    if (setting := draft.settings.get("method.lora_dropout")) and setting.value:
        origin = f"{setting.origin}; {table.name} trains {name} without dropout"
        draft.settings["method.lora_dropout"] = Setting(0.0, origin, setting.line)
