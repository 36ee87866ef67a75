"""What a relay costs when nothing happens, and how soon it is awake again."""

import time
from random import Random
from typing import Any

import psycopg

from benchmarks import events, latency
from benchmarks.processes import cpu_s
from benchmarks.results import Results
from benchmarks.surroundings import DELIVERIES, Surroundings

ROWS = 20
# Of no length that a poll interval could be in step with.
GAP_S = (0.3, 0.9)
ARRIVAL_TIMEOUT_S = 10.0
PERCENT = 100.0
BACKENDS = "SELECT pid FROM pg_stat_activity WHERE usename = 'outbox_relay'"


def measure(around: Surroundings, results: Results, seconds: int) -> None:
    """Measure each delivery of our relay."""
    for delivery in DELIVERIES:
        with around.steps.step(f"idle: {delivery}"):
            results.attempt(
                {"section": "idle", "contender": delivery},
                lambda d=delivery: _take(around, d, seconds),  # type: ignore[misc]
            )


def _take(around: Surroundings, delivery: str, seconds: int) -> dict[str, Any]:
    with around.relay(delivery) as relay:
        latency.catch_up(around, events.TOPIC)
        with psycopg.connect(around.admin_url, autocommit=True) as connection:
            backends = [pid for (pid,) in connection.execute(BACKENDS)]
        before = cpu_s(relay.pid), sum(map(cpu_s, backends))
        time.sleep(seconds)
        after = cpu_s(relay.pid), sum(map(cpu_s, backends))
        first, *rest = _rows_after_quiet(around)
    return {
        "seconds": seconds,
        "cpu_percent": round((after[0] - before[0]) / seconds * PERCENT, 2),
        "postgres_cpu_percent": round((after[1] - before[1]) / seconds * PERCENT, 2),
        "postgres_connections": len(backends),
        "first_row_ms": round(first * latency.MILLISECONDS, 2),
        "later_rows": latency.quantiles(rest),
    }


def _rows_after_quiet(around: Surroundings) -> list[float]:
    """Commit a row now and then; return the seconds from each commit to its arrival."""
    after_id = events.last_id(around.owner_url)
    gaps, arrived = Random(1), {}  # noqa: S311 - moments, not secrets
    with latency.reading(around, events.TOPIC) as reader:
        for _ in range(ROWS):
            key = events.write_one(around.owner_url)
            deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
            while key not in arrived:
                message = reader.poll(latency.POLL_S)
                if message is not None:
                    arrived[message.key()] = time.time()
                elif time.monotonic() > deadline:
                    raise TimeoutError(f"a row has not come within {ARRIVAL_TIMEOUT_S:g} s")
            reader.poll(gaps.uniform(*GAP_S))
    committed = latency.commit_times(around, after_id)
    return [arrived[key] - at for key, at in committed.items()]
