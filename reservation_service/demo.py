"""Concerts for a demo: two small halls and an arena, on sale now."""

from datetime import UTC, datetime, timedelta

import structlog

from reservation_service import catalogue_changes, sql
from reservation_service.database import Connection
from reservation_service.new_concert import NewConcert, NewPerformance, NewRow, NewSection

WANTED_AVAILABLE_SEATS = 200

log = structlog.get_logger(__name__)


def seed(connection: Connection) -> int:
    """Publish the demo's concerts unless one can still be booked; return how many were made.

    Two at once are safe: the second waits and finds the first one's concerts.
    """
    with connection.transaction():
        connection.execute(sql.LOCK_SEEDING)
        row = connection.execute(
            sql.COUNT_CONCERTS_TO_BOOK, {"seats": WANTED_AVAILABLE_SEATS}
        ).fetchone()
        if row and row[0]:
            return 0
        concerts = demo_concerts(datetime.now(UTC))
        for concert in concerts:
            catalogue_changes.publish(connection, concert)
    return len(concerts)


def demo_concerts(now: datetime) -> list[NewConcert]:
    """Return the concerts, the biggest first: it has room for thousands of bookings."""
    noon = now.replace(hour=18, minute=0, second=0, microsecond=0)
    return [
        NewConcert(
            title="Northern Lights Tour",
            venue="Harbour Arena, Hamburg",
            time_zone="Europe/Berlin",
            currency="EUR",
            performances=[_evening(noon, days, _arena()) for days in (45, 46)],
        ),
        NewConcert(
            title="Beethoven: Symphony No. 9",
            venue="Concert Hall, Vienna",
            time_zone="Europe/Vienna",
            currency="EUR",
            performances=[_evening(noon, days, _hall()) for days in (30, 31, 37)],
        ),
        NewConcert(
            title="Late Night Jazz",
            venue="Blue Cellar, London",
            time_zone="Europe/London",
            currency="GBP",
            performances=[
                _evening(noon + timedelta(hours=2), days, _cellar()) for days in (14, 21)
            ],
        ),
    ]


def _evening(at: datetime, days: int, sections: list[NewSection]) -> NewPerformance:
    starts_at = at + timedelta(days=days)
    return NewPerformance(
        starts_at=starts_at,
        sales_open_at=at - timedelta(days=2),
        sales_close_at=starts_at - timedelta(hours=1),
        sections=sections,
    )


def _section(name: str, price: int, rows: int, seats: int) -> NewSection:
    return NewSection(
        section=name,
        price=price,
        rows=[NewRow(row=str(number), seats=seats) for number in range(1, rows + 1)],
    )


def _arena() -> list[NewSection]:
    return [
        _section("Floor", 12_900, 30, 40),
        _section("Lower tier west", 9_900, 25, 40),
        _section("Lower tier east", 9_900, 25, 40),
        _section("Upper tier west", 6_900, 25, 40),
        _section("Upper tier east", 6_900, 25, 40),
    ]


def _hall() -> list[NewSection]:
    return [
        _section("Stalls", 8_900, 14, 22),
        _section("Boxes", 11_500, 6, 4),
        _section("Balcony", 5_400, 6, 20),
        _section("Gallery", 2_900, 4, 20),
    ]


def _cellar() -> list[NewSection]:
    return [_section("Tables", 4_500, 12, 4), _section("Bar", 2_500, 1, 12)]
