"""Prometheus metrics, right with several workers: each writes to files of a common directory.

prometheus_client decides at import where values live, so `serve` names the directory before
anything imports this module.
"""

from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

REQUESTS = Counter(
    "reservation_http_requests", "HTTP requests answered.", ["method", "route", "status"]
)
REQUEST_SECONDS = Histogram(
    "reservation_http_request_seconds",
    "Time to answer an HTTP request.",
    ["method", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CHANGES = Counter(
    "reservation_changes",
    "Calls that change a reservation, by what came of them (a status code for refusals).",
    ["action", "outcome"],
)

# Of the workers that live: `serve` takes away those of one that has ended.
POOL_MAX = Gauge(
    "reservation_pool_max_connections",
    "Connections that the workers may have to the database.",
    multiprocess_mode="livesum",
)
POOL_BUSY = Gauge(
    "reservation_pool_busy_connections",
    "Connections that requests are using.",
    multiprocess_mode="livesum",
)
POOL_WAIT_SECONDS = Histogram(
    "reservation_pool_wait_seconds",
    "Time that a request waited for a connection.",
    buckets=(0.001, 0.01, 0.1, 0.5, 1, 2.5, 5),
)
POOL_REFUSALS = Counter("reservation_pool_refusals", "Requests that got no connection in time.")


def render(directory: Path | None) -> tuple[bytes, str]:
    """Return the text of all workers' metrics, or of this process alone, and its content type."""
    registry = REGISTRY
    if directory is not None:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
