"""`data-platform rebuild`: what comes out, and what nobody may notice."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from data_platform import __main__ as command
from data_platform import config, rebuild
from data_platform.topics import Topics
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import Event, event, history
from tests.waiting import wait_until

Rows = dict[str, list[dict[str, Any]]]

TABLES = {
    "fct_reservation_events": "reservation_id, version",
    "fct_reservations": "reservation_id",
    "fct_reservation_seats": "reservation_id, seat_id",
    "dim_concerts": "concert_id",
    "dim_performances": "performance_id",
    "dead_letters": "topic, kafka_partition, kafka_offset",
}
# Everything that the catalogue knows of the tables and what depends on them, without numbers.
CATALOGUE = {
    "relations": """
        SELECT relname, relkind, relpersistence, relreplident, relrowsecurity, reloptions,
            pg_get_userbyid(relowner), relnatts, reltablespace, relacl::text,
            obj_description(oid, 'pg_class')
        FROM pg_class WHERE relnamespace = 'analytics'::regnamespace ORDER BY relname
    """,
    "columns": """
        SELECT relname, attnum, attname, format_type(atttypid, atttypmod), attnotnull, attcollation,
            attstorage, attcompression, attidentity, attgenerated, attacl::text,
            pg_get_expr(adbin, adrelid), col_description(pg_class.oid, attnum)
        FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid
        LEFT JOIN pg_attrdef ON adrelid = pg_class.oid AND adnum = attnum
        WHERE relnamespace = 'analytics'::regnamespace AND attnum > 0 AND NOT attisdropped
        ORDER BY relname, attnum
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, contype, pg_get_constraintdef(oid), convalidated,
            obj_description(oid, 'pg_constraint')
        FROM pg_constraint WHERE connamespace = 'analytics'::regnamespace ORDER BY 1, 2
    """,
    "indexes": """
        SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid, indisprimary,
            obj_description(indexrelid, 'pg_class')
        FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
        WHERE relnamespace = 'analytics'::regnamespace ORDER BY 1
    """,
    # Postgres names a nameless column of a UNION's later branch once it has read its own text.
    "views": r"""
        SELECT viewname, viewowner,
            regexp_replace(definition, 'NULL::(\w+) AS \w+', 'NULL::\1', 'g')
        FROM pg_views WHERE schemaname = 'analytics'
        ORDER BY 1
    """,
    "functions": """
        SELECT proname, prosrc, proacl::text FROM pg_proc
        WHERE pronamespace = 'analytics'::regnamespace ORDER BY 1
    """,
    "schemas": "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'analytics%' ORDER BY 1",
    "triggers": "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal",
}
DAMAGE = """
DELETE FROM analytics.fct_reservation_events
WHERE reservation_id = (SELECT min(reservation_id) FROM analytics.fct_reservations) AND version = 1;
UPDATE analytics.fct_reservations SET amount = amount + 1
WHERE reservation_id = (SELECT max(reservation_id) FROM analytics.fct_reservations);
INSERT INTO analytics.fct_reservations
SELECT 'nobody-made-this', version, status, customer_id, concert_id, performance_id, seat_count,
    amount, currency, created_at, updated_at, expires_at
FROM analytics.fct_reservations LIMIT 1;
"""


def test_what_was_altered_deleted_or_added_by_hand_is_named_and_as_before_afterwards(
    platform: Platform,
) -> None:
    events = history(40, seed=1)
    _load(platform, events, [(b"broken", b"{"), (None, None)])
    rows, catalogue = _rows(platform), _catalogue(platform)
    platform.execute(DAMAGE)

    compared = platform.command("rebuild", "--dry-run", "--json")
    done = platform.command("rebuild", "--json")
    again = platform.command("rebuild", "--dry-run")

    found = json.loads(done.stdout)
    assert (compared.returncode, done.returncode, again.returncode) == (1, 0, 0), done.stderr
    assert {(one["what"], one["where"]) for one in found["differences"]} == {
        ("missing", "fct_reservation_events"),
        ("altered", "fct_reservations.amount"),
        ("extra", "fct_reservations"),
    }
    assert json.loads(compared.stdout)["differences"] == found["differences"]
    assert found["changed"] == [
        "fct_reservation_events",
        "fct_reservations",
        "fct_reservation_seats",
    ]
    assert (found["events"], found["dead_letters"]) == (len(events), 2)
    _assert_equal_but_for_load_time(rows, _rows(platform), times=2)
    assert _catalogue(platform) == catalogue


def test_tables_that_were_emptied_come_back_with_every_right_index_comment_and_view(
    platform: Platform,
) -> None:
    events = history(30, seed=2)
    _load(platform, events, [(b"broken", b"{")])
    rows, catalogue = _rows(platform), _catalogue(platform)
    platform.execute(f"TRUNCATE {', '.join(f'analytics.{table}' for table in TABLES)}")
    platform.execute("GRANT SELECT (reservation_id) ON analytics.fct_reservations TO PUBLIC")
    catalogue = _catalogue(platform)

    done = platform.command("rebuild")

    assert done.returncode == 0, done.stderr
    assert _catalogue(platform) == catalogue
    _assert_equal_but_for_load_time(rows, _rows(platform), times=None)
    with psycopg.connect(platform.database.analyst_url) as analyst:
        counted = analyst.execute("SELECT sum(started)::bigint FROM analytics.booking_funnel")
        assert counted.fetchone() == (30,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            analyst.execute("SELECT FROM analytics.dead_letters")
    _load(platform, [event("afterwards")], before=len(events) + 1)
    assert "afterwards" in {row[0] for row in platform.states()}


def test_workers_and_readers_go_on_and_what_comes_meanwhile_is_there(platform: Platform) -> None:
    events = history(400, seed=3)
    half = len(events) // 2
    _load(platform, events[:half])
    worker = platform.worker()
    stop, readings = threading.Event(), list[tuple[Any, ...]]()

    def produce_and_read() -> None:
        with psycopg.connect(platform.database.analyst_url, autocommit=True) as analyst:
            for at in range(half, len(events), 20):
                platform.produce(events[at : at + 20])
                readings.extend(
                    analyst.execute(
                        "SELECT count(*), (SELECT count(*) FROM analytics.fct_reservation_events)"
                        " FROM analytics.fct_reservations"
                    )
                )
        stop.set()

    thread = threading.Thread(target=produce_and_read)
    thread.start()
    try:
        while not stop.is_set():
            platform.execute("UPDATE analytics.fct_reservations SET amount = amount + 1")
            done = platform.command("rebuild")
            assert done.returncode == 0, done.stderr
    finally:
        thread.join()
    wait_until(lambda: len(platform.facts()) == len(events), 30, "everything loaded")
    worker.stop(15)

    assert [row[1] for row in readings] == sorted(row[1] for row in readings)
    compared = platform.command("rebuild", "--dry-run", "--json")
    assert json.loads(compared.stdout)["differences"] == []
    assert "dead_letters" not in worker.log.read_text()


TOUCH_THE_ADDED_ONE = """
UPDATE analytics.fct_reservations SET loaded_at = now() WHERE reservation_id = 'nobody-made-this'
"""


def test_what_workers_load_between_filling_and_comparing_hides_no_damage(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "LAST_LOOKS", 10)
    for name, value in platform.environment().items():
        monkeypatch.setenv(name, value)
    settings = config.load(config.RebuildSettings)
    events = history(60, seed=6)
    _load(platform, events)
    platform.execute(DAMAGE)
    with rebuild._connected(platform.database.owner_url) as connection:
        work = rebuild._Rebuild(
            connection,
            Topics(settings.client_properties()),
            settings.consumer_properties(),
            command._decoders(settings),
        )
        work.begin()
        work.fill()
        _load(platform, history(200, seed=7), before=len(events))
        # To the end of its file, behind all of these.
        platform.execute(TOUCH_THE_ADDED_ONE)
        work.compare()
        done = work.swap(dry_run=True)
        work.clean_up()
    assert {(one.what, one.where) for one in done.differences} == {
        ("missing", "fct_reservation_events"),
        ("altered", "fct_reservations.amount"),
        ("extra", "fct_reservations"),
    }
    assert len(done.differences) == 3


@pytest.mark.parametrize("sign", ["rebuild_reads", "rebuild_tries_again"])
def test_killed_it_has_changed_nothing_and_the_next_one_cleans_up(
    platform: Platform, sign: str
) -> None:
    _load(platform, history(20, seed=4))
    platform.execute("UPDATE analytics.fct_reservations SET amount = amount + 1")
    rows, catalogue = _rows(platform), _catalogue(platform)

    with psycopg.connect(platform.database.owner_url) as reader:
        # A query that goes on keeps the tables from being exchanged.
        reader.execute("SELECT FROM analytics.fct_reservations")
        killed = platform.run_process("data_platform", "rebuild", env=platform.environment())
        wait_until(lambda: sign in killed.log.read_text(), 30, sign)
        second = platform.command("rebuild")
        killed.kill()

    assert second.returncode == 1
    assert "another rebuild or a migration is at work" in second.stderr
    assert _rows(platform) == rows
    # Postgres may notice a second later that nobody is there any more.
    wait_until(lambda: platform.command("rebuild").returncode == 0, 30, "the next rebuild")
    assert _catalogue(platform) == catalogue
    assert _rows(platform) != rows


def test_bad_records_stay_dead_letters_and_those_that_are_good_by_now_are_loaded(
    platform: Platform,
) -> None:
    good = event("good-by-now")
    _load(platform, [event("good")], [(b"broken", b"{"), (good.key, good.value)])
    # As if an older worker had not known it.
    platform.execute(
        "DELETE FROM analytics.fct_reservation_events WHERE reservation_id = 'good-by-now';"  # noqa: S608 - ours
        "DELETE FROM analytics.fct_reservation_seats WHERE reservation_id = 'good-by-now';"
        "DELETE FROM analytics.fct_reservations WHERE reservation_id = 'good-by-now';"
        "UPDATE analytics.dead_letters SET error = 'as said then', first_seen_at = '2020-1-1';"
        # Whose record the topic no longer has.
        "INSERT INTO analytics.dead_letters (topic, kafka_partition, kafka_offset, reason, error)"
        f" VALUES ('{platform.topic}', 0, -1, 'unknown-type', '')"
    )
    letters = platform.rows("SELECT * FROM analytics.dead_letters")
    platform.execute(
        "INSERT INTO analytics.dead_letters (topic, kafka_partition, kafka_offset, reason, error)"
        f" SELECT '{platform.topic}', 0, {_last_offset(platform)}, 'unknown-type', ''"
    )

    done = platform.command("rebuild")

    assert done.returncode == 0, done.stderr
    assert platform.rows("SELECT * FROM analytics.dead_letters") == letters
    assert [row[0] for row in platform.facts()] == ["good", "good-by-now"]


def test_it_refuses_what_would_lose_something(platform: Platform) -> None:
    _load(platform, history(5, seed=5))
    rows = _rows(platform)

    platform.execute(
        "CREATE MATERIALIZED VIEW analytics.mine AS SELECT * FROM analytics.dim_concerts"
    )
    dependent = platform.command("rebuild")
    platform.execute("DROP MATERIALIZED VIEW analytics.mine")
    platform.execute("UPDATE analytics.load_offsets SET topic_id = 'was ' || topic_id")
    anew = platform.command("rebuild")
    platform.execute("UPDATE analytics.load_offsets SET topic_id = substr(topic_id, 5)")
    loaded = int(
        platform.rows("SELECT min(kafka_partition) FROM analytics.fct_reservation_events")[0][0]
    )
    admin = AdminClient({"bootstrap.servers": platform.bootstrap_servers})
    for future in admin.delete_records([TopicPartition(platform.topic, loaded, 1)]).values():
        future.result(10)
    shortened = platform.command("rebuild")

    assert [one.returncode for one in (dependent, anew, shortened)] == [1, 1, 1]
    assert "the topic was made anew" in anew.stderr
    assert "mine" in dependent.stderr
    assert "begins at 1: only the tables have what was before" in shortened.stderr
    assert "backup" in shortened.stderr
    assert _rows(platform) == rows


def test_its_lock_is_the_migrations_lock(platform: Platform) -> None:
    with psycopg.connect(platform.database.owner_url) as migration:
        migration.execute("SELECT pg_advisory_lock(%s)", [0x636F6E63657274])
        refused = platform.command("rebuild")
    assert (refused.returncode, "migration" in refused.stderr) == (1, True)


def _load(
    platform: Platform,
    events: Sequence[Event],
    bad: Sequence[tuple[bytes | None, bytes | None]] = (),
    before: int = 0,
) -> None:
    """Let a worker load these; `before` records are loaded already."""
    platform.produce(events)
    platform.produce_raw(bad, partition=0)
    worker = platform.worker()
    platform.wait_for_offsets(before + len(events) + len(bad))
    assert worker.stop(15) == 0


def _rows(platform: Platform) -> Rows:
    return {
        table: [
            row[0]
            for row in platform.rows(
                f"SELECT to_jsonb(stored) FROM analytics.{table} AS stored ORDER BY {key}"  # noqa: S608 - ours
            )
        ]
        for table, key in TABLES.items()
    }


def _catalogue(platform: Platform) -> dict[str, list[tuple[Any, ...]]]:
    return {what: platform.rows(query) for what, query in CATALOGUE.items()}


def _assert_equal_but_for_load_time(before: Rows, after: Rows, times: int | None) -> None:
    """`times`: in how many rows the time of load differs; None: wherever."""
    differing = []
    for table, rows in before.items():
        assert len(rows) == len(after[table]), table
        for row, again in zip(rows, after[table], strict=True):
            differing += [(table, name) for name, value in row.items() if value != again[name]]
    assert {name for _, name in differing} <= {"loaded_at", "first_seen_at"}, differing
    assert times in (len(differing), None)


def _last_offset(platform: Platform) -> int:
    query = (
        "SELECT next_offset FROM analytics.load_offsets WHERE topic = %(t)s AND kafka_partition = 0"
    )
    return int(platform.rows(query, {"t": platform.topic})[0][0]) - 1
