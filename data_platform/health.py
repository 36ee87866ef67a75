"""What the worker tells of itself: over HTTP `/metrics` and `/healthz`, and to systemd.

Guarantees: `/healthz` is 200 while the loop goes round, also while it waits for Postgres or
Kafka (a restart wouldn't bring them back), and 503 when it has not for `STUCK_AFTER_S`.
"""

import json
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from data_platform.notify import Notifier

# Longer than a transaction may take.
STUCK_AFTER_S = 30.0
REQUEST_TIMEOUT_S = 5.0
LOAD_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)


class Health:
    """Counters of one worker and the sign of life of its loop."""

    def __init__(self, notifier: Notifier | None = None) -> None:
        self._notifier = notifier or Notifier()
        self.registry = CollectorRegistry()
        self.events = self._counter("events", "Good records loaded, repetitions included")
        self.new_events = self._counter("new_events", "Events that were not there before")
        self.dead_letters = self._counter("dead_letters", "Records put into dead_letters")
        self.batches = self._counter("batches", "Transactions committed")
        self.waits = self._counter("waits", "Times the loop backed off from an outage")
        self.places_lost = self._counter(
            "places_lost", "Batches dropped: Postgres or Kafka stood elsewhere"
        )
        self.waiting = Gauge(
            "data_platform_waiting",
            "1 while an outage is waited out",
            registry=self.registry,
        )
        self.stopped = Gauge(
            "data_platform_stopped_partitions",
            "Partitions that can't be read without losing or mixing up something",
            registry=self.registry,
        )
        self.complete_up_to = Gauge(
            "data_platform_complete_up_to_timestamp_seconds",
            "Everything that Kafka had committed before this moment is in the tables",
            ["topic"],
            registry=self.registry,
        )
        self.lag_records = Gauge(
            "data_platform_lag_records",
            "Offsets of a topic that are not in the tables, transaction markers included",
            ["topic"],
            registry=self.registry,
        )
        self.dead_letters_kept = Gauge(
            "data_platform_dead_letters_kept",
            "Dead letters that wait for a replay; counted up to 10,000",
            registry=self.registry,
        )
        self.load_seconds = Histogram(
            "data_platform_load_seconds",
            "Duration of a load transaction",
            buckets=LOAD_SECONDS,
            registry=self.registry,
        )
        self._stopped: dict[str, str] = {}
        self._waiting_for: str | None = None
        self._beat_at = time.monotonic()

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"data_platform_{name}", what, registry=self.registry)

    def beat(self, stopped: dict[str, str]) -> None:
        """Note that the loop has gone round; `stopped` says which partitions stand, and why."""
        self._beat_at = time.monotonic()
        self._stopped = stopped
        self.stopped.set(len(stopped))
        status = f"waiting: {self._waiting_for}" if self._waiting_for is not None else "loading"
        if stopped:
            status = f"stopped partitions: {', '.join(stopped)}; {status}"
        self._notifier.turn(status)

    def waits_for(self, cause: str | None) -> None:
        """Note that an outage is waited out, and what it is; None when it is over."""
        self._waiting_for = cause
        self.waiting.set(cause is not None)

    def report(self) -> tuple[HTTPStatus, dict[str, object]]:
        """Answer `/healthz`."""
        idle_s = time.monotonic() - self._beat_at
        alive = idle_s < STUCK_AFTER_S
        status = HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE
        return status, {
            "status": "alive" if alive else "stuck",
            "seconds_since_progress": round(idle_s, 3),
            "stopped_partitions": self._stopped,
        }

    def serve(self, host: str, port: int) -> ThreadingHTTPServer:
        """Answer on `port` from threads of its own until the process ends.

        Raises:
            OSError: the address can't be had.
        """
        server = ThreadingHTTPServer((host, port), _handler_of(self))
        threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
        return server


def _handler_of(health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            """Answer the two paths there are."""
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(health.registry))
            elif path == "/healthz":
                status, report = health.report()
                self._answer(status, "application/json", json.dumps(report).encode())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"/metrics or /healthz\n")

        def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Probes every few seconds are no news."""

    return Handler
