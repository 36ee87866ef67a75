"""Eight writers of every kind that a real service has, and the truth about what they wrote.

Each event carries its key's number, drawn while the key's lock is held: in the topic the numbers
of a key must rise. Half of the keys are locked by their row, the others by an advisory lock taken
by a transaction whose first write is the outbox row.
"""

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg

KEYS_OF_EACH_KIND = 12
STEP_TIMEOUT_S = 30.0

SCHEMA = """
CREATE TABLE row_keys (key text PRIMARY KEY, number bigint NOT NULL);
CREATE TABLE early_writes (writer text);
INSERT INTO row_keys SELECT 'row-' || n, 0 FROM generate_series(1, %(keys)s) AS n;
"""
Kind = Callable[[psycopg.Connection, random.Random], int]
INSERT = "INSERT INTO outbox (topic, key, payload) VALUES (%s, %s, %s)"


class Rollback(Exception):  # noqa: N818  # it is no error
    """Thrown by a writer to take its transaction back."""


@dataclass
class Writers:
    """Runs one thread per kind of writer until `stop`; then the outbox table is the truth.

    `events` counts what is committed; with `events_per_s` they wait for one another's sum.
    """

    url: str
    topic: str
    seed: int
    burst_rows: int = 200
    events_per_s: float = math.inf
    commits: int = 0
    events: int = 0
    failures: list[BaseException] = field(default_factory=list)
    _began: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _progress: threading.Condition = field(default_factory=threading.Condition)
    _advisory_numbers: dict[str, int] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the tables that the writers lock."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(SCHEMA.replace("%(keys)s", str(KEYS_OF_EACH_KIND)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write while the block runs; all writers have ended behind it."""
        self._began = time.monotonic()
        kinds: list[Kind] = [
            self.row_lock_first,
            self.row_lock_first,
            self.outbox_insert_is_the_first_write,
            self.two_keys,
            self.late_lock_in_a_long_transaction,
            self.savepoints,
            self.rolls_back,
            self.bursts,
        ]
        threads = [
            threading.Thread(target=self._write, args=(kind, number))
            for number, kind in enumerate(kinds)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            with self._progress:
                self._progress.notify_all()
            for thread in threads:
                thread.join(STEP_TIMEOUT_S)
        assert not self.failures, self.failures
        assert not any(thread.is_alive() for thread in threads)

    def row_lock_first(self, connection: psycopg.Connection, chance: random.Random) -> int:
        with connection.transaction():
            self._write_row_key(connection, self._row_key(chance))
        return 1

    def outbox_insert_is_the_first_write(
        self, connection: psycopg.Connection, chance: random.Random
    ) -> int:
        """An advisory lock needs no transaction id: id and xid are drawn by the same INSERT."""
        key = f"advisory-{chance.randint(1, KEYS_OF_EACH_KIND)}"
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (key,))
            number = self._advisory_numbers.get(key, 0) + 1
            connection.execute(INSERT, (self.topic, key, json.dumps({"number": number})))
            # Before the commit, which lets the next holder in.
            self._advisory_numbers[key] = number
        return 1

    def two_keys(self, connection: psycopg.Connection, chance: random.Random) -> int:
        first, second = sorted(chance.sample(range(1, KEYS_OF_EACH_KIND + 1), 2))
        with connection.transaction():
            self._write_row_key(connection, f"row-{first}")
            self._write_row_key(connection, f"row-{second}")
        return 2

    def late_lock_in_a_long_transaction(
        self, connection: psycopg.Connection, chance: random.Random
    ) -> int:
        """An old transaction id with a young event: it sorts before those it comes after."""
        with connection.transaction():
            connection.execute("INSERT INTO early_writes VALUES ('long')")
            self._wait_for_others(commits=chance.randint(20, 200))
            self._write_row_key(connection, self._row_key(chance))
        return 1

    def savepoints(self, connection: psycopg.Connection, chance: random.Random) -> int:
        key = self._row_key(chance)
        with connection.transaction():
            self._write_row_key(connection, key)
            try:
                with connection.transaction():
                    self._write_row_key(connection, key)
                    raise Rollback  # noqa: TRY301
            except Rollback:
                self._write_row_key(connection, key)
        return 2

    def rolls_back(self, connection: psycopg.Connection, chance: random.Random) -> int:
        try:
            with connection.transaction():
                self._write_row_key(connection, self._row_key(chance))
                raise Rollback  # noqa: TRY301
        except Rollback:
            return 0

    def bursts(self, connection: psycopg.Connection, chance: random.Random) -> int:
        names = {"topic": self.topic, "key": self._row_key(chance), "rows": self.burst_rows}
        with connection.transaction():
            connection.execute(
                "UPDATE row_keys SET number = number + %(rows)s WHERE key = %(key)s", names
            )
            connection.execute(
                "INSERT INTO outbox (topic, key, payload)"
                " SELECT %(topic)s, key, json_build_object('number', number - %(rows)s + n)"
                " FROM row_keys, generate_series(1, %(rows)s) AS n WHERE key = %(key)s ORDER BY n",
                names,
            )
        return self.burst_rows

    def _write_row_key(self, connection: psycopg.Connection, key: str) -> None:
        found = connection.execute(
            "UPDATE row_keys SET number = number + 1 WHERE key = %s RETURNING number", (key,)
        ).fetchone()
        assert found is not None
        connection.execute(INSERT, (self.topic, key, json.dumps({"number": found[0]})))

    @staticmethod
    def _row_key(chance: random.Random) -> str:
        return f"row-{chance.randint(1, KEYS_OF_EACH_KIND)}"

    def _write(self, kind: Kind, number: int) -> None:
        chance = random.Random(self.seed * 100 + number)  # noqa: S311
        try:
            with psycopg.connect(self.url, autocommit=True) as connection:
                while not self._stop.is_set():
                    events = kind(connection, chance)
                    with self._progress:
                        self.commits += 1
                        self.events += events
                        self._progress.notify_all()
                    self._stop.wait(self._ahead_s())
        except BaseException as error:  # noqa: BLE001  # told by running()
            self.failures.append(error)

    def _ahead_s(self) -> float:
        """How long until so many events may have been written."""
        return max(0.0, self._began + self.events / self.events_per_s - time.monotonic())

    def _wait_for_others(self, commits: int) -> None:
        with self._progress:
            target = self.commits + commits
            self._progress.wait_for(
                lambda: self.commits >= target or self._stop.is_set(), STEP_TIMEOUT_S
            )


@dataclass(frozen=True)
class Verdict:
    """What a reader made of the truth: numbers of events."""

    committed: int
    lost: int
    invented: int
    reordered: int
    doubled: int


def judge(url: str, published: list[tuple[str, int]]) -> Verdict:
    """Compare what was published, as (key, number) in order, with the outbox table."""
    with psycopg.connect(url) as connection:
        committed = {
            (key, payload["number"])
            for key, payload in connection.execute("SELECT key, payload FROM outbox").fetchall()
        }
    return compare(committed, published)


def compare(committed: set[tuple[str, int]], published: list[tuple[str, int]]) -> Verdict:
    """Compare what was published, as (key, number) in order, with what was committed.

    Under at_least_once a repetition is no fault: for order each event's first appearance counts.
    """
    first_seen = list(dict.fromkeys(published))
    reordered, last = 0, dict[str, int]()
    for key, number in first_seen:
        reordered += number < last.get(key, 0)
        last[key] = max(number, last.get(key, 0))
    return Verdict(
        committed=len(committed),
        lost=len(committed - set(first_seen)),
        invented=len(set(first_seen) - committed),
        reordered=reordered,
        doubled=len(published) - len(first_seen),
    )
