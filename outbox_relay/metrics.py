"""What the relay tells Prometheus, and whether its lanes make progress. Usable from any thread."""

import threading
import time
from collections.abc import Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

# Longer than any statement and wait of a lane, so that only one that hangs is unhealthy.
HEALTHY_WITHIN_S = 45.0
BATCH_ROWS_BUCKETS = (1, 10, 100, 1_000, 5_000, 100_000)
COMMIT_TO_ACK_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


class Metrics:
    """The relay's metrics and the time of each lane's last progress."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._leader = self._gauge("leader", "1 while this process leads.")
        self._standby = self._gauge("standby", "1 while this process stands by for the leader.")
        self._lag_rows = self._gauge(
            "lag_rows",
            "Committed events of a topic that are not published; counted up to some 100,000.",
            "topic",
        )
        self._oldest_age_s = self._gauge(
            "oldest_unpublished_age_seconds", "Age of the oldest of these; 0 without any.", "topic"
        )
        self._quarantined = self._gauge(
            "quarantined", "Events that wait for `outbox-relay quarantine release`.", "topic"
        )
        self._partitions = self._gauge("outbox_partitions", "Partitions of the outbox.")
        self._default_filled = self._gauge(
            "outbox_default_filled", "1 while rows are beyond all partitions; to be 0."
        )
        self._under_replicated = self._gauge(
            "under_replicated_partitions",
            "Partitions of a Kafka topic of which a replica is not in sync; to be 0.",
            "topic",
        )
        self._leaderless = self._gauge(
            "leaderless_partitions",
            "Partitions of a Kafka topic that nobody can write to; to be 0.",
            "topic",
        )
        self._published = Counter(
            "outbox_relay_published_events",
            "Events that Kafka has acknowledged and the cursor has passed.",
            ["topic"],
            registry=self.registry,
        )
        self._retries = Counter(
            "outbox_relay_retries",
            "Attempts that failed and are made again, by the kind of the failure.",
            ["reason", "topic"],
            registry=self.registry,
        )
        self._batch_rows = self._histogram(
            "batch_rows", "Events published together.", BATCH_ROWS_BUCKETS
        )
        self._commit_to_ack_s = self._histogram(
            "commit_to_ack_seconds",
            "From the insert of a batch's oldest event to its acknowledgement by Kafka.",
            COMMIT_TO_ACK_BUCKETS_S,
        )
        self._progressed_at_s: dict[str, float] = {}
        self._leads = False
        self._lock = threading.Lock()

    def leading(self, leads: bool) -> None:  # noqa: FBT001 - a state, named by the method
        """Note whether this process leads; who doesn't knows nothing of the lag."""
        self._leader.set(leads)
        with self._lock:
            self._leads = leads
        if not leads:
            for of_the_leader in (self._lag_rows, self._oldest_age_s, self._quarantined):
                of_the_leader.clear()
            self.partitions(None)

    def standing_by(self, stands_by: bool) -> None:  # noqa: FBT001 - see above
        """Note whether this process waits for the leadership."""
        self._standby.set(stands_by)

    def published(self, topic: str, rows: int, oldest_age_s: float) -> None:
        """Count a batch behind which the cursor has moved; its oldest event is that old."""
        self._published.labels(topic).inc(rows)
        self._batch_rows.labels(topic).observe(rows)
        self._commit_to_ack_s.labels(topic).observe(oldest_age_s)

    def retried(self, reason: str, topic: str) -> None:
        """Count an attempt that failed. `reason` is a kind (few in number), not a message."""
        self._retries.labels(reason, topic).inc()

    def lag(self, topic: str, rows: int, seconds: float) -> None:
        """Note how many events of a topic are unpublished, and the age of the oldest."""
        self._lag_rows.labels(topic).set(rows)
        self._oldest_age_s.labels(topic).set(seconds)

    def quarantined(self, topic: str, events: int) -> None:
        """Note how many events of a topic are in quarantine."""
        self._quarantined.labels(topic).set(events)

    def retention(self, partitions: int, default_filled: bool) -> None:  # noqa: FBT001 - see above
        """Note of how many partitions the outbox is, and whether the default one has rows."""
        self._partitions.set(partitions)
        self._default_filled.set(default_filled)

    def partitions(self, told: Mapping[str, tuple[int, int]] | None) -> None:
        """Note by topic how many partitions lack a replica, a leader; None: nobody knows.

        What comes late, from a term that is over, is not told: nobody would take it back.
        """
        with self._lock:
            self._under_replicated.clear()
            self._leaderless.clear()
            known = told if told is not None and self._leads else {}
            for topic, (under_replicated, leaderless) in known.items():
                self._under_replicated.labels(topic).set(under_replicated)
                self._leaderless.labels(topic).set(leaderless)

    def progressed(self, lane: str) -> None:
        """Note that a lane has come round; the first time makes it count for `healthy`."""
        with self._lock:
            self._progressed_at_s[lane] = time.monotonic()

    def forget(self, lane: str) -> None:
        """Note that a lane has ended in order."""
        with self._lock:
            self._progressed_at_s.pop(lane, None)

    def healthy(self, within_s: float = HEALTHY_WITHIN_S) -> bool:
        """Whether every lane has come round lately."""
        with self._lock:
            oldest_s = min(self._progressed_at_s.values(), default=time.monotonic())
        return time.monotonic() - oldest_s < within_s

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"outbox_relay_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(
            f"outbox_relay_{name}", text, ["topic"], buckets=tuple(buckets), registry=self.registry
        )


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
