"""What the promises' measurements share: programs, comparisons, and where the tables begin.

The analysts' database begins with empty tables and the topic's present ends as its offsets, as if
all before had been loaded: other sections' events don't count.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg
from confluent_kafka import TopicCollection

from benchmarks import events, fault_loaders
from benchmarks.arrivals import Arrivals, Verdict
from benchmarks.loader import LOADED, analytics, empty
from benchmarks.results import Figure, Results
from benchmarks.surroundings import (
    RELAY_STOP_TIMEOUT_S,
    Surroundings,
    check_alive,
    relay_environment,
)
from devstack.processes import Process
from devstack.proxy import Proxy
from outbox_relay.producer import make_admin

ORDER = "promise order"
FIRST_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
LOOK_EVERY_S = 0.1
# A batch of one row at a time is this slow at worst.
SLOWEST_EVENTS_PER_S = 50

SET_OFFSET = """
INSERT INTO analytics.load_offsets (topic, kafka_partition, next_offset, topic_id)
VALUES (%s, %s, %s, %s)
"""
TOLD = "SELECT key, split_part(payload ->> 'id', ':', 2)::integer FROM outbox"

Event = tuple[str, int]


@contextmanager
def relay(
    around: Surroundings, delivery: str = "exactly_once", env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Run a relay, not waited for, until the block ends."""
    name = f"promise-{delivery}-{time.monotonic_ns()}"
    process = around.program(
        *("outbox_relay", "run"), name=name, env=relay_environment(delivery) | dict(env or {})
    )
    try:
        yield process
    finally:
        process.stop(RELAY_STOP_TIMEOUT_S)


@contextmanager
def worker(
    around: Surroundings, env: Mapping[str, str] | None = None, name: str = "worker"
) -> Iterator[Process]:
    """Run a worker, in a group of its own where `env` doesn't tell, until the block ends."""
    group = f"promise-{time.monotonic_ns()}"
    environment = {"DATA_PLATFORM_GROUP": group, **(env or {})}
    process = around.program("data_platform", "run", name=f"promise-{name}", env=environment)
    try:
        yield process
    finally:
        process.stop(STOP_TIMEOUT_S)


def begin_here(around: Surroundings) -> Arrivals:
    """Empty the analysts' tables; all that is in the topic now counts as loaded."""
    empty(around)
    arrivals = around.arrivals(events.TOPIC)
    admin = make_admin({"bootstrap.servers": around.bootstrap_servers})
    described = admin.describe_topics(TopicCollection([events.TOPIC]))[events.TOPIC]
    topic_id = str(described.result(FIRST_TIMEOUT_S).topic_id)
    with analytics(around) as connection:
        connection.cursor().executemany(
            SET_OFFSET,
            [(events.TOPIC, number, at, topic_id) for number, at in arrivals.begin.items()],
        )
    return arrivals


def published(arrivals: Arrivals, rows: int, process: Process) -> tuple[float, Verdict]:
    """Wait until a relay has published all rows; return events a second, and what came."""
    arrivals.await_first(FIRST_TIMEOUT_S, check_alive(process))
    timeout_s = FIRST_TIMEOUT_S + rows / SLOWEST_EVENTS_PER_S
    end_s, _ = arrivals.watch(rows, timeout_s, check_alive(process), bool)
    verdict = arrivals.verify(rows)
    return rows / (end_s - verdict.first_append_s), verdict


def tables_beside_outbox(around: Surroundings) -> Figure:
    """Compare the analysts' tables with the outbox, event by event."""
    with psycopg.connect(around.owner_url) as ours, analytics(around) as theirs:
        told: set[Event] = set(ours.execute(TOLD).fetchall())
        states: dict[str, int] = dict(theirs.execute(fault_loaders.STATES).fetchall())
        counted = theirs.execute(fault_loaders.OUR_FACTS.encode()).fetchall()
    return compare(told, states, {(name, version): count for name, version, count in counted})


def compare(told: set[Event], states: Mapping[str, int], facts: Mapping[Event, int]) -> Figure:
    """Say what tables lack, have twice, have out of date, or have though nobody told them."""
    found = fault_loaders.compare(told, states, facts)
    return {"events": len(told), **found, "invented": len(facts.keys() - told)}


def note_order(results: Results, what: str, verdict: Verdict) -> None:
    """Keep how many keys and records were followed, and what was wrong with them."""
    labels = {"section": ORDER, "contender": what, "keys": verdict.keys}
    results.add(labels | {"records": verdict.records} | verdict.summary())


def await_loaded(
    around: Surroundings, arrivals: Arrivals, rows: int, process: Process
) -> tuple[float, float]:
    """Wait until the topic's end is loaded; return when the first came, and the last."""
    begin, end = sum(arrivals.begin.values()), sum(arrivals.ends().values())
    until = time.monotonic() + LOAD_TIMEOUT_S + rows / SLOWEST_EVENTS_PER_S
    first, alive = None, check_alive(process)
    with analytics(around) as connection:
        while (at := loaded(connection)) < end:
            alive()
            now = time.monotonic()
            if first is None and at > begin:
                first = now
            if now > until:
                raise TimeoutError(f"{end - at:,} offsets of {end - begin:,} were not loaded")
            time.sleep(LOOK_EVERY_S)
    return first or time.monotonic() - LOOK_EVERY_S, time.monotonic()


def make_topics(around: Surroundings, name: str) -> None:
    """Make a topic of events and a catalogue like the product's own."""
    around.make_topic(name)
    around.kafka.create_topic(f"{name}-catalogue", 3)


def named(name: str) -> dict[str, str]:
    """Return what makes a worker read such topics."""
    return {
        "DATA_PLATFORM_RESERVATION_TOPIC": name,
        "DATA_PLATFORM_CATALOGUE_TOPIC": f"{name}-catalogue",
    }


def loaded(connection: psycopg.Connection, name: str = events.TOPIC) -> int:
    """Return up to where a topic is loaded, all partitions added up."""
    found = connection.execute(LOADED, [name]).fetchone()
    return int(found[0]) if found else 0


@contextmanager
def long_way(around: Surroundings, delay_s: float) -> Iterator[Proxy]:
    """A way to the analysts' database that takes so much longer in each direction."""
    with Proxy(lambda: around.stack.analytics.port) as proxy:
        proxy.slow(delay_s)
        yield proxy


def through(around: Surroundings, proxy: Proxy) -> dict[str, str]:
    """Return what makes a worker go that way."""
    url = around.stack.environment["ANALYTICS_DATABASE_URL"]
    port = around.stack.analytics.port
    return {"ANALYTICS_DATABASE_URL": url.replace(f":{port}/", f":{proxy.port}/")}
