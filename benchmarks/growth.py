"""What loading an event costs by how much the tables hold already: it should always be the same.

The tables are filled by SQL to each size, then a worker loads a topic of events that are newer than
all of them, as in life. CPU per event is what counts; the clock tells what else the machine did.
"""

from collections.abc import Iterator, Sequence

import psycopg

from benchmarks import loader, topic
from benchmarks.goals import TIMES, Goal
from benchmarks.results import Figure, Results
from benchmarks.surroundings import Surroundings

TOPIC = "bench-growth"
EVENTS = 200_000
# Between the first ids of two topics: each of them makes reservations of its own.
APART_MS = 1_000_000
EVENTS_PER_RESERVATION = 2
# B-trees of twenty times the rows are one level higher; more than this would be more than that.
FLAT_TIMES = 1.2

# Ids as the service makes them, ordered by time and older than any topic's; as many performances,
# seats and customers as a season has. `%` of psycopg's parameters is doubled.
RESERVATIONS = """
CREATE TEMPORARY TABLE made ON COMMIT DROP AS
SELECT lpad(to_hex(1600000000000 + n), 12, '0') AS time, md5(n::text) AS chance,
    n, 1 + n %% 4 AS seat_count, 1 + n * 7919 %% 5000 AS performance_id,
    'customer-' || n * 104729 %% 300000 AS customer_id,
    timestamptz '2025-01-01' + n * interval '1 second' AS created_at
FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n;
"""
ID = """
left(time, 8) || '-' || right(time, 4) || '-7' || left(chance, 3) || '-8'
    || substr(chance, 4, 3) || '-' || right(chance, 12)
"""
FACTS = f"""
INSERT INTO analytics.fct_reservation_events (
    reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
    kafka_offset, occurred_on
)
SELECT {ID}, version, event_type, created_at + later, status, customer_id, 17, performance_id,
    seat_count, seat_count * 8950, 'EUR', created_at, NULL, n % 6, n, (created_at + later)::date
FROM made
CROSS JOIN LATERAL (
    VALUES (1, 'reservation.held', 'held', interval '0'),
        (2, 'reservation.completed', 'confirmed', interval '3 minutes')
) AS happened (version, event_type, status, later)
"""  # noqa: S608 - our own constants
STATES = f"""
INSERT INTO analytics.fct_reservations (
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, updated_at, seats_version, seats_digest, created_on
)
SELECT {ID}, 2, 'confirmed', customer_id, 17, performance_id, seat_count, seat_count * 8950, 'EUR',
    created_at, created_at + interval '3 minutes', 1, n, created_at::date
FROM made
"""  # noqa: S608 - our own constants
SEATS = f"""
INSERT INTO analytics.fct_reservation_seats (
    reservation_id, seat_id, performance_id, section, "row", number, price, currency, version
)
SELECT {ID}, performance_id * 10000 + n % 5000 + seat, performance_id, 'Stalls left', 'K', seat,
    8950, 'EUR', 1
FROM made CROSS JOIN generate_series(1, seat_count) AS seat
"""  # noqa: S608 - our own constants
STEP_RESERVATIONS = 500_000
# As autovacuum does in production, sooner or later; nothing of it is left for the measurement.
SETTLE = (
    "VACUUM (ANALYZE) analytics.fct_reservation_events",
    "VACUUM (ANALYZE) analytics.fct_reservations",
    "VACUUM (ANALYZE) analytics.fct_reservation_seats",
)
COUNT = "SELECT count(*) FROM analytics.fct_reservation_events"


def measure(around: Surroundings, results: Results, sizes: tuple[int, ...]) -> None:
    """Load EVENTS events into tables of each size, in events."""
    loader.start_analytics(around)
    loader.empty(around)
    held = 0
    for number, rows in enumerate(sizes):
        name = f"{TOPIC}-{number}"
        with around.steps.step(f"{rows:,} events in the tables"):
            grow(around, held, rows)
            held = rows
            around.make_topic(name)
            around.make_topic(f"{name}-catalogue")
            first_ms = topic.FIRST_MS + number * APART_MS
            topic.fill(around.bootstrap_servers, name, EVENTS, first_ms=first_ms)
            _settle(around)
        labels = {"section": "growth", "rows": rows, "contender": "star"}
        with around.steps.step(f"{EVENTS:,} events on top of {rows:,}"):
            results.attempt(labels, lambda n=name: _take(around, n))  # type: ignore[misc]
    around.stack.analytics.stop()


def _take(around: Surroundings, name: str) -> Figure:
    before = _facts(around)
    found = loader.watch(around, ("data_platform", "run"), 1, EVENTS, name)
    both = found["cpu_us_per_event"] + found["postgres_us_per_event"]
    return found | {
        "all_cpu_us_per_event": round(both, 2),
        "lost": EVENTS - (_facts(around) - before),
    }


def grow(around: Surroundings, held: int, events: int) -> None:
    """Fill the tables, which hold `held` events of this module's, up to `events`."""
    last = events // EVENTS_PER_RESERVATION
    with loader.analytics(around) as connection:
        connection.execute("SET synchronous_commit = off")
        first = held // EVENTS_PER_RESERVATION + 1
        while first <= last:
            until = min(last, first + STEP_RESERVATIONS - 1)
            with connection.transaction():
                connection.execute(RESERVATIONS, {"first": first, "last": until})
                for statement in (FACTS, STATES, SEATS):
                    connection.execute(statement.encode())
            first = until + 1


def _settle(around: Surroundings) -> None:
    with loader.analytics(around) as connection:
        for statement in SETTLE:
            connection.execute(statement.encode())
    with psycopg.connect(around.stack.analytics.admin_url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")


def _facts(around: Surroundings) -> int:
    with loader.analytics(around) as connection:
        found = connection.execute(COUNT).fetchone()
    return int(found[0]) if found else 0


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Yield whether an event costs the same in the largest tables as in the smallest."""
    measured = [f for f in figures if f["section"] == "growth" and not f.get("error")]
    found, sizes = None, ""
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        found = round(last["all_cpu_us_per_event"] / first["all_cpu_us_per_event"], 2)
        sizes = f", {last['rows']:,} events there against {first['rows']:,}"
    yield Goal(f"loader, CPU per event{sizes}", TIMES, FLAT_TIMES, found, at_most=True)
