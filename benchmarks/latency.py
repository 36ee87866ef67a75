"""How soon a committed event is with a consumer: from the commit's time to the reader's hands.

Writers commit single rows at random moments, so many a second, whether or not anybody keeps up (an
open loop). A commit's time is the server's own, taken just before it is flushed; the consumer's
clock is the same. Everyone has been warmed up by a backlog, and leads alone. (The polling relay has
a table of its own, which begins empty.)
"""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from benchmarks import contenders, events, load
from benchmarks.arrivals import Reader
from benchmarks.debezium import LOW_LATENCY, Connect, topic_of
from benchmarks.results import Results
from benchmarks.surroundings import DELIVERIES, Surroundings, says

RATES = (500, 2_000)
CLIENTS = 8
WARM_UP_ROWS = 20_000
CATCH_UP_TIMEOUT_S = 300.0
LAST_ARRIVAL_TIMEOUT_S = 15.0
READY_TIMEOUT_S = 30.0
POLL_S = 0.1
QUANTILES = {"p50_ms": 0.50, "p95_ms": 0.95, "p99_ms": 0.99, "p999_ms": 0.999}
MILLISECONDS = 1000.0

COMMIT_TIMES = """
SELECT key, extract(epoch FROM pg_xact_commit_timestamp(transaction_id::xid))::float8
FROM {table} WHERE id > %s
"""
LAST_ID = "SELECT coalesce(max(id), 0) FROM {table}"
OUTBOX, POLLED = "outbox", "bench_polled"


def measure(around: Surroundings, results: Results, seconds: int, *, peers: bool) -> None:
    """Measure each contender at each rate."""
    for delivery in DELIVERIES:
        labels = {"section": "latency", "contender": delivery}
        with (
            around.steps.step(f"latency: {delivery}"),
            results.tolerating(labels),
            around.relay(delivery),
        ):
            _warm_up(around, events.TOPIC)
            _at_each_rate(around, results, labels, events.TOPIC, seconds)
    labels = {"section": "latency", "contender": "polling"}
    topic = topic_of("polling-latency")
    around.make_topic(topic)
    with (
        around.steps.step("latency: polling"),
        results.tolerating(labels),
        _polling(around, topic),
    ):
        _at_each_rate(around, results, labels, topic, seconds, table=POLLED)
    if peers:
        labels = {"section": "latency", "contender": "debezium"}
        topic = topic_of("debezium-low-latency")
        around.make_topic(topic)
        with (
            around.steps.step("latency: debezium"),
            results.tolerating(labels),
            Connect(around) as connect,
            connect.connector("debezium-low-latency", LOW_LATENCY, topic),
        ):
            _warm_up(around, topic)
            _at_each_rate(around, results, labels, topic, seconds)


@contextmanager
def _polling(around: Surroundings, topic: str) -> Iterator[None]:
    """Run one relay as most people write it."""
    with psycopg.connect(around.owner_url) as connection:
        connection.execute(contenders.POLLED_TABLE)
    log = around.stack.run.path / "polling-latency.log"
    command = ("benchmarks.contenders", "polling-service", topic)
    process = around.program(*command, name="polling-latency")
    try:
        process.wait_ready(says(log, "started"), READY_TIMEOUT_S)
        yield
    finally:
        process.stop()


def catch_up(around: Surroundings, topic: str) -> None:
    """Wait until everything that is committed now has arrived.

    Raises:
        TimeoutError: it did not come within CATCH_UP_TIMEOUT_S.
    """
    # The first row shows that the end is near; what is still under way in other partitions then has
    # been published before the second.
    for _ in range(2):
        _await_one(around, topic)


@contextmanager
def reading(around: Surroundings, topic: str) -> Iterator[Reader]:
    """A reader of what comes to a topic from now on."""
    begin = around.arrivals(topic).begin
    with Reader(around.bootstrap_servers, topic, begin) as reader:
        reader.poll(POLL_S)  # connects; not to be paid by the first record
        yield reader


def quantiles(latencies_s: Sequence[float]) -> dict[str, float]:
    """Return the latencies' quantiles and the worst, in milliseconds (nearest rank)."""
    ordered = sorted(latencies_s)
    found = {
        name: ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        for name, share in QUANTILES.items()
    } | {"max_ms": ordered[-1]}
    return {name: round(value * MILLISECONDS, 2) for name, value in found.items()}


def commit_times(around: Surroundings, after_id: int, table: str = OUTBOX) -> dict[bytes, float]:
    """Return each key's commit time in seconds of the wall clock, of rows behind an id."""
    with psycopg.connect(around.owner_url) as connection:
        found = connection.execute(_named(COMMIT_TIMES, table), [after_id])
        return {key.encode(): at for key, at in found}


def _last_id(around: Surroundings, table: str) -> int:
    with psycopg.connect(around.owner_url) as connection:
        found = connection.execute(_named(LAST_ID, table)).fetchone()
    return 0 if found is None else int(found[0])


def _named(statement: LiteralString, table: str) -> sql.Composed:
    return sql.SQL(statement).format(table=sql.Identifier(table))


def _await_one(around: Surroundings, topic: str) -> None:
    with reading(around, topic) as reader:
        key = events.write_one(around.owner_url)
        deadline = time.monotonic() + CATCH_UP_TIMEOUT_S
        while time.monotonic() < deadline:
            message = reader.poll(POLL_S)
            if message is not None and message.key() == key:
                return
    raise TimeoutError(f"a row has not come to {topic} within {CATCH_UP_TIMEOUT_S:g} s")


def _warm_up(around: Surroundings, topic: str) -> None:
    events.write_backlog(around.owner_url, WARM_UP_ROWS)
    catch_up(around, topic)


def _at_each_rate(
    around: Surroundings,
    results: Results,
    labels: dict[str, Any],
    topic: str,
    seconds: int,
    *,
    table: str = OUTBOX,
) -> None:
    for rate in RATES:
        results.attempt(
            labels | {"rate": rate},
            lambda r=rate: _take(around, topic, table, r, seconds),  # type: ignore[misc]
        )


def _take(around: Surroundings, topic: str, table: str, rate: int, seconds: int) -> dict[str, Any]:
    """Write and read side by side; return the quantiles of what lies between."""
    after_id = _last_id(around, table)
    script = load.SINGLE.replace(f"INTO {OUTBOX} ", f"INTO {table} ")
    arrived: dict[bytes, float] = {}
    repeated = 0
    with reading(around, topic) as reader, _no_collections():
        writers = load.start(around, script, clients=CLIENTS, seconds=seconds, rate=rate)
        deadline = time.monotonic() + seconds + LAST_ARRIVAL_TIMEOUT_S
        quiet_since = time.monotonic()
        while time.monotonic() < deadline:
            message = reader.poll(POLL_S)
            now_s = time.time()
            if message is None:
                if not writers.process.alive and time.monotonic() - quiet_since > 1:
                    break
                continue
            quiet_since = time.monotonic()
            repeated += message.key() in arrived
            arrived.setdefault(message.key() or b"", now_s)
        written_per_s = writers.finish()
    committed = commit_times(around, after_id, table)
    latencies_s = [arrived[key] - at for key, at in committed.items() if key in arrived]
    return quantiles(latencies_s) | {
        "seconds": seconds,
        "written_per_s": round(written_per_s),
        "lost": len(committed) - len(latencies_s),
        "doubled": repeated,
    }


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep our own garbage collector from delaying what we measure."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
