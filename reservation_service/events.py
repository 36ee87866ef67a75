"""The CloudEvents that the service publishes, as contracts/*.schema.json describe them.

`data` is the whole state after the change, so a consumer needs no call back.
"""

from datetime import datetime
from typing import Literal, NamedTuple

import msgspec

from reservation_service import outbox
from reservation_service.database import Connection

SOURCE = "/reservation-service"
RESERVATION_TOPIC = "concert-reservation"
CONCERT_TOPIC = "concert-catalogue"
RESERVATION_SCHEMA = "urn:concert-reservation:schema:reservation-event:1"
HEADERS = {"content-type": "application/cloudevents+json"}

Status = Literal["held", "confirmed", "cancelled", "expired"]
TYPES: dict[Status, str] = {
    "held": "reservation.held",
    "confirmed": "reservation.completed",
    "cancelled": "reservation.cancelled",
    "expired": "reservation.expired",
}
EXTENDED = "reservation.extended"
ConcertEventType = Literal["concert.published", "concert.changed"]


class Seat(msgspec.Struct, frozen=True):
    """A seat as it was reserved; price in minor units."""

    seat_id: int
    section: str
    row: str
    number: int
    price: int


class ConcertOfReservation(msgspec.Struct, frozen=True):
    """The concert as a reservation's event tells it."""

    concert_id: int
    title: str
    venue: str
    time_zone: str


class PerformanceOfReservation(msgspec.Struct, frozen=True):
    """The performance as a reservation's event tells it."""

    performance_id: int
    starts_at: datetime


class Reservation(msgspec.Struct, frozen=True):
    """The whole state of a reservation; `expires_at` is None unless it is held."""

    reservation_id: str
    version: int
    status: Status
    customer_id: str
    created_at: datetime
    expires_at: datetime | None
    amount: int
    currency: str
    concert: ConcertOfReservation
    performance: PerformanceOfReservation
    seats: list[Seat]


class Section(msgspec.Struct, frozen=True):
    """A section of a hall with its range of prices in minor units; `blocked` seats of it."""

    section: str
    capacity: int
    price_min: int
    price_max: int
    blocked: int = 0


class Performance(msgspec.Struct, frozen=True):
    """A performance as a concert's event tells it."""

    performance_id: int
    starts_at: datetime
    sales_open_at: datetime
    sales_close_at: datetime
    status: Literal["scheduled", "cancelled"]
    capacity: int
    sections: list[Section]


class Concert(msgspec.Struct, frozen=True):
    """The whole state of a concert."""

    concert_id: int
    version: int
    title: str
    venue: str
    time_zone: str
    currency: str
    performances: list[Performance]


class NewEvent(NamedTuple):
    """An event to which the database adds `time` and `data`, its last members."""

    topic: str
    envelope: str
    headers: str


class _CloudEvent(msgspec.Struct, omit_defaults=True):
    specversion: str = msgspec.field(name="specversion")
    id: str
    source: str
    type: str
    subject: str
    time: datetime
    datacontenttype: str
    dataschema: str
    data: Reservation | Concert
    traceparent: str | None = None


def write_reservation(
    connection: Connection, reservation: Reservation, happened_at: datetime, traceparent: str | None
) -> None:
    """Write the event of a reservation's newest change. The caller holds its row's lock."""
    # What is held still, after another change, was extended.
    still_held = reservation.status == "held" and reservation.version > 1
    _write(
        connection,
        topic=RESERVATION_TOPIC,
        subject=reservation.reservation_id,
        kind=EXTENDED if still_held else TYPES[reservation.status],
        schema=RESERVATION_SCHEMA,
        happened_at=happened_at,
        data=reservation,
        traceparent=traceparent,
    )


def of_new_reservation(reservation_id: str, *, confirm: bool, trace: str | None) -> NewEvent:
    """Return the event of a reservation's first version, as far as it is known before."""
    traceparent = outbox.valid_traceparent(trace)
    envelope = {
        "specversion": "1.0",
        "id": f"{reservation_id}:1",
        "source": SOURCE,
        "type": TYPES["confirmed" if confirm else "held"],
        "subject": reservation_id,
        "datacontenttype": "application/json",
        "dataschema": RESERVATION_SCHEMA,
    }
    headers = dict(HEADERS)
    if traceparent:
        envelope["traceparent"] = headers["traceparent"] = traceparent
    return NewEvent(
        RESERVATION_TOPIC,
        msgspec.json.encode(envelope).decode(),
        msgspec.json.encode(headers).decode(),
    )


def write_concert(
    connection: Connection,
    concert: Concert,
    kind: ConcertEventType,
    happened_at: datetime,
    traceparent: str | None,
) -> None:
    """Write the event of a concert's newest change. The caller holds its row's lock."""
    _write(
        connection,
        topic=CONCERT_TOPIC,
        subject=str(concert.concert_id),
        kind=kind,
        schema="urn:concert-reservation:schema:concert-event:1",
        happened_at=happened_at,
        data=concert,
        traceparent=traceparent,
    )


def _write(
    connection: Connection,
    *,
    topic: str,
    subject: str,
    kind: str,
    schema: str,
    happened_at: datetime,
    data: Reservation | Concert,
    traceparent: str | None,
) -> None:
    event = _CloudEvent(
        specversion="1.0",
        id=f"{subject}:{data.version}",
        source=SOURCE,
        type=kind,
        subject=subject,
        time=happened_at,
        datacontenttype="application/json",
        dataschema=schema,
        data=data,
        traceparent=outbox.valid_traceparent(traceparent),
    )
    outbox.write(
        connection,
        topic=topic,
        key=subject,
        payload=msgspec.json.encode(event),
        headers=HEADERS,
        traceparent=traceparent,
    )
