"""Read concerts, performances and seats."""

from datetime import datetime
from typing import Any, Literal, LiteralString, NamedTuple

import msgspec

from reservation_service import problems, sql
from reservation_service.database import Connection


class PerformanceAnswer(msgspec.Struct, frozen=True):
    """A performance as the API shows it."""

    performance_id: int
    starts_at: datetime
    sales_open_at: datetime
    sales_close_at: datetime
    capacity: int
    status: Literal["scheduled", "cancelled"]


class ConcertAnswer(msgspec.Struct, frozen=True):
    """A concert as the API shows it, performances by time."""

    concert_id: int
    title: str
    venue: str
    time_zone: str
    performances: list[PerformanceAnswer]


class SeatAnswer(msgspec.Struct, frozen=True):
    """A seat as the API shows it; price in minor units of currency."""

    seat_id: int
    section: str
    row: str
    number: int
    price: int
    currency: str
    status: Literal["available", "held", "reserved", "blocked"]


class SeatsAnswer(msgspec.Struct, frozen=True):
    """All seats of a performance."""

    performance_id: int
    seats: list[SeatAnswer]


class PerformanceOnSale(msgspec.Struct, frozen=True):
    """A performance with its concert, for the page."""

    concert_id: int
    title: str
    venue: str
    time_zone: str
    currency: str
    performance_id: int
    starts_at: datetime
    sales_open_at: datetime
    sales_close_at: datetime
    status: str
    now: datetime

    @property
    def open(self) -> bool:
        """Whether it can be booked now."""
        in_time = self.sales_open_at <= self.now < min(self.sales_close_at, self.starts_at)
        return self.status == "scheduled" and in_time


_PERFORMANCES = msgspec.json.Decoder(list[PerformanceAnswer])


class Place(NamedTuple):
    """Where a list by time has come to: when a concert next begins, and which one it is."""

    begins_at: datetime
    concert_id: int


def read_concerts(connection: Connection, limit: int, after: int = 0) -> list[ConcertAnswer]:
    """Return up to `limit` concerts whose id is greater than `after`, by id."""
    return _concerts(connection, sql.READ_CONCERTS, {"after": after, "limit": limit})


def read_concerts_to_come(
    connection: Connection, limit: int, now: datetime, after: Place
) -> list[ConcertAnswer]:
    """Return up to `limit` concerts that have not all begun, the next first, from `after` on."""
    wanted = {"now": now, "begins_at": after.begins_at, "after": after.concert_id, "limit": limit}
    return _concerts(connection, sql.READ_CONCERTS_TO_COME, wanted)


def _concerts(
    connection: Connection, statement: LiteralString, wanted: dict[str, Any]
) -> list[ConcertAnswer]:
    return [
        ConcertAnswer(concert_id, title, venue, time_zone, _PERFORMANCES.decode(performances))
        for concert_id, title, venue, time_zone, performances in connection.execute(
            statement, wanted
        )
    ]


def read_concert(connection: Connection, concert_id: int) -> ConcertAnswer:
    """Return one concert.

    Raises:
        Problem: 404.
    """
    for concert in read_concerts(connection, limit=1, after=concert_id - 1):
        if concert.concert_id == concert_id:
            return concert
    raise problems.not_found("concert")


def read_performance(connection: Connection, performance_id: int) -> PerformanceOnSale:
    """Return one performance with its concert.

    Raises:
        Problem: 404.
    """
    cursor = connection.execute(sql.READ_PERFORMANCE, {"performance_id": performance_id})
    row = cursor.fetchone()
    if row is None:
        raise problems.not_found("performance")
    return PerformanceOnSale(*row)


def read_seats(connection: Connection, performance_id: int) -> SeatsAnswer:
    """Return all seats of a performance with their status at this moment.

    Raises:
        Problem: 404.
    """
    with connection.pipeline():
        performance = connection.execute(sql.READ_PERFORMANCE, {"performance_id": performance_id})
        rows = connection.execute(sql.READ_SEATS, {"performance_id": performance_id})
    found = performance.fetchone()
    if found is None:
        raise problems.not_found("performance")
    currency = found[4]
    return SeatsAnswer(
        performance_id,
        [
            SeatAnswer(seat_id, section, row, number, price, currency, status)
            for seat_id, section, row, number, price, status in rows.fetchall()
        ],
    )
