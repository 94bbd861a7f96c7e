"""Imported last in the process that ranks are forked from: it holds what each of them would load and collect again.

A rank that collects garbage writes to each of half a million objects of libraries, and so copies all of its parent's
memory; frozen ones are passed over.
"""

import gc

import pandas  # noqa: F401  # pyarrow's, when the first column becomes an array
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.llama import modeling_llama  # noqa: F401  # the family of most tests

get_checkpoint_conversion_mapping("llama")  # a thousand patterns, compiled once
gc.collect()
gc.freeze()
