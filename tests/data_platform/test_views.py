"""The analysts' views on data whose answers can be counted by hand, and who may do what."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest

import migrations
from devstack.postgres import PostgresServer
from tests.data_platform.season import (
    SEASON,
    put,
    put_catalogue,
    put_place,
    put_season,
)
from tests.databases import AnalyticsDatabase
from tests.waiting import wait_until

VIEWS = ("daily_bookings", "performance_occupancy", "booking_funnel", "freshness")
TABLES = (
    "fct_reservation_events",
    "fct_reservations",
    "fct_reservation_seats",
    "dim_concerts",
    "dim_performances",
)
DAILY = """
SELECT day, performance_id, currency, bookings, seats, revenue
FROM analytics.daily_bookings ORDER BY day, performance_id, currency
"""
FUNNEL = """
SELECT day, performance_id, started, open, completed, cancelled_before_completion,
    cancelled_after_completion, expired, mean_seconds_to_complete
FROM analytics.booking_funnel ORDER BY day, performance_id
"""
OCCUPANCY = """
SELECT performance_id, title, capacity, bookings, booked_seats, held_seats, occupancy, revenue,
    currency
FROM analytics.performance_occupancy ORDER BY performance_id
"""


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


def march(day: int) -> date:
    return date(2026, 3, day)


# ---- what they say


@pytest.mark.parametrize("with_days", [True, False])
def test_bookings_count_on_the_day_that_the_performance_s_place_had(
    analytics_database: AnalyticsDatabase,
    with_days: bool,  # noqa: FBT001
) -> None:
    put_catalogue(analytics_database.owner_url)
    put(analytics_database.owner_url, SEASON, with_days=with_days)
    assert ask(analytics_database.analyst_url, DAILY) == [
        (march(2), 11, "EUR", 1, 2, 10_000),
        (march(3), 11, "EUR", 2, 2, 14_000),  # one at 23:30 UTC, one that is cancelled later
        (march(3), 21, "USD", 1, 2, 20_000),  # at 03:00 UTC on 4 March
        (march(4), 12, "EUR", 1, 3, 18_000),
        (march(5), 21, "USD", 1, 1, 12_500),
    ]


@pytest.mark.parametrize("with_days", [True, False])
def test_the_funnel_tells_what_became_of_what_was_begun_on_a_day(
    analytics_database: AnalyticsDatabase,
    with_days: bool,  # noqa: FBT001
) -> None:
    put_catalogue(analytics_database.owner_url)
    put(analytics_database.owner_url, SEASON, with_days=with_days)
    rows = ask(analytics_database.analyst_url, FUNNEL)
    assert rows == [
        (march(2), 11, 1, 0, 1, 0, 0, 0, 60.0),
        (march(3), 11, 2, 0, 2, 0, 1, 0, 450.0),
        (march(3), 21, 1, 0, 1, 0, 0, 0, 120.0),
        (march(4), 12, 2, 0, 1, 0, 0, 1, 0.0),
        (march(5), 21, 1, 0, 1, 0, 0, 0, 240.0),
        (march(6), 11, 1, 1, 0, 0, 0, 0, None),
        (march(6), 12, 1, 0, 0, 0, 0, 1, None),  # run out, though no event has told so
        (march(6), 21, 1, 0, 0, 1, 0, 0, None),
    ]
    for row in rows:
        assert row[2] == row[3] + row[4] + row[5] + row[7]


def test_rows_with_and_without_a_day_add_up(analytics_database: AnalyticsDatabase) -> None:
    put_catalogue(analytics_database.owner_url)
    put(analytics_database.owner_url, SEASON[:2], with_days=False)
    put(analytics_database.owner_url, [replace(SEASON[0], reservation_id="later")])
    assert ask(analytics_database.analyst_url, DAILY)[0] == (march(2), 11, "EUR", 2, 4, 20_000)
    assert ask(analytics_database.analyst_url, FUNNEL)[0][2] == 2


def test_a_performance_shows_what_stands_and_one_nobody_booked_its_capacity(
    analytics_database: AnalyticsDatabase,
) -> None:
    put_season(analytics_database.owner_url)
    strings, harbour = "Nacht der Streicher", "Harbour Lights"
    assert ask(analytics_database.analyst_url, OCCUPANCY) == [
        (11, strings, 10, 2, 3, 2, Decimal("0.3000"), 15_000, "EUR"),
        (12, strings, 10, 1, 3, 0, Decimal("0.3000"), 18_000, "EUR"),
        (21, harbour, 20, 2, 3, 0, Decimal("0.1500"), 32_500, "USD"),
        (31, "Nobody Comes", 50, 0, 0, 0, Decimal(0), 0, "EUR"),
    ]


def test_money_of_two_currencies_is_never_added_up(analytics_database: AnalyticsDatabase) -> None:
    put_catalogue(analytics_database.owner_url)
    put(
        analytics_database.owner_url,
        [SEASON[0], replace(SEASON[0], reservation_id="usd", currency="USD")],
    )
    both = ask(analytics_database.analyst_url, DAILY)
    assert [(row[2], row[5]) for row in both] == [("EUR", 10_000), ("USD", 10_000)]
    (mixed,) = (row for row in ask(analytics_database.analyst_url, OCCUPANCY) if row[0] == 11)
    assert mixed[4:] == (4, 0, Decimal("0.4000"), None, None)


def test_neither_an_unknown_concert_nor_an_unknown_time_zone_fails_a_query(
    analytics_database: AnalyticsDatabase,
) -> None:
    put(analytics_database.owner_url, SEASON[:2], with_days=False)  # no catalogue at all
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute(
            "INSERT INTO analytics.dim_performances (performance_id, concert_id, version,"
            " starts_at, time_zone) VALUES (11, 99, 0, now(), 'Mars/Olympus')"
        )
    rows = ask(analytics_database.analyst_url, DAILY)
    assert [row[0] for row in rows] == [march(2)]  # UTC, for want of a better
    (row,) = ask(analytics_database.analyst_url, OCCUPANCY)
    assert row == (11, None, None, 2, 3, 0, None, 15_000, "EUR")
    assert len(ask(analytics_database.analyst_url, FUNNEL)) == 1


def test_freshness_tells_by_partition_how_far_the_tables_are_complete(
    analytics_database: AnalyticsDatabase,
) -> None:
    now = datetime.now(UTC)
    put_place(analytics_database.owner_url, 0, now - timedelta(seconds=30))
    put_place(analytics_database.owner_url, 1, None, next_offset=0)
    put_place(analytics_database.owner_url, 2, now + timedelta(minutes=5))  # a clock put back
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute(
            "INSERT INTO analytics.dead_letters (topic, kafka_partition, kafka_offset, reason,"
            " error) SELECT 'concert-reservation', 2, n, 'r', 'e' FROM generate_series(1, 3) n"
        )
    first, second, third = ask(
        analytics_database.analyst_url,
        "SELECT complete_up_to, lag_seconds, last_load_at IS NOT NULL, dead_letters"
        " FROM analytics.freshness ORDER BY kafka_partition",
    )
    assert first[0] == now - timedelta(seconds=30)
    assert 30 <= first[1] < 60
    assert first[2:] == (True, 0)
    assert second == (None, None, False, 0)
    assert third[1:] == (0, True, 3)


# ---- who may do what


def test_the_analyst_reads_everything_that_is_for_analysts(
    analytics_database: AnalyticsDatabase,
) -> None:
    found = ask(
        analytics_database.owner_url,
        "SELECT relname FROM pg_class WHERE relnamespace = 'analytics'::regnamespace"
        " AND relkind IN ('r', 'p', 'v', 'm') AND has_table_privilege('analyst', oid, 'SELECT')",
    )
    assert {name for (name,) in found} == {*VIEWS, *TABLES}
    for name in (*VIEWS, *TABLES):
        ask(analytics_database.analyst_url, f"SELECT * FROM analytics.{name}")  # noqa: S608


@pytest.mark.parametrize("name", [*VIEWS, *TABLES, "dead_letters", "load_offsets"])
def test_the_analyst_writes_nowhere_not_even_through_a_view(
    analytics_database: AnalyticsDatabase, name: str
) -> None:
    put_season(analytics_database.owner_url)
    (column,) = ask(
        analytics_database.owner_url,
        f"SELECT attname FROM pg_attribute WHERE attrelid = 'analytics.{name}'::regclass"  # noqa: S608
        " AND attnum = 1",
    )[0]
    with psycopg.connect(analytics_database.analyst_url) as connection:
        for statement in (
            f"INSERT INTO analytics.{name} DEFAULT VALUES",
            f"UPDATE analytics.{name} SET {column} = {column}",  # noqa: S608
            f"DELETE FROM analytics.{name}",  # noqa: S608
            f"TRUNCATE analytics.{name}",
            f"LOCK analytics.{name} IN EXCLUSIVE MODE",
            f"SELECT * FROM analytics.{name} FOR UPDATE",  # noqa: S608
        ):
            # A view over several rows can't be written by anybody, whatever his rights.
            with pytest.raises(
                (
                    psycopg.errors.InsufficientPrivilege,
                    psycopg.errors.ObjectNotInPrerequisiteState,
                    psycopg.errors.WrongObjectType,
                    psycopg.errors.FeatureNotSupported,
                )
            ):
                connection.execute(statement.encode())
            connection.rollback()


def test_the_views_show_nothing_of_what_a_dead_letter_contains(
    analytics_database: AnalyticsDatabase,
) -> None:
    columns = ask(
        analytics_database.owner_url,
        "SELECT column_name FROM information_schema.columns WHERE table_schema = 'analytics'"
        " AND table_name = 'freshness' ORDER BY ordinal_position",
    )
    assert [name for (name,) in columns] == [
        "topic", "kafka_partition", "last_event_at", "last_load_at", "lag_seconds",
        "complete_up_to", "dead_letters",
    ]  # fmt: skip


# ---- the migration


@pytest.fixture
def old_database(
    postgres_server: PostgresServer, analytics_template: AnalyticsDatabase
) -> Iterator[AnalyticsDatabase]:
    """A database of its own, as it was before the views."""
    template = analytics_template
    name = "analytics_before_views"
    postgres_server.create_database(name, "analytics_owner", template.name)
    found = replace(
        template,
        name=name,
        owner_url=template.owner_url.replace(f"/{template.name}", f"/{name}"),
        analyst_url=template.analyst_url.replace(f"/{template.name}", f"/{name}"),
    )
    migrations.downgrade("analytics", found.owner_url, "analytics_0002")
    yield found
    postgres_server.drop_database(name)


@contextmanager
def snapshot(url: str) -> Iterator[None]:
    """An old snapshot, which an index that is built CONCURRENTLY waits for; no lock."""
    with psycopg.connect(url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT 1")
        yield


def upgrading(database: AnalyticsDatabase) -> subprocess.Popen[bytes]:
    """An upgrade on its way; in a process, because Alembic runs once in each."""
    upgrade = "import migrations, sys; migrations.upgrade('analytics', sys.argv[1])"
    return subprocess.Popen([sys.executable, "-c", upgrade, database.owner_url])


WAITING_BUILD = """
SELECT 1 FROM pg_stat_activity WHERE datname = current_database()
    AND query LIKE '%CREATE INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'
    AND pid <> pg_backend_pid()
"""
ASKING_FOR_THEIR_TURN = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database()
    AND query LIKE '%advisory_lock%' AND pid <> pg_backend_pid()
"""
INDEXES = """
SELECT count(*) FROM pg_index WHERE indisvalid
    AND indrelid::regclass::text LIKE 'analytics.fct_%' AND NOT indisprimary
"""


def test_the_migration_lets_readers_and_the_loader_work_and_mends_a_broken_index(
    old_database: AnalyticsDatabase,
) -> None:
    url = old_database.owner_url
    with psycopg.connect(url, autocommit=True) as connection:
        # As an interrupted build leaves it: invalid.
        connection.execute("SET statement_timeout = '300ms'")
        with snapshot(old_database.analyst_url), pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute(
                "CREATE INDEX CONCURRENTLY fct_reservations_of_a_performance"
                " ON analytics.fct_reservations (performance_id)"
            )
    with snapshot(old_database.analyst_url):
        upgrade = upgrading(old_database)
        wait_until(lambda: bool(ask(url, WAITING_BUILD)), 30, "a build that waits")
        # Nobody has to wait for the one who waits.
        with psycopg.connect(url, options="-c lock_timeout=200") as loader:
            loader.execute("UPDATE analytics.fct_reservations SET version = version")
            loader.execute("INSERT INTO analytics.load_offsets VALUES ('t', 0, 0, 'id')")
            loader.execute("SELECT count(*) FROM analytics.fct_reservation_events")
    assert upgrade.wait(60) == 0
    assert ask(url, INDEXES) == [(4,)]


def test_a_migration_behind_a_long_query_gives_way_after_seconds_and_may_be_repeated(
    old_database: AnalyticsDatabase,
) -> None:
    migrate = [sys.executable, "-m", "data_platform", "migrate"]
    environment = os.environ | {"ANALYTICS_OWNER_DATABASE_URL": old_database.owner_url}
    with psycopg.connect(old_database.analyst_url) as analyst:
        analyst.execute("SELECT count(*) FROM analytics.fct_reservations")  # and goes on
        behind = subprocess.Popen(migrate, env=environment, stderr=subprocess.PIPE, text=True)
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'migrations' AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: bool(ask(old_database.owner_url, waiting)), 30, "the migration to wait")
        # Whoever comes now has to queue behind it, but not for long.
        with psycopg.connect(old_database.analyst_url, options="-c lock_timeout=6s") as other:
            other.execute("SELECT count(*) FROM analytics.fct_reservations")
        assert behind.wait(20) == 1
        assert behind.stderr is not None
        assert "Nothing has changed: run it again" in behind.stderr.read()
        behind.stderr.close()
    assert subprocess.run(migrate, env=environment, check=False, timeout=60).returncode == 0
    assert ask(old_database.owner_url, INDEXES) == [(4,)]


def test_two_migrations_at_once_wait_for_each_other_while_indexes_are_built(
    old_database: AnalyticsDatabase,
) -> None:
    url = old_database.owner_url
    with snapshot(old_database.analyst_url):
        first = upgrading(old_database)
        wait_until(lambda: bool(ask(url, WAITING_BUILD)), 30, "a build that waits")
        second = upgrading(old_database)
        wait_until(lambda: len(ask(url, ASKING_FOR_THEIR_TURN)) == 2, 30, "two that asked")
    # The build may now go on, unless the second one is in its way.
    assert [upgrade.wait(30) for upgrade in (first, second)] == [0, 0]
    assert ask(url, "SELECT version_num FROM alembic_version") == [(migrations.head("analytics"),)]
