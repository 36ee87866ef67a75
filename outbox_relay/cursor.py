"""How far a topic is published, of which database and into which Kafka: what a restart stands on.

There is one cursor a topic. Under `at_least_once` it is a row in Postgres, under `exactly_once` a
record in Kafka, committed together with the events; Postgres then has a copy, at most a second old.
`generation` says which of the two counts: it rises where the one in Postgres replaces the one in
Kafka. Snapshots and ids mean something on one history of one database only, so a cursor of another
one is refused: going on could lose events or publish them twice.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import psycopg
from psycopg.rows import dict_row

from outbox_relay import sql
from outbox_relay.leadership import Identity, RefusedError, Server, Term
from outbox_relay.reader import EMPTY_SNAPSHOT, Position

FORMAT = 1
REMEDY = (
    "Events may be lost or doubled by going on. Find the first event that is not in Kafka, then:"
    " outbox-relay resume --from-id N (shows what it would do; --apply does it)"
)


class LostLeadershipError(Exception):
    """Another relay has moved the cursor; this one must start over."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A topic's cursor.

    `sequence` counts its steps within a generation. `offsets` are ends known by partition (as text)
    of the topic with the id `topic_id`, some seconds old; `released` the quarantined events that
    this very step has published; `copied_sequence` is that of the copy that Postgres is known to
    have: a database with an older one was restored, however far it has come since.
    """

    position: Position
    identity: Identity
    generation: int = 1
    sequence: int = 0
    published_rows: int = 0
    kafka_cluster_id: str | None = None
    topic_id: str | None = None
    offsets: Mapping[str, int] = field(default_factory=dict)
    released: tuple[int, ...] = ()
    copied_sequence: int = 0

    def step(self, position: Position, rows: int = 0) -> Self:
        """Return the cursor that has come to `position` by publishing `rows` rows."""
        return replace(
            self,
            position=position,
            sequence=self.sequence + 1,
            published_rows=self.published_rows + rows,
            released=(),
        )

    def next_generation(self) -> Self:
        """Return the cursor that replaces every other one of its topic."""
        return replace(self, generation=self.generation + 1, sequence=0, released=())

    def to_json(self) -> bytes:
        """Return the record's value."""
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> Self:
        """Read a record's value.

        Raises:
            RefusedError: it was written by a newer version, or by something else.
        """
        try:
            found = json.loads(value)
            if found.pop("format") != FORMAT:
                raise ValueError  # noqa: TRY301 - one answer to all that isn't ours
            found["position"] = Position(**found["position"])
            found["identity"] = Identity(**found["identity"])
            found["released"] = tuple(found["released"])
            return cls(**found)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RefusedError(
                f"the cursor topic holds a record that this version doesn't know. {REMEDY}"
            ) from None


@dataclass(frozen=True, slots=True)
class Stored:
    """A cursor as Postgres has it, with the delivery that it belongs to."""

    cursor: Cursor
    delivery: str


class Store:
    """A topic's row in Postgres, in one term: nobody else moves it while the term lasts."""

    def __init__(self, connection: psycopg.Connection, term: Term, topic: str) -> None:
        self._connection = connection
        self._term = term
        self._topic = topic
        self.saved = Cursor(Position(EMPTY_SNAPSHOT, "0/0"), Identity(0, 0, ""))

    def load(self, server: Server, delivery: str) -> Stored:
        """Return the stored cursor; made now, before all events, when there is none.

        Raises:
            LostLeadershipError: it belongs to a later term.
        """
        self._connection.execute(
            sql.CREATE_CURSOR,
            {
                "name": self._term.name,
                "topic": self._topic,
                "delivery": delivery,
                "epoch": self._term.epoch,
                "leader": self._term.leader,
                "published_snapshot": EMPTY_SNAPSHOT,
                "wal_lsn": server.wal_lsn,
                **asdict(server.identity),
            },
        )
        found = load_rows(self._connection, self._term.name, self._topic)
        if not found or found[0]["leader_epoch"] != self._term.epoch:
            raise LostLeadershipError("another relay has begun a term")
        self.saved = from_row(found[0])
        return Stored(self.saved, found[0]["delivery"])

    def save(self, cursor: Cursor, delivery: str, *, durably: bool) -> None:
        """Store `cursor`; not `durably`, a crash of Postgres may bring an older one back.

        Raises:
            LostLeadershipError: the stored cursor is not the one that this term stored last.
        """
        old = self.saved
        changed = self._connection.execute(
            sql.SAVE_CURSOR,
            {
                "name": self._term.name,
                "topic": self._topic,
                "epoch": self._term.epoch,
                "delivery": delivery,
                "generation": cursor.generation,
                "sequence": cursor.sequence,
                **asdict(cursor.position),
                **asdict(cursor.identity),
                "kafka_cluster_id": cursor.kafka_cluster_id,
                "published_rows": cursor.published_rows,
                "synchronous_commit": "local" if durably else "off",
                "old_generation": old.generation,
                "old_sequence": old.sequence,
            },
            prepare=True,
        ).rowcount
        if changed != 1:
            raise LostLeadershipError("the cursor has been moved by another relay")
        self.saved = cursor


def load_rows(
    connection: psycopg.Connection, name: str, topic: str | None = None
) -> list[dict[str, Any]]:
    """Return the stored cursors of a relay as they are in the table, one topic's or all."""
    with connection.cursor(row_factory=dict_row) as rows:
        return rows.execute(sql.LOAD_CURSORS, {"name": name, "topic": topic}).fetchall()


def from_row(row: Mapping[str, Any]) -> Cursor:
    """Return the cursor that a row tells."""
    return Cursor(
        position=Position(
            **{
                name: row[name]
                for name in ("published_snapshot", "wal_lsn", "batch_snapshot", "batch_last_id")
            }
        ),
        identity=Identity(row["system_identifier"], row["database_oid"], row["timeline"]),
        generation=row["generation"],
        sequence=row["sequence"],
        published_rows=row["published_rows"],
        kafka_cluster_id=row["kafka_cluster_id"],
    )


def newest(stored: Stored, in_kafka: Cursor | None, topic: str) -> Cursor:
    """Return the one of the two cursors that counts.

    Raises:
        RefusedError: Kafka lost what the database knows of.
    """
    ours = stored.cursor
    if in_kafka is None or in_kafka.generation < ours.generation:  # replaced since, or none yet
        if stored.delivery == "exactly_once" and ours.sequence > 0:
            raise RefusedError(
                f"Kafka has lost the cursor of topic {topic} that this database has a copy of. "
                + REMEDY
            )
        return ours
    if in_kafka.sequence < ours.sequence:
        raise RefusedError(
            f"Kafka's cursor of topic {topic} is older than the copy of it in this database:"
            f" Kafka has lost data. {REMEDY}"
        )
    return in_kafka


def refuse_restored(ours: Cursor, in_kafka: Cursor | None, topic: str) -> None:
    """Refuse when Kafka tells of a newer copy of its cursor than this database has.

    Raises:
        RefusedError: the database was restored, or is an old copy of the one that publishes.
    """
    if in_kafka is None:
        return
    known = (in_kafka.generation, in_kafka.copied_sequence)
    if known > (ours.generation, ours.sequence):
        raise RefusedError(
            f"Kafka's cursor of topic {topic} tells of a newer copy than this database has: it was"
            " restored to an earlier state, or another database has a relay of this name."
            f" {REMEDY}"
        )


def refuse_another_kafka(cursor: Cursor, kafka_cluster_id: str) -> None:
    """Refuse to go on in a cluster that hasn't what the cursor says is published.

    Raises:
        RefusedError: it is another one.
    """
    if cursor.kafka_cluster_id not in (None, kafka_cluster_id):
        raise RefusedError(f"this is another Kafka cluster than the cursor's. {REMEDY}")


def refuse_another_history(
    connection: psycopg.Connection, cursor: Cursor, server: Server
) -> Cursor:
    """Return `cursor` for this server.

    A promoted standby is fine when it had all that the cursor has seen.

    Raises:
        RefusedError: the cursor's snapshots can't be trusted here: another server or database, a
            promoted or restored one, one that has lost the end of its WAL.
    """
    ours, here = cursor.identity, server.identity
    position = cursor.position
    newer = position.batch_snapshot or position.published_snapshot
    behind = connection.execute(
        sql.IS_BEHIND, {"wal_lsn": position.wal_lsn, "snapshot": newer}
    ).fetchone()
    checks = (
        ("another server", ours.system_identifier != here.system_identifier),
        ("another database", ours.database_oid != here.database_oid),
        ("an earlier state of this database (restored)", behind is None or bool(behind[0])),
        (
            "another timeline (promoted or restored)",
            ours.timeline != here.timeline and not _had_all(connection, cursor, server),
        ),
    )
    for what, differs in checks:
        if differs:
            raise RefusedError(
                f"the cursor was written on a different history: this is {what}. {REMEDY}"
            )
    return replace(cursor, identity=here)


def _had_all(connection: psycopg.Connection, cursor: Cursor, server: Server) -> bool:
    """Whether this server left the cursor's timeline behind the cursor, as far as we may know."""
    if connection.execute(sql.MAY_READ_HISTORY).fetchone() != (True,):
        return False
    found = connection.execute(
        sql.TIMELINE_HISTORY, {"timeline": server.identity.timeline}
    ).fetchone()
    if found is None:
        return False
    for line in found[0].splitlines():
        timeline, _, rest = line.partition("\t")
        if timeline.strip().isdigit() and int(timeline) == int(cursor.identity.timeline, 16):
            return _lsn(rest.partition("\t")[0]) >= _lsn(cursor.position.wal_lsn)
    return False


def _lsn(text: str) -> int:
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)
