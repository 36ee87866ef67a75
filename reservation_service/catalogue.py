"""Concerts, performances and seats: publish them (with their event) and read them."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self
from zoneinfo import available_timezones

import msgspec
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from reservation_service import events, idempotency, problems, sql
from reservation_service.database import Connection
from reservation_service.idempotency import Answer, Key

# Bounds that keep one call's transaction short and its event well under the topic's limit.
MAX_SEATS_PER_CONCERT = 50_000
EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)


def _in_range(value: datetime) -> datetime:
    if not EARLIEST <= value <= LATEST:
        raise ValueError("expected a time between 2000 and 2200")
    return value


def _time_zone(value: str) -> str:
    # The two that mean whatever this machine says.
    if value not in available_timezones() - {"localtime", "Factory"}:
        raise ValueError("expected an IANA time zone like Europe/Berlin")
    return value


NO_CONTROLS = r"^[^\x00-\x1f\x7f]*$"
Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200, pattern=NO_CONTROLS, strip_whitespace=True),
]
ShortText = Annotated[
    str,
    StringConstraints(min_length=1, max_length=60, pattern=NO_CONTROLS, strip_whitespace=True),
]
Time = Annotated[AwareDatetime, AfterValidator(_in_range)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NewRow(_Body):
    """A row of seats numbered 1 to `seats`."""

    row: ShortText
    seats: int = Field(ge=1, le=500)


class NewSection(_Body):
    """A section whose seats all cost `price` minor units."""

    section: ShortText
    price: int = Field(ge=0, le=1_000_000_000_000)
    rows: list[NewRow] = Field(min_length=1, max_length=200)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        _refuse_twice("row", (row.row for row in self.rows))
        return self


class NewPerformance(_Body):
    """One evening with its sales window and its seats."""

    starts_at: Time
    sales_open_at: Time
    sales_close_at: Time
    sections: list[NewSection] = Field(min_length=1, max_length=50)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_twice("section", (section.section for section in self.sections))
        if self.sales_close_at <= self.sales_open_at:
            raise ValueError("sales_close_at: expected a time after sales_open_at")
        return self

    @property
    def capacity(self) -> int:
        """Number of seats."""
        return sum(row.seats for section in self.sections for row in section.rows)


class NewConcert(_Body):
    """A concert as the admin sends it."""

    title: Text
    venue: Text
    time_zone: Annotated[str, Field(max_length=64), AfterValidator(_time_zone)]
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    performances: list[NewPerformance] = Field(min_length=1, max_length=20)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if sum(performance.capacity for performance in self.performances) > MAX_SEATS_PER_CONCERT:
            raise ValueError(f"expected at most {MAX_SEATS_PER_CONCERT} seats in all")
        return self


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


def publish(
    connection: Connection,
    concert: NewConcert,
    key: Key | None = None,
    traceparent: str | None = None,
) -> Answer:
    """Insert the concert with all its seats and write `concert.published`, in one transaction.

    Raises:
        Problem: 409 or 422 about the key, as in `idempotency.claim`.
    """
    with connection.transaction():
        answered = idempotency.claim(connection, key)
        if answered:
            return answered
        concert_id = _insert(connection, concert)
        state, published_at = _read_state(connection, concert_id)
        # The row is ours alone until COMMIT, so nobody can write this key's next event before us.
        events.write_concert(connection, state, "concert.published", published_at, traceparent)
        body = msgspec.json.encode(read_concert(connection, concert_id))
        answer = Answer(location=f"/api/concerts/{concert_id}", body=body)
        idempotency.remember(connection, key, answer)
    return answer


def read_concerts(connection: Connection, limit: int, after: int = 0) -> list[ConcertAnswer]:
    """Return up to `limit` concerts whose id is greater than `after`, by id."""
    cursor = connection.execute(sql.READ_CONCERTS, {"after": after, "limit": limit})
    return [
        ConcertAnswer(concert_id, title, venue, time_zone, _PERFORMANCES.decode(performances))
        for concert_id, title, venue, time_zone, performances in cursor
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


def _insert(connection: Connection, concert: NewConcert) -> int:
    concert_id = _id(connection, sql.INSERT_CONCERT, concert.model_dump(exclude={"performances"}))
    rows: list[tuple[int, str, str, int, int]] = []
    for performance in concert.performances:
        values = performance.model_dump(exclude={"sections"})
        values |= {"concert_id": concert_id, "capacity": performance.capacity}
        performance_id = _id(connection, sql.INSERT_PERFORMANCE, values)
        rows += [
            (performance_id, section.section, row.row, row.seats, section.price)
            for section in performance.sections
            for row in section.rows
        ]
    columns = ("performance_ids", "sections", "rows", "counts", "prices")
    values_of = zip(*rows, strict=True)
    connection.execute(
        sql.INSERT_SEATS, {name: list(v) for name, v in zip(columns, values_of, strict=True)}
    )
    return concert_id


def _read_state(connection: Connection, concert_id: int) -> tuple[events.Concert, datetime]:
    cursor = connection.execute(sql.READ_CONCERT_STATE, {"concert_id": concert_id})
    row = cursor.fetchone()
    assert row  # noqa: S101 - inserted by this transaction
    *members, read_at, performances = row
    # JSON made by Postgres says +00:00, which is equal but not what the schema asks for; decoded
    # times carry UTC and are written with Z.
    names = ("concert_id", "version", "title", "venue", "time_zone", "currency")
    decoded = msgspec.json.decode(performances, type=list[events.Performance])
    return events.Concert(**dict(zip(names, members, strict=True)), performances=decoded), read_at


def _id(connection: Connection, statement: Any, values: dict[str, Any]) -> int:
    row = connection.execute(statement, values).fetchone()
    assert row  # noqa: S101 - INSERT … RETURNING gives a row
    return int(row[0])


def _refuse_twice(what: str, names: Iterator[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]!r} is named twice")
