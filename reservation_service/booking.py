"""Book, confirm, extend and cancel: one Postgres transaction each, which writes its event.

Guarantees:
- Never two reservations with a live claim on one seat. Nothing is checked first and booked
  later: the transaction locks all seats it wants (sorted, one statement), then looks at them.
- All seats of a request or none.
- The clock is Postgres', read after every lock is held, so a hold that ran out counts as
  expired in every decision made from that moment on, whether the sweeper came by or not.
- A reservation's versions are 1, 2, 3 … and each has exactly one event.
- A refused call leaves nothing behind.

A booking is one statement: one round trip. A change goes through a pipeline, in two or three; the
results of its statements, that of COMMIT too, have arrived when the `with` ends, and only then is
anything answered.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec
import psycopg

from reservation_service import events, idempotency, problems, sql
from reservation_service.database import Connection, transaction
from reservation_service.events import (
    ConcertOfReservation,
    PerformanceOfReservation,
    Reservation,
    Seat,
    Status,
)
from reservation_service.idempotency import NO_KEY, Answer, Key
from reservation_service.problems import Problem

UUID_MAX = UUID(int=2**128 - 1)
# An extension that is repeated gains as little as this share of a hold: 10 s of 10 minutes.
AGAIN_SHARE = 1 / 60


class Order(NamedTuple):
    """What a customer wants; `seat_ids` are distinct, at least one."""

    customer_id: str
    performance_id: int
    seat_ids: Sequence[int]
    confirm: bool


@dataclass(frozen=True)
class Terms:
    """The house's rules. `max_seats_per_customer` counts per performance; 0 is no limit.

    `hold` is how long a hold lasts from now on, `hold_max` how long from its beginning, however
    often it is extended.
    """

    hold: timedelta
    max_seats_per_customer: int = 0
    hold_max: timedelta = timedelta(minutes=30)


class ReservationAnswer(msgspec.Struct, frozen=True):
    """A reservation as the API shows it; `expires_at` is None unless it is held."""

    reservation_id: str
    status: Status
    version: int
    performance_id: int
    customer_id: str
    seats: list[Seat]
    amount: int
    currency: str
    expires_at: datetime | None


class Stored(NamedTuple):
    """A reservation as it counts now, with what decides about its next change."""

    reservation: Reservation
    owns_its_seats: bool
    performance_status: str
    sale_ends_at: datetime
    now: datetime


def book(
    connection: Connection,
    order: Order,
    terms: Terms,
    key: Key | None = None,
    traceparent: str | None = None,
) -> Answer:
    """Hold the seats, or with `confirm` reserve them in one step.

    One statement does it all, and commits: see `book_seats` in the migrations. The connection must
    not be in a transaction.

    Raises:
        Problem: 404 no such performance; 409 seats taken, not on sale, over the customer's limit
            or the key in flight; 422 the key had another body.
        psycopg.OperationalError: nothing is known to have happened.
    """
    reservation_id = uuid7()
    event = events.of_new_reservation(str(reservation_id), confirm=order.confirm, trace=traceparent)
    values = {
        **order._asdict(),
        **(key or NO_KEY)._asdict(),
        **event._asdict(),
        "seat_ids": list(order.seat_ids),
        "reservation_id": reservation_id,
        "hold": terms.hold,
        "max_seats_per_customer": terms.max_seats_per_customer,
    }
    try:
        row = connection.execute(sql.BOOK_SEATS, values).fetchone()
    except psycopg.errors.LockNotAvailable as error:
        raise idempotency.in_flight(error) from None
    assert row  # noqa: S101 - a function gives a row
    outcome, location, answer, detail = row
    if outcome in {"booked", "replayed"}:
        return Answer(location, answer.encode(), replayed=outcome == "replayed")
    raise _refusal(outcome, detail, terms)


def confirm(
    connection: Connection, reservation_id: UUID, customer_id: str, traceparent: str | None = None
) -> Reservation:
    """Turn a hold into a reservation; a confirmed one stays as it is.

    Raises:
        Problem: 404 none of this customer's; 409 it is cancelled or expired.
    """
    return _change(connection, reservation_id, customer_id, "confirmed", traceparent)


def cancel(
    connection: Connection, reservation_id: UUID, customer_id: str, traceparent: str | None = None
) -> Reservation:
    """Give the seats back; a cancelled one stays as it is.

    Raises:
        Problem: 404 none of this customer's; 409 it is expired, or the performance has begun.
    """
    return _change(connection, reservation_id, customer_id, "cancelled", traceparent)


def extend(
    connection: Connection,
    reservation_id: UUID,
    customer_id: str,
    traceparent: str | None = None,
    *,
    terms: Terms,
) -> Reservation:
    """Let a hold last `terms.hold` from now.

    It stays as it is when that would gain nothing, or when it is the same extension once more:
    the hold was extended before, and would gain less than `AGAIN_SHARE` of a hold.

    Raises:
        Problem: 404 none of this customer's; 409 it isn't held (any more).
    """
    with transaction(connection):
        stored = _locked(connection, reservation_id, customer_id)
        _check_held(stored, "extending it")
        hold = stored.reservation
        until = min(stored.now + terms.hold, hold.created_at + terms.hold_max, stored.sale_ends_at)
        least = terms.hold * AGAIN_SHARE if hold.version > 1 else timedelta()
        if hold.expires_at is None or until - hold.expires_at <= least:
            return hold
        extended = msgspec.structs.replace(hold, version=hold.version + 1, expires_at=until)
        values = {
            "reservation_id": reservation_id,
            "version": extended.version,
            "changed_at": stored.now,
            "expires_at": until,
            "seat_ids": [seat.seat_id for seat in hold.seats],
        }
        connection.execute(sql.EXTEND_RESERVATION, values)
        connection.execute(sql.EXTEND_SEATS, values)
        events.write_reservation(connection, extended, stored.now, traceparent)
    return extended


def find(connection: Connection, reservation_id: UUID, customer_id: str) -> Reservation:
    """Return one of this customer's reservations as it counts now.

    Raises:
        Problem: 404.
    """
    for stored in read(connection, [reservation_id]):
        if stored.reservation.customer_id == customer_id:
            return stored.reservation
    raise problems.not_found("reservation")


def newest(
    connection: Connection, customer_id: str, limit: int, before: UUID = UUID_MAX
) -> list[Reservation]:
    """Return up to `limit` of the customer's reservations, newest first."""
    wanted = {"customer_id": customer_id, "limit": limit, "before": before}
    rows = connection.execute(sql.LIST_RESERVATIONS, wanted).fetchall()
    return [stored.reservation for stored in read(connection, [row[0] for row in rows])]


def read(connection: Connection, reservation_ids: list[UUID]) -> list[Stored]:
    """Return the reservations as they count now, newest first."""
    cursor = connection.execute(sql.READ_RESERVATIONS, {"reservation_ids": reservation_ids})
    return [_stored(row) for row in cursor.fetchall()]


def apply(
    connection: Connection,
    reservation: Reservation,
    status: Literal["confirmed", "cancelled", "expired"],
    happened_at: datetime,
    traceparent: str | None = None,
) -> Reservation:
    """Write a change with its event. The caller holds the locks of the reservation and its seats.

    The reservation's row is locked before the event's INSERT starts: the order of its events in
    the outbox, and so on the topic, depends on that.
    """
    changed = msgspec.structs.replace(
        reservation, status=status, version=reservation.version + 1, expires_at=None
    )
    values = {
        "reservation_id": UUID(changed.reservation_id),
        "status": status,
        "version": changed.version,
        "changed_at": happened_at,
        "seat_ids": [seat.seat_id for seat in changed.seats],
    }
    connection.execute(sql.CHANGE_RESERVATION, values)
    connection.execute(sql.CONFIRM_SEATS if status == "confirmed" else sql.FREE_SEATS, values)
    events.write_reservation(connection, changed, happened_at, traceparent)
    return changed


def answer_of(reservation: Reservation) -> ReservationAnswer:
    """Return what the API tells of a reservation."""
    return ReservationAnswer(
        reservation_id=reservation.reservation_id,
        status=reservation.status,
        version=reservation.version,
        performance_id=reservation.performance.performance_id,
        customer_id=reservation.customer_id,
        seats=reservation.seats,
        amount=reservation.amount,
        currency=reservation.currency,
        expires_at=reservation.expires_at,
    )


def uuid7() -> UUID:
    """Make a UUIDv7 (RFC 9562): 48 bits of milliseconds, then random.

    New rows land side by side in the index, here and with the analysts. The order is a matter of
    speed alone; nothing is decided by this clock.
    """
    milliseconds = time.time_ns() // 1_000_000 & (1 << 48) - 1
    random = int.from_bytes(os.urandom(10), "big")
    high = milliseconds << 16 | 0x7000 | random >> 68
    low = 0b10 << 62 | random & (1 << 62) - 1
    return UUID(int=high << 64 | low)


def _refusal(outcome: str, detail: list[int], terms: Terms) -> Problem:
    """Return what an outcome of `book_seats` means to the caller."""
    match outcome:
        case "no-performance":
            return problems.not_found("performance")
        case "unavailable":
            return problems.seats_unavailable(detail)
        case "key-reused":
            return idempotency.key_reused()
        case "customer-limit":
            most, taken = terms.max_seats_per_customer, detail[0]
            return Problem(
                409,
                "customer-limit",
                f"A customer may have {most} seats of a performance; you have {taken}.",
            )
        case "cancelled" | "past":
            return problems.not_on_sale(f"The performance is {outcome}.")
        case _:
            return problems.not_on_sale("The performance is not on sale at this time.")


def _change(
    connection: Connection,
    reservation_id: UUID,
    customer_id: str,
    wanted: Literal["confirmed", "cancelled"],
    traceparent: str | None,
) -> Reservation:
    with transaction(connection):
        stored = _locked(connection, reservation_id, customer_id, keep_count=wanted == "confirmed")
        reservation = stored.reservation
        if reservation.status != wanted:
            _check_change(stored, wanted)
            reservation = apply(connection, reservation, wanted, stored.now, traceparent)
    return reservation


def _locked(
    connection: Connection, reservation_id: UUID, customer_id: str, *, keep_count: bool = True
) -> Stored:
    """Lock a reservation and its seats, then read it.

    With `keep_count` nobody counts this customer's seats meanwhile: a hold that the count took for
    expired must not live on.
    """
    # A stranger's locks none of what is not his, else he could tell that it is there.
    wanted = {"reservation_id": reservation_id, "customer_id": customer_id}
    if keep_count:
        connection.execute(sql.LOCK_CUSTOMER_OF_RESERVATION, wanted)
    locked = connection.execute(sql.LOCK_RESERVATION, wanted)
    connection.execute(sql.LOCK_SEATS_OF_RESERVATION, wanted)
    stored = read(connection, [reservation_id])
    if locked.fetchone() is None:
        raise problems.not_found("reservation")
    return stored[0]


def _check_held(stored: Stored, action: str) -> None:
    status = stored.reservation.status
    if status != "held":
        raise problems.state_forbids(status, action)
    # Only a clock that was set back could show a hold alive whose seats are gone already.
    if not stored.owns_its_seats:
        raise problems.state_forbids("expired", action)
    if stored.performance_status != "scheduled":
        raise problems.state_forbids(status, f"{action} (the performance is cancelled)")
    # No hold outlives the sale, unless the admin has brought its end forward since.
    if stored.sale_ends_at <= stored.now:
        raise problems.state_forbids(status, f"{action} (the sale has ended)")


def _check_change(stored: Stored, wanted: Literal["confirmed", "cancelled"]) -> None:
    status = stored.reservation.status
    if wanted == "confirmed":
        _check_held(stored, "confirming it")
    elif status == "expired":
        raise problems.state_forbids(status, "cancelling it")
    elif stored.reservation.performance.starts_at <= stored.now:
        raise problems.state_forbids(status, "cancelling it (the performance has begun)")


def _stored(row: tuple[Any, ...]) -> Stored:
    (reservation_id, customer_id, status, version, created_at, expires_at, amount, currency) = row[
        :8
    ]
    concert, performance, seats, owns_its_seats, performance_status, sale_ends_at, now = row[8:]
    if status == "held" and expires_at <= now:
        status, expires_at = "expired", None
    reservation = Reservation(
        reservation_id=str(reservation_id),
        version=version,
        status=status,
        customer_id=customer_id,
        created_at=created_at,
        expires_at=expires_at,
        amount=amount,
        currency=currency,
        concert=msgspec.json.decode(concert, type=ConcertOfReservation),
        performance=msgspec.json.decode(performance, type=PerformanceOfReservation),
        seats=msgspec.json.decode(seats, type=list[Seat]),
    )
    return Stored(reservation, owns_its_seats, performance_status, sale_ends_at, now)
