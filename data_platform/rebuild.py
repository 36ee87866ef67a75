"""Everything made again from the topic, beside the tables, and put into their place.

Guarantees: workers and analysts go on meanwhile. The new tables are filled by the loader's own
code, up to the offsets that the workers have loaded; then one short transaction, in which no
worker is within a load, brings them up to date, compares, and puts those that differ into the old
ones' place, with definitions, rights, comments and views as before. Killed at any moment, nothing
has changed or all has; what is left behind is removed by the next run. A row that comes out as it
was keeps its `loaded_at`. Records that are bad stay dead letters; those that are good by now are
loaded, and their letters deleted.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
import structlog
from psycopg import errors as pg
from psycopg.abc import Params, Query
from psycopg.rows import TupleRow
from psycopg.sql import SQL, Composable, Composed, Identifier

from data_platform import records, sql, sql_rebuild, star
from data_platform.batch import BadRecord, Slice, decode
from data_platform.consumer import Partition
from data_platform.differences import Difference
from data_platform.errors import Cure, KafkaTroubleError, cure_of, told
from data_platform.events import Decoder
from data_platform.loader import (
    APPLICATION_NAME,
    CONNECT_TIMEOUT_S,
    Connection,
    prepare,
    put_aside,
    sift,
)
from data_platform.topics import Span, StoredOffset, Topic, Topics

# So few records are left to be loaded when the workers are asked to wait.
LAST_RECORDS = 2_000
CATCH_UP_LIMIT_S = 3_600.0
# An analyst's long query keeps the change from happening; it is tried again for so long.
SWAP_LIMIT_S = 600.0
SWAP_PAUSE_FIRST_S = 0.2
SWAP_PAUSE_LONGEST_S = 5.0
# Rows that differ are looked at again: so many when the tables in the making have caught up, for
# what workers have loaded since they were filled differs, too, and so many while workers wait.
# Where more differ, the table is exchanged without another look.
SECOND_LOOKS = 200_000
LAST_LOOKS = 5_000
IN_THE_WAY = (pg.LockNotAvailable, pg.DeadlockDetected, pg.SerializationFailure)
# What isn't told by the events: when a row was loaded, and which of several versions with the
# same seats came first.
UNDETERMINED = {
    "": {"loaded_at"},
    "fct_reservations": {"loaded_at", "seats_version"},
    "fct_reservation_seats": {"loaded_at", "version"},
}
# So many refused records in one batch, or half of it, are a fault of ours.
MANY_REFUSED = 100
LETTERS = "dead_letters"
# States and seats are changed together.
TOGETHER = {"fct_reservations", "fct_reservation_seats"}

log = structlog.get_logger()


class RebuildRefusedError(Exception):
    """It can't be done without losing something; nothing has changed."""


@dataclass(frozen=True)
class Rebuilt:
    """What came of it.

    Attributes:
        events: records read, good ones.
        dead_letters: records read that are bad.
        changed: the tables that were put into the old ones' place, or would be.
        differences: of rows that differed; of each table those of at most LAST_LOOKS rows.
        locked_s: for how long the workers had to wait.
    """

    events: int
    dead_letters: int
    changed: Sequence[str]
    differences: Sequence[Difference]
    seconds: float
    locked_s: float


@dataclass
class _Table:
    """A table with its columns; `keys` are (name, type) of its primary key.

    `differing` are the keys of rows that differed when they were looked at last, at most one more
    than SECOND_LOOKS.
    """

    name: str
    columns: Sequence[str]
    keys: Sequence[tuple[str, str]]
    differing: list[list[str]] = field(default_factory=list)

    @property
    def has_many(self) -> bool:
        """Whether more rows differ than are looked at while workers wait."""
        return len(self.differing) > LAST_LOOKS

    def fill(self, statement: LiteralString) -> Composed:
        """Put this table's names into a statement."""
        names = [name for name, _ in self.keys]
        undetermined = UNDETERMINED.get(self.name, UNDETERMINED[""])
        determined = [name for name in self.columns if name not in undetermined]
        return SQL(statement).format(
            table=Identifier(self.name),
            function=Identifier(f"keep_loaded_at_{self.name}"),
            key=SQL(", ").join(map(Identifier, names)),
            either_key=SQL("ARRAY[{}]").format(
                SQL(", ").join(
                    SQL("coalesce({}, {})::text").format(
                        Identifier("made", name), Identifier("stored", name)
                    )
                    for name in names
                )
            ),
            stored_is_made=_equal("stored", "made", names),
            stored_is_new=_equal("stored", "new", names),
            stored_is_wanted=_equal("stored", "wanted", names),
            made_is_wanted=_equal("made", "wanted", names),
            made_columns=_list("made", determined),
            stored_columns=_list("stored", determined),
            new_columns=_list("new", determined),
            wanted_arrays=SQL(", ").join(SQL(f"%s::text[]::{kind}[]") for _, kind in self.keys),
        )


def _list(table: str, names: Sequence[str]) -> Composable:
    return SQL(", ").join(Identifier(table, name) for name in names)


def _equal(one: str, other: str, names: Sequence[str]) -> Composable:
    return SQL(" AND ").join(
        SQL("{} = {}").format(Identifier(one, name), Identifier(other, name)) for name in names
    )


class _IntoShadow(psycopg.Cursor[TupleRow]):
    """Sends the loader's statements to the tables in the making: what they are stays in one place.

    Offsets are not among them; a rebuild moves none.
    """

    def execute(self, query: Query, *arguments: Any, **options: Any) -> "_IntoShadow":
        """As psycopg's."""
        super().execute(_redirected(query), *arguments, **options)
        return self

    def executemany(self, query: Query, *arguments: Any, **options: Any) -> None:
        """As psycopg's."""
        super().executemany(_redirected(query), *arguments, **options)

    def copy(self, statement: Query, *arguments: Any, **options: Any) -> Any:
        """As psycopg's."""
        return super().copy(_redirected(statement), *arguments, **options)


LOADED_TABLES = re.compile(r"\banalytics\.(?=fct_|dim_|dead_letters\b)")


def _redirected(query: Query) -> Query:
    return LOADED_TABLES.sub("analytics_rebuild.", query) if isinstance(query, str) else query


def rebuild(
    url: str,
    topics: Topics,
    consumer: Mapping[str, Any],
    decoders: Mapping[str, Decoder],
    *,
    dry_run: bool = False,
) -> Rebuilt:
    """Make all tables again from the topics; with `dry_run` only compare.

    Args:
        url: libpq connection string of the tables' owner.
        topics: asks Kafka about topics.
        consumer: librdkafka properties of a worker's consumer.
        decoders: a decoder for each topic that workers read.
        dry_run: put nothing into the old tables' place.

    Raises:
        RebuildRefusedError: something would be lost, or somebody else is at it.
        KafkaTroubleError, KafkaException, psycopg.Error: nothing has changed.
    """
    with _connected(url) as connection:
        work = _Rebuild(connection, topics, consumer, decoders)
        work.begin()
        try:
            work.fill()
            work.compare()
            return work.swap(dry_run=dry_run)
        finally:
            if not connection.broken:
                work.clean_up()


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    """Connect, as the only rebuild; the lock goes with the connection."""
    connection = psycopg.connect(
        url,
        autocommit=True,
        # Not the workers' name: they end a rival of their own name that stands in their way.
        application_name=f"{APPLICATION_NAME} rebuild",
        connect_timeout=CONNECT_TIMEOUT_S,
        cursor_factory=_IntoShadow,
    )
    try:
        if connection.execute(sql_rebuild.TRY_LOCK).fetchone() != (True,):
            raise RebuildRefusedError("another rebuild or a migration is at work")
        yield connection
    finally:
        connection.close()


class _Rebuild:
    """One rebuild, over one connection: what ends it takes everything with it."""

    def __init__(
        self,
        connection: Connection,
        topics: Topics,
        consumer: Mapping[str, Any],
        decoders: Mapping[str, Decoder],
    ) -> None:
        self._connection = connection
        self._topics = topics
        self._consumer = consumer
        self._decoders = decoders
        self._began_at = time.monotonic()
        self._tables: list[_Table] = []
        self._first: dict[Partition, int] = {}
        self._reached: dict[Partition, int] = {}
        self._events = 0
        self._compared = False

    def _do(
        self, statement: str | Composed, parameters: Params | None = None
    ) -> psycopg.Cursor[TupleRow]:
        """Execute a statement as it is."""
        return psycopg.Cursor(self._connection).execute(statement, parameters)

    # ---- before

    def begin(self) -> None:
        """Make sure that nothing would be lost; remove what an earlier rebuild left behind."""
        prepare(self._connection)
        self._do(sql_rebuild.CREATE_GOOD_LETTERS)
        self._do(sql_rebuild.SESSION)
        self.clean_up()
        obstacles = [str(row[0]) for row in self._do(sql_rebuild.OBSTACLES)]
        if obstacles:
            raise RebuildRefusedError(f"it can't be carried over: {'; '.join(sorted(obstacles))}")
        self._tables = [
            _Table(name, columns, list(zip(keys, kinds, strict=True)))
            for name, columns, keys, kinds in self._do(sql_rebuild.TABLES)
        ]
        self._look_at_topics()
        with self._connection.transaction():
            self._do(sql_rebuild.CREATE_SHADOW)
            for table in self._tables:
                self._make(table)

    def clean_up(self) -> None:
        """Remove the tables in the making."""
        self._do(sql_rebuild.DROP_SHADOW)

    def _look_at_topics(self) -> None:
        described: dict[str, Topic] = {}
        for name, partition, next_offset, topic_id in self._do(sql.READ_ALL_OFFSETS):
            if name not in self._decoders:
                raise RebuildRefusedError(f"rows of topic {name} are loaded, which is not read")
            topic = described.get(name) or described.setdefault(name, self._topics.look(name))
            fault = topic.fault(partition, StoredOffset(next_offset, topic_id))
            if fault:
                raise RebuildRefusedError(f"{name} partition {partition}: {fault}")
            first = topic.spans[partition].first
            if first > 0:
                raise RebuildRefusedError(
                    f"{name} partition {partition} begins at {first}: only the tables have what "
                    "was before, and it would be lost. `reconcile` names what is wrong; take rows "
                    "from a backup, and let retention.ms be -1 (`outbox-relay topics`)"
                )
            self._first[Partition(name, partition)] = first
        self._reached = dict(self._first)

    def _make(self, table: _Table) -> None:
        name = {"table": table.name}
        self._do(table.fill(sql_rebuild.CREATE_TABLE))
        for (statement,) in self._do(sql_rebuild.KEYS, name).fetchall():
            self._do(statement)
        if "loaded_at" in table.columns:
            self._do(table.fill(sql_rebuild.KEEP_FUNCTION))
            self._do(table.fill(sql_rebuild.KEEP_TRIGGER))

    # ---- filling

    def fill(self) -> None:
        """Load what the workers have loaded, until little is left; then make the tables whole."""
        self._catch_up()
        self._do(sql_rebuild.SESSION)
        for table in self._tables:
            name = {"table": table.name}
            for statements in (sql_rebuild.INDEXES, sql_rebuild.PROPERTIES):
                for (statement,) in self._do(statements, name).fetchall():
                    self._do(statement)
            self._do(table.fill(sql_rebuild.VACUUM))

    def _catch_up(self) -> None:
        self._set_up_loading()
        until = time.monotonic() + CATCH_UP_LIMIT_S
        while True:
            ends = self._loaded()
            left = sum(end - self._reached.get(place, 0) for place, end in ends.items())
            log.info("rebuild_reads", records=left)
            self._load(ends)
            if left <= LAST_RECORDS:
                return
            if time.monotonic() > until:
                raise KafkaTroubleError(f"the workers stay {left} records ahead")

    def _set_up_loading(self) -> None:
        self._do(sql.SESSION)
        self._do(sql_rebuild.LOADING_SESSION)

    def _loaded(self) -> dict[Partition, int]:
        rows = self._do(sql.READ_ALL_OFFSETS)
        return {Partition(row[0], row[1]): int(row[2]) for row in rows}

    def _load(self, ends: Mapping[Partition, int]) -> None:
        spans = {place: Span(self._reached.get(place, 0), end) for place, end in ends.items()}
        for slices in records.read(self._consumer, spans):
            with self._connection.transaction():
                self._write(slices)
        self._reached |= ends

    def _write(self, slices: Sequence[Slice]) -> None:
        decoded = decode(slices, self._decoders)
        refused: list[BadRecord] = []
        try:
            star.write(self._connection, star.rows_of(decoded.rows), ask=False)
        except Exception as error:
            if cure_of(error) is not Cure.DEAD_LETTER:
                raise
            sift(self._connection, decoded.rows, refused)
        if len(refused) > max(MANY_REFUSED, len(decoded.rows) / 2):
            cause = refused[-1].error.partition("\n")[0]  # not its DETAIL, which quotes the row
            raise RebuildRefusedError(
                f"Postgres refuses {len(refused)} of {len(decoded.rows)} records, at last for: "
                f"{cause}"
            )
        bad = [*decoded.bad, *refused]
        put_aside(self._connection, bad)
        self._note_good_letters(slices, {id(record.message) for record in bad})
        self._events += len(decoded.rows) - len(refused)

    def _note_good_letters(self, slices: Sequence[Slice], bad: AbstractSet[int]) -> None:
        """Remember the letters of records that are good; `bad` has the others' ids in memory.

        Not of what comes after the comparison: nobody would see that a table lacks it.
        """
        if self._compared:
            return
        for part in slices:
            place = {"topic": part.topic, "partition": part.partition}
            span = {"first": part.first_offset, "end": part.next_offset}
            letters = {row[0] for row in self._do(sql_rebuild.LETTERS_BETWEEN, place | span)}
            if letters:
                good = {one.offset() for one in part.messages if id(one) not in bad} & letters
                self._do(sql_rebuild.ADD_GOOD_LETTERS, place | {"offsets": list(good)})

    # ---- comparing

    def compare(self) -> None:
        """Find the rows that differ, or so many that it doesn't matter which.

        The workers may be ahead by now: each is looked at again in the end. What they have loaded
        since the tables in the making were filled is not compared, only added.
        """
        self._compared = True
        for table in self._tables:
            if table.name != LETTERS:
                rows = self._do(table.fill(sql_rebuild.DIFFERING), [SECOND_LOOKS + 1])
                table.differing = [key for (key,) in rows]

    def _look_again(self, table: _Table, keys: Sequence[list[str]]) -> psycopg.Cursor[TupleRow]:
        columns = [list(column) for column in zip(*keys, strict=True)]
        return self._do(table.fill(sql_rebuild.STILL_DIFFERING), columns)

    def _narrow(self) -> None:
        """Forget rows that differed only because workers were ahead."""
        for table in self._tables:
            if table.has_many and len(table.differing) <= SECOND_LOOKS:
                table.differing = [row[0] for row in self._look_again(table, table.differing)]

    def _differences(self, table: _Table) -> list[Difference]:
        if not table.differing:
            return []
        rows = self._look_again(table, table.differing[:LAST_LOOKS])
        return [found for row in rows for found in _told(table.name, *row)]

    # ---- the change

    def swap(self, *, dry_run: bool) -> Rebuilt:
        """Do it, as soon as nobody is in the way."""
        until = time.monotonic() + SWAP_LIMIT_S
        pause_s = SWAP_PAUSE_FIRST_S
        while True:
            self._catch_up()
            self._narrow()
            reached, events = dict(self._reached), self._events
            try:
                with self._connection.transaction():
                    return self._change(dry_run=dry_run)
            except IN_THE_WAY as error:
                if time.monotonic() > until:
                    raise
                log.info("rebuild_tries_again", cause=told(error))
            self._reached, self._events = reached, events
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, SWAP_PAUSE_LONGEST_S)

    def _change(self, *, dry_run: bool) -> Rebuilt:
        self._do(sql_rebuild.LOCK_OFFSETS)
        locked_at = time.monotonic()
        self._load(self._loaded())
        differences = [found for table in self._tables for found in self._differences(table)]
        names = {found.where.partition(".")[0] for found in differences}
        names |= {table.name for table in self._tables if table.has_many}
        changed = [
            table
            for table in self._tables
            if table.name in names or (table.name in TOGETHER and names & TOGETHER)
        ]
        differences += self._change_letters(dry_run=dry_run)
        if changed and not dry_run:
            self._exchange(changed)
        return Rebuilt(
            self._events,
            int((self._do(sql_rebuild.COUNT_LETTERS).fetchone() or (0,))[0]),
            [table.name for table in changed],
            differences,
            round(time.monotonic() - self._began_at, 3),
            round(time.monotonic() - locked_at, 3),
        )

    def _change_letters(self, *, dry_run: bool) -> list[Difference]:
        """Delete letters that are good by now, add those that are missing."""
        self._do(sql_rebuild.LOCK_LETTERS)
        with self._connection.transaction(force_rollback=dry_run):
            extra = self._do(sql_rebuild.DELETE_LETTERS).fetchall()
            missing = self._do(sql_rebuild.ADD_LETTERS).fetchall()
        return [
            *(Difference("extra", LETTERS, _place(row), found=row[3]) for row in extra),
            *(Difference("missing", LETTERS, _place(row), expected=row[3]) for row in missing),
        ]

    def _exchange(self, changed: Sequence[_Table]) -> None:
        """Put tables into the old ones' place; readers wait from here on."""
        for table in changed:
            self._do(table.fill(sql_rebuild.LOCK_TABLE))
        names = {"tables": [table.name for table in changed]}
        views = self._do(sql_rebuild.VIEWS, names).fetchall()
        self._do(sql_rebuild.CREATE_REPLACED)
        for table in changed:
            if "loaded_at" in table.columns:
                self._do(table.fill(sql_rebuild.DROP_TRIGGER))
            self._do(table.fill(sql_rebuild.MOVE_AWAY))
            self._do(table.fill(sql_rebuild.MOVE_IN))
        for (view,) in views:
            self._do(view)
        for table in changed:
            self._do(table.fill(sql_rebuild.DROP_REPLACED_TABLE))
        self._do(sql_rebuild.DROP_REPLACED)


def _place(row: TupleRow) -> str:
    return " ".join(str(part) for part in row[:3])


def _told(
    table: str,
    key: Sequence[str],
    made: Mapping[str, Any] | None,
    stored: Mapping[str, Any] | None,
) -> Iterator[Difference]:
    ignored = UNDETERMINED.get(table, UNDETERMINED[""])
    if made is None or stored is None:
        what = "extra" if made is None else "missing"
        row = {name: value for name, value in (made or stored or {}).items() if name not in ignored}
        yield Difference(what, table, ":".join(key), row if made else None, row if stored else None)
        return
    for column, value in made.items():
        if column not in ignored and stored[column] != value:
            where = f"{table}.{column}"
            yield Difference("altered", where, ":".join(key), value, stored[column])
