"""A known season in the analysts' tables, put there as the loader does: what is asked of it has
answers that one can count by hand.

Concert 1 plays in Berlin (EUR) on two evenings, 2 in New York (USD), 3 has no bookings at all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import psycopg

BERLIN, NEW_YORK = "Europe/Berlin", "America/New_York"
CONCERTS = [
    (1, 1, "Nacht der Streicher", "Philharmonie", BERLIN, "EUR"),
    (2, 1, "Harbour Lights", "Pier 17", NEW_YORK, "USD"),
    (3, 1, "Nobody Comes", "Philharmonie", BERLIN, "EUR"),
]
PERFORMANCES = [
    (11, 1, "2026-05-01 18:00+00", 10, BERLIN),
    (12, 1, "2026-05-02 18:00+00", 10, BERLIN),
    (21, 2, "2026-05-10 23:00+00", 20, NEW_YORK),
    (31, 3, "2026-06-01 18:00+00", 50, BERLIN),
]
STATUS = {
    "held": "held",
    "extended": "held",
    "completed": "confirmed",
    "cancelled": "cancelled",
    "expired": "expired",
}
FAR_AWAY = datetime(2100, 1, 1, tzinfo=UTC)


class Seat(NamedTuple):
    """A seat of a reservation; price in minor units."""

    section: str
    number: int
    price: int


@dataclass(frozen=True)
class Life:
    """A reservation and what happened to it: ("held", "2026-03-01 10:00"), … in UTC."""

    reservation_id: str
    performance_id: int
    customer_id: str
    seats: Sequence[Seat]
    happened: Sequence[tuple[str, str]]
    currency: str = "EUR"
    expires_at: datetime = FAR_AWAY

    @property
    def concert_id(self) -> int:
        """Its concert."""
        return next(row[1] for row in PERFORMANCES if row[0] == self.performance_id)

    @property
    def time_zone(self) -> str:
        """Its performance's time zone."""
        return next(row[4] for row in PERFORMANCES if row[0] == self.performance_id)

    def rows(self) -> Iterable[tuple[Any, ...]]:
        """Return its facts, in the order of INSERT_FACT without the day."""
        created_at = _utc(self.happened[0][1])
        for version, (kind, at) in enumerate(self.happened, start=1):
            status = STATUS[kind]
            yield (
                self.reservation_id,
                version,
                f"reservation.{kind}",
                _utc(at),
                status,
                self.customer_id,
                self.concert_id,
                self.performance_id,
                len(self.seats),
                sum(seat.price for seat in self.seats),
                self.currency,
                created_at,
                self.expires_at if status == "held" else None,
            )


INSERT_FACT = """
INSERT INTO analytics.fct_reservation_events (
    reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at, occurred_on,
    kafka_partition, kafka_offset
) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, 0, 0)
"""
INSERT_STATE = """
INSERT INTO analytics.fct_reservations (
    reservation_id, version, updated_at, status, customer_id, concert_id, performance_id,
    seat_count, amount, currency, created_at, expires_at, created_on
) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
INSERT_SEAT = """
INSERT INTO analytics.fct_reservation_seats (
    reservation_id, seat_id, performance_id, section, "row", number, price, currency, version
) VALUES (%s, %s, %s, %s, 'A', %s, %s, %s, 1)
"""
INSERT_CONCERT = """
INSERT INTO analytics.dim_concerts (
    concert_id, version, title, venue, time_zone, currency, occurred_at
) VALUES (%s, %s, %s, %s, %s, %s, '2026-01-01 00:00+00')
"""
INSERT_PERFORMANCE = """
INSERT INTO analytics.dim_performances (
    performance_id, concert_id, starts_at, capacity, time_zone, version, sales_open_at,
    sales_close_at, status, occurred_at
) VALUES (%s, %s, %s, %s, %s, 1, '2026-01-01 00:00+00', '2027-01-01 00:00+00', 'scheduled',
    '2026-01-01 00:00+00')
"""
INSERT_OFFSET = """
INSERT INTO analytics.load_offsets (
    topic, kafka_partition, next_offset, topic_id, last_event_at, complete_up_to, updated_at
) VALUES (%s, %s, %s, 't', %s, %s, %s)
"""


def put(url: str, lives: Iterable[Life], *, with_days: bool = True) -> None:
    """Put reservations into the tables; without days as a worker of old would."""
    with psycopg.connect(url) as connection:
        for life in lives:
            facts = list(life.rows())
            zone = ZoneInfo(life.time_zone)
            for fact in facts:
                day = fact[3].astimezone(zone).date() if with_days else None
                connection.execute(INSERT_FACT, (*fact, day))
            last = facts[-1]
            day = last[11].astimezone(zone).date() if with_days else None
            connection.execute(INSERT_STATE, (*last[:2], last[3], *last[4:], day))
            for seat in life.seats:
                connection.execute(
                    INSERT_SEAT,
                    (
                        life.reservation_id,
                        life.performance_id * 1000 + seat.number,
                        life.performance_id,
                        *seat,
                        life.currency,
                    ),
                )


def put_catalogue(url: str) -> None:
    """Put the concerts and performances into the tables."""
    with psycopg.connect(url) as connection:
        for concert in CONCERTS:
            connection.execute(INSERT_CONCERT, concert)
        for performance in PERFORMANCES:
            connection.execute(INSERT_PERFORMANCE, performance)


def put_place(
    url: str,
    partition: int,
    complete_up_to: datetime | None,
    *,
    next_offset: int = 10,
    topic: str = "concert-reservation",
) -> None:
    """Put where the loader stands in a partition."""
    happened = datetime(2026, 3, 31, tzinfo=UTC)
    with psycopg.connect(url) as connection:
        connection.execute(
            INSERT_OFFSET, (topic, partition, next_offset, happened, complete_up_to, happened)
        )


def seats(*prices: int, section: str = "Parkett", first: int = 1) -> list[Seat]:
    """Seats side by side with these prices."""
    return [Seat(section, first + n, price) for n, price in enumerate(prices)]


# The whole season, for the ten questions. 23:30 UTC is the next day in Berlin, 03:00 UTC the day
# before in New York.
SEASON = [
    Life(
        "r-01", 11, "ann", seats(5_000, 5_000),
        [("held", "2026-03-02 10:00"), ("completed", "2026-03-02 10:01")],
    ),
    Life(
        "r-02", 11, "bob", seats(5_000, first=3),
        [("held", "2026-03-02 23:25"), ("completed", "2026-03-02 23:30")],
    ),
    Life(
        "r-03", 11, "cat", seats(9_000, section="Loge", first=4),
        [
            ("held", "2026-03-03 09:00"), ("extended", "2026-03-03 09:05"),
            ("completed", "2026-03-03 09:10"), ("cancelled", "2026-03-05 12:00"),
        ],
    ),
    Life(
        "r-04", 12, "ann", seats(6_000, 6_000, 6_000),
        [("completed", "2026-03-04 08:00")],
    ),
    Life(
        "r-05", 12, "dan", seats(6_000, first=4),
        [("held", "2026-03-04 11:00"), ("expired", "2026-03-04 11:10")],
    ),
    Life(
        "r-06", 21, "eve", seats(10_000, 10_000),
        [("held", "2026-03-04 02:58"), ("completed", "2026-03-04 03:00")], "USD",
    ),
    Life(
        "r-07", 21, "ann", seats(12_500, section="Balcony", first=3),
        [("held", "2026-03-05 15:00"), ("completed", "2026-03-05 15:04")], "USD",
    ),
    Life(
        "r-08", 21, "bob", seats(10_000, first=4),
        [("held", "2026-03-06 15:00"), ("cancelled", "2026-03-06 15:02")], "USD",
    ),
    Life("r-09", 11, "fay", seats(5_000, 5_000, first=5), [("held", "2026-03-06 16:00")]),
    Life(
        "r-10", 12, "gus", seats(6_000, first=5), [("held", "2026-03-06 17:00")],
        expires_at=datetime(2026, 3, 6, 17, 10, tzinfo=UTC),
    ),
]  # fmt: skip


def put_season(url: str) -> None:
    """Put everything above into the tables, complete up to a day in April."""
    put_catalogue(url)
    put(url, SEASON)
    for partition in range(2):
        put_place(url, partition, datetime(2026, 4, 1, 12, partition, tzinfo=UTC))


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
