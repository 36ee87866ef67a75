"""`reconcile --every`: again and again, with the outcome as metrics.

Guarantees: a comparison that fails is said, counted and tried again at its next time; the gauge of
differences is only ever that of a comparison that came to its end.
"""

import os
import signal
import time
from collections.abc import Callable

import psycopg
import structlog
from confluent_kafka import KafkaException
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from data_platform.config import ConfigurationError
from data_platform.errors import KafkaTroubleError, told
from data_platform.reconcile import Report

LOGGED_DIFFERENCES = 20

log = structlog.get_logger()


def run(compare: Callable[[], Report], interval_s: float, host: str, port: int) -> None:
    """Compare every `interval_s` seconds until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: the port can't be had.
    """
    registry, gauges, failures = make_metrics()
    if port:
        try:
            start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigurationError(
                f"METRICS_PORT: expected a free port: {error.strerror}"
            ) from error
    for number in (signal.SIGTERM, signal.SIGINT):
        # It only reads: nothing is in hand that would have to be finished.
        signal.signal(number, lambda *_: os._exit(0))
    at = time.monotonic()
    while True:
        try:
            report = compare()
        except (KafkaTroubleError, KafkaException, psycopg.Error) as error:
            log.warning("reconcile_failed", cause=told(error))
            failures.inc()
        else:
            _tell(report)
            gauges["differences"].set(report.found)
            gauges["unexamined"].set(report.unexamined)
            gauges["in_flight"].set(report.in_flight)
            gauges["duration_seconds"].set(report.seconds)
            gauges["last_run_timestamp_seconds"].set(time.time())
        at = max(at + interval_s, time.monotonic())
        time.sleep(max(0.0, at - time.monotonic()))


def make_metrics() -> tuple[CollectorRegistry, dict[str, Gauge], Counter]:
    """Return the registry, what was found last by name, and how many comparisons failed."""
    registry = CollectorRegistry()
    said = {
        "differences": "Differences that the last comparison found; to be 0.",
        "unexamined": "Reservations that it left out, there were so many differences; to be 0.",
        "in_flight": "Reservations that were on their way.",
        "last_run_timestamp_seconds": "When it ended.",
        "duration_seconds": "How long it took.",
    }
    gauges = {
        name: Gauge(f"data_platform_reconcile_{name}", text, registry=registry)
        for name, text in said.items()
    }
    failures = Counter(
        "data_platform_reconcile_failures", "Comparisons that failed.", registry=registry
    )
    return registry, gauges, failures


def _tell(report: Report) -> None:
    for found in report.differences[:LOGGED_DIFFERENCES]:
        # Without the values: a log is read by more people than the tables.
        log.warning("difference", what=found.what, where=found.where, key=found.key)
    log.info(
        "reconciled",
        differences=report.found,
        unexamined=report.unexamined,
        in_flight=report.in_flight,
        **report.compared,
    )
