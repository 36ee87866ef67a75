"""The star schema's rows of a batch: facts, current state, seats, dimensions.

Guarantees: a fact is there once, however often its event comes. A reservation's state and its
seats, a concert and a performance are those of the highest version that ever came, in whatever
order. A concert or performance that only reservations have told of is there, too, at version 0.

Rows go straight into their tables by COPY, which costs less than half of statements that look for
conflicts first (docs/decisions/0009). That takes for granted what nearly always holds: an event
comes once, version 1 of a reservation before the others. Where Postgres says that it doesn't hold,
everything of the batch is taken back and the tables are asked what they know.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import psycopg
from psycopg import errors as pg
from psycopg.rows import TupleRow

from data_platform import sql
from data_platform.batch import Row
from data_platform.errors import RivalError
from data_platform.events import ConcertEvent, ReservationEvent

# Asked, and wrong all the same: another worker loads the same reservations at this moment.
ATTEMPTS = 4
OUR_KEYS = frozenset(
    {"fct_reservation_events_pkey", "fct_reservations_pkey", "fct_reservation_seats_pkey"}
)

Connection = psycopg.Connection[TupleRow]


@dataclass(frozen=True)
class Texts:
    """What COPY gets, each sorted by key: two workers that meet wait in the same order.

    Attributes:
        new: states of reservations that aren't there yet, and `seats` theirs.
        moved: states of `moved_count` reservations that are there.
    """

    facts: str
    new: str
    seats: str
    moved: str
    moved_count: int


Latest = Mapping[str, tuple[ReservationEvent, int]]


@dataclass(frozen=True)
class Rows:
    """A batch's rows, each once.

    Attributes:
        facts: lines of COPY's text by the event's id.
        latest: each reservation's highest version in the batch, and the version that brought its
            seats.
        texts: to be written if the batch is as most are.
        concerts: highest version of each concert.
    """

    facts: Mapping[str, str]
    latest: Latest
    texts: Texts
    concerts: Mapping[int, ConcertEvent]


@dataclass(frozen=True)
class Written:
    """`new_events`: facts that were not there; `repeated`: whether something was there already."""

    new_events: int
    repeated: bool


class _NotAsExpectedError(Exception):
    """The tables know more, or less, of the batch than was taken for granted."""


def rows_of(rows: Iterable[Row]) -> Rows:
    """Sort out what a batch's events say."""
    facts: dict[str, str] = {}
    latest: dict[str, tuple[ReservationEvent, int]] = {}
    begun: set[str] = set()
    concerts: dict[int, ConcertEvent] = {}
    for message, event in rows:
        if isinstance(event, ConcertEvent):
            known_concert = concerts.setdefault(event.concert.concert_id, event)
            if known_concert.concert.version < event.concert.version:
                concerts[event.concert.concert_id] = event
            continue
        # Of two records with one event the first in Kafka's order is told as its origin.
        partition, offset = int(message.partition() or 0), int(message.offset() or 0)
        if event.id in facts and _origin(facts[event.id]) < (partition, offset):
            continue
        facts[event.id] = (
            f"{event.state}\t{event.type}\t{event.occurred_on}\t{partition}\t{offset}\n"
        )
        known = latest.get(event.reservation_id)
        if known is None or known[0].version < event.version:
            latest[event.reservation_id] = event, _seats_since(event, known)
        if event.version == 1:
            begun.add(event.reservation_id)
    return Rows(facts, latest, _texts(facts, latest, begun), concerts)


def _texts(facts: Mapping[str, str], latest: Latest, new: AbstractSet[str]) -> Texts:
    lines: tuple[list[str], list[str]] = [], []
    seats = []
    for name, (event, since) in sorted(latest.items()):
        is_new = name in new
        lines[is_new].append(
            f"{event.state}\t{since}\t{event.seats_digest()}\t{event.created_on}\n"
        )
        if is_new:
            seats.append(event.seat_lines(since))
    return Texts(
        "".join(sorted(facts.values())),
        "".join(lines[True]),
        "".join(seats),
        "".join(lines[False]),
        len(lines[False]),
    )


def _origin(fact: str) -> tuple[int, int]:
    _, partition, offset = fact.rsplit("\t", 2)
    return int(partition), int(offset)


def _seats_since(event: ReservationEvent, earlier: tuple[ReservationEvent, int] | None) -> int:
    """Return the version that brought the seats, so that it doesn't depend on the batch's size."""
    if earlier is None or earlier[0].seats_digest() != event.seats_digest():
        return event.version
    return earlier[1]


def write(connection: Connection, rows: Rows, *, ask: bool) -> Written:
    """Write a batch's rows in the caller's transaction.

    Args:
        connection: one that `loader.prepare` has seen.
        rows: what to write.
        ask: ask the tables at once, because events have come again of late.

    Raises:
        RivalError: another worker loads the same reservations and we can't get around it.
        psycopg.Error: whatever Postgres says; the transaction is as before the call.
    """
    for attempt in range(ATTEMPTS):
        try:
            with connection.transaction():
                return _write(connection, rows, ask=ask or attempt > 0)
        except pg.UniqueViolation as error:
            if error.diag.constraint_name not in OUR_KEYS:
                raise
        except _NotAsExpectedError:
            continue
    raise RivalError(f"another loader was in the way {ATTEMPTS} times")


def _write(connection: Connection, rows: Rows, *, ask: bool) -> Written:
    facts, texts = rows.facts, rows.texts
    if ask:
        facts = _without_known_facts(connection, rows)
        texts = _unknown(connection, rows.latest, facts)
    _copy(connection, sql.COPY_EVENTS, texts.facts)
    _copy(connection, sql.COPY_RESERVATIONS, texts.new)
    seats = texts.seats
    if texts.moved:
        seats += _move_states(connection, texts, rows.latest)
    _copy(connection, sql.COPY_SEATS, seats)
    _infer_dimensions(connection, [event for event, _ in rows.latest.values()])
    for _, concert in sorted(rows.concerts.items()):
        _write_concert(connection, concert)
    return Written(len(facts), len(facts) < len(rows.facts))


def _move_states(connection: Connection, texts: Texts, latest: Latest) -> str:
    """Bring reservations that are there up to date; return the seats that have to be written."""
    _copy(connection, sql.STAGE, texts.moved)
    count, changed = connection.execute(sql.UPDATE_RESERVATIONS).fetchone() or (0, [])
    if count != texts.moved_count:
        raise _NotAsExpectedError
    if not changed:
        return ""
    # Nobody else may touch these reservations' seats now: we hold the locks of their states.
    connection.execute(sql.DELETE_SEATS, {"reservation_ids": changed})
    return "".join(latest[name][0].seat_lines(latest[name][1]) for name in sorted(changed))


def _unknown(connection: Connection, latest: Latest, facts: Mapping[str, str]) -> Texts:
    """Leave out states that the tables have already, or have newer ones of."""
    found = connection.execute(sql.KNOWN_RESERVATIONS, {"reservation_ids": list(latest)})
    known: dict[str, int] = dict(found.fetchall())
    newer = {name: one for name, one in latest.items() if known.get(name, 0) < one[0].version}
    return _texts(facts, newer, newer.keys() - known.keys())


def _without_known_facts(connection: Connection, rows: Rows) -> dict[str, str]:
    names, versions = [], []
    for event_id in rows.facts:
        name, _, version = event_id.rpartition(":")
        names.append(name)
        versions.append(int(version))
    found = connection.execute(
        sql.KNOWN_EVENTS, {"reservation_ids": names, "versions": versions}
    ).fetchall()
    known = {event_id for (event_id,) in found}
    return {event_id: line for event_id, line in rows.facts.items() if event_id not in known}


def _copy(connection: Connection, statement: str, text: str) -> None:
    if text:
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            copy.write(text)


def _infer_dimensions(connection: Connection, events: Sequence[ReservationEvent]) -> None:
    concerts = {event.concert.concert_id: event.concert for event in events}
    performances = {event.performance.performance_id: event for event in events}
    if concerts:
        connection.execute(
            sql.INFER_CONCERTS,
            {
                "concert_ids": list(concerts),
                "titles": [concert.title for concert in concerts.values()],
                "venues": [concert.venue for concert in concerts.values()],
                "time_zones": [concert.time_zone for concert in concerts.values()],
            },
        )
        connection.execute(
            sql.INFER_PERFORMANCES,
            {
                "performance_ids": list(performances),
                "concert_ids": [event.concert.concert_id for event in performances.values()],
                "starts_at": [event.performance.starts_at for event in performances.values()],
                "time_zones": [event.concert.time_zone for event in performances.values()],
            },
        )


def _write_concert(connection: Connection, event: ConcertEvent) -> None:
    concert = event.concert
    shared = {
        "concert_id": concert.concert_id,
        "version": concert.version,
        "time_zone": concert.time_zone,
        "occurred_at": event.time,
    }
    connection.execute(
        sql.UPSERT_CONCERT,
        shared | {"title": concert.title, "venue": concert.venue, "currency": concert.currency},
    )
    connection.cursor().executemany(
        sql.UPSERT_PERFORMANCE,
        [
            shared
            | {
                "performance_id": performance.performance_id,
                "starts_at": performance.starts_at,
                "sales_open_at": performance.sales_open_at,
                "sales_close_at": performance.sales_close_at,
                "status": performance.status,
                "capacity": performance.capacity,
            }
            for performance in sorted(concert.performances, key=lambda one: one.performance_id)
        ],
    )
