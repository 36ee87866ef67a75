"""Records into rows: every check that makes a record a good one, and nothing else.

Guarantees: a decoder returns a row that the tables take as it is, or raises `BadRecordError`;
whatever the bytes are, it raises nothing else. It is as strict as
`contracts/reservation-event.schema.json`, and in four points stricter, because Postgres and
other consumers are: values are UTF-8 throughout, no text holds U+0000, no escape stands for a lone
surrogate, and an integer is written as one (`1`, not `1.0`). Business rules are not
judged here: one seat in two reservations is fine.
"""

import re
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

# re.search is what msgspec does with a pattern, so both ends are anchored; `\Z`, because `$` would
# let a newline pass.
Identifier = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
Currency = Annotated[str, Meta(pattern=r"\A[A-Z]{3}\Z")]
UtcTime = Annotated[
    str,
    Meta(
        pattern=r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,18})?Z\Z",
    ),
]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Version = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Number = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Id = Annotated[int, Meta(ge=1, le=2**63 - 1)]
# Minor units; the bound is what every JSON reader can hold exactly.
Money = Annotated[int, Meta(ge=0, le=2**53 - 1)]

STATUS_AFTER: Final = {
    "reservation.held": "held",
    "reservation.extended": "held",
    "reservation.completed": "confirmed",
    "reservation.cancelled": "cancelled",
    "reservation.expired": "expired",
}

# An escaped NUL: an odd number of backslashes before u0000 (an even one is text about a NUL).
NUL_HINT = rb"\u0000"  # the pattern alone would cost more than all the rest
ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
# What a later version of ours may read.
SCHEMA_VERSION = re.compile(r"\Aurn:concert-reservation:schema:[a-z-]+:([1-9][0-9]*)\Z")
SPECIFICATION_VERSION = re.compile(r"\A[1-9][0-9]*\.[0-9]+\Z")


class BadRecordError(Exception):
    """The record is not a good one and never will be.

    Attributes:
        reason: short name for counting, one of those in this module.
    """

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(error)
        self.reason = reason


class Concert(msgspec.Struct, frozen=True):
    """The concert as far as the event tells of it."""

    concert_id: Id
    title: Name
    venue: Name
    time_zone: Name


class Performance(msgspec.Struct, frozen=True):
    """The performance as far as the event tells of it."""

    performance_id: Id
    starts_at: UtcTime


class Seat(msgspec.Struct, frozen=True):
    """A reserved seat; `price` in minor units of the reservation's currency."""

    seat_id: Id
    section: Name
    row: Name
    number: Number
    price: Money


class Reservation(msgspec.Struct, frozen=True):
    """The whole state of a reservation after the change."""

    reservation_id: Identifier
    version: Version
    status: Literal["held", "confirmed", "cancelled", "expired"]
    customer_id: Identifier
    created_at: UtcTime
    expires_at: UtcTime | None
    amount: Money
    currency: Currency
    concert: Concert
    performance: Performance
    seats: Annotated[list[Seat], Meta(min_length=1)]


class ReservationEnvelope(msgspec.Struct, frozen=True):
    """CloudEvents 1.0, structured mode. `id` and `subject` are checked against `data`."""

    specversion: Literal["1.0"]
    id: str
    source: Literal["/reservation-service"]
    type: Literal[
        "reservation.held",
        "reservation.extended",
        "reservation.completed",
        "reservation.cancelled",
        "reservation.expired",
    ]
    subject: str
    time: UtcTime
    datacontenttype: Literal["application/json"]
    dataschema: Literal["urn:concert-reservation:schema:reservation-event:1"]
    data: Reservation
    traceparent: str = ""


class ReservationEvent(NamedTuple):
    """A row to load: `columns` in the order of `sql.STAGE`, without partition and offset."""

    occurred_at: datetime
    columns: tuple[str | int | None, ...]


Decoder = Callable[[bytes | None, bytes | None], ReservationEvent]

_envelope = msgspec.json.Decoder(ReservationEnvelope)


def decode_reservation_event(key: bytes | None, value: bytes | None) -> ReservationEvent:
    """Turn a record of topic `concert-reservation` into a row.

    Raises:
        BadRecordError: the record breaks the contract; with the first breach found.
    """
    envelope = _parse(value)
    data = envelope.data
    # Postgres reads the text itself; this only tells 30 February before Postgres has to.
    occurred_at = _existing_moment(envelope.time)
    for time in (data.created_at, data.expires_at, data.performance.starts_at):
        if time is not None:
            _existing_moment(time)
    if data.status != STATUS_AFTER[envelope.type]:
        raise BadRecordError(
            "schema", f"type {envelope.type} with status {data.status!r} - at `$.data.status`"
        )
    if envelope.subject != data.reservation_id:
        raise BadRecordError(
            "subject", f"subject {envelope.subject!r} is not the reservation {data.reservation_id}"
        )
    if envelope.id != f"{data.reservation_id}:{data.version}":
        raise BadRecordError(
            "id", f"id {envelope.id!r} is not {data.reservation_id}:{data.version}"
        )
    if key != data.reservation_id.encode("ascii"):
        raise BadRecordError("key", f"key {key!r} is not the reservation {data.reservation_id}")
    return ReservationEvent(
        occurred_at,
        (
            data.reservation_id,
            data.version,
            envelope.type,
            envelope.time,
            data.status,
            data.customer_id,
            data.concert.concert_id,
            data.performance.performance_id,
            len(data.seats),
            data.amount,
            data.currency,
            data.created_at,
            data.expires_at,
        ),
    )


def _parse(value: bytes | None) -> ReservationEnvelope:
    if value is None:
        raise BadRecordError("null-value", "the record has no value")
    try:
        value.decode("utf-8")  # msgspec looks only into the texts that it keeps
        envelope = _envelope.decode(value)
    except UnicodeDecodeError as error:
        raise BadRecordError("not-utf8", str(error)) from error
    except msgspec.ValidationError as error:
        raise BadRecordError(_unknown(value, STATUS_AFTER) or "schema", str(error)) from error
    except msgspec.DecodeError as error:
        raise BadRecordError("not-json", str(error)) from error
    except RecursionError as error:
        raise BadRecordError("too-deep", str(error)) from error
    if NUL_HINT in value and ESCAPED_NUL.search(value):
        raise BadRecordError("nul", "a text holds U+0000, which Postgres cannot store")
    return envelope


class _Kind(msgspec.Struct):
    specversion: Any = None
    type: Any = None
    dataschema: Any = None


_kind = msgspec.json.Decoder(_Kind)


def _unknown(value: bytes, types: Collection[str]) -> str | None:
    """Name what makes an invalid record one that an upgraded worker may load, or None."""
    try:
        kind = _kind.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return None
    schema = SCHEMA_VERSION.match(str(kind.dataschema))
    specification = kind.specversion if isinstance(kind.specversion, str) else ""
    if (schema and schema[1] != "1") or (
        SPECIFICATION_VERSION.match(specification) and specification != "1.0"
    ):
        return "unknown-schema"
    return "unknown-type" if isinstance(kind.type, str) and kind.type not in types else None


def _existing_moment(time: str) -> datetime:
    try:
        return datetime.fromisoformat(time)
    except ValueError as error:
        raise BadRecordError("schema", f"{time!r} is no moment: {error}") from error
