"""The ten questions of docs/analysts.md on a season of many events, made by SQL."""

import re
import threading
import time
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import psycopg

import migrations
from benchmarks.results import Figure, Results
from benchmarks.surroundings import Surroundings
from devstack.postgres import PostgresServer
from devstack.state import REPOSITORY
from devstack.steps import Steps

QUESTIONS = REPOSITORY / "docs" / "analysts.md"
QUESTION = re.compile(r"^### (\d+)\. (.+?)( ⏱)?\n(?:.*?)```sql\n(.+?)```", re.DOTALL | re.MULTILINE)
EVENTS_PER_RESERVATION = 2.1
RUNS = 5
BEFORE_THE_VIEWS = "analytics_0002"
PROBE_INTERVAL_S = 0.01
BOUNDED_LIMIT_MS, LIMIT_MS = 200.0, 2_000.0


class Question(NamedTuple):
    """A question; `bounded` in time."""

    number: int
    title: str
    bounded: bool
    statement: str


def questions() -> list[Question]:
    """Return what the document asks."""
    text = QUESTIONS.read_text(encoding="utf-8")
    return [
        Question(int(number), title, bool(mark), statement)
        for number, title, mark, statement in QUESTION.findall(text)
    ]


# 500 concerts with 5,000 performances in five time zones; sales from January to June, when a
# popular performance has ten times the bookings of another. One customer in a few comes back.
DIMENSIONS = """
INSERT INTO analytics.dim_concerts (
    concert_id, version, title, venue, time_zone, currency, occurred_at
)
SELECT n, 1, 'Concert ' || n, 'Hall ' || n % 40,
    ('{Europe/Berlin,Europe/London,America/New_York,Asia/Tokyo,America/Los_Angeles}'::text[])
        [1 + n % 5],
    ('{EUR,GBP,USD,JPY,USD}'::text[])[1 + n % 5], '2025-12-01'
FROM generate_series(1, 500) AS n;
INSERT INTO analytics.dim_performances (
    performance_id, concert_id, version, starts_at, sales_open_at, sales_close_at, status,
    capacity, time_zone, occurred_at
)
SELECT n, concert_id, 1, timestamptz '2026-01-03 19:00+00' + n % 500 * interval '18 hours',
    '2025-12-01', '2027-12-01', 'scheduled', 5000, time_zone, '2025-12-01'
FROM generate_series(1, 5000) AS n
JOIN analytics.dim_concerts ON concert_id = 1 + n % 500;
"""
# What happens to a reservation is decided by its number: ten in a hundred are booked at once,
# 55 held and completed, ten extended before, ten expire, five are cancelled before and ten after.
# Rows come in the order of time, as the loader writes them.
RESERVATIONS = """
CREATE UNLOGGED TABLE made AS
SELECT n, n % 100 AS fate,
    lpad(to_hex((extract(epoch FROM created_at) * 1000)::bigint), 12, '0') || '-'
        || substr(md5(n::text), 1, 23) AS reservation_id,
    'customer-' || (power(random(), 2) * {reservations} / 3)::integer AS customer_id,
    performance_id, concert_id, currency, time_zone, 1 + n % 3 AS seat_count, created_at,
    created_at + interval '1 second' * (20 + random() * 500) AS completed_at
FROM (
    SELECT n, 1 + floor(power(random(), 1.5) * 5000)::bigint AS performance_id,
        timestamptz '2026-01-01' + n * (interval '180 days' / {reservations}) AS created_at
    FROM generate_series(1, {reservations}) AS n
) AS numbers
JOIN analytics.dim_performances AS performance USING (performance_id)
JOIN analytics.dim_concerts AS concert USING (concert_id, time_zone)
"""
FACTS = """
INSERT INTO analytics.fct_reservation_events (
    reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
    kafka_offset, occurred_on
)
SELECT reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, seat_count * 6500, currency, created_at,
    CASE status WHEN 'held' THEN created_at + interval '10 minutes' END, n % 6, n,
    (occurred_at AT TIME ZONE time_zone)::date
FROM made
CROSS JOIN LATERAL (
    VALUES
        (1, 'reservation.held', 'held', created_at, fate >= 10),
        (1, 'reservation.completed', 'confirmed', created_at, fate < 10),
        (2, 'reservation.completed', 'confirmed', completed_at,
            fate BETWEEN 10 AND 64 OR fate >= 90),
        (2, 'reservation.extended', 'held', created_at + interval '9 minutes',
            fate BETWEEN 65 AND 74),
        (3, 'reservation.completed', 'confirmed', completed_at + interval '9 minutes',
            fate BETWEEN 65 AND 74),
        (2, 'reservation.expired', 'expired', created_at + interval '10 minutes',
            fate BETWEEN 75 AND 84),
        (2, 'reservation.cancelled', 'cancelled', created_at + interval '1 minute',
            fate BETWEEN 85 AND 89),
        (3, 'reservation.cancelled', 'cancelled', completed_at + interval '2 days', fate >= 90)
) AS happened (version, event_type, status, occurred_at, whether)
WHERE whether
ORDER BY occurred_at
"""
STATES = """
INSERT INTO analytics.fct_reservations (
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, updated_at, created_on
)
SELECT reservation_id,
    CASE WHEN fate < 10 THEN 1 WHEN fate BETWEEN 65 AND 74 OR fate >= 90 THEN 3 ELSE 2 END,
    CASE WHEN fate < 75 THEN 'confirmed' WHEN fate < 85 THEN 'expired' ELSE 'cancelled' END,
    customer_id, concert_id, performance_id, seat_count, seat_count * 6500, currency, created_at,
    CASE
        WHEN fate < 10 THEN created_at
        WHEN fate < 65 THEN completed_at
        WHEN fate < 75 THEN completed_at + interval '9 minutes'
        WHEN fate < 85 THEN created_at + interval '10 minutes'
        WHEN fate < 90 THEN created_at + interval '1 minute'
        ELSE completed_at + interval '2 days'
    END,
    (created_at AT TIME ZONE time_zone)::date
FROM made
ORDER BY created_at
"""
SEATS = """
INSERT INTO analytics.fct_reservation_seats (
    reservation_id, seat_id, performance_id, section, "row", number, price, currency, version
)
SELECT reservation_id, performance_id * 10000 + n % 5000 + seat, performance_id,
    ('{Parkett,Rang,Loge,Balcony}'::text[])[1 + n % 4], 'A', seat, 6500, currency, 1
FROM made CROSS JOIN generate_series(1, seat_count) AS seat
ORDER BY created_at
"""
PLACES = """
INSERT INTO analytics.load_offsets (
    topic, kafka_partition, next_offset, topic_id, last_event_at, complete_up_to
)
SELECT 'concert-reservation', n, 1000, 't', now(), now() FROM generate_series(0, 5) AS n
"""
COUNT = "SELECT count(*) FROM analytics.fct_reservation_events"
# Autovacuum does so in production, sooner or later: pages are known to be visible to all.
SETTLE = ("DROP TABLE made", "VACUUM (ANALYZE)")
# Looks at each table that the migration touches, as an analyst would.
PROBE = """
SELECT (SELECT count(*) FROM (SELECT FROM analytics.fct_reservation_events LIMIT 10) AS f)
    + (SELECT count(*) FROM (SELECT FROM analytics.fct_reservations LIMIT 10) AS r)
"""


def measure(around: Surroundings, results: Results, events: int) -> None:
    """Ask each question of about so many events, then migrate them beside a reader."""
    server = PostgresServer(around.stack.run, "analysts")
    try:
        with around.steps.step(f"{events:,} events for analysts"):
            server.start()
            server.create_database("season", "analytics_owner")
            owner = server.url("season", "analytics_owner", server.give_password("analytics_owner"))
            migrations.upgrade("analytics", owner)
            rows = fill(owner, events)
        analyst = server.url("season", "analyst", server.give_password("analyst"))
        _ask_all(around.steps, results, analyst, rows)
        with around.steps.step("the migration beside a reader"):
            migrations.downgrade("analytics", owner, BEFORE_THE_VIEWS)
            labels = {"section": "analysts", "rows": rows, "contender": "migration"}
            results.attempt(labels, lambda: migrate_beside_a_reader(owner, analyst))
    finally:
        server.close()


def fill(owner_url: str, events: int) -> int:
    """Make about so many events and the rest of the star; return how many there are."""
    reservations = str(int(events / EVENTS_PER_RESERVATION))
    with psycopg.connect(owner_url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off; SET work_mem = '256MB'")
        connection.execute("SELECT setseed(0.5)")
        for statement in (DIMENSIONS, RESERVATIONS, FACTS, STATES, SEATS, PLACES):
            connection.execute(statement.replace("{reservations}", reservations).encode())
        for statement in SETTLE:
            connection.execute(statement.encode())
        found = connection.execute(COUNT).fetchone()
    return 0 if found is None else int(found[0])


def _ask_all(steps: Steps, results: Results, url: str, rows: int) -> None:
    for question in questions():
        with steps.step(f"question {question.number}"):
            labels = {
                "section": "analysts",
                "rows": rows,
                "contender": f"{question.number}. {question.title}",
                "limit_ms": BOUNDED_LIMIT_MS if question.bounded else LIMIT_MS,
            }
            results.attempt(labels, lambda asked=question: ask(url, asked))  # type: ignore[misc]


def ask(url: str, question: Question) -> Figure:
    """Ask RUNS times over one connection; the median counts, beside the first and the slowest."""
    taken_ms = []
    rows = 0
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(RUNS):
            began = time.perf_counter()
            rows = len(connection.execute(question.statement.encode()).fetchall())
            taken_ms.append(round((time.perf_counter() - began) * 1000, 1))
    return {
        "ms": median(taken_ms),
        "first_ms": taken_ms[0],
        "slowest_ms": max(taken_ms),
        "answer_rows": rows,
    }


@dataclass
class Reader:
    """Asks small questions all the time; `longest_ms` is what the slowest took."""

    url: str
    longest_ms: float = 0.0
    asked: int = 0

    def run(self, done: threading.Event) -> None:
        """Ask until done."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            while not done.wait(PROBE_INTERVAL_S):
                began = time.perf_counter()
                connection.execute(PROBE)
                self.longest_ms = max(self.longest_ms, (time.perf_counter() - began) * 1000)
                self.asked += 1


def migrate_beside_a_reader(owner_url: str, analyst_url: str) -> Figure:
    """Bring the tables up to date while somebody reads them."""
    reader, done = Reader(analyst_url), threading.Event()
    thread = threading.Thread(target=reader.run, args=(done,))
    thread.start()
    began = time.perf_counter()
    try:
        migrations.upgrade("analytics", owner_url)
    finally:
        took_s = time.perf_counter() - began
        done.set()
        thread.join()
    return {
        "s": round(took_s, 1),
        "reader_longest_ms": round(reader.longest_ms, 1),
        "reader_asked": reader.asked,
    }
