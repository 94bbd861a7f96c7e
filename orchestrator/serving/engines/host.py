"""The process of an engine of ours: reads queries, computes step by step, writes pieces.  A JSON object a line.

    in    {"settings": {...}}                               the first line
          {"number": 7, "query": {...}}  {"cancel": 7}  {"forget": FOLDER}
    out   {"ready": true} or {"failed": SENTENCE}            once
          {"number": 7, "begun": true}                       its computation has started
          {"number": 7, "text": ..., "finish": ...}  {"number": 7, "refused": {...}}
          {"counts": {...}}                                  when they have changed

It ends when its input does: with the server, however that ended.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TextIO

from clusters.safe.reading import first_line
from orchestrator.errors import OrchestratorError
from orchestrator.serving.engines.protocol import Piece, Query, Refused, ServedModel

_SILENT_S = 0.5  # counts are not written more often


def main() -> None:
    warnings.simplefilter("ignore")  # meant for developers of the libraries
    out = _own_output()
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    first = lines.get()
    if first is None:
        return
    try:
        engine = _start(first["settings"], out)
    except (OrchestratorError, Refused, OSError, RuntimeError, ValueError) as error:
        _write(out, {"failed": first_line(error, 2000)})
        return
    _write(out, {"ready": True})
    _serve(engine, lines, out)


def _start(settings: Mapping[str, Any], out: TextIO) -> Any:
    from transformers.utils import logging as hf_logging

    from orchestrator.serving.engines.weights import EngineSettings

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels that are not installed

    def send(number: int, answer: Piece | Refused | None) -> None:
        _write(out, {"number": number, **as_json(answer)})

    found = EngineSettings(**settings)
    if found.engine == "llama.cpp":
        from orchestrator.serving.engines.llama_cpp import LlamaCppEngine

        _silence_libraries()
        return LlamaCppEngine(found, send)
    import torch

    from orchestrator.serving.engines.transformers_engine import TransformersEngine
    from strategies.step import thread_waits

    engine = TransformersEngine(found, send)
    thread_waits.use_threads(torch.get_num_threads())
    return engine


def _serve(engine: Any, lines: queue.Queue[dict[str, Any] | None], out: TextIO) -> None:
    """Until the input ends: take in all that has come, then compute one step."""
    counts: Mapping[str, float] = {}
    said_at = 0.0
    while True:
        wait_s = 0.0 if engine.is_busy else _SILENT_S if counts != engine.counts else None
        try:
            message = lines.get(block=wait_s != 0.0, timeout=wait_s)
        except queue.Empty:
            if engine.is_busy:
                engine.step()
            if engine.counts != counts and time.monotonic() - said_at >= _SILENT_S:
                counts, said_at = dict(engine.counts), time.monotonic()
                _write(out, {"counts": counts})
            continue
        if message is None:
            return
        _do(engine, message)


def _do(engine: Any, message: Mapping[str, Any]) -> None:
    if "query" in message:
        engine.submit(message["number"], query_of(message["query"]))
    elif "cancel" in message:
        engine.cancel(message["cancel"])
    elif "forget" in message:
        engine.forget(message["forget"])


def query_of(values: dict[str, Any]) -> Query:
    """Of its JSON form."""
    return Query(**values | {"model": ServedModel(**values["model"]), "stop": tuple(values["stop"])})


def as_json(answer: Piece | Refused | None) -> dict[str, Any]:
    """An answer as it goes from process to process; None: its computation has begun."""
    if answer is None:
        return {"begun": True}
    if isinstance(answer, Piece):
        return asdict(answer)
    return {"refused": vars(answer)}


def _read(lines: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin.buffer:
        lines.put(json.loads(line))
    lines.put(None)


def _own_output() -> TextIO:
    """The standard output, which from now on nobody else writes to: what libraries print goes to standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _silence_libraries() -> None:
    """Let only Python write to standard error: llama.cpp says there what it does."""
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


def _write(out: TextIO, message: Mapping[str, Any]) -> None:
    try:
        out.write(json.dumps(message) + "\n")
        out.flush()
    except BrokenPipeError:  # the server is gone
        os._exit(0)


if __name__ == "__main__":
    main()
