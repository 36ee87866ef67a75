"""What the relay tells Prometheus, and whether its loop still turns."""

import threading
import time
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

# Longer than any statement and wait of the loop, so that only a loop that hangs is unhealthy.
HEALTHY_WITHIN_S = 150.0
CHUNK_BUCKETS = (1, 10, 100, 1_000, 5_000, 100_000)


class Metrics:
    """The relay's metrics and the time of its last progress."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leader = Gauge(
            "outbox_relay_leader", "1 while this process leads.", registry=self.registry
        )
        self._published = Counter(
            "outbox_relay_published_events",
            "Events that Kafka has acknowledged and the cursor has passed.",
            registry=self.registry,
        )
        self._chunk_rows = Histogram(
            "outbox_relay_chunk_rows",
            "Events published together.",
            buckets=CHUNK_BUCKETS,
            registry=self.registry,
        )
        self._failures = Counter(
            "outbox_relay_failures",
            "Terms that ended by a failure, by its kind.",
            ["reason"],
            registry=self.registry,
        )
        self._progressed_at_s = time.monotonic()

    def published(self, rows: int) -> None:
        """Count a chunk behind which the cursor has moved."""
        self._published.inc(rows)
        self._chunk_rows.observe(rows)

    def failed(self, error: Exception) -> None:
        """Count a term that a failure ended."""
        self._failures.labels(reason=type(error).__name__).inc()
        self.progressed()

    def progressed(self) -> None:
        """Note that the loop has come round."""
        self._progressed_at_s = time.monotonic()

    def healthy(self) -> bool:
        """Whether the loop has come round lately."""
        return time.monotonic() - self._progressed_at_s < HEALTHY_WITHIN_S


def serve(metrics: Metrics, host: str, port: int) -> None:
    """Serve /metrics and /healthz on `host` and `port` in a daemon thread.

    Raises:
        OSError: the port is taken.
    """
    exposition = make_wsgi_app(metrics.registry)

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        match environ.get("PATH_INFO"):
            case "/metrics":
                exposed: Iterable[bytes] = exposition(environ, start_response)
                return exposed
            case "/healthz":
                status = "200 OK" if metrics.healthy() else "503 Service Unavailable"
            case _:
                status = "404 Not Found"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [status.encode()]

    server = make_server(host, port, application, _Server, _Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: one that says nothing must not make a healthy relay look dead."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Requests of a scraper are not worth a line each."""

    timeout = 5

    def log_message(self, *_: object) -> None:
        return None
