"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Metrics:
    """Counts what the server does, in a registry of its own.

    Args:
        waiting: how many questions wait for their first token.
        under_way: how many are being answered.
        connections: how many clients are connected.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        waiting: Callable[[], int],
        under_way: Callable[[], int],
        connections: Callable[[], int],
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "chatbind_requests",
            "Requests that are through; status 499: the client left.",
            ["route", "status"],
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "chatbind_request_seconds",
            "From a request's head to the end of its reply.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "chatbind_time_to_first_token_seconds",
            "From a streamed request's body to the first text of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of the prompts of answers.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens of answers.")
        self.embeddings = self._counter("embeddings", "Media and texts that were embedded.")
        self._gauge("waiting", "Questions that wait for their first token.", waiting)
        self._gauge("under_way", "Questions that are being answered.", under_way)
        self._gauge("connections", "Clients that are connected.", connections)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"chatbind_{name}", text, registry=self._registry)

    def _gauge(self, name: str, text: str, read: Callable[[], int]) -> None:
        Gauge(f"chatbind_{name}", text, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
