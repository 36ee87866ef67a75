"""Publish concerts and change them, each time with the event that tells the concert's whole state.

Guarantees:
- A change, the concert's next version and its event are one transaction. Versions are 1, 2, 3 …
  and each has exactly one event.
- Events of a concert are in the outbox, and so on the topic, in the order of its versions: every
  change locks the concert's row before it looks at anything.
- What is so already is left alone: no version, no event.
- Bookings wait for none of it but for the seats that are being blocked. A change that needs
  seats locks them after the concert, sorted, as a booking does.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg
from pydantic import ValidationError

from reservation_service import catalogue, events, idempotency, problems, sql
from reservation_service.catalogue import ConcertAnswer
from reservation_service.database import Connection
from reservation_service.idempotency import Answer, Key
from reservation_service.new_concert import (
    ConcertChange,
    NewConcert,
    NewPerformance,
    PerformanceChange,
    RowPart,
    Times,
)

# A statement stays far below the session's statement_timeout.
SEATS_PER_STATEMENT = 10_000


class Blocking(msgspec.Struct, frozen=True):
    """What blocking or releasing has changed; seats that were so already aren't in it."""

    performance_id: int
    changed_seats: list[int]


def publish(
    connection: Connection,
    concert: NewConcert,
    key: Key | None = None,
    traceparent: str | None = None,
) -> Answer:
    """Insert the concert with all its seats and write `concert.published`.

    Raises:
        Problem: 409 or 422 about the key, as in `idempotency.claim`; 422 the event would be larger
            than its topic takes.
    """
    with connection.transaction():
        answered = idempotency.claim(connection, key)
        if answered:
            return answered
        concert_id = insert(connection, concert, None, traceparent)
        body = msgspec.json.encode(catalogue.read_concert(connection, concert_id))
        answer = Answer(location=f"/api/concerts/{concert_id}", body=body)
        idempotency.remember(connection, key, answer)
    return answer


def insert(
    connection: Connection,
    concert: NewConcert,
    fingerprint: bytes | None,
    traceparent: str | None,
) -> int:
    """Publish in the caller's transaction; return the concert's id.

    Raises:
        Problem: 422 the event would be larger than its topic takes.
    """
    values = concert.model_dump(exclude={"performances"}) | {"fingerprint": fingerprint}
    concert_id = _id(connection, sql.INSERT_CONCERT, values)
    for performance in concert.performances:
        _insert_performance(connection, concert_id, performance)
    # The row is ours alone until COMMIT, so nobody can write this key's next event before us.
    _write_event(connection, concert_id, "concert.published", traceparent)
    return concert_id


def change_concert(
    connection: Connection, concert_id: int, change: ConcertChange, traceparent: str | None = None
) -> ConcertAnswer:
    """Give a concert another title or venue.

    Raises:
        Problem: 404.
    """
    with connection.transaction():
        if not connection.execute(sql.LOCK_CONCERT, {"concert_id": concert_id}).fetchone():
            raise problems.not_found("concert")
        known = catalogue.read_concert(connection, concert_id)
        wanted = _merged(known, change.model_dump(), ("title", "venue"))
        if connection.execute(sql.CHANGE_CONCERT, wanted | {"concert_id": concert_id}).fetchone():
            _announce(connection, concert_id, traceparent)
        return catalogue.read_concert(connection, concert_id)


def change_performance(
    connection: Connection,
    performance_id: int,
    change: PerformanceChange,
    traceparent: str | None = None,
) -> ConcertAnswer:
    """Give a performance another begin or other sales times; holds keep their own end.

    Raises:
        Problem: 404; 409 it is cancelled; 422 the sale would end before it begins.
    """
    with connection.transaction():
        concert_id = _lock_concert_of(connection, performance_id)
        known = catalogue.read_performance(connection, performance_id)
        if known.status != "scheduled":
            raise problems.not_on_sale("The performance is cancelled.")
        times = ("starts_at", "sales_open_at", "sales_close_at")
        wanted = _merged(known, change.model_dump(), times)
        try:
            Times(**wanted)
        except ValidationError as error:
            raise problems.invalid(problems.told_by(error)) from None
        wanted["performance_id"] = performance_id
        if connection.execute(sql.CHANGE_PERFORMANCE, wanted).fetchone():
            _announce(connection, concert_id, traceparent)
        return catalogue.read_concert(connection, concert_id)


def block(
    connection: Connection,
    performance_id: int,
    seat_ids: Sequence[int],
    traceparent: str | None = None,
) -> Blocking:
    """Take seats from the sale, all or none.

    Raises:
        Problem: 404; 409 with those that are held or reserved, or no seats of this performance.
    """
    with connection.transaction():
        concert_id, wanted = _lock_seats(connection, performance_id, seat_ids)
        # A statement after the one that waited, so its clock is younger than the locks.
        taken = connection.execute(sql.READ_TAKEN_SEATS, wanted).fetchall()
        _refuse({seat_id for (seat_id,) in taken})
        changed = connection.execute(sql.BLOCK_SEATS, wanted).fetchall()
        if changed:
            _announce(connection, concert_id, traceparent)
    return Blocking(performance_id, sorted(seat_id for (seat_id,) in changed))


def release(
    connection: Connection,
    performance_id: int,
    seat_ids: Sequence[int],
    traceparent: str | None = None,
) -> Blocking:
    """Give blocked seats back to the sale, all or none.

    Raises:
        Problem: 404; 409 with those that are no seats of this performance.
    """
    with connection.transaction():
        concert_id, wanted = _lock_seats(connection, performance_id, seat_ids)
        changed = connection.execute(sql.RELEASE_SEATS, wanted).fetchall()
        if changed:
            _announce(connection, concert_id, traceparent)
    return Blocking(performance_id, sorted(seat_id for (seat_id,) in changed))


def cancel_performance(
    connection: Connection, performance_id: int, traceparent: str | None = None
) -> None:
    """End the sale for good; its reservations are `cancellation`'s to cancel.

    Raises:
        Problem: 404.
    """
    with connection.transaction():
        concert_id = _lock_concert_of(connection, performance_id)
        wanted = {"performance_id": performance_id}
        if connection.execute(sql.CANCEL_PERFORMANCE, wanted).fetchone():
            _announce(connection, concert_id, traceparent)


def _announce(connection: Connection, concert_id: int, traceparent: str | None) -> None:
    """Raise the version and write `concert.changed`. The caller holds the concert's lock."""
    connection.execute(sql.RAISE_CONCERT_VERSION, {"concert_id": concert_id})
    _write_event(connection, concert_id, "concert.changed", traceparent)


def _write_event(
    connection: Connection, concert_id: int, kind: events.ConcertEventType, traceparent: str | None
) -> None:
    state, happened_at = _read_state(connection, concert_id)
    try:
        events.write_concert(connection, state, kind, happened_at, traceparent)
    except psycopg.errors.CheckViolation as error:
        if error.diag.constraint_name != "outbox_record_fits":
            raise
        raise problems.event_too_large(error.diag.message_primary or "") from None


def _lock_concert_of(connection: Connection, performance_id: int) -> int:
    wanted = {"performance_id": performance_id}
    row = connection.execute(sql.LOCK_CONCERT_OF_PERFORMANCE, wanted).fetchone()
    if row is None:
        raise problems.not_found("performance")
    return int(row[0])


def _lock_seats(
    connection: Connection, performance_id: int, seat_ids: Sequence[int]
) -> tuple[int, dict[str, Any]]:
    concert_id = _lock_concert_of(connection, performance_id)
    wanted = {"performance_id": performance_id, "seat_ids": list(seat_ids)}
    locked = connection.execute(sql.LOCK_SEATS_OF_PERFORMANCE, wanted).fetchall()
    _refuse(set(seat_ids) - {seat_id for (seat_id,) in locked})
    return concert_id, wanted


def _refuse(seat_ids: set[int]) -> None:
    if seat_ids:
        raise problems.seats_unavailable(
            seat_ids,
            "Some of these seats are held or reserved, or are none of this performance;"
            " nothing was changed.",
        )


def _merged(known: Any, change: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return what is known with what shall be different."""
    return {name: getattr(known, name) if change[name] is None else change[name] for name in names}


def _insert_performance(
    connection: Connection, concert_id: int, performance: NewPerformance
) -> None:
    values = performance.model_dump(exclude={"sections"})
    values |= {"concert_id": concert_id, "capacity": performance.capacity}
    performance_id = _id(connection, sql.INSERT_PERFORMANCE, values)
    for parts in _chunks(performance.parts()):
        sections, rows, firsts, counts, prices = zip(*parts, strict=True)
        chunk = {
            "performance_id": performance_id,
            "sections": list(sections),
            "rows": list(rows),
            "firsts": list(firsts),
            "counts": list(counts),
            "prices": list(prices),
        }
        connection.execute(sql.INSERT_SEATS, chunk)


def _chunks(parts: Iterable[RowPart]) -> Iterator[list[RowPart]]:
    chunk: list[RowPart] = []
    seats = 0
    for part in parts:
        chunk.append(part)
        seats += part.seats
        if seats >= SEATS_PER_STATEMENT:
            yield chunk
            chunk, seats = [], 0
    if chunk:
        yield chunk


def _read_state(connection: Connection, concert_id: int) -> tuple[events.Concert, datetime]:
    cursor = connection.execute(sql.READ_CONCERT_STATE, {"concert_id": concert_id})
    row = cursor.fetchone()
    assert row  # noqa: S101 - this transaction has inserted or locked it
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
