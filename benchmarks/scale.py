"""Beyond one machine: what distance costs relay and loader, and an outbox split into two.

The delays (see `place`) lie on both ways of a program at once: relay to Postgres and to Kafka,
worker to Kafka and to the analysts' Postgres. Everyone at each distance does the same work. The
split outbox has each database on a server of its own; both relays publish into one topic.

`sizes` and `booking` are what the capacity is computed from and no other section has measured.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import psycopg

from benchmarks import drain, events, loader, topic
from benchmarks.events import Backlog
from benchmarks.goals import TIMES, Goal
from benchmarks.place import Place, log_bytes, number, place
from benchmarks.processes import cost
from benchmarks.results import Figure, Results, find
from benchmarks.shop import make_hall, own_outbox, shop
from benchmarks.surroundings import DELIVERIES, Surroundings, check_alive
from devstack.proxy import Proxy, Traffic
from tests.proxy import breakable

SECTION = "scale"
DELAYS_MS = (0, 1, 10)
ONE, TWO, WORKER = "one database", "two databases", "worker"
LOADED_TOPIC = "scale-loader"
WARM_UP_ROWS = 20_000
BOOKING_LINES = 32
BOOKINGS_MAX_PER_S = 4_000
PROBES = 15
WORKERS = 2
# What a way of 10 ms may cost a drain or a load: work is batched, so nobody waits for each event.
HELD = {1: 0.9, 10: 0.7}

WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'"
OUTBOX_BYTES = "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('outbox')"
RESERVATION_BYTES = """
SELECT sum(pg_total_relation_size(oid)) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'seats'
"""
ANALYTICS_BYTES = """
SELECT sum(pg_total_relation_size(oid)) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'analytics'::regnamespace
"""
EMPTY_OUTBOX = "TRUNCATE outbox"
# Every version from 1 to the newest is there once, and the newest is the state.
WRONG_HISTORIES = """
SELECT count(*) FROM analytics.fct_reservations AS state JOIN (
    SELECT reservation_id, count(*) AS facts, max(version) AS newest
    FROM analytics.fct_reservation_events GROUP BY reservation_id
) AS history USING (reservation_id)
WHERE (state.version, history.newest) IS DISTINCT FROM (history.facts, history.facts)
"""


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
        with results.tolerating(labels | {"contender": TWO}):
            _split(one, two, results, rows, sizes)
        _relays(one, results, labels)
        with results.tolerating(labels | {"contender": WORKER}):
            _workers(one, results, labels, sizes)
        results.add(labels | {"contender": "sizes"} | sizes)
    with around.steps.step("what a booking leaves"):
        results.attempt(
            {"section": SECTION, "contender": "booking"}, lambda: _bookings(around, booking_s)
        )


# ---- one database split into two


def _split(one: Place, two: Place, results: Results, rows: int, sizes: Figure) -> None:
    """Publish all rows from one database, then half of as many from each of two; load them all."""
    contender = drain.Contender("one", events.TOPIC, lambda _: one.relay_of("scale-one"))
    warm_up = events.write_backlog(one.owner_url, WARM_UP_ROWS)
    drain.publish(one, contender, warm_up)
    before = one.ask(WAL), one.ask(OUTBOX_BYTES), log_bytes(one.kafka, events.TOPIC)
    with one.steps.step(f"{rows:,} rows from one database"):
        backlog = events.write_backlog(one.owner_url, rows)
        sizes["outbox_wal_bytes"] = round((one.ask(WAL) - before[0]) / rows, 1)
        events.settle(one.admin_url)
        sizes["outbox_bytes"] = round((one.ask(OUTBOX_BYTES) - before[1]) / rows, 1)
        found = drain.publish(one, contender, backlog)
        sizes["log_bytes"] = round((log_bytes(one.kafka, events.TOPIC) - before[2]) / rows, 1)
        results.add({"section": SECTION, "rows": rows, "contender": ONE, "ratio": 1.0} | found)
    speed = found["events_per_s"]
    with one.steps.step(f"{rows:,} rows from two databases"):
        found = _publish_both(one, two, rows)
    with one.steps.step(f"{WORKERS} workers of a group load both"):
        loaded = _load_all(one, rows=warm_up.rows + 2 * rows)
    results.add(
        {"section": SECTION, "rows": rows, "contender": TWO}
        | found
        | loaded
        | {"ratio": round(found["events_per_s"] / speed, 3)}
    )


def _publish_both(one: Place, two: Place, rows: int) -> Figure:
    """Let two relays, one a database, publish half of the rows each at the same time."""
    for there in (one, two):
        events.write_backlog(there.owner_url, rows // 2)
        events.settle(there.admin_url)
    arrivals = one.arrivals(events.TOPIC)
    with one.relay_of("scale-one") as first, two.relay_of("scale-two") as second:
        groups = {"relay 1": first.pid, "relay 2": second.pid}

        def check() -> None:
            check_alive(first)()
            check_alive(second)()

        arrivals.await_first(drain.TIMEOUT_S, check)
        before = cost(groups)
        timeout_s = drain.TIMEOUT_S + rows / drain.SLOWEST_EVENTS_PER_S
        end_s, after = arrivals.watch(rows, timeout_s, check, lambda: cost(groups))
    verdict = arrivals.verify(rows)
    used = sum(after.since(before).values())
    return (
        drain.rates(rows, end_s - verdict.first_append_s)
        | {"cpu_s": used, "cpu_us_per_event": round(used / rows * drain.MICROSECONDS, 2)}
        | verdict.summary()
    )


def _load_all(there: Place, rows: int) -> Figure:
    """Load the events' topic by one group; return what is wrong in the tables."""
    loader.empty(there)
    # A transaction's marker takes an offset, too.
    offsets = sum(there.arrivals(events.TOPIC).ends().values())
    found = _load(there, "scale-group", events.TOPIC, offsets, workers=WORKERS)
    with loader.analytics(there) as connection:
        facts, _ = connection.execute(loader.COUNTS).fetchone() or (0, 0)
        (histories,) = connection.execute(WRONG_HISTORIES).fetchone() or (0,)
    return {
        "loaded_events": facts,
        "loaded_per_s": found["events_per_s"],
        "tables_lost": rows - facts,
        "tables_wrong": histories,
        "promised": ("lost", "doubled", "reordered", "tables_lost", "tables_wrong"),
    }


# ---- distances


def _relays(there: Place, results: Results, labels: Figure) -> None:
    """Drain the same backlog by a relay of each delivery at each distance."""
    with there.steps.step(f"an outbox of {labels['rows']:,} rows"):
        with psycopg.connect(there.owner_url) as connection:
            connection.execute(EMPTY_OUTBOX)
        backlog = events.write_backlog(there.owner_url, labels["rows"])
        events.settle(there.admin_url)
    for delivery in DELIVERIES:
        for delay_ms in DELAYS_MS:
            own = labels | {"contender": delivery, "delay_ms": delay_ms}
            with there.steps.step(f"{delivery}, round trip {delay_ms} ms"):
                results.attempt(own, lambda own=own: _distant(there, results, own, backlog))  # type: ignore[misc]
    there.delay(0)


def _distant(there: Place, results: Results, labels: Figure, backlog: Backlog) -> Figure:
    # A name of its own: it begins where the outbox does.
    delivery, name = labels["contender"], f"scale-{labels['contender']}-{labels['delay_ms']}"
    there.delay(0)
    there.make_topics(name)
    there.delay(labels["delay_ms"])
    ways = {"kafka": there.broken.proxies[0], "postgres": there.postgres}
    before = {way: proxy.traffic for way, proxy in ways.items()}
    contender = drain.Contender(name, events.TOPIC, lambda _: there.relay_of(name, delivery))
    found = drain.publish(there, contender, backlog)
    found |= _traffic(ways, before, backlog.rows)
    found["round_trip_ms"] = _round_trip_ms(there.environment(name)["OUTBOX_RELAY_DATABASE_URL"])
    return found | _ratio(results, labels, found)


def _workers(there: Place, results: Results, labels: Figure, sizes: Figure) -> None:
    """Load the same topic by a worker at each distance."""
    rows = labels["rows"]
    with there.steps.step(f"a topic of {rows:,} events"):
        topic.fill(there.bootstrap_servers, LOADED_TOPIC, rows)
    for delay_ms in DELAYS_MS:
        own = labels | {"contender": WORKER, "delay_ms": delay_ms}
        with there.steps.step(f"worker, round trip {delay_ms} ms"):
            results.attempt(own, lambda own=own: _distant_worker(there, results, own, sizes))  # type: ignore[misc]
    there.delay(0)


def _distant_worker(there: Place, results: Results, labels: Figure, sizes: Figure) -> Figure:
    rows, name = labels["rows"], f"scale-worker-{labels['delay_ms']}"
    loader.empty(there)
    there.delay(labels["delay_ms"])
    ways = {"kafka": there.broken.proxies[0], "postgres": there.analysts}
    before = {way: proxy.traffic for way, proxy in ways.items()}
    analytics = there.stack.analytics.admin_url.rpartition("/")[0] + "/analytics"
    wal, stored = number(analytics, WAL), number(analytics, ANALYTICS_BYTES)
    found = _load(there, name, LOADED_TOPIC, rows)
    sizes["analytics_wal_bytes"] = round((number(analytics, WAL) - wal) / rows, 1)
    sizes["analytics_bytes"] = round((number(analytics, ANALYTICS_BYTES) - stored) / rows, 1)
    found |= _traffic(ways, before, rows)
    with loader.analytics(there) as connection:
        facts, _ = connection.execute(loader.COUNTS).fetchone() or (0, 0)
    found |= {"lost": rows - facts}
    found["round_trip_ms"] = _round_trip_ms(there.environment(name)["ANALYTICS_DATABASE_URL"])
    return found | _ratio(results, labels, found)


def _load(there: Place, group: str, name: str, offsets: int, *, workers: int = 1) -> Figure:
    """Load a topic up to its end, all of whose offsets are `offsets` in sum."""
    environment = there.environment(group) | {"DATA_PLATFORM_RESERVATION_TOPIC": name}

    def loaded(connection: psycopg.Connection) -> int:
        found = connection.execute(loader.LOADED, [name]).fetchone()
        return int(found[0]) if found else 0

    with ExitStack() as cleanup:
        running = []
        for which in range(workers):
            running.append(
                there.program("data_platform", "run", name=f"{group}-{which}", env=environment)
            )
            cleanup.callback(running[-1].stop)
        return loader.watch_processes(there, running, loaded, offsets)


def _ratio(results: Results, labels: Figure, found: Figure) -> Figure:
    """Compare with the same at no distance."""
    near = find(results.figures, **labels | {"delay_ms": 0}) if labels["delay_ms"] else found
    return {"ratio": round(found["events_per_s"] / near["events_per_s"], 3) if near else None}


def _traffic(ways: dict[str, Proxy], before: dict[str, Traffic], rows: int) -> Figure:
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
