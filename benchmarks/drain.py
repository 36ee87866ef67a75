"""How fast a backlog is published: events a second, and what each of them costs.

Everyone drains the same committed rows, alone, warm. Our relay has led before and is started anew;
Debezium's connector is resumed in its JVM. The clock runs from the first record that the broker
takes to the last one that a `read_committed` reader sees; `start_s` is how long the first one took.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from benchmarks import contenders, events
from benchmarks.debezium import THROUGHPUT, Connect, Connector, topic_of
from benchmarks.events import Backlog
from benchmarks.processes import cost, peak_memory_mib
from benchmarks.results import Results, find
from benchmarks.surroundings import DELIVERIES, Surroundings, check_alive, says
from devstack.processes import Process, succeed

WARM_UP_ROWS = 20_000
READY_TIMEOUT_S = 120.0
TIMEOUT_S = 60.0
SLOWEST_EVENTS_PER_S = 4_000
# Beyond it only we and the limits are measured: the others' cost per event is known by then.
OTHERS_MAX_ROWS = 1_000_000
OPEN_TRANSACTION_ROWS = 100_000
MICROSECONDS = 1e6

# An xid and a snapshot of its own, both older than every row of the backlog.
HOLD_OPEN = ("SELECT pg_current_xact_id()", "SELECT 1 FROM outbox LIMIT 1")

Runs = Callable[[Backlog], AbstractContextManager[Process]]


@dataclass(frozen=True)
class Contender:
    """Somebody who publishes a backlog to a topic while its block is open."""

    name: str
    topic: str
    runs: Runs


def measure(around: Surroundings, results: Results, sizes: tuple[int, ...], *, peers: bool) -> None:
    """Drain a backlog of each size by every contender, then one behind an open transaction."""
    with _contenders(around, peers=peers) as known:
        with around.steps.step(f"warm-up of {WARM_UP_ROWS:,} rows"):
            backlog = events.write_backlog(around.owner_url, WARM_UP_ROWS)
            for contender in known:
                results.attempt(
                    {"section": "warm-up", "contender": contender.name},
                    lambda c=contender: publish(around, c, backlog),  # type: ignore[misc]
                )
        results.sizes = events.describe(around.owner_url)
        # One that can't even do that would only cost its time limit at every size.
        all_of_them = [
            found
            for found in known
            if find(results.figures, section="warm-up", contender=found.name)
        ]
        for rows in sizes:
            _drain_by_all(around, results, all_of_them, rows)
        rows = min(OPEN_TRANSACTION_ROWS, max(sizes))
        with _held_open(around):
            ours = [found for found in all_of_them if found.name in {*DELIVERIES, "debezium"}]
            _drain_by_all(around, results, ours, rows, open_transaction=True)


def _drain_by_all(
    around: Surroundings,
    results: Results,
    all_of_them: list[Contender],
    rows: int,
    *,
    open_transaction: bool = False,
) -> None:
    behind = " behind an open transaction" if open_transaction else ""
    with around.steps.step(f"{rows:,} rows written{behind}"):
        backlog = events.write_backlog(around.owner_url, rows)
        events.settle(around.admin_url)
    labels = {"section": "drain", "rows": backlog.rows, "open_transaction": open_transaction}
    if not open_transaction:
        with around.steps.step(f"{rows:,} rows: raw-read"):
            results.attempt(labels | {"contender": "raw-read"}, lambda: _read_raw(around, backlog))
    for contender in all_of_them:
        if rows <= OTHERS_MAX_ROWS or contender.name in DELIVERIES:
            with around.steps.step(f"{rows:,} rows{behind}: {contender.name}"):
                results.attempt(
                    labels | {"contender": contender.name},
                    lambda c=contender: publish(around, c, backlog),  # type: ignore[misc]
                )


def publish(around: Surroundings, contender: Contender, backlog: Backlog) -> dict[str, Any]:
    """Let a contender publish a backlog; return its figures."""
    arrivals = around.arrivals(contender.topic)
    groups = around.server_pids()
    timeout_s = TIMEOUT_S + backlog.rows / SLOWEST_EVENTS_PER_S
    with contender.runs(backlog) as process:
        began_s = time.time()
        groups["contender"] = process.pid
        try:
            arrivals.await_first(TIMEOUT_S, check_alive(process))
            before = cost(groups)
            end_s, after = arrivals.watch(
                backlog.rows, timeout_s, check_alive(process), lambda: cost(groups)
            )
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{process.log_tail()}") from None
        peak_mib = peak_memory_mib(process.pid)
    verdict = arrivals.verify(backlog.rows)
    used = after.since(before)
    return (
        rates(backlog.rows, end_s - verdict.first_append_s)
        | {
            "cpu_s": used["contender"],
            "cpu_us_per_event": round(used["contender"] / backlog.rows * MICROSECONDS, 2),
            "postgres_cpu_s": used["postgres"],
            "kafka_cpu_s": used["kafka"],
            "peak_mib": peak_mib,
            "start_s": round(verdict.first_append_s - began_s, 3),
        }
        | verdict.summary()
    )


def rates(rows: int, seconds: float) -> dict[str, float]:
    """Return a duration as the figures that people compare."""
    return {
        "seconds": round(seconds, 4),
        "events_per_s": round(rows / seconds),
        "us_per_event": round(seconds / rows * MICROSECONDS, 2),
    }


def _read_raw(around: Surroundings, backlog: Backlog) -> dict[str, Any]:
    output = around.stack.run.path / "raw-read.out"
    output.unlink(missing_ok=True)
    reader = around.stack.program(
        *("benchmarks.contenders", "raw-read", str(backlog.after_id), str(backlog.rows)),
        name="raw-read",
    )
    succeed(reader, READY_TIMEOUT_S + backlog.rows / SLOWEST_EVENTS_PER_S)
    found = json.loads(reader.log.read_text("utf-8").splitlines()[-1])
    return rates(found["rows"], found["seconds"]) | {
        "cpu_s": round(found["cpu_s"], 4),
        "cpu_us_per_event": round(found["cpu_s"] / found["rows"] * MICROSECONDS, 2),
        "peak_mib": round(found["peak_mib"], 1),
    }


@contextmanager
def _contenders(around: Surroundings, *, peers: bool) -> Iterator[list[Contender]]:
    """Everyone who publishes; Debezium's JVM lives as long as the block."""
    found = [_raw_produce(around)]
    found += [Contender(name, events.TOPIC, _relay_runs(around, name)) for name in DELIVERIES]
    found.append(_polling(around))
    if not peers:
        yield found
        return
    topic = topic_of("debezium")
    around.make_topic(topic)
    with Connect(around) as connect, connect.connector("debezium", THROUGHPUT, topic) as connector:
        connector.stop()
        yield [*found, Contender("debezium", topic, _connector_runs(connector))]


def _relay_runs(around: Surroundings, delivery: str) -> Runs:
    # A relay that is waited for has published part of the backlog by then.
    return lambda _: around.relay(delivery, leading=False)


def _connector_runs(connector: Connector) -> Runs:
    @contextmanager
    def run(_: Backlog) -> Iterator[Process]:
        connector.resume()
        try:
            yield connector.connect.process
        finally:
            connector.stop()

    return run


def _raw_produce(around: Surroundings) -> Contender:
    topic = topic_of("raw-produce")
    around.make_topic(topic)

    def runs(backlog: Backlog) -> AbstractContextManager[Process]:
        place = (str(backlog.after_id), str(backlog.rows))
        return _contender(around, "raw-produce", "loaded", topic, *place)

    return Contender("raw-produce", topic, runs)


def _polling(around: Surroundings) -> Contender:
    topic = topic_of("polling")
    around.make_topic(topic)

    def runs(backlog: Backlog) -> AbstractContextManager[Process]:
        with psycopg.connect(around.owner_url, autocommit=True) as connection:
            connection.execute(contenders.POLLED_TABLE)
            connection.execute(contenders.FILL_POLLED_TABLE, {"after_id": backlog.after_id})
            connection.execute(contenders.SETTLE_POLLED_TABLE)
        return _contender(around, "polling", "started", topic)

    return Contender("polling", topic, runs)


@contextmanager
def _contender(around: Surroundings, name: str, ready: str, *arguments: str) -> Iterator[Process]:
    log = around.stack.run.path / f"{name}.log"
    log.unlink(missing_ok=True)
    process = around.program("benchmarks.contenders", name, *arguments, name=name)
    try:
        process.wait_ready(says(log, ready), READY_TIMEOUT_S)
        yield process
    finally:
        process.stop()


@contextmanager
def _held_open(around: Surroundings) -> Iterator[None]:
    """Keep a transaction open from before the backlog is written to after it is drained."""
    with psycopg.connect(around.owner_url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        for statement in HOLD_OPEN:
            connection.execute(statement)
        yield
        connection.rollback()
