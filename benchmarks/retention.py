"""Days of an outbox in minutes: rows come, are read as the relay reads them, and are dropped.

    python -m benchmarks.retention --rows 50000000

Without Kafka: what is asked is whether anything grows with the partitions that have come and gone.
Each PARTITION_ROWS rows a new partition begins, each ROUND_ROWS what is published is pruned, so the
reader always has some partitions before it. Fails when something of the last three rounds is more
than LIMIT times what it was in the first three: the time to read an event, the size, the pages of a
poll that finds nothing.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.progress import track
from rich.table import Table

from devstack.postgres import PostgresServer
from devstack.processes import wait_until
from devstack.state import Run
from outbox_relay import leadership, reader, sql
from outbox_relay.reader import EMPTY_SNAPSHOT, Position
from outbox_relay.retention import AHEAD, Retention, survey
from tests.databases import ReservationDatabase, create_reservation_database

TOPIC = "concert-reservation"
RELAY = "benchmark"
ROUND_ROWS = 5_000_000
PARTITION_ROWS = 500_000
TRANSACTION_ROWS = 100_000
PRUNE_TIMEOUT_S = 120.0
CHUNK_ROWS = 5_000
CHUNK_BYTES = 8 * 2**20
LIMIT = 1.5
RESULTS = Path(__file__).parent / "results" / "retention.json"

# The trigger's cost is the writers', and the same for each row.
WITHOUT_TRIGGER = "ALTER TABLE outbox DISABLE TRIGGER outbox_refuse_unpublishable"
ONE_TOPIC = "DELETE FROM outbox_topics WHERE topic <> %s"
WRITE = """
INSERT INTO outbox (topic, key, payload)
SELECT %s, 'key-' || n %% 5000, json_build_object('n', n, 'pad', repeat('x', 60))
FROM generate_series(1, %s) AS n
"""
SAVE_CURSOR = """
INSERT INTO outbox_relay_cursor (relay_name, topic, delivery, leader_epoch, leader,
    published_snapshot, system_identifier, database_oid, timeline, wal_lsn)
VALUES (%s, %s, 'at_least_once', 1, '', %s::pg_snapshot, 1, 1, '1', '0/0')
ON CONFLICT (relay_name, topic) DO UPDATE SET published_snapshot = excluded.published_snapshot
"""


@dataclass(frozen=True)
class Round:
    """What a round gave; sizes and partitions at its end, before and after pruning."""

    rows: int
    write_us_per_event: float
    read_us_per_event: float
    idle_pages: int
    idle_ms: float
    partitions: int
    size_mb: float
    prune_ms: float
    partitions_after: int
    size_after_mb: float


class Outbox:
    """An outbox with its writer and its relay, and how far that has read."""

    def __init__(self, owner: psycopg.Connection, relay: psycopg.Connection) -> None:
        self._owner = owner
        self._relay = relay
        self._position = Position(EMPTY_SNAPSHOT, "0/0")

    def write(self, rows: int) -> float:
        """Insert rows; return the seconds."""
        began_s = time.monotonic()
        for _ in range(rows // TRANSACTION_ROWS):
            self._owner.execute(WRITE, (TOPIC, TRANSACTION_ROWS))
        return time.monotonic() - began_s

    def begin_partition(self) -> None:
        """Roll over, as maintenance does by time."""
        in_use = survey(self._relay)[0].in_use
        self._relay.execute(sql.ROLL_OVER, {"in_use": in_use})
        while sum(partition.ahead for partition in survey(self._relay)) < AHEAD:
            self._relay.execute(sql.ADD_PARTITION)

    def read(self, expected_rows: int) -> float:
        """Read everything new and move the cursor; return the seconds."""
        began_s, rows = time.monotonic(), 0
        while True:
            chunk = reader.read(
                self._relay, self._position, TOPIC, max_rows=CHUNK_ROWS, max_bytes=CHUNK_BYTES
            )
            rows += len(chunk.rows)
            if not chunk.rows and chunk.position == self._position:
                break
            self._position = chunk.position
        self._owner.execute(SAVE_CURSOR, (RELAY, TOPIC, self._position.published_snapshot))
        if rows != expected_rows:
            sys.exit(f"read {rows} rows of {expected_rows}")
        return time.monotonic() - began_s

    def idle_poll(self) -> tuple[int, float]:
        """Return the pages and the milliseconds of a poll that finds nothing."""
        parameters = self._position.unpublished() | {
            "topic": TOPIC,
            "max_rows": CHUNK_ROWS,
            "max_bytes": CHUNK_BYTES,
        }
        cursor = psycopg.ClientCursor[Any](self._relay)
        times_ms, pages = [], 0
        for _ in range(20):
            cursor.execute(
                f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {sql.READ_FRESH}", parameters
            )
            ((found,),) = cursor.fetchall()
            times_ms.append(found[0]["Execution Time"])
            plan = found[0]["Plan"]
            pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        return pages, statistics.median(times_ms)

    def state(self) -> tuple[int, float]:
        """Return the number of partitions and their size in MB."""
        found = survey(self._relay)
        return len(found), sum(partition.size_bytes for partition in found) / 1e6

    def prune(self) -> bool:
        """Drop all that may be dropped; return whether nothing stayed."""
        return not any(pruned.kept for pruned in Retention(0).prune(self._relay))

    def round(self, rows_before: int) -> Round:
        """Live through ROUND_ROWS rows, then prune."""
        write_s = read_s = 0.0
        for _ in range(ROUND_ROWS // PARTITION_ROWS):
            write_s += self.write(PARTITION_ROWS)
            self.begin_partition()
            read_s += self.read(PARTITION_ROWS)
        idle_pages, idle_ms = self.idle_poll()
        partitions, size_mb = self.state()
        began_s = time.monotonic()
        # Autovacuum may hold on to a partition for a while.
        wait_until(self.prune, PRUNE_TIMEOUT_S, "a partition stays")
        prune_ms = (time.monotonic() - began_s) * 1_000
        return Round(
            rows_before + ROUND_ROWS,
            write_s / ROUND_ROWS * 1e6,
            read_s / ROUND_ROWS * 1e6,
            idle_pages,
            idle_ms,
            partitions,
            size_mb,
            prune_ms,
            *self.state(),
        )


def ratios(rounds: list[Round]) -> dict[str, float]:
    """Return how the last three rounds compare with the first three, by what must stay flat."""
    return {
        name: statistics.median(getattr(each, name) for each in rounds[-3:])
        / statistics.median(getattr(each, name) for each in rounds[:3])
        for name in ("read_us_per_event", "size_mb", "size_after_mb", "idle_pages", "partitions")
    }


def show(rounds: list[Round], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for name in asdict(rounds[0]):
        table.add_column(name.replace("_", " "), justify="right")
    for each in rounds:
        rows, *figures = asdict(each).values()
        table.add_row(f"{rows:,}", *(f"{figure:,.4g}" for figure in figures))
    Console(width=120).print(table)


def live(database: ReservationDatabase, rows: int) -> list[Round]:
    """Let at least `rows` rows come and go."""
    rounds: list[Round] = []
    with (
        psycopg.connect(database.owner_url, autocommit=True) as owner,
        leadership.connect(database.relay_url) as relay,
    ):
        relay.execute("SET idle_session_timeout = 0")  # it is idle while rows are written
        # The newest partitions have no statistics yet: with a bitmap scan each chunk would read and
        # sort all the rest of one (14.5 us an event instead of 3.3).
        owner.execute(WITHOUT_TRIGGER)
        owner.execute(ONE_TOPIC, (TOPIC,))
        outbox = Outbox(owner, relay)
        for _ in track(range(0, rows, ROUND_ROWS), "rounds"):
            rounds.append(outbox.round(len(rounds) * ROUND_ROWS))
    return rounds


def main() -> None:
    """Run, print, save, and fail where something grew."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000_000)
    rows = parser.parse_args().rows
    with Run() as run:
        server = PostgresServer(run, "postgres-retention")
        try:
            server.start()
            version = server.version
            rounds = live(create_reservation_database(server), rows)
        finally:
            server.close()
    show(rounds, f"An outbox over time, {version}")
    found = ratios(rounds)
    print("last / first: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()))
    content = {"server": version, "rounds": [asdict(each) for each in rounds], "ratios": found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    grown = {name: ratio for name, ratio in found.items() if ratio > LIMIT}
    if grown:
        sys.exit(f"grown: {grown}")


if __name__ == "__main__":
    main()
