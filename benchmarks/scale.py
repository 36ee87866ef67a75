"""Beyond one machine: what distance costs relay and loader, and an outbox split into two.

The delays (see `place`) lie on both ways of a program at once: relay to Postgres and to Kafka,
worker to Kafka and to the analysts' Postgres. Everyone at each distance does the same work. Of two
runs at each distance the better one is shown; what was wrong in either is. For the outbox that is
split see `split`.

`sizes` and `booking` are what the capacity is computed from and no other section has measured.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import psycopg

from benchmarks import drain, events, loader, split, topic
from benchmarks.events import Backlog
from benchmarks.goals import TIMES, Goal
from benchmarks.place import WAL, Place, load_topic, number, place
from benchmarks.results import WRONG, Figure, Results, find
from benchmarks.shop import make_hall, own_outbox, shop
from benchmarks.split import SECTION
from benchmarks.surroundings import DELIVERIES, Surroundings
from devstack.proxy import Proxy, Traffic
from tests.proxy import breakable

DELAYS_MS = (0, 1, 10)
WORKER = "worker"
LOADED_TOPIC = "scale-loader"
SMALL_BATCH = {"DATA_PLATFORM_BATCH_ROWS": "5000"}
LOADERS: Mapping[str, tuple[int, Mapping[str, str]]] = {
    WORKER: (1, {}),
    "worker, batches of 5,000": (1, SMALL_BATCH),
    "two workers": (2, {}),
}
BOOKING_LINES = 32
BOOKINGS_MAX_PER_S = 4_000
PROBES = 15
# What a way of 10 ms may cost a drain or a load: work is batched, so nobody waits for each event.
HELD = {1: 0.9, 10: 0.7}

RESERVATION_BYTES = """
SELECT sum(pg_total_relation_size(oid)) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'seats'
"""
ANALYTICS_BYTES = """
SELECT sum(pg_total_relation_size(oid)) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'analytics'::regnamespace
"""
EMPTY_OUTBOX = "TRUNCATE outbox"


def measure(around: Surroundings, results: Results, rows: int, booking_s: int) -> None:
    """Split an outbox; drain and load at each distance; then what an event weighs."""
    with ExitStack() as cleanup:
        with around.steps.step("servers for the distances"):
            loader.start_analytics(around)
            cleanup.callback(around.stack.analytics.stop)
            broken = cleanup.enter_context(breakable(around.stack.run, "scale-kafka", 1))
            one, two = (
                cleanup.enter_context(place(around, broken, f"scale-{number}"))
                for number in ("one", "two")
            )
            one.make_topics("scale-one")
            two.make_topics("scale-two")
            for name in (events.TOPIC, LOADED_TOPIC):
                if name != events.TOPIC:
                    one.kafka.create_topic(name, events.PARTITIONS, {"retention.ms": "-1"})
                one.kafka.set_topic_config(name, {"message.timestamp.type": "LogAppendTime"})
        sizes: Figure = {}
        labels: Figure = {"section": SECTION, "rows": rows}
        with results.tolerating(labels | {"contender": split.TWO}):
            split.measure(one, two, results, rows, sizes)
        _relays(one, results, labels)
        with results.tolerating(labels | {"contender": WORKER}):
            _workers(one, results, labels, sizes)
        results.add(labels | {"contender": "sizes"} | sizes)
    with around.steps.step("what a booking leaves"):
        results.attempt(
            {"section": SECTION, "contender": "booking"}, lambda: _bookings(around, booking_s)
        )


# ---- distances


def _relays(there: Place, results: Results, labels: Figure) -> None:
    """Drain the same backlog by a relay of each delivery at each distance."""
    with there.steps.step(f"an outbox of {labels['rows']:,} rows"):
        with psycopg.connect(there.owner_url) as connection:
            connection.execute(EMPTY_OUTBOX)
        backlog = events.write_backlog(there.owner_url, labels["rows"])
        events.settle(there.admin_url)
    for delivery in DELIVERIES:
        take = partial(_distant_relay, there, delivery, backlog)
        _there_and_back(there, results, labels | {"contender": delivery}, take)


def _workers(there: Place, results: Results, labels: Figure, sizes: Figure) -> None:
    """Load the same topic at each distance: as one does, in smaller batches, by two workers."""
    with there.steps.step(f"a topic of {labels['rows']:,} events"):
        topic.fill(there.bootstrap_servers, LOADED_TOPIC, labels["rows"])
    for name in LOADERS:
        take = partial(_distant_worker, there, sizes, labels["rows"], name)
        _there_and_back(there, results, labels | {"contender": name}, take)


def _there_and_back(
    there: Place, results: Results, labels: Figure, take: Callable[[str], Figure]
) -> None:
    """Take a figure at each distance twice, in mirrored order; `take` gets a name of its own."""
    runs: dict[int, list[Figure]] = {delay_ms: [] for delay_ms in DELAYS_MS}
    for delay_ms in (*DELAYS_MS, *reversed(DELAYS_MS)):
        own = labels | {"delay_ms": delay_ms}
        name = f"scale-{labels['contender']}-{delay_ms}-{len(runs[delay_ms])}"
        with (
            there.steps.step(f"{labels['contender']}, round trip {delay_ms} ms"),
            results.tolerating(own),
        ):
            there.delay(delay_ms)
            runs[delay_ms].append(take(_plain(name)))
    there.delay(0)
    for figure in compared(runs):
        results.add(labels | figure)


def compared(runs: Mapping[int, Sequence[Figure]]) -> Iterator[Figure]:
    """Yield the better run at each distance, with what was wrong in any, against the nearest."""
    nearest = None
    for delay_ms, found in sorted(runs.items()):
        if found:
            best = max(found, key=lambda figure: figure["events_per_s"])
            wrong = {
                name: sum(abs(figure[name]) for figure in found) for name in WRONG if name in best
            }
            if delay_ms == min(runs):
                nearest = best["events_per_s"]
            ratio = round(best["events_per_s"] / nearest, 3) if nearest else None
            yield best | wrong | {"delay_ms": delay_ms, "ratio": ratio}


def _distant_relay(there: Place, delivery: str, backlog: Backlog, name: str) -> Figure:
    # With a name that is new it begins where the outbox does.
    there.make_topics(name)
    ways = {"kafka": there.broken.proxies[0], "postgres": there.postgres}
    before = {way: proxy.traffic for way, proxy in ways.items()}
    contender = drain.Contender(name, events.TOPIC, lambda _: there.relay_of(name, delivery))
    found = drain.publish(there, contender, backlog)
    took_ms = _round_trip_ms(there.environment(name)["OUTBOX_RELAY_DATABASE_URL"])
    return found | traffic(ways, before, backlog.rows) | {"round_trip_ms": took_ms}


def _distant_worker(there: Place, sizes: Figure, rows: int, who: str, name: str) -> Figure:
    workers, settings = LOADERS[who]
    loader.empty(there)
    ways = {"kafka": there.broken.proxies[0], "postgres": there.analysts}
    before = {way: proxy.traffic for way, proxy in ways.items()}
    analytics = there.stack.analytics.admin_url.rpartition("/")[0] + "/analytics"
    wal, stored = number(analytics, WAL), number(analytics, ANALYTICS_BYTES)
    found = load_topic(there, name, LOADED_TOPIC, rows, workers=workers, settings=settings)
    sizes["analytics_wal_bytes"] = round((number(analytics, WAL) - wal) / rows, 1)
    sizes["analytics_bytes"] = round((number(analytics, ANALYTICS_BYTES) - stored) / rows, 1)
    with loader.analytics(there) as connection:
        facts, _ = connection.execute(loader.COUNTS).fetchone() or (0, 0)
    took_ms = _round_trip_ms(there.environment(name)["ANALYTICS_DATABASE_URL"])
    return found | traffic(ways, before, rows) | {"lost": rows - facts, "round_trip_ms": took_ms}


def _plain(name: str) -> str:
    """Return a name that a relay, a group and a file may have."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def traffic(ways: dict[str, Proxy], before: dict[str, Traffic], rows: int) -> Figure:
    """Return bytes an event and round trips per 1,000 events of each way, the start included."""
    found: Figure = {}
    for way, proxy in ways.items():
        then, now = before[way], proxy.traffic
        found |= {
            f"{way}_sent_bytes": round((now.asked_bytes - then.asked_bytes) / rows, 1),
            f"{way}_got_bytes": round((now.answered_bytes - then.answered_bytes) / rows, 1),
            f"{way}_round_trips": round((now.round_trips - then.round_trips) / rows * 1_000, 2),
        }
    return found


def _round_trip_ms(url: str) -> float:
    """Return what a statement that does nothing takes: the delay that there really is."""
    took_s = []
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(PROBES):
            began = time.monotonic()
            connection.execute("SELECT 1")
            took_s.append(time.monotonic() - began)
    return round(statistics.median(took_s) * 1_000, 2)


# ---- what a booking leaves


def _bookings(around: Surroundings, seconds: int) -> Figure:
    """Book for a while; return WAL and table bytes of a booking, with its event."""
    at_most = BOOKINGS_MAX_PER_S * seconds
    with own_outbox(around), shop(around) as open_shop:
        hall = make_hall(around.owner_url, at_most)
        wal, stored = number(around.admin_url, WAL), number(around.admin_url, RESERVATION_BYTES)
        found = open_shop.book(hall, at_most=at_most, seconds=seconds, lines=BOOKING_LINES)
        bookings = found["answers"]["201"]
        wal = number(around.admin_url, WAL) - wal
        stored = number(around.admin_url, RESERVATION_BYTES) - stored
    return {
        "bookings": bookings,
        "wal_bytes": round(wal / bookings, 1),
        "table_bytes": round(stored / bookings, 1),
    }


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Yield what distance may cost."""
    for contender in (*DELIVERIES, WORKER):
        for delay_ms, wanted in HELD.items():
            found = find(figures, section=SECTION, contender=contender, delay_ms=delay_ms)
            what = f"{contender}, round trip {delay_ms} ms against 0"
            yield Goal(what, TIMES, wanted, found["ratio"] if found else None)
