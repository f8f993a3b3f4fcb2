"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kiln_common.pb import engine_pb2
from kiln_gateway.insight.live_requests import LiveRequests

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class GatewayMetrics:
    """One registry per app, so that several apps can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.live = LiveRequests()
        self._requests = Counter(
            "kiln_gateway_requests", "HTTP requests", ["route", "method", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "kiln_gateway_request_seconds",
            "Time to the last byte of an answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "kiln_gateway_first_token_seconds",
            "Time from a request's acceptance to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.running_choices = Gauge(
            "kiln_gateway_running_choices", "Choices being generated", registry=self.registry
        )
        self.prompt_tokens = Counter(
            "kiln_gateway_prompt_tokens", "Prompt tokens of finished choices", registry=self.registry
        )
        self.completion_tokens = Counter(
            "kiln_gateway_completion_tokens", "Generated tokens of finished choices", registry=self.registry
        )
        self.rollouts = Counter(
            "kiln_gateway_rollouts", "Rollouts by what became of them", ["outcome"], registry=self.registry
        )
        self._engine = Gauge(
            "kiln_gateway_engine",
            "Engine statistics as last seen",
            ["engine", "name"],
            registry=self.registry,
        )

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request; status 0 means the client left before an answer began."""
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def show_engine(self, engine: str, stats: engine_pb2.EngineStats) -> None:
        for field, value in stats.ListFields():
            if isinstance(value, int | float):
                self._engine.labels(engine, field.name).set(value)

    def render(self) -> bytes:
        return generate_latest(self.registry)
