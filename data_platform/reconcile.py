"""Reservations ↔ outbox ↔ topic ↔ tables: every difference has a name.

Guarantees: it changes nothing. Each row of the reservation service is compared with the tables, the
tables with each other, each record of the topic with its fact, and each fact with a record. What is
on its way is no difference: whatever differs is looked at again, upstream first, and what is found
unpublished in the outbox or not yet loaded in the topic is left out. Memory is bounded, whatever
the size: ranges are compared by sums of hashes, and only where these differ row by row. What the
outbox's retention dropped, and a record that came twice, are no differences. Of tables in great
disorder, or far behind, the first SUSPECTS_LIMIT reservations are examined and the others counted.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import psycopg
import structlog

from data_platform import sql_reconcile as sql
from data_platform.differences import Difference
from data_platform.events import Decoder
from data_platform.loader import APPLICATION_NAME, CONNECT_TIMEOUT_S, Connection
from data_platform.outbox_flow import Outbox
from data_platform.topic_facts import TopicFacts
from data_platform.topics import Topics

RANGE_RESERVATIONS = 5_000
CONCERTS = 500
# Of a table in disorder not every row is kept.
NAMED_DIFFERENCES = 1_000
# Reservations that are looked at again, and so many at a time: for each time what isn't loaded yet
# is read, all of it.
SUSPECTS_LIMIT = 100_000
SUSPECTS_AT_ONCE = 5_000
ROWS_LIMIT = 4 * RANGE_RESERVATIONS
# A reservation that changes while we look is looked at again.
ROUNDS = 5
FIRST, LAST, LAST_ID = "", "\U0010ffff", 2**63 - 1

log = structlog.get_logger()


@dataclass
class Report:
    """What was compared, and what differs.

    Attributes:
        found: how many differences; `differences` are the first NAMED_DIFFERENCES of them. From
            there on one may count twice.
        compared: how many of what was looked at.
        in_flight: changes that were on their way.
        unexamined: so many more reservations, at least, differ or are on their way.
    """

    compared: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    found: int = 0
    unexamined: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing differs, for sure."""
        return not self.found and not self.unexamined

    def add(self, difference: Difference) -> None:
        """Take a difference down, once: outbox, topic and service may all tell of it."""
        if any(
            (known.what, known.where, known.key)
            == (difference.what, difference.where, difference.key)
            for known in self.differences
        ):
            return
        self.found += 1
        if len(self.differences) < NAMED_DIFFERENCES:
            self.differences.append(difference)

    def count(self, what: str, number: int) -> None:
        """Take down that so many of something were compared."""
        self.compared[what] = self.compared.get(what, 0) + number

    def in_words(self, shown: int) -> str:
        """Return it for people, with so many differences."""
        lines = [found.in_words() for found in self.differences[:shown]]
        if self.found > len(lines):
            lines.append(f"and {self.found - len(lines)} more (--json shows {NAMED_DIFFERENCES})")
        if self.unexamined:
            lines.append(
                f"and {self.unexamined} more reservations differ or are on their way: the first "
                f"{SUSPECTS_LIMIT} were examined; let the workers catch up, or see `rebuild`"
            )
        lines += [f"note: {note}" for note in self.notes]
        compared = ", ".join(f"{count} {what}" for what, count in self.compared.items())
        lines.append(
            f"{self.found} differences, {self.in_flight} on their way; compared {compared} "
            f"in {self.seconds:g} s"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Sources:
    """Where everything is; libpq connection strings. Without `service` the topic is the truth."""

    analytics: str
    service: str | None
    outbox: str | None
    reservation_topic: str
    catalogue_topic: str


def reconcile(
    sources: Sources,
    topics: Topics,
    consumer: Mapping[str, Any],
    decoders: Mapping[str, Decoder],
) -> Report:
    """Compare everything once.

    Raises:
        KafkaTroubleError, KafkaException, psycopg.Error: a part can't be read.
    """
    began_at = time.monotonic()
    report = Report()
    with ExitStack() as stack:
        tables = stack.enter_context(_connected(sources.analytics))
        service = stack.enter_context(_connected(sources.service)) if sources.service else None
        topic = TopicFacts(tables, topics, consumer, decoders, sources.reservation_topic)
        outbox = None
        if sources.outbox or service:
            connection = stack.enter_context(_connected(str(sources.outbox or sources.service)))
            outbox = Outbox.readable(connection)
        _compare_tables(tables, report)
        topic.compare(report)
        if service is None:
            report.notes.append("without the service seats and catalogue were not compared")
        else:
            flow = _Flow(service, tables, topic, outbox, sources)
            if outbox is None:
                report.notes.append(
                    "the outbox was not compared, and unpublished events look missing: "
                    "set OUTBOX_RELAY_DATABASE_URL"
                )
            else:
                topic.compare_published(outbox, sources.reservation_topic, report)
            _compare_service(flow, report)
            _compare_catalogue(flow, report)
    report.seconds = round(time.monotonic() - began_at, 3)
    return report


def _connected(url: str) -> Connection:
    connection = psycopg.connect(
        url,
        autocommit=True,
        application_name=f"{APPLICATION_NAME} reconcile",
        connect_timeout=CONNECT_TIMEOUT_S,
    )
    connection.execute(sql.SESSION)
    return connection


def _compare_tables(tables: Connection, report: Report) -> None:
    """The current state against the newest fact; nothing can be in flight between these."""
    for key, told, stored in tables.execute(
        sql.STATES_AND_FACTS, {"limit": NAMED_DIFFERENCES}
    ).fetchall():
        for found in differing("fct_reservations", key, told, stored):
            report.add(found)


def differing(
    where: str, key: str, expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None
) -> Iterator[Difference]:
    """Name what differs between two rows, column by column if both are there."""
    if expected is None and found is None:
        return
    if expected is None or found is None:
        yield Difference("extra" if expected is None else "missing", where, key, expected, found)
        return
    for column, value in expected.items():
        if value != found.get(column):
            yield Difference("altered", f"{where}.{column}", key, value, found.get(column))


@dataclass(frozen=True)
class _Flow:
    """The way of an event, upstream first."""

    service: Connection
    tables: Connection
    topic: TopicFacts
    outbox: Outbox | None
    sources: Sources

    def on_its_way(self, topic: str, keys: set[str]) -> set[str]:
        """Return the events (`<key>:<version>`) of `keys` that aren't loaded yet.

        Asked of the outbox first: what moves on meanwhile is met further down.
        """
        found = set()
        if self.outbox:
            found = self.outbox.pending(topic, keys)
        return found | self.topic.not_loaded(topic, keys)


@dataclass(frozen=True)
class _Known:
    """What the tables know of a reservation."""

    state: Mapping[str, Any] | None
    versions: Sequence[int]


def _compare_service(flow: _Flow, report: Report) -> None:
    """Compare ranges of reservations by sums of hashes; look at the rows where these differ."""
    suspects: list[str] = []
    after = FIRST
    while True:
        until, count, *sums = _one(
            flow.service, sql.SERVICE_RANGE, {"after": after or None, "limit": RANGE_RESERVATIONS}
        )
        last = count < RANGE_RESERVATIONS
        place = {"after": after, "until": LAST if last else until}
        known_count, *known_sums = _one(flow.tables, sql.TABLES_RANGE, place)
        if [count, *sums] != [known_count, *known_sums]:
            unlike = _unlike(flow, place)
            room = SUSPECTS_LIMIT - len(suspects)
            suspects += unlike[:room]
            report.unexamined += len(unlike[room:]) + max(0, known_count - ROWS_LIMIT)
        report.count("reservations", count)
        if last:
            break
        after = until
    for at in range(0, len(suspects), SUSPECTS_AT_ONCE):
        _judge(flow, set(suspects[at : at + SUSPECTS_AT_ONCE]), report)


def _one(connection: Connection, statement: str, parameters: Mapping[str, Any]) -> Sequence[Any]:
    row = connection.execute(statement, parameters).fetchone()
    return row or ()


def _told(flow: _Flow, place: Mapping[str, Any], ids: Sequence[str] | None) -> dict[str, Any]:
    """What the service says."""
    uuids = None if ids is None else [name for name in ids if _is_uuid(name)]
    until = place["until"]
    rows = flow.service.execute(
        sql.SERVICE_ROWS,
        {
            "after": place["after"] or None,
            "until": None if until == LAST else until,
            "ids": uuids,
        },
    )
    return dict(rows.fetchall())


def _is_uuid(name: str) -> bool:
    parts = name.split("-")
    return [len(part) for part in parts] == [8, 4, 4, 4, 12] and set("".join(parts)) <= HEX


HEX = frozenset("0123456789abcdef")


def _known(flow: _Flow, place: Mapping[str, Any], ids: Sequence[str] | None) -> dict[str, _Known]:
    """What the tables say of the first ROWS_LIMIT reservations; the service has fewer there."""
    rows = flow.tables.execute(
        sql.TABLES_ROWS, {**place, "ids": None if ids is None else list(ids), "limit": ROWS_LIMIT}
    )
    return {
        key: _Known(None if state["version"] is None else state, versions)
        for key, state, versions in rows
    }


def _unlike(flow: _Flow, place: Mapping[str, Any]) -> list[str]:
    told, known = _told(flow, place, None), _known(flow, place, None)
    keys = sorted(told.keys() | known.keys())
    return [key for key in keys if not _same(told.get(key), known.get(key))]


def _same(told: Mapping[str, Any] | None, known: _Known | None) -> bool:
    return (
        told is not None
        and known is not None
        and told == known.state
        and list(known.versions) == list(range(1, told["version"] + 1))
    )


EVERYWHERE = {"after": FIRST, "until": LAST}


def _judge(flow: _Flow, suspects: set[str], report: Report) -> None:
    """Tell differences from changes that are on their way, in the order of the flow."""
    for rounds_left in reversed(range(ROUNDS)):
        ids = sorted(suspects)
        told = _told(flow, EVERYWHERE, ids)
        on_its_way = flow.on_its_way(flow.sources.reservation_topic, suspects)
        known = _known(flow, EVERYWHERE, ids)
        moved = set()
        for key in ids:
            ours, theirs = told.get(key), known.get(key, _Known(None, ()))
            if _same(ours, theirs):
                continue
            newest = max(theirs.versions, default=0)
            # The tables know more: it may have changed since we asked the service.
            if rounds_left and newest > (ours["version"] if ours else 0):
                moved.add(key)
                continue
            report.in_flight += _name(key, ours, theirs, on_its_way, report)
        if not moved:
            return
        suspects = moved


def _name(
    key: str,
    told: Mapping[str, Any] | None,
    known: _Known,
    on_its_way: set[str],
    report: Report,
) -> bool:
    """Name what differs in one reservation; return whether something of it is on its way."""
    latest = told["version"] if told else 0
    missing = set(range(1, latest + 1)) - set(known.versions)
    flying = {version for version in missing if f"{key}:{version}" in on_its_way}
    for version in sorted(missing - flying):
        report.add(Difference("missing", "fct_reservation_events", f"{key}:{version}"))
    for version in sorted(set(known.versions) - set(range(1, latest + 1))):
        report.add(Difference("extra", "fct_reservation_events", f"{key}:{version}"))
    if latest not in flying:
        for found in differing("fct_reservations", key, told, known.state):
            if found.where.endswith(".seats"):
                _name_seats(key, found, report)
            else:
                report.add(found)
    return bool(flying)


def _name_seats(key: str, found: Difference, report: Report) -> None:
    expected = {row[0]: row for row in found.expected or []}
    there = {row[0]: row for row in found.found or []}
    for seat in sorted(expected.keys() | there.keys()):
        one, other = expected.get(seat), there.get(seat)
        if one != other:
            what = "missing" if other is None else "extra" if one is None else "altered"
            report.add(Difference(what, "fct_reservation_seats", f"{key}:{seat}", one, other))


# ---- the catalogue


Concerts = dict[int, dict[str, Any]]


def _compare_catalogue(flow: _Flow, report: Report) -> None:
    after = 0
    while True:
        told = _concerts(flow.service, sql.SERVICE_CONCERTS, after, None)
        last = len(told) < CONCERTS
        until = LAST_ID if last else max(told)
        if told != _concerts(flow.tables, sql.TABLES_CONCERTS, after, until):
            _judge_concerts(flow, after, until, report)
        report.count("concerts", len(told))
        if last:
            return
        after = until


def _concerts(connection: Connection, statement: str, after: int, until: int | None) -> Concerts:
    place = {"after": after, "until": until, "limit": CONCERTS}
    return dict(connection.execute(statement, place).fetchall())


def _judge_concerts(flow: _Flow, after: int, until: int, report: Report) -> None:
    """As `_judge`."""
    for rounds_left in reversed(range(ROUNDS)):
        told = _concerts(flow.service, sql.SERVICE_CONCERTS, after, None)
        keys = {str(key) for key in told}
        on_its_way = flow.on_its_way(flow.sources.catalogue_topic, keys)
        known = _concerts(flow.tables, sql.TABLES_CONCERTS, after, until)
        unlike = sorted(
            key for key in told.keys() | known.keys() if told.get(key) != known.get(key)
        )
        newer = (key for key in unlike if _version(known, key) > _version(told, key))
        if rounds_left and any(newer):
            continue
        for key in unlike:
            if f"{key}:{_version(told, key)}" in on_its_way:
                report.in_flight += 1
            else:
                _name_concert(str(key), told.get(key), known.get(key), report)
        return


def _version(concerts: Concerts, key: int) -> int:
    return int(concerts[key]["version"]) if key in concerts else 0


def _name_concert(
    key: str,
    told: Mapping[str, Any] | None,
    known: Mapping[str, Any] | None,
    report: Report,
) -> None:
    for found in differing("dim_concerts", key, told, known):
        if not found.where.endswith(".performances"):
            report.add(found)
            continue
        expected, there = found.expected or {}, found.found or {}
        for performance in sorted(expected.keys() | there.keys(), key=int):
            for one in differing(
                "dim_performances", performance, expected.get(performance), there.get(performance)
            ):
                report.add(one)
