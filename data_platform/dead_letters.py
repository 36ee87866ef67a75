"""What could not be loaded: look at it, and load it again once it can be.

Guarantees of a replay: what it loads is what a worker would have loaded, by the same code, and a
letter is deleted in the transaction that loads its record. So it may be repeated, interrupted, and
run beside workers and other replays. It moves no offset, and an event that comes late adds its
fact without touching a newer state. A letter that is still bad stays, with today's reason and
error, and with the time it was first seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
import structlog
from confluent_kafka import Message
from psycopg import errors as pg
from psycopg.rows import dict_row

from data_platform import sql, sql_dead_letters
from data_platform.batch import BadRecord, Slice, decode
from data_platform.errors import RivalError, told
from data_platform.events import Decoder
from data_platform.loader import (
    APPLICATION_NAME,
    CONNECT_TIMEOUT_S,
    Connection,
    prepare,
    sift,
)

# A transaction of a replay is short, so that a worker that meets it hardly waits; and it fits
# into memory.
CHUNK_LETTERS = 100
CHUNK_BYTES = 2**22
# Workers come first: what loses against them is tried again, so often.
CHUNK_ATTEMPTS = 5
LOST_AGAINST_ANOTHER = (
    RivalError,
    pg.LockNotAvailable,
    pg.DeadlockDetected,
    pg.SerializationFailure,
)

log = structlog.get_logger()


class Place(NamedTuple):
    """Where a dead letter's record was."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Scope:
    """Which dead letters: all, or those of which everything given here is true."""

    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Replayed:
    """What became of the letters.

    Attributes:
        loaded: they are in the tables now (or were already) and no dead letters any more.
        still_bad: they stay.
        not_read: they stay, for no worker of these settings reads their topic.
        busy: another replay had them in hand.
    """

    loaded: int = 0
    still_bad: int = 0
    not_read: int = 0
    busy: int = 0

    def in_words(self, *, dry_run: bool = False) -> str:
        """Return one line for people."""
        loaded = "would be loaded" if dry_run else "loaded"
        return (
            f"{self.loaded} {loaded}, {self.still_bad} still bad, {self.not_read} of topics that "
            f"are not read, {self.busy} in another replay's hands"
        )

    def __add__(self, other: "Replayed") -> "Replayed":
        """Sum up two parts of a replay."""
        ours, theirs = asdict(self), asdict(other)
        return Replayed(**{name: ours[name] + theirs[name] for name in ours})


def read_list(url: str, scope: Scope, limit: int) -> list[dict[str, Any]]:
    """Return the newest letters of a topic, a reason, or all; without what they contain."""
    with _connected(url) as connection:
        connection.execute(sql.STATUS_SESSION)
        return connection.cursor(row_factory=dict_row).execute(
            sql_dead_letters.LIST, {"topic": scope.topic, "reason": scope.reason, "limit": limit}
        ).fetchall()  # fmt: skip


def read_one(url: str, place: Place) -> dict[str, Any] | None:
    """Return a letter with its key, value and headers, or None where there is none."""
    with _connected(url) as connection:
        connection.execute(sql.STATUS_SESSION)
        return connection.cursor(row_factory=dict_row).execute(
            sql_dead_letters.SHOW,
            {
                "topic": place.topic,
                "kafka_partition": place.partition,
                "kafka_offset": place.offset,
            },
        ).fetchone()  # fmt: skip


def replay(
    url: str, scope: Scope, decoders: Mapping[str, Decoder], *, dry_run: bool = False
) -> Replayed:
    """Load the letters of `scope` that can be loaded; with `dry_run` only say which can.

    Args:
        url: libpq connection string of a role with the loader's rights.
        scope: which letters; only those that are there when it begins.
        decoders: a decoder for each topic that workers read.
        dry_run: every transaction is rolled back.

    Raises:
        psycopg.Error: Postgres failed. What was loaded until then stays loaded; a repetition
            does the rest.
        RivalError: workers were in the way again and again; as above.
    """
    total = Replayed()
    with _connected(url) as connection:
        prepare(connection)
        for places in _chunks(connection, scope):
            readable = [place for place in places if place.topic in decoders]
            total += Replayed(not_read=len(places) - len(readable))
            if readable:
                total += _with_patience(connection, readable, decoders, dry_run=dry_run)
    return total


def _connected(url: str) -> Connection:
    return psycopg.connect(
        url,
        autocommit=True,
        # Not the workers' name: they end a rival of their own name that stands in their way.
        application_name=f"{APPLICATION_NAME} dead-letters",
        connect_timeout=CONNECT_TIMEOUT_S,
    )


def _chunks(connection: Connection, scope: Scope) -> Iterator[list[Place]]:
    """Yield the places of `scope`, each once, in chunks of bounded count and size."""
    (until,) = connection.execute(sql_dead_letters.NOW).fetchone() or (None,)
    after = Place("", -1, -1)
    while found := _places_after(connection, scope, after, until):
        chunk: list[Place] = []
        size_bytes = 0
        for place, place_bytes in found:
            if chunk and size_bytes + place_bytes > CHUNK_BYTES:
                break
            chunk.append(place)
            size_bytes += place_bytes
        after = chunk[-1]
        yield chunk


def _places_after(
    connection: Connection, scope: Scope, after: Place, until: datetime | None
) -> list[tuple[Place, int]]:
    rows = connection.execute(
        sql_dead_letters.PLACES_AFTER,
        {
            "topic": scope.topic,
            "kafka_partition": scope.partition,
            "kafka_offset": scope.offset,
            "reason": scope.reason,
            "after_topic": after.topic,
            "after_partition": after.partition,
            "after_offset": after.offset,
            "until": until,
            "limit": CHUNK_LETTERS,
        },
    )
    return [(Place(*row[:3]), row[3]) for row in rows]


def _with_patience(
    connection: Connection,
    places: Sequence[Place],
    decoders: Mapping[str, Decoder],
    *,
    dry_run: bool,
) -> Replayed:
    for _ in range(CHUNK_ATTEMPTS - 1):
        try:
            return _replay_chunk(connection, places, decoders, dry_run=dry_run)
        except LOST_AGAINST_ANOTHER as error:  # it has waited for a second or two by now
            log.info("replay_tries_again", cause=told(error))
    return _replay_chunk(connection, places, decoders, dry_run=dry_run)


def _replay_chunk(
    connection: Connection,
    places: Sequence[Place],
    decoders: Mapping[str, Decoder],
    *,
    dry_run: bool,
) -> Replayed:
    with connection.transaction(force_rollback=dry_run):
        locked = connection.execute(sql_dead_letters.LOCK, _columns(places)).fetchall()
        slices: dict[tuple[str, int], Slice] = {}
        for topic, partition, offset, key, value in locked:
            part = slices.setdefault((topic, partition), Slice(topic, partition, "", 0, 0))
            part.messages.append(
                Message(topic=topic, partition=partition, offset=offset, key=key, value=value)
            )
        decoded = decode(list(slices.values()), decoders)
        refused: list[BadRecord] = []
        sift(connection, decoded.rows, refused)
        bad = [*decoded.bad, *refused]
        still_bad = {_place(record.message) for record in bad}
        loaded = [Place(*row[:3]) for row in locked if Place(*row[:3]) not in still_bad]
        connection.execute(sql_dead_letters.DELETE, _columns(loaded))
        _keep(connection, bad)
    return Replayed(len(loaded), len(bad), busy=len(places) - len(locked))


def _keep(connection: Connection, bad: Sequence[BadRecord]) -> None:
    connection.cursor().executemany(
        sql_dead_letters.KEEP,
        [
            {
                "topic": record.message.topic(),
                "kafka_partition": record.message.partition(),
                "kafka_offset": record.message.offset(),
                "reason": record.reason,
                "error": record.error,
            }
            for record in bad
        ],
    )


def _place(message: Message) -> Place:
    return Place(str(message.topic()), int(message.partition() or 0), int(message.offset() or 0))


def _columns(places: Sequence[Place]) -> dict[str, Any]:
    return {
        "topics": [place.topic for place in places],
        "partitions": [place.partition for place in places],
        "offsets": [place.offset for place in places],
    }
