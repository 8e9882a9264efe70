"""The metrics of /metrics. Labels take values from fixed sets, so that memory does not grow with requests."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from gradmap_hub.serving.engine import Engine
from gradmap_hub.serving.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Outcome = Literal["stop", "length", "cancelled", "timeout", "error"]
Refusal = Literal["queue_full", "shutting_down", "unauthorized"]
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """The metrics of one server, in its own registry, so that one process can run several servers."""

    def __init__(self, engine: Engine, scheduler: Scheduler, *, model: str, slots: int) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Gauge(
            "gradmap_model_info", "The served model; always 1", ["model", "artifact", "provider"], registry=registry
        ).labels(model, engine.artifact, engine.provider).set(1)
        Gauge("gradmap_slots", "Maximum number of concurrent generations", registry=registry).set(slots)
        Gauge("gradmap_slots_active", "Running generations", registry=registry).set_function(lambda: scheduler.active)
        Gauge("gradmap_queue_depth", "Requests waiting for a slot", registry=registry).set_function(
            lambda: scheduler.waiting
        )
        self._requests = Counter("gradmap_requests", "HTTP requests answered", ["route", "status"], registry=registry)
        self._refused = Counter("gradmap_refused", "Requests refused with unread body", ["reason"], registry=registry)
        self._generations = Counter("gradmap_generations", "Generations ended", ["outcome"], registry=registry)
        self._prompt = Counter("gradmap_prompt_tokens", "Prompt tokens of all generations", registry=registry)
        self._cached = Counter(
            "gradmap_prompt_tokens_cached", "Prompt tokens that needed no prefill", registry=registry
        )
        Gauge("gradmap_prefix_cache_bytes", "Size of the prefix cache", registry=registry).set_function(
            lambda: scheduler.prefix_bytes
        )
        self._completion = Counter("gradmap_completion_tokens", "Tokens generated", registry=registry)
        self._first = Histogram(
            "gradmap_time_to_first_token_seconds",
            "Time from admission to the first token, queueing included",
            buckets=_SECONDS,
            registry=registry,
        )
        self._speed = Histogram(
            "gradmap_tokens_per_second", "Decode speed of a generation", buckets=_SPEEDS, registry=registry
        )

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def refused(self, reason: Refusal) -> None:
        self._refused.labels(reason).inc()

    def generated(
        self,
        outcome: Outcome,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int,
        first_token_seconds: float | None,
        tokens_per_second: float | None,
    ) -> None:
        """Record a generation that ended. None: not measured, as it ended too early."""
        self._generations.labels(outcome).inc()
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)
        self._completion.inc(completion_tokens)
        if first_token_seconds is not None:
            self._first.observe(first_token_seconds)
        if tokens_per_second is not None:
            self._speed.observe(tokens_per_second)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
