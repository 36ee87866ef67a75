"""Keeps the outbox small: partitions are made ahead and dropped behind every relay's cursor.

A partition goes when each of its rows is published, by every relay and for every topic, and its
newest one is older than the retention time. No row goes before, whoever is still writing it; and no
booking waits longer than 50 ms for a lock. The migration's functions see to both.

Partitions are ranges of ids, but cut by time: each eighth of the retention time a new one begins,
by setting the sequence to its first id. So their number depends neither on the rate of events nor
on how long no relay was there; where MAX_PARTITIONS can't be dropped, the newest just grows. Two
are always ahead, each for ten thousand million ids.

A partition is emptied first and dropped afterwards. Emptying locks it alone, which no booking
writes to any more, and gives the space back even while a transaction that has once written to the
outbox stays open for hours. Dropping locks the whole outbox for a few milliseconds; it is tried
only while nobody holds on to the outbox for long.

The default partition is there so that no insert fails. While it has rows, ATTACH would read them
with everybody locked out, so it is fenced first; new partitions begin beyond the sequence, which is
moved there; and it is emptied like the others, so its rows stand in nothing's way. They mean that
something is wrong, though: an error in the log and `Outcome.default_filled` say so.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
import structlog
from psycopg.rows import class_row

from outbox_relay import sql

SLICES = 8
MIN_SLICE_S = 60.0
AHEAD = 2
MAX_PARTITIONS = 16
HOLDER_PATIENCE_S = 0.05
HOLDER_POLL_S = 0.005
# By hand one waits a little for a moment without writers.
PRUNE_ATTEMPTS = 5

logger = structlog.get_logger(__name__)

Deed = Literal["added", "fenced", "rolled_over", "emptied", "dropped"]


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of the outbox; `in_use` is the number of the one that new rows go to.

    `number` is None for the default one. `filled` is true of dead rows, too. `ids` counts from the
    first row to the last, so it is at least the number of rows; the ages are None without rows.
    """

    number: int | None
    in_use: int
    filled: bool
    size_bytes: int
    ids: int
    oldest_age_s: float | None
    newest_age_s: float | None

    @property
    def name(self) -> str:
        """The table's name."""
        return "outbox_default" if self.number is None else f"outbox_{self.number}"

    @property
    def behind(self) -> bool:
        """Whether the sequence has left it."""
        return self.number is not None and self.number < self.in_use

    @property
    def ahead(self) -> bool:
        """Whether the sequence is still to come to it."""
        return self.number is not None and self.number > self.in_use

    def is_older_than(self, age_s: float) -> bool:
        """Whether its newest row is; true when it has none."""
        return self.newest_age_s is None or self.newest_age_s >= age_s


# A step that may be due; returns what it did and to which partition, if anything.
Do = Callable[[psycopg.Connection, Partition], tuple[Deed, str] | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step of maintenance did, and how the outbox was before it.

    `partition` is the one it was done to; `busy` names who held a lock that was in its way.
    """

    did: Deed | None
    partition: str | None
    busy: str | None
    partitions: int
    size_bytes: int
    default_filled: bool


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of a partition; `kept` says why it is still there, None: it is gone."""

    name: str
    ids: int
    size_bytes: int
    kept: str | None


class BusyError(Exception):
    """Somebody holds a lock that isn't worth waiting for; the message says who."""


class Retention:
    """Maintains the outbox's partitions for one relay; others may be at it at the same time.

    Connections must be in autocommit mode: a lock that outlasts its statement holds up bookings.
    """

    def __init__(self, retention_hours: float) -> None:
        self._retention_s = retention_hours * 3600
        self._slice_s = max(self._retention_s / SLICES, MIN_SLICE_S)
        self._alarmed = False

    def maintain(self, connection: psycopg.Connection) -> Outcome:
        """Do the most urgent step, if any is due; to be called every few seconds.

        A step is one short transaction; only `fenced` may read for long, in nobody's way.

        Raises:
            psycopg.Error: but not for a lock that isn't free.
        """
        partitions = survey(connection)
        self._alarm(default_filled=partitions[-1].filled)
        did, partition, busy = self._step(connection, partitions)
        if did:
            logger.info("partition_maintained", did=did, partition=partition)
        return Outcome(
            did,
            partition,
            busy,
            partitions=len(partitions),
            size_bytes=sum(partition.size_bytes for partition in partitions),
            default_filled=partitions[-1].filled,
        )

    def prune(self, connection: psycopg.Connection) -> list[Pruned]:
        """Let every partition go that may, also the one in use; return what became of each.

        Raises:
            psycopg.Error: but not for a lock that isn't free.
        """
        for partition in survey(connection):
            if partition.number == partition.in_use and self._is_due(partition):
                _patiently(_roll_over, connection, partition)
        found = [each for each in survey(connection) if each.filled or each.behind]
        pruned = [
            Pruned(each.name, each.ids, each.size_bytes, self._prune(connection, each))
            for each in found
        ]
        for _ in range(AHEAD * PRUNE_ATTEMPTS):
            partitions = survey(connection)
            if sum(partition.ahead for partition in partitions) >= AHEAD:
                break
            _patiently(_add, connection, partitions[-1])
        return pruned

    def _prune(self, connection: psycopg.Connection, partition: Partition) -> str | None:
        """Let a partition go; return why it stays, None when it doesn't."""
        if not partition.behind and partition.number is not None:
            return "in use"
        if not partition.is_older_than(self._retention_s):
            return f"its newest event is {(partition.newest_age_s or 0) / 3600:.1f} h old"
        if partition.filled:
            why = _patiently(_empty, connection, partition)
            if why or partition.number is None:
                return why
        return _patiently(_drop, connection, partition)

    def _step(
        self, connection: psycopg.Connection, partitions: Sequence[Partition]
    ) -> tuple[Deed | None, str | None, str | None]:
        busy = None
        for do, partition in self._due(partitions):
            try:
                done = do(connection, partition)
            except BusyError as error:  # in the way of this step, not of the next one
                busy = busy or str(error)
                continue
            if done:
                return *done, busy
        return None, None, busy

    def _due(self, partitions: Sequence[Partition]) -> Iterator[tuple[Do, Partition]]:
        """Yield what could be done, the most urgent first."""
        *numbered, default = partitions
        if sum(partition.ahead for partition in numbered) < AHEAD:
            yield _add, default
        in_use = next((each for each in numbered if each.number == each.in_use), None)
        if in_use is None:
            yield _roll_over, default
        elif len(numbered) < MAX_PARTITIONS and (in_use.oldest_age_s or 0) >= self._slice_s:
            yield _roll_over, in_use
        for partition in partitions:
            if (partition.behind or partition is default) and self._is_due(partition):
                yield _empty, partition
        for partition in numbered:
            if partition.behind and not partition.filled:
                yield _drop, partition

    def _is_due(self, partition: Partition) -> bool:
        return partition.filled and partition.is_older_than(self._retention_s)

    def _alarm(self, *, default_filled: bool) -> None:
        if default_filled and not self._alarmed:
            logger.error(
                "default_partition_has_rows",
                help="ids have gone beyond all partitions (a restored dump, a setval()?); new ones"
                " are made beyond them, and the rows go when they are published and old",
            )
        elif self._alarmed and not default_filled:
            logger.info("default_partition_is_empty")
        self._alarmed = default_filled


def survey(connection: psycopg.Connection) -> list[Partition]:
    """Return the partitions by number, the default one last. Reads two rows of each."""
    with connection.cursor(row_factory=class_row(Partition)) as cursor:
        return cursor.execute(sql.PARTITIONS).fetchall()


def _add(connection: psycopg.Connection, default: Partition) -> tuple[Deed, str] | None:
    added = _call(connection, sql.ADD_PARTITION, default)
    if added is not None:
        return "added", f"outbox_{added}"
    # Else somebody was quicker; a fence too many would do no harm.
    if default.filled:
        _call(connection, sql.FENCE_DEFAULT, default)
        return "fenced", default.name
    return None


def _roll_over(connection: psycopg.Connection, partition: Partition) -> tuple[Deed, str] | None:
    next_number = _call(connection, sql.ROLL_OVER, partition)
    return None if next_number is None else ("rolled_over", f"outbox_{next_number}")


def _empty(connection: psycopg.Connection, partition: Partition) -> tuple[Deed, str] | None:
    _wait_for_holders(connection, partition.name)
    emptied = _call(connection, sql.EMPTY_PARTITION, partition)
    return ("emptied", partition.name) if emptied else None


def _drop(connection: psycopg.Connection, partition: Partition) -> tuple[Deed, str] | None:
    _wait_for_holders(connection, "outbox")
    dropped = _call(connection, sql.DROP_PARTITION, partition)
    return ("dropped", partition.name) if dropped else None


def _call(connection: psycopg.Connection, statement: str, partition: Partition) -> Any:
    parameters = {"number": partition.number, "in_use": partition.in_use}
    try:
        found = connection.execute(statement, parameters).fetchone()
    except psycopg.errors.LockNotAvailable as error:
        raise BusyError(f"{partition.name}: {error.diag.message_primary}") from error
    return None if found is None else found[0]


def _wait_for_holders(connection: psycopg.Connection, table: str) -> None:
    """Wait until nobody of now holds on to `table`, so that the lock is asked for with hope only.

    Who waits for a lock makes everybody behind him wait.

    Raises:
        BusyError: somebody has held on to it for HOLDER_PATIENCE_S.
    """
    give_up_at_s = time.monotonic() + HOLDER_PATIENCE_S
    holders = _holders(connection, table)
    while holders:
        if time.monotonic() > give_up_at_s:
            raise BusyError(
                f"{table}: {', '.join(sorted(set(holders.values())))} holds a lock on it"
            )
        time.sleep(HOLDER_POLL_S)
        now = _holders(connection, table)
        holders = {who: name for who, name in holders.items() if who in now}


def _holders(connection: psycopg.Connection, table: str) -> dict[str, str]:
    found = connection.execute(sql.HOLDERS, {"relation": f"public.{table}"}).fetchall()
    return dict(found)


def _patiently(do: Do, connection: psycopg.Connection, partition: Partition) -> str | None:
    """Do a step, again while a lock isn't free; return why it couldn't be done, else None."""
    why = None
    for _ in range(PRUNE_ATTEMPTS):
        try:
            if do(connection, partition):
                return None
            kept_for = _call(connection, sql.KEPT_FOR, partition)
        except BusyError as error:
            why = str(error)
        else:
            return f"not published: {kept_for}" if kept_for else "changed meanwhile"
    return why
