"""Reading by snapshot difference, on a real Postgres."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from outbox_relay import leadership, reader, sql, status
from outbox_relay.reader import EMPTY_SNAPSHOT, Position
from tests.conftest import MakePostgresServer
from tests.databases import ReservationDatabase, create_reservation_database

TOPIC, RARE = "concert-reservation", "concert-catalogue"
START = Position(published_snapshot=EMPTY_SNAPSHOT, wal_lsn="0/0")
INSERT = "INSERT INTO outbox (topic, key, payload) VALUES (%s, 'k', %s)"


@pytest.fixture
def connection(reservation_database: ReservationDatabase) -> Iterator[psycopg.Connection]:
    """The relay's own connection."""
    with leadership.connect(reservation_database.relay_url) as connection:
        connection.execute(sql.BE_PATIENT)  # filling a table takes its time
        yield connection


@contextmanager
def writer(database: ReservationDatabase) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database.owner_url) as connection:
        yield connection


def insert(connection: psycopg.Connection, *numbers: int) -> None:
    for number in numbers:
        connection.execute(INSERT, (TOPIC, json.dumps(number)))


def read_all(
    connection: psycopg.Connection,
    position: Position,
    max_rows: int = 100,
    max_bytes: int = 1_000_000,
) -> tuple[list[int], Position]:
    """Read chunk by chunk until nothing is new."""
    numbers: list[int] = []
    while True:
        chunk = reader.read(connection, position, TOPIC, max_rows=max_rows, max_bytes=max_bytes)
        if chunk.position == position:
            return numbers, position
        assert len(chunk.rows) <= max_rows
        numbers += [json.loads(row[2]) for row in chunk.rows]
        position = chunk.position


def test_a_long_transaction_holds_up_its_own_rows_only(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    with writer(reservation_database) as slow, writer(reservation_database) as quick:
        insert(slow, 1)
        insert(quick, 2)
        quick.commit()
        numbers, position = read_all(connection, START)
        assert numbers == [2]
        insert(quick, 3)
        quick.commit()
        numbers, position = read_all(connection, position)
        assert numbers == [3]
        slow.commit()
        numbers, position = read_all(connection, position)
        assert numbers == [1]
        assert read_all(connection, position)[0] == []


def test_rows_of_rolled_back_transactions_and_savepoints_are_never_read(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    with writer(reservation_database) as connection_of_writer:
        insert(connection_of_writer, 1)
        connection_of_writer.rollback()
        insert(connection_of_writer, 2)
        connection_of_writer.execute("SAVEPOINT s")
        insert(connection_of_writer, 3)
        connection_of_writer.execute("ROLLBACK TO s")
        insert(connection_of_writer, 4)
    assert read_all(connection, START)[0] == [2, 4]


def test_a_row_whose_transaction_lies_in_the_future_is_not_read_again_and_again(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    with writer(reservation_database) as restored:
        # As when a dump is restored: its data comes before its triggers.
        restored.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_refuse_unpublishable")
        restored.execute(
            "INSERT INTO outbox (topic, key, payload, transaction_id)"
            " VALUES (%s, 'k', '1', '999999999999')",
            (TOPIC,),
        )
        restored.execute("ALTER TABLE outbox ENABLE TRIGGER outbox_refuse_unpublishable")
        insert(restored, 2)
    numbers, position = read_all(connection, START)
    assert numbers == [2]
    assert read_all(connection, position, max_rows=1) == ([], position)


def test_a_big_batch_is_read_to_its_end_with_one_snapshot_from_any_stored_position(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    with writer(reservation_database) as early, writer(reservation_database) as others:
        insert(early, 0)  # the batch's lowest id, not committed when it begins
        insert(others, *range(1, 26))
        others.commit()
        chunk = reader.read(connection, START, TOPIC, max_rows=10, max_bytes=1_000_000)
        early.commit()
        insert(others, 26)
        others.commit()
        # From the stored position in the middle, as often as one restarts: the same rows.
        for _ in range(2):
            numbers, _ = read_all(connection, chunk.position, max_rows=10)
            assert numbers == [*range(11, 26), 0, 26]
        assert [json.loads(row[2]) for row in chunk.rows] == list(range(1, 11))


@pytest.mark.parametrize("rows", [9, 10, 11, 20, 21])
def test_batches_around_the_size_of_a_chunk_are_read_whole_and_in_order(
    reservation_database: ReservationDatabase, connection: psycopg.Connection, rows: int
) -> None:
    with writer(reservation_database) as connection_of_writer:
        insert(connection_of_writer, *range(rows))
    numbers, position = read_all(connection, START, max_rows=10)
    assert numbers == list(range(rows))
    assert position.batch_snapshot is None


def test_a_chunk_is_bounded_in_bytes_and_the_rest_of_its_batch_follows(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    large = "x" * 100_000  # stored out of line
    with writer(reservation_database) as connection_of_writer:
        for _ in range(10):
            connection_of_writer.execute(INSERT, (TOPIC, json.dumps(large)))
    with writer(reservation_database) as connection_of_writer:
        # Headers count as well, and what compresses well counts in full.
        for _ in range(4):
            connection_of_writer.execute(
                "INSERT INTO outbox (topic, key, payload, headers) VALUES (%s, 'k', '1', %s)",
                (TOPIC, json.dumps({"h": large})),
            )
    position, chunks = START, []
    while True:
        chunk = reader.read(connection, position, TOPIC, max_rows=100, max_bytes=250_000)
        if chunk.position == position:
            break
        position = chunk.position
        chunks.append(len(chunk.rows))
    assert [count for count in chunks if count] == [3, 3, 3, 3, 2]


def test_rows_that_grow_all_of_a_sudden_do_not_come_all_at_once(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    """A chunk is reckoned from its first rows; the others are counted as they come."""
    large = "x" * 100_000
    with writer(reservation_database) as connection_of_writer:
        insert(connection_of_writer, *range(60))
        for _ in range(200):
            connection_of_writer.execute(INSERT, (TOPIC, json.dumps(large)))
    position, chunks = START, []
    while True:
        chunk = reader.read(connection, position, TOPIC, max_rows=100, max_bytes=250_000)
        if chunk.position == position:
            break
        position = chunk.position
        chunks.append(chunk.rows)
    assert sum(map(len, chunks)) == 260
    bound = 2 * 250_000 + reader.STREAM_ROWS * 100_002
    assert max(sum(len(row[2]) for row in rows) for rows in chunks) <= bound


def test_a_rare_topic_is_read_in_steps_past_another_ones_rows(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    ids_between = 3 * sql.WINDOW_IDS
    with writer(reservation_database) as connection_of_writer:
        insert(connection_of_writer, 1)
        connection_of_writer.execute(
            "ALTER TABLE outbox DISABLE TRIGGER outbox_refuse_unpublishable"
        )
        connection_of_writer.execute(
            "INSERT INTO outbox (topic, key, payload)"
            " SELECT 'concert-catalogue', 'k', '0' FROM generate_series(1, %s)",
            [ids_between],
        )
        insert(connection_of_writer, *range(2, 20))
    position, steps, numbers = START, 0, []
    while True:
        chunk = reader.read(connection, position, TOPIC, max_rows=10, max_bytes=1_000_000)
        if chunk.position == position:
            break
        numbers += [json.loads(row[2]) for row in chunk.rows]
        position, steps = chunk.position, steps + 1
    assert numbers == list(range(1, 20))
    assert ids_between // sql.WINDOW_IDS <= steps <= 10


def test_what_a_batch_stands_on_survives_a_crash_that_hands_out_transaction_ids_again(
    make_postgres_server: MakePostgresServer,
) -> None:
    # The WAL writer sleeps: only a commit brings records to the disk.
    server = make_postgres_server({"wal_writer_delay": "10s", "autovacuum": "off"})
    database = create_reservation_database(server)
    with writer(database) as connection_of_writer:
        insert(connection_of_writer, 1)
        connection_of_writer.commit()
        for _ in range(50):  # rolled back: their ids are drawn, their records not on disk
            insert(connection_of_writer, -1)
            connection_of_writer.rollback()
        with leadership.connect(database.relay_url) as connection:
            numbers, position = read_all(connection, START)
        assert numbers == [1]
        server.kill()
    server.start()
    with leadership.connect(database.relay_url) as connection:
        for number in range(2, 12):
            with writer(database) as connection_of_writer:
                insert(connection_of_writer, number)
        assert read_all(connection, position)[0] == list(range(2, 12))


# --- Plans -------------------------------------------------------------------------------------

ROWS = 1_000_000
FILL = """
INSERT INTO outbox (topic, key, payload)
SELECT 'concert-reservation', 'key-' || n % 5000, json_build_object('n', n, 'pad', repeat('x', 100))
FROM generate_series(1, %(rows)s) AS n
"""


def positional(statement: str, parameters: Mapping[str, object]) -> tuple[str, list[object]]:
    """Return a statement with $1, $2, ... as Postgres prepares it, and their values."""
    values = []
    for number, (name, value) in enumerate(parameters.items(), start=1):
        statement = statement.replace(f"%({name})s", f"${number}")
        values.append(value)
    return statement.replace("%%", "%"), values


def buffers_and_nodes(
    connection: psycopg.Connection, mode: str, statement: str, parameters: Mapping[str, object]
) -> tuple[int, set[str], int]:
    """Run a statement under a plan mode; return pages touched, kinds of nodes, rows."""
    text, values = positional(statement, parameters)
    connection.execute(f"SET plan_cache_mode = {mode}")
    connection.execute(f"PREPARE examined AS {text}")
    try:
        placeholders = ", ".join("%s" for _ in values)
        found = connection.execute(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE examined({placeholders})",
            [literal(value) for value in values],
        ).fetchone()
    finally:
        connection.execute("DEALLOCATE examined")
    assert found is not None
    plan = (found[0] if isinstance(found[0], list) else json.loads(found[0]))[0]["Plan"]
    nodes = [plan]
    for node in nodes:
        nodes += node.get("Plans", [])
    touched = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return touched, {node["Node Type"] for node in nodes}, plan["Actual Rows"]


def literal(value: object) -> object:
    return "{" + ",".join(map(str, value)) + "}" if isinstance(value, list) else value


def test_plans_on_a_million_rows_touch_few_pages_and_scan_nothing_sequentially(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    with (
        writer(reservation_database) as late,
        writer(reservation_database) as filler,
    ):
        filler.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_refuse_unpublishable")
        filler.commit()
        insert(late, 1)  # its id lies a million rows back
        filler.execute(FILL.replace("%(rows)s", str(ROWS)))
        filler.commit()
        filler.autocommit = True
        filler.execute("ANALYZE outbox")
        published = reader.read(connection, START, TOPIC, max_rows=10, max_bytes=1).position
        assert published.batch_snapshot is not None
        published = Position(published_snapshot=published.batch_snapshot, wal_lsn="0/0")
        fresh = {"topic": TOPIC, "max_rows": 5_000, "max_bytes": 1_000_000}
        with leadership.connect(reservation_database.relay_url) as relay:
            relay.cursor_factory = psycopg.ClientCursor[Any]
            for mode in ("force_generic_plan", "force_custom_plan"):
                parameters = {**published.unpublished(), **fresh}
                idle = buffers_and_nodes(relay, mode, sql.READ_FRESH, parameters)
                assert idle[0] <= 30, idle
                assert idle[2] == 0
                assert "Seq Scan" not in idle[1]
        late.commit()
        for number in range(10):
            filler.execute(INSERT, (TOPIC, json.dumps(number)))
        with leadership.connect(reservation_database.relay_url) as relay:
            relay.cursor_factory = psycopg.ClientCursor[Any]
            for mode in ("force_generic_plan", "force_custom_plan"):
                parameters = {**published.unpublished(), **fresh}
                small = buffers_and_nodes(relay, mode, sql.READ_FRESH, parameters)
                assert small[2] == 11
                assert small[0] <= 60, small
                assert "Seq Scan" not in small[1]
                begin = buffers_and_nodes(
                    relay,
                    mode,
                    sql.BEGIN_BIG_BATCH,
                    {**published.unpublished(), "topic": TOPIC},
                )
                assert begin[0] <= 60, begin
                assert "Seq Scan" not in begin[1]
                middle = buffers_and_nodes(
                    relay,
                    mode,
                    sql.READ_BIG_BATCH,
                    {
                        "after_id": ROWS // 2,
                        "window_end_id": ROWS // 2 + sql.WINDOW_IDS,
                        "published_snapshot": EMPTY_SNAPSHOT,
                        "batch_snapshot": published.published_snapshot,
                        "topic": TOPIC,
                        "max_rows": 1_000,
                        "max_bytes": 1_000_000,
                    },
                )
                assert middle[2] == 1_000
                assert middle[0] <= 200, middle
                assert "Seq Scan" not in middle[1]


def test_a_rare_topic_far_behind_is_read_without_one_long_statement(
    reservation_database: ReservationDatabase,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with writer(reservation_database) as filler:
        filler.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_refuse_unpublishable")
        insert_rare = "INSERT INTO outbox (topic, key, payload) VALUES (%s, 'k', %s)"
        filler.execute(insert_rare, (RARE, "1"))
        filler.commit()
        published = snapshot_of(connection)
        filler.execute(FILL.replace("%(rows)s", str(ROWS // 2)))
        filler.execute(insert_rare, (RARE, "2"))
    monkeypatch.setattr(sql, "WINDOW_IDS", ROWS // 200)
    connection.execute("SET statement_timeout = '100ms'")
    for position in (START, Position(published, "0/0")):
        assert reader.skip_other_topics(connection, position, RARE) == position
        rest, payloads = position, []
        while (
            chunk := reader.read(connection, rest, RARE, max_rows=100, max_bytes=1000)
        ).position != rest:
            rest = chunk.position
            payloads += [row[2] for row in chunk.rows]
        assert payloads == ([b"1", b"2"] if position is START else [b"2"])


def snapshot_of(connection: psycopg.Connection) -> str:
    found = connection.execute(sql.SNAPSHOT).fetchone()
    assert found is not None
    return str(found[0])


def test_the_gauge_of_a_backlog_costs_no_more_than_it_may_and_is_exact_where_it_is_small(
    reservation_database: ReservationDatabase, connection: psycopg.Connection
) -> None:
    with writer(reservation_database) as open_one, writer(reservation_database) as filler:
        insert(open_one, 0)
        insert(filler, *range(1, 31))
        filler.execute(INSERT, (RARE, "0"))
        filler.commit()
        chunk = reader.read(connection, START, TOPIC, max_rows=10, max_bytes=1_000_000)
        assert chunk.position.batch_snapshot is not None
        open_one.commit()
        insert(filler, 31, 32)
        filler.commit()
        for position, rows in ((START, 33), (chunk.position, 23)):
            assert status.lag(connection, TOPIC, position)[0] == rows
            assert status.lag_at_least(connection, TOPIC, position)[0] == rows
        filler.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_refuse_unpublishable")
        filler.execute(FILL.replace("%(rows)s", str(3 * sql.LAG_MAX_ROWS)))
        filler.commit()
    assert status.lag_at_least(connection, TOPIC, START)[0] == sql.LAG_MAX_ROWS - 1
    rows, age_s = status.lag_at_least(connection, TOPIC, chunk.position)
    assert sql.LAG_MAX_ROWS <= rows <= sql.LAG_MAX_ROWS + 21
    in_a_batch = replace(chunk.position, batch_snapshot=snapshot_of(connection))
    assert status.lag_at_least(connection, TOPIC, in_a_batch)[0] == sql.LAG_MAX_ROWS - 1
    assert age_s > 0


def test_every_statement_is_one_that_postgres_prepares(connection: psycopg.Connection) -> None:
    statements = {
        name: text
        for name, text in vars(sql).items()
        if name.isupper() and isinstance(text, str) and name != "SESSION_OPTIONS"
    }
    assert len(statements) > 10
    for name, text in statements.items():
        parameters = dict.fromkeys(part.split(")s")[0] for part in text.split("%(")[1:])
        connection.execute(f"PREPARE {name} AS {positional(text, parameters)[0]}")
