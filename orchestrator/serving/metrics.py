"""What /metrics shows: requests, tokens, latency, and how engines and their adapters are, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from orchestrator.serving.engines.protocol import EngineState, Piece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class ServerMetrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ("model", "path", "status")
        self._requests = Counter("orchestrator_requests", "requests by their answer", labels, registry=registry)
        self._prompt = Counter("orchestrator_prompt_tokens", "tokens of prompts", ("model",), registry=registry)
        self._new = Counter("orchestrator_completion_tokens", "tokens of answers", ("model",), registry=registry)
        self._first = Histogram(
            "orchestrator_first_token_seconds",
            "from a request to the first piece of its answer",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "orchestrator_request_seconds", "whole requests", ("model",), buckets=_SECONDS, registry=registry
        )
        names = ("engine", "base")
        self._is_ready = Gauge("orchestrator_engine_ready", "1 where it answers", names, registry=registry)
        self._restarts = Gauge("orchestrator_engine_restarts", "since the server started", names, registry=registry)
        self._counts = Gauge(
            "orchestrator_engine",
            "adapter_hits, adapter_loads and adapter_evictions since it started; rows, waiting, adapters_loaded now",
            (*names, "count"),
            registry=registry,
        )

    def request(self, model: str, path: str, status: int) -> None:
        self._requests.labels(model, path, str(status)).inc()

    def first_piece(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def answer(self, model: str, pieces: Iterable[Piece], seconds: float) -> None:
        """An answer that came to its end."""
        self._whole.labels(model).observe(seconds)
        for piece in pieces:
            self._prompt.labels(model).inc(piece.prompt_tokens)
            self._new.labels(model).inc(piece.completion_tokens)

    def text(self, states: Sequence[EngineState]) -> bytes:
        for state in states:
            names = state.engine, state.base
            self._is_ready.labels(*names).set(state.is_ready)
            self._restarts.labels(*names).set(state.restarts)
            for count, value in state.counts.items():
                self._counts.labels(*names, count).set(value)
        return generate_latest(self._registry)
