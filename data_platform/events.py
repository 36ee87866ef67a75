"""Records into rows: every check that makes a record a good one, and nothing else.

Guarantees: a decoder returns what the tables take as it is, or raises `BadRecordError`; whatever
the bytes are, it raises nothing else. It is as strict as `contracts/*.schema.json`, and in four
points stricter, because Postgres and other consumers are: values are UTF-8 throughout, no text
holds U+0000, no escape stands for a lone surrogate, and an integer is written as one (`1`, not
`1.0`). Business rules are not judged here: one seat in two reservations is fine.

It is the worker's hottest code: parts that repeat (concert, performance) are parsed once, and
times stay texts, for Postgres reads them faster than Python writes them.
"""

import re
from collections.abc import Callable, Collection
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

# re.search is what msgspec does with a pattern, so both ends are anchored; `\Z`, because `$` would
# let a newline pass.
Identifier = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
Currency = Annotated[str, Meta(pattern=r"\A[A-Z]{3}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Version = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Number = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Id = Annotated[int, Meta(ge=1, le=2**63 - 1)]
# Minor units; the bound is what every JSON reader can hold exactly.
Money = Annotated[int, Meta(ge=0, le=2**53 - 1)]
UTC_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,18})?Z"
).fullmatch

STATUS_AFTER: Final = {
    "reservation.held": "held",
    "reservation.extended": "held",
    "reservation.completed": "confirmed",
    "reservation.cancelled": "cancelled",
    "reservation.expired": "expired",
}

CONCERT_TYPES: Final = frozenset({"concert.published", "concert.changed"})
NULL: Final = "\\N"  # as COPY reads it

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
    """The concert as far as a reservation's event tells of it."""

    concert_id: Id
    title: Name
    venue: Name
    time_zone: Name


class Performance(msgspec.Struct, frozen=True):
    """The performance as far as a reservation's event tells of it."""

    performance_id: Id
    starts_at: str


class Seat(msgspec.Struct, frozen=True, gc=False):
    """A reserved seat; `price` in minor units of the reservation's currency."""

    seat_id: Id
    section: Name
    row: Name
    number: Number
    price: Money


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """The whole state of a reservation after the change; what is Raw is parsed by itself."""

    reservation_id: Identifier
    version: Version
    status: Literal["held", "confirmed", "cancelled", "expired"]
    customer_id: Identifier
    created_at: str
    expires_at: str | None
    amount: Money
    currency: Currency
    concert: msgspec.Raw
    performance: msgspec.Raw
    seats: msgspec.Raw


class _Envelope(msgspec.Struct, frozen=True, gc=False):
    """CloudEvents 1.0, structured mode. `id` and `subject` are checked against `data`."""

    specversion: Literal["1.0"]
    id: str
    source: Literal["/reservation-service"]
    subject: str
    time: str
    datacontenttype: Literal["application/json"]
    traceparent: str = ""


class ReservationEnvelope(_Envelope, frozen=True, gc=False, kw_only=True):
    """The event of a reservation."""

    type: Literal[
        "reservation.held",
        "reservation.extended",
        "reservation.completed",
        "reservation.cancelled",
        "reservation.expired",
    ]
    dataschema: Literal["urn:concert-reservation:schema:reservation-event:1"]
    data: Reservation


class Section(msgspec.Struct, frozen=True):
    """A section of a hall with its range of prices in minor units."""

    section: Name
    capacity: Annotated[int, Meta(ge=1)]
    price_min: Money
    price_max: Money


class CataloguePerformance(msgspec.Struct, frozen=True):
    """A performance as the catalogue tells of it."""

    performance_id: Id
    starts_at: str
    sales_open_at: str
    sales_close_at: str
    status: Literal["scheduled", "cancelled"]
    capacity: Number
    sections: Annotated[list[Section], Meta(min_length=1)]


class CatalogueConcert(msgspec.Struct, frozen=True):
    """The whole state of a concert after the change."""

    concert_id: Id
    version: Version
    title: Name
    venue: Name
    time_zone: Name
    currency: Currency
    performances: Annotated[list[CataloguePerformance], Meta(min_length=1)]


class ConcertEnvelope(_Envelope, frozen=True, kw_only=True):
    """The event of a concert."""

    type: Literal["concert.published", "concert.changed"]
    dataschema: Literal["urn:concert-reservation:schema:concert-event:1"]
    data: CatalogueConcert


class ReservationEvent(msgspec.Struct, frozen=True, gc=False):
    """A reservation's event, ready to be loaded.

    Attributes:
        id: `<reservation id>:<version>`.
        state: its columns as COPY's text, in the order of `sql.STATE_COLUMNS`, without an end.
        raw_seats: the seats as they stand in the record; `plain` says that there is no backslash.
        occurred_on, created_on: days in the performance's time zone, like 2027-01-31.
    """

    id: str
    reservation_id: str
    version: int
    type: str
    occurred_at: datetime
    state: str
    concert: Concert
    performance: Performance
    seats: list[Seat]
    currency: str
    raw_seats: bytes
    plain: bool
    occurred_on: str
    created_on: str

    def seats_digest(self) -> int:
        """Tell these seats from others: 64 bits, the same in every process and version."""
        told = b"%d %b " % (self.performance.performance_id, self.currency.encode())
        return int.from_bytes(blake2b(told + self.raw_seats, digest_size=8).digest(), signed=True)

    def seat_lines(self, version: int) -> str:
        """Return a line of COPY's text for each seat, in the order of `sql.COPY_SEATS`."""
        performance_id, text = self.performance.performance_id, (str if self.plain else copy_text)
        # One seat told twice is one seat.
        return "".join(
            [
                f"{self.reservation_id}\t{seat.seat_id}\t{performance_id}\t{text(seat.section)}\t"
                f"{text(seat.row)}\t{seat.number}\t{seat.price}\t{self.currency}\t{version}\n"
                for seat in {seat.seat_id: seat for seat in self.seats}.values()
            ]
        )


class ConcertEvent(msgspec.Struct, frozen=True):
    """A concert's event, ready to be loaded."""

    occurred_at: datetime
    time: str
    concert: CatalogueConcert


Event = ReservationEvent | ConcertEvent


def copy_text(text: str) -> str:
    """Escape a text for COPY."""
    return text.translate(COPY_ESCAPES)


COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

Decoder = Callable[[bytes | None, bytes | None], Event]

# A concert, or a performance, is told in each of its reservations' events: parsed once.
KNOWN_PARTS = 4_096
# Many events happen in a minute, and no zone's day begins within one.
KNOWN_DAYS = 16_384
MINUTE_CHARACTERS = len("2027-01-31T18:00")
DAY_CHARACTERS = len("2027-01-31")

_reservation = msgspec.json.Decoder(ReservationEnvelope)
_concert = msgspec.json.Decoder(ConcertEnvelope)
_seats = msgspec.json.Decoder(Annotated[list[Seat], Meta(min_length=1)])
_part_of_concert = msgspec.json.Decoder(Concert)
_part_of_performance = msgspec.json.Decoder(Performance)
_concerts: dict[bytes, Concert] = {}
_performances: dict[bytes, Performance] = {}


def decode_reservation_event(key: bytes | None, value: bytes | None) -> ReservationEvent:
    """Turn a record of topic `concert-reservation` into what is loaded of it.

    Raises:
        BadRecordError: the record breaks the contract; with the first breach found.
    """
    if value is None or not value.isascii():
        value = _text(value)
    try:
        envelope = _reservation.decode(value)
        data = envelope.data
        raw_concert, raw_performance = bytes(data.concert), bytes(data.performance)
        raw_seats = bytes(data.seats)
        concert = _concerts.get(raw_concert) or _learn(_part_of_concert, _concerts, raw_concert)
        performance = _performances.get(raw_performance) or _learn_performance(raw_performance)
        seats = _seats.decode(raw_seats)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad(value, error, STATUS_AFTER) from error
    plain = b"\\" not in value
    if not plain:
        _refuse_nul(value)
    time, created_at, expires_at = envelope.time, data.created_at, data.expires_at
    occurred_at = _moment(time)
    if created_at != time:
        _moment(created_at)
    if expires_at is not None:
        _moment(expires_at)
    reservation_id, version = data.reservation_id, data.version
    if data.status != STATUS_AFTER[envelope.type]:
        raise BadRecordError(
            "schema", f"type {envelope.type} with status {data.status!r} - at `$.data.status`"
        )
    _check_names(envelope, f"{reservation_id}:{version}", reservation_id, key)
    return ReservationEvent(
        envelope.id,
        reservation_id,
        version,
        envelope.type,
        occurred_at,
        f"{reservation_id}\t{version}\t{data.status}\t{data.customer_id}\t{concert.concert_id}\t"
        f"{performance.performance_id}\t{len(seats)}\t{data.amount}\t{data.currency}\t"
        f"{created_at}\t{time}\t{expires_at or NULL}",
        concert,
        performance,
        seats,
        data.currency,
        raw_seats,
        plain,
        _day(concert.time_zone, time[:MINUTE_CHARACTERS]),
        _day(concert.time_zone, created_at[:MINUTE_CHARACTERS]),
    )


def decode_concert_event(key: bytes | None, value: bytes | None) -> ConcertEvent:
    """Turn a record of topic `concert-catalogue` into what is loaded of it; raises as the other."""
    value = _text(value)
    try:
        envelope = _concert.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad(value, error, CONCERT_TYPES) from error
    _refuse_nul(value)
    concert = envelope.data
    occurred_at = _moment(envelope.time)
    for performance in concert.performances:
        for time in (performance.starts_at, performance.sales_open_at, performance.sales_close_at):
            _moment(time)
    concert_id = str(concert.concert_id)
    _check_names(envelope, f"{concert_id}:{concert.version}", concert_id, key)
    return ConcertEvent(occurred_at, envelope.time, concert)


@lru_cache(KNOWN_DAYS)
def _day(time_zone: str, minute: str) -> str:
    """Return the day that a time zone has in a minute of UTC; UTC's own where it is unknown."""
    zone = _zone(time_zone)
    try:
        return f"{datetime.fromisoformat(f'{minute}:00+00:00').astimezone(zone).date()}"
    except OverflowError:  # at the ends of the calendar
        return minute[:DAY_CHARACTERS]


@lru_cache(KNOWN_PARTS)
def _zone(name: str) -> tzinfo:
    # What isn't a name may be a folder, a path that leads elsewhere, or too long for one.
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return UTC


def _text(value: bytes | None) -> bytes:
    if value is None:
        raise BadRecordError("null-value", "the record has no value")
    if not value.isascii():
        try:
            value.decode("utf-8")  # msgspec looks only into the texts that it keeps
        except UnicodeDecodeError as error:
            raise BadRecordError("not-utf8", str(error)) from error
    return value


P = TypeVar("P")


def _learn(decoder: msgspec.json.Decoder[P], known: dict[bytes, P], raw: bytes) -> P:
    part = decoder.decode(raw)
    if len(known) >= KNOWN_PARTS:
        known.clear()
    known[raw] = part
    return part


def _learn_performance(raw: bytes) -> Performance:
    _moment(_part_of_performance.decode(raw).starts_at)
    return _learn(_part_of_performance, _performances, raw)


def _check_names(envelope: _Envelope, event_id: str, subject: str, key: bytes | None) -> None:
    """Key, subject and id must name what `data` is about."""
    if envelope.subject != subject:
        raise BadRecordError("subject", f"subject {envelope.subject!r} is not {subject}")
    if envelope.id != event_id:
        raise BadRecordError("id", f"id {envelope.id!r} is not {event_id}")
    if key != subject.encode("ascii"):
        raise BadRecordError("key", f"key {key!r} is not {subject}")


def _bad(value: bytes, error: Exception, types: Collection[str]) -> BadRecordError:
    if isinstance(error, msgspec.ValidationError):
        return BadRecordError(_unknown(value, types) or "schema", str(error))
    return BadRecordError(
        "too-deep" if isinstance(error, RecursionError) else "not-json", str(error)
    )


def _refuse_nul(value: bytes) -> None:
    if NUL_HINT in value and ESCAPED_NUL.search(value):
        raise BadRecordError("nul", "a text holds U+0000, which Postgres cannot store")


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


def _moment(time: str) -> datetime:
    """Read a time; this also tells 30 February before Postgres has to."""
    if UTC_TIME(time) is None:
        raise BadRecordError("schema", f"{time!r} is no time as RFC 3339 writes it in UTC")
    try:
        return datetime.fromisoformat(time)
    except ValueError as error:
        raise BadRecordError("schema", f"{time!r} is no moment: {error}") from error
