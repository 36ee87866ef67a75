"""What each loader loses, doubles or leaves out of date while it and its Postgres are struck.

Everybody loads the same records at the same pace: reservations held and, a thousand records later,
completed; of each fiftieth record a repetition comes two thousand records later, which is what a
publisher of the kind at-least-once leaves behind: an older version after a newer one among them.
The loader is killed twice, Postgres restarted at once. Whoever ends is started again. In the end
the tables are compared with what they must hold: `lost` reservations (and facts, where facts are
kept), `stale` states, of which an older version has won, and `doubled` facts.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import psycopg
from confluent_kafka import Producer

from benchmarks import events, jdbc_sink, sinks, topic
from benchmarks.faults import Strike, meanwhile, mended, strike, supervised
from benchmarks.loader import BATCH, JDBC, STARS, analytics, empty, start_analytics
from benchmarks.results import Figure, Results
from benchmarks.surroundings import Surroundings
from chaos.supervisor import Part, Supervisor

RECORDS_PER_S = 1_000
HELD_FOR_RESERVATIONS = 500
AGAIN_OF, AGAIN_AFTER = 50, 2_000
GUARDED = f"{BATCH}, with a version guard"
PROMISED = {STARS[0]: ("lost", "stale", "doubled")}
FLUSH_TIMEOUT_S = 60.0
# So long the last records may take to be in the table.
LOAD_TIMEOUT_S = 120.0
LOOK_EVERY_S = 0.2
SHORTEST_S, SHARE = 20, 2
CONNECT_TIMEOUT_S = 5

SCRIPT = (
    Strike("loader killed", 0.10),
    # Whoever needs ten seconds to come back has something to lose again by now.
    Strike("Postgres restarted", 0.65),
    Strike("loader killed again", 0.80),
)
STATES = "SELECT reservation_id, version FROM analytics.fct_reservations"
FACTS = "SELECT reservation_id, version, count(*) FROM {} GROUP BY 1, 2"
OUR_FACTS = FACTS.format("analytics.fct_reservation_events")
THEIR_FACTS = FACTS.format("analytics.bench_facts")
PROGRESS = """
SELECT coalesce(sum(version), 0)::bigint, count(*) FILTER (WHERE reservation_id = ANY (%s))
FROM analytics.fct_reservations
"""

Event = tuple[str, int]


def repeating(records: Sequence[topic.Record]) -> Iterator[topic.Record]:
    """Yield the records, each AGAIN_OFth of them again when AGAIN_AFTER more have come."""
    for number, record in enumerate(records):
        yield record
        earlier = number - AGAIN_AFTER
        if earlier >= 0 and earlier % AGAIN_OF == 0:
            yield records[earlier]


def compare(
    told: set[Event], states: Mapping[str, int], facts: Mapping[Event, int] | None
) -> dict[str, int | None]:
    """Compare the tables with the events that the topic tells.

    Args:
        told: reservations and their versions.
        states: the version of each reservation in the table.
        facts: how often each event is in its table; None where facts aren't kept.
    """
    newest: dict[str, int] = {}
    for name, version in told:
        newest[name] = max(version, newest.get(name, 0))
    lost = len(newest.keys() - states.keys())
    if facts is not None:
        lost += len(told - facts.keys())
    return {
        "lost": lost,
        "stale": sum(states.get(name, version) < version for name, version in newest.items()),
        "doubled": None if facts is None else sum(count - 1 for count in facts.values()),
    }


class Delivery:
    """Produces the records at their pace, and at the end a mark in each partition."""

    def __init__(
        self,
        around: Surroundings,
        topic_name: str,
        records: Sequence[topic.Record],
        marks: Sequence[topic.Record],
    ) -> None:
        self._topic, self._records, self._marks = topic_name, records, marks
        settings = {"bootstrap.servers": around.bootstrap_servers, "partitioner": "murmur2"}
        self._producer = Producer({**settings, "linger.ms": 5})

    def run(self, ended: threading.Event) -> None:
        """Produce everything, in as many seconds as the records are meant for."""
        began = time.monotonic()
        for number, record in enumerate(repeating(self._records)):
            self._producer.produce(self._topic, record.value, record.key)
            self._producer.poll(0)
            ahead_s = began + number / RECORDS_PER_S - time.monotonic()
            if ahead_s > 0.01:
                ended.wait(ahead_s)
        for partition, mark in enumerate(self._marks):
            self._producer.produce(self._topic, mark.value, mark.key, partition)
        if self._producer.flush(FLUSH_TIMEOUT_S):
            raise TimeoutError("Kafka did not take the records")


class Watch:
    """Looks how far the states are: how long they stood still, and whether the marks are there."""

    def __init__(self, around: Surroundings, marks: Sequence[topic.Record]) -> None:
        self.standstill_s, self.moved_at = 0.0, -math.inf
        self.complete = threading.Event()
        self._url = around.stack.environment["ANALYTICS_OWNER_DATABASE_URL"]
        self._marks = [mark.reservation for mark in marks]

    def run(self, ended: threading.Event) -> None:
        """Look until `ended`."""
        versions, since = 0, time.monotonic()
        while not ended.wait(LOOK_EVERY_S):
            try:
                with psycopg.connect(self._url, connect_timeout=CONNECT_TIMEOUT_S) as connection:
                    found = connection.execute(PROGRESS, [self._marks]).fetchone()
            except psycopg.OperationalError:  # it is being restarted
                continue
            assert found  # noqa: S101 - an aggregate
            now = time.monotonic()
            if found[0] != versions:
                self.standstill_s = max(self.standstill_s, now - max(since, self.moved_at))
                versions, self.moved_at = found[0], now
            if found[1] == len(self._marks):
                self.complete.set()


@dataclass(frozen=True)
class Loader:
    """Somebody who loads a topic; `mend` restarts what a supervisor can't see."""

    part: Part
    facts: str | None
    mend: Callable[[], int] = int


Runs = Callable[[str], AbstractContextManager[Loader]]


def measure(around: Surroundings, results: Results, seconds: int, *, peers: bool) -> None:
    """Audit each loader, in half the time: it has fewer faults to survive."""
    seconds = max(SHORTEST_S, seconds // SHARE)
    start_analytics(around)
    contenders: dict[str, Runs] = {
        STARS[0]: lambda name: _ours(around, name),
        BATCH: lambda name: _executemany(around, name),
        GUARDED: lambda name: _executemany(around, name, guarded=True),
    }
    if peers:
        contenders[JDBC] = lambda name: _jdbc_sink(around, name)
    for number, (name, runs) in enumerate(contenders.items(), start=1):
        labels = {"section": "loader faults", "contender": name, "promised": PROMISED.get(name, ())}
        with around.steps.step(f"faults: {name}"):
            results.attempt(
                labels,
                lambda n=number, r=runs, f=name == JDBC: _audit(  # type: ignore[misc]
                    around, r, f"bench-faults-{n}", seconds, flat=f
                ),
            )
    around.stack.analytics.stop()


def _audit(
    around: Surroundings, runs: Runs, topic_name: str, seconds: int, *, flat: bool
) -> Figure:
    empty(around)
    around.make_topic(topic_name)
    records = _records(seconds * RECORDS_PER_S, flat=flat)
    marks = _records(2 * events.PARTITIONS, flat=flat, first_ms=topic.FIRST_MS + 1_000_000)
    marks = [mark for mark in marks if mark.version == 1]
    delivery = Delivery(around, topic_name, records, marks)
    watch = Watch(around, marks)
    server = around.stack.analytics
    with (
        runs(topic_name) as loader,
        Supervisor([loader.part]),
        mended(loader.mend) as failed_tasks,
        meanwhile(watch.run),
    ):

        def kill(_: float) -> None:
            loader.part.kill()

        def restart_postgres(_: float) -> None:
            server.stop("immediate")
            server.start()

        with meanwhile(delivery.run):
            strike(
                SCRIPT,
                seconds,
                {
                    "loader killed": kill,
                    "Postgres restarted": restart_postgres,
                    "loader killed again": kill,
                },
                lambda since: watch.moved_at > since,
            )
        # Whoever doesn't come so far has lost what is missing.
        fed_s = time.monotonic()
        watch.complete.wait(LOAD_TIMEOUT_S)
        caught_up_s = time.monotonic() - fed_s
    told = {(record.reservation, record.version) for record in (*records, *marks)}
    with analytics(around) as connection:
        states: dict[str, int] = dict(connection.execute(STATES).fetchall())
        facts = None
        if loader.facts:
            counted = connection.execute(loader.facts).fetchall()
            facts = {(name, version): count for name, version, count in counted}
    return {
        "seconds": seconds,
        "events": len(told),
        **compare(told, states, facts),
        "restarted": loader.part.ended_by_itself + failed_tasks[0],
        "standstill_s": round(watch.standstill_s, 1),
        "caught_up_s": round(caught_up_s, 1),
    }


def _records(count: int, *, flat: bool, first_ms: int = topic.FIRST_MS) -> list[topic.Record]:
    shape, key_of = (jdbc_sink.flat, jdbc_sink.key_of) if flat else (str, str)
    return list(
        topic.records(
            *(count,), first_ms=first_ms, held_for=HELD_FOR_RESERVATIONS, shape=shape, key_of=key_of
        )
    )


@contextmanager
def _ours(around: Surroundings, topic_name: str) -> Iterator[Loader]:
    catalogue = f"{topic_name}-catalogue"
    around.make_topic(catalogue)
    environment = {
        "DATA_PLATFORM_RESERVATION_TOPIC": topic_name,
        "DATA_PLATFORM_CATALOGUE_TOPIC": catalogue,
        "DATA_PLATFORM_GROUP": topic_name,
    }
    with supervised(around, topic_name, "data_platform", "run", env=environment) as part:
        yield Loader(part, OUR_FACTS)


@contextmanager
def _executemany(
    around: Surroundings, topic_name: str, *, guarded: bool = False
) -> Iterator[Loader]:
    with analytics(around) as connection:
        connection.execute(sinks.FACTS_TABLE)
        if guarded:
            connection.execute(sinks.UNIQUE_FACTS)
    options = ["--guarded"] if guarded else []
    with supervised(
        around, topic_name, "benchmarks.sinks", "service", topic_name, *options
    ) as part:
        yield Loader(part, THEIR_FACTS)


@contextmanager
def _jdbc_sink(around: Surroundings, topic_name: str) -> Iterator[Loader]:
    """It keeps one table of a topic, so no facts beside the states."""
    with jdbc_sink.started(around) as connected, jdbc_sink.sink(connected, around, topic_name):
        part = Part("jdbc sink", connected.launch, lambda: connected.process)
        yield Loader(part, None, connected.restart_failed)
