"""What the gateway counts, for Prometheus. docs/metrics.md is written from here."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from kiln_common.histogram import REQUEST_SECONDS, STEP_SECONDS, Histogram
from kiln_gateway.insight.live_requests import LiveRequests
from kiln_gateway.service_metrics import ServiceMetrics, add_histogram


class TokenTimes:
    """Times of every choice. Counted at each token, so by our own histogram, which takes no lock."""

    def __init__(self) -> None:
        self.first_token_s = Histogram(REQUEST_SECONDS)
        self.between_tokens_s = Histogram(STEP_SECONDS)
        self.queue_s = Histogram(REQUEST_SECONDS)
        self.choice_s = Histogram(REQUEST_SECONDS)

    def collect(self) -> Iterator[Metric]:
        for name, text, histogram in (
            ("time_to_first_token", "From a choice's start to its first token", self.first_token_s),
            ("inter_token_latency", "Between two arrivals of a choice's tokens", self.between_tokens_s),
            ("queue_time", "From the engine's acceptance to the first step", self.queue_s),
            ("choice", "From a choice's start to its end", self.choice_s),
        ):
            family = HistogramMetricFamily(f"kiln_gateway_{name}_seconds", text, labels=[])
            add_histogram(family, [], histogram.to_proto())
            yield family


class GatewayMetrics:
    """One registry per app, so that several apps can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.live = LiveRequests()
        self._requests = Counter(
            "kiln_gateway_requests", "HTTP requests", ["route", "method", "status"], registry=self.registry
        )
        self._request_seconds = PrometheusHistogram(
            "kiln_gateway_request_seconds",
            "Time to the last byte of an answer",
            ["route"],
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        self.times = TokenTimes()
        self.registry.register(self.times)
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
        self.moved = Counter(
            "kiln_gateway_requests_moved",
            "Requests that another engine went on with, by why the one before did not",
            ["code"],
            registry=self.registry,
        )
        self.services = ServiceMetrics()
        self.registry.register(self.services)

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request; status 0 means the client left before an answer began."""
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self.registry)
