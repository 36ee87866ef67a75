"""Both histories up and down on a real server, and what each role may do afterwards."""

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import sqlalchemy.exc

import migrations
from devstack.postgres import PostgresServer
from migrations import Database
from tests.databases import AnalyticsDatabase, ReservationDatabase

TABLES = """
SELECT table_schema || '.' || table_name FROM information_schema.tables
WHERE table_schema IN ('public', 'analytics') AND table_name <> 'alembic_version' ORDER BY 1
"""
OWNERS: dict[Database, str] = {
    "reservations": "reservation_owner",
    "analytics": "analytics_owner",
}


def empty_database(server: PostgresServer, name: str, owner: str) -> str:
    server.create_database(name, owner)
    return server.url(name, owner, server.give_password(owner))


def tables(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        return [name for (name,) in connection.execute(TABLES).fetchall()]


@pytest.mark.parametrize("database", ["reservations", "analytics"])
def test_a_history_goes_up_down_and_up_again(
    postgres_server: PostgresServer,
    reservation_template: ReservationDatabase,
    analytics_template: AnalyticsDatabase,
    database: Database,
) -> None:
    # The templates come first: a new password of the owner would lock their tests out.
    del reservation_template, analytics_template
    name = f"migrated_{database}"
    postgres_server.create_database(name, f"{OWNERS[database]}_of_migrations")
    owner = f"{OWNERS[database]}_of_migrations"
    url = postgres_server.url(name, owner, postgres_server.give_password(owner))
    with psycopg.connect(postgres_server.admin_url, autocommit=True) as admin:
        # The roles exist on this server already: who grants must be their administrator.
        for role in ("reservation_service", "outbox_relay", "data_platform", "analyst"):
            admin.execute(f"GRANT {role} TO {owner} WITH ADMIN OPTION")
    migrations.upgrade(database, url)
    made = tables(url)
    assert len(made) >= 4
    migrations.downgrade(database, url)
    assert tables(url) == []
    migrations.upgrade(database, url)
    migrations.upgrade(database, url)
    assert tables(url) == made
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    assert found == [(migrations.head(database),)]


@pytest.mark.parametrize("database", ["reservations", "analytics"])
def test_every_revision_but_the_newest_is_outdated(database: Database) -> None:
    versions = Path(migrations.__file__).parent / database / "versions"
    known = {f"{database}_{file.name[:4]}" for file in versions.glob("[0-9]*.py")}
    assert migrations.outdated(database) == known - {migrations.head(database)}


def test_two_migrations_at_once_wait_for_each_other(postgres_server: PostgresServer) -> None:
    url = empty_database(postgres_server, "migrated_twice", "twice_owner")
    upgrade = "import migrations, sys; migrations.upgrade('reservations', sys.argv[1])"
    both = [subprocess.Popen([sys.executable, "-c", upgrade, url]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert "public.outbox" in tables(url)


def test_a_migration_gives_up_soon_when_somebody_holds_a_table(
    postgres_server: PostgresServer,
) -> None:
    url = empty_database(postgres_server, "migrated_locked", "locked_owner")
    migrations.upgrade("analytics", url)
    with psycopg.connect(url) as reader:
        reader.execute("SELECT count(*) FROM analytics.fct_reservations")
        with pytest.raises(sqlalchemy.exc.OperationalError, match="lock timeout"):
            migrations.downgrade("analytics", url)
        assert "analytics.fct_reservations" in tables(url)


def test_roles_stay_when_a_database_is_taken_down(postgres_server: PostgresServer) -> None:
    url = empty_database(postgres_server, "migrated_roles", "roles_owner")
    migrations.upgrade("analytics", url)
    migrations.downgrade("analytics", url)
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT count(*) FROM pg_roles WHERE rolname = 'analyst'")
        assert found.fetchone() == (1,)


def refused(url: str, statements: tuple[str, ...]) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_the_service_may_add_events_but_neither_read_change_nor_remove_them(
    reservation_database: ReservationDatabase,
) -> None:
    refused(
        reservation_database.service_url,
        (
            "UPDATE outbox SET key = 'x'",
            "DELETE FROM outbox",
            "TRUNCATE outbox",
            "SELECT * FROM outbox",
            "INSERT INTO outbox (transaction_id) VALUES ('1')",
            "INSERT INTO outbox_topics VALUES ('t', 1)",
            "UPDATE outbox_relay_cursor SET leader = 'x'",
            "INSERT INTO outbox_0 (topic, key, payload) VALUES ('concert-reservation', 'k', '{}')",
            "SELECT outbox_roll_over(0)",
            "SELECT outbox_empty_partition(0)",
            "SELECT outbox_drop_partition(0)",
            "DELETE FROM reservations",
            "DELETE FROM seats",
            "CREATE TABLE mine (a int)",
        ),
    )
    with psycopg.connect(reservation_database.service_url) as connection:
        connection.execute(
            "INSERT INTO outbox (topic, key, payload) VALUES ('concert-reservation', 'k', '{}')"
        )


def test_the_relay_may_read_events_but_neither_add_change_nor_remove_them(
    reservation_database: ReservationDatabase,
) -> None:
    refused(
        reservation_database.relay_url,
        (
            "INSERT INTO outbox (topic, key, payload) VALUES ('concert-reservation', 'k', '{}')",
            "UPDATE outbox SET key = 'x'",
            "DELETE FROM outbox",
            "TRUNCATE outbox_0",
            "DROP TABLE outbox_0",
            "ALTER TABLE outbox DETACH PARTITION outbox_0",
            "SELECT setval('outbox_id_seq', 1)",
            "CREATE TABLE mine (a int)",
        ),
    )
    with psycopg.connect(reservation_database.relay_url) as connection:
        connection.execute("SELECT * FROM outbox, outbox_default")
        connection.execute("SELECT number, last_value FROM outbox_partitions, outbox_id_seq")


def test_functions_with_the_owners_rights_look_names_up_nowhere_else_and_are_not_for_everybody(
    reservation_database: ReservationDatabase,
) -> None:
    # Else whoever may make a table in some schema could put his own in the place of ours.
    with psycopg.connect(reservation_database.owner_url) as connection:
        found = connection.execute(
            "SELECT proname, proconfig,"
            " has_function_privilege('reservation_service', oid, 'execute')"
            " FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace"
        ).fetchall()
    assert len(found) == 6
    for name, settings, everybody in found:
        assert "search_path=pg_catalog, pg_temp" in settings, name
        assert not everybody, name


PARTITION = """
SELECT array_agg((attname, format_type(atttypid, NULL), attnotnull, attstorage) ORDER BY attnum),
       (SELECT array_agg(replace(indexdef, relname, '') ORDER BY indexdef) FROM pg_indexes
        WHERE tablename = relname),
       (SELECT array_agg(pg_get_constraintdef(oid) ORDER BY pg_get_constraintdef(oid))
        FROM pg_constraint
        WHERE conrelid = pg_class.oid),
       (SELECT array_agg((tgname, tgenabled)) FROM pg_trigger WHERE tgrelid = pg_class.oid)
FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid AND attnum > 0
WHERE pg_class.oid = %s::regclass GROUP BY pg_class.oid, relname
"""


def test_a_partition_made_later_is_like_the_first_one(
    reservation_database: ReservationDatabase,
) -> None:
    with psycopg.connect(reservation_database.relay_url) as relay:
        relay.execute("SELECT outbox_roll_over(0)")
        assert relay.execute("SELECT outbox_add_partition()").fetchone() == (3,)
    with psycopg.connect(reservation_database.owner_url) as connection:
        first, *others = (
            connection.execute(PARTITION, (name,)).fetchone()
            for name in ("outbox_0", "outbox_3", "outbox_default")
        )
    assert first is not None
    columns, indexes, _, triggers = first
    # Not compressed, so that its size is known without reading it.
    assert ("payload", "json", "t", "e") in [tuple(map(str, column)) for column in columns]
    assert len(indexes) == 2
    assert "outbox_refuse_unpublishable" in str(triggers)
    assert others == [first, first]


def test_the_analyst_reads_facts_and_nothing_else(analytics_database: AnalyticsDatabase) -> None:
    refused(
        analytics_database.analyst_url,
        (
            "SELECT * FROM analytics.dead_letters",
            "SELECT * FROM analytics.load_offsets",
            "DELETE FROM analytics.fct_reservations",
            "DELETE FROM analytics.fct_reservation_seats",
            "INSERT INTO analytics.dim_concerts DEFAULT VALUES",
            "UPDATE analytics.dim_performances SET status = 'cancelled'",
            "UPDATE analytics.fct_reservations SET status = 'held'",
            "CREATE TABLE analytics.mine (a int)",
        ),
    )
    with psycopg.connect(analytics_database.analyst_url) as connection:
        connection.execute("SELECT * FROM analytics.fct_reservation_events")
        connection.execute("SELECT * FROM analytics.fct_reservations")
        connection.execute("SELECT * FROM analytics.fct_reservation_seats")
        connection.execute("SELECT * FROM analytics.dim_concerts, analytics.dim_performances")


def test_every_table_and_column_of_the_analysts_has_a_comment(
    analytics_database: AnalyticsDatabase,
) -> None:
    with psycopg.connect(analytics_database.owner_url) as connection:
        bare = connection.execute(
            "SELECT attrelid::regclass::text, attname FROM pg_attribute"
            " JOIN pg_class ON pg_class.oid = attrelid"
            " WHERE relnamespace = 'analytics'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')"
            " AND NOT attisdropped AND (attnum > 0 AND col_description(attrelid, attnum) IS NULL"
            "     OR obj_description(attrelid, 'pg_class') IS NULL)"
        ).fetchall()
    assert bare == []


def test_the_loader_may_not_change_or_remove_a_fact(analytics_database: AnalyticsDatabase) -> None:
    refused(
        analytics_database.loader_url,
        (
            "UPDATE analytics.fct_reservation_events SET amount = 0",
            "DELETE FROM analytics.fct_reservation_events",
            "DELETE FROM analytics.fct_reservations",
            "DELETE FROM analytics.load_offsets",
            "DELETE FROM analytics.dim_concerts",
            "CREATE TABLE analytics.mine (a int)",
        ),
    )


@pytest.mark.parametrize(
    ("columns", "values", "constraint"),
    [
        ("topic, key, payload", "'unknown', 'k', '{}'", "outbox_topic_known"),
        ("topic, key, payload", "'concert-reservation', '', '{}'", "outbox_key_is_given"),
        (
            "topic, key, payload",
            "'concert-reservation', 'k', to_json(repeat('x', 1000000))",
            "outbox_record_fits",
        ),
        (
            "topic, key, payload, headers",
            "'concert-reservation', 'k', '{}', '{\"a\": 1}'",
            "outbox_headers_are_texts",
        ),
    ],
)
def test_what_could_never_be_published_is_refused_in_the_writers_transaction(
    reservation_database: ReservationDatabase, columns: str, values: str, constraint: str
) -> None:
    statement = f"INSERT INTO outbox ({columns}) VALUES ({values})"  # noqa: S608
    with (
        psycopg.connect(reservation_database.service_url) as connection,
        pytest.raises(psycopg.errors.CheckViolation) as refusal,
    ):
        connection.execute(statement)
    assert refusal.value.diag.constraint_name == constraint


def test_a_key_a_payload_and_a_topic_are_required(
    reservation_database: ReservationDatabase,
) -> None:
    for row in (
        (None, "k", "{}"),
        ("concert-reservation", None, "{}"),
        ("concert-reservation", "k", None),
    ):
        with (
            psycopg.connect(reservation_database.service_url) as connection,
            pytest.raises(psycopg.errors.IntegrityError),
        ):
            connection.execute("INSERT INTO outbox (topic, key, payload) VALUES (%s, %s, %s)", row)


def test_ids_are_drawn_one_by_one(reservation_database: ReservationDatabase) -> None:
    # With CACHE 20 a session's later version would get a smaller id than another's earlier one.
    with psycopg.connect(reservation_database.owner_url) as connection:
        found = connection.execute(
            "SELECT seqcache FROM pg_sequence"
            " WHERE seqrelid = pg_get_serial_sequence('outbox', 'id')::regclass"
        ).fetchone()
    assert found == (1,)
