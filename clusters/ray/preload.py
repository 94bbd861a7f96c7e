"""What a process of a resident Ray loads while it waits for a job: libraries alone, nothing of a job.

Each takes seconds to import, and none of them starts a GPU: PEFT, which imports bitsandbytes, is loaded where there is
no GPU to start.
"""

from __future__ import annotations

import contextlib
import importlib

_LIBRARIES = ("torch", "transformers.models.auto", "transformers.modeling_utils", "ray.train")


def load() -> None:
    """Import them; one that is absent is the job's to name."""
    from clusters.hardware.gpus import look_at_gpus

    for name in (*_LIBRARIES, *(() if look_at_gpus()[0] else ("peft",))):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
