"""What every section of a job file is, and the types that several of them use.

Names are Hugging Face's, PEFT's and TRL's wherever those have one.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Auto = Literal["auto"]
MOST = 10**9  # of anything that is counted
Finite = Annotated[float, Field(ge=-1e12, le=1e12)]
Whole = Annotated[int, Field(ge=-MOST, le=MOST)]
Metric = Literal["exact_match", "accuracy", "macro_f1", "rouge_l", "bleu", "chrf"]
Tokenizer = Literal["auto", "13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores200"]


def _has_finite_numbers(value: Any) -> Any:
    """Refuse NaN and infinities at any depth, in a value of any type."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("should hold finite numbers only")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _has_finite_numbers(part)
    return value


def _names_a_function(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
        raise ValueError("should be module:function, one of your own")
    return value


OwnMetric = Annotated[str, AfterValidator(_names_a_function)]
Anything = Annotated[Any, AfterValidator(_has_finite_numbers)]


class Section(BaseModel):
    """A section of the job file: unknown keys and numbers that are not finite are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def key(default: Any, doc: str, **limits: Any) -> Any:
    """A key of a section: its default, its sentence and its limits."""
    return Field(default, description=doc, **limits)
