"""What the doctor finds, on servers that are really so."""

import time
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from data_platform import doctor, sql_doctor
from data_platform.config import Settings
from data_platform.doctor import Finding
from data_platform.loader import APPLICATION_NAME
from tests.conftest import MakeKafkaCluster, MakePostgresServer, UniqueTopic
from tests.data_platform.conftest import MakePlatform, Platform
from tests.data_platform.histories import history
from tests.databases import AnalyticsDatabase, create_analytics_database
from tests.waiting import wait_until

KEPT = {"cleanup.policy": "delete", "retention.ms": "-1"}
GRANTED = "GRANT {} ON analytics.{} TO analyst"


def settings(platform: Platform, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "analytics_database_url": platform.database.loader_url,
        "kafka_bootstrap_servers": platform.bootstrap_servers,
        "data_platform_group": platform.group,
        "data_platform_reservation_topic": platform.topic,
        "data_platform_catalogue_topic": platform.catalogue_topic,
    }
    return Settings(**values | more)


@pytest.fixture
def sound(platform: Platform, unique_topic: UniqueTopic) -> Platform:
    """A platform with topics as `outbox-relay topics` makes them."""
    return replace(
        platform,
        topic=unique_topic(6, KEPT),
        catalogue_topic=unique_topic(3, {"cleanup.policy": "compact"}),
    )


def examined(platform: Platform) -> list[Finding]:
    return doctor.examine_all(settings(platform))


def named(found: list[Finding], name: str) -> list[Finding]:
    return [one for one in found if one.name == name]


def only(found: list[Finding], name: str) -> Finding:
    (one,) = named(found, name)
    return one


def of_database(database: AnalyticsDatabase) -> list[Finding]:
    """What is found in Postgres; Kafka isn't asked."""
    given: dict[str, Any] = {
        "analytics_database_url": database.loader_url,
        "kafka_bootstrap_servers": "127.0.0.1:1",
    }
    return doctor._within_time("postgres", doctor._examine_postgres(Settings(**given)))


def execute(database: AnalyticsDatabase, *statements: str) -> None:
    with psycopg.connect(database.owner_url, autocommit=True) as owner:
        for statement in statements:
            owner.execute(statement.encode())


def test_a_platform_in_order_has_nothing_wrong_but_one_broker(sound: Platform) -> None:
    assert [one.name for one in examined(sound) if one.level != "ok"] == [
        "kafka",
        f"group {sound.group}",
    ]
    sound.worker()
    sound.produce(history(20, seed=1))
    wait_until(lambda: len(sound.facts()) > 20, 30, "loading")
    wait_until(lambda: sound.status()["lag_rows"] == 0, 30, "the end")
    answer = sound.command("doctor")
    assert answer.returncode == 0, answer.stdout
    assert f"ok      group {sound.group}: 1 workers, 0 records wait" in answer.stdout
    assert "error" not in answer.stdout


def test_records_that_wait_for_nobody_are_an_error(sound: Platform) -> None:
    def idle() -> bool:  # a new Kafka doesn't know its groups at once
        one = only(examined(sound), f"group {sound.group}")
        return (one.level, one.found) == ("warning", "no worker; 0 records wait")

    wait_until(idle, 30, "the coordinator")
    sound.produce(history(5, seed=1))
    waiting = only(examined(sound), f"group {sound.group}")
    assert waiting.level == "error"
    assert "start data-platform run" in waiting.to_do


def test_workers_that_load_nothing_are_an_error(sound: Platform) -> None:
    worker = sound.worker()
    wait_until(lambda: "partitions_placed" in worker.log.read_text(), 30, "the worker")
    sound.execute("REVOKE INSERT ON analytics.fct_reservation_events FROM data_platform")
    sound.produce(history(5, seed=1))
    found = examined(sound)
    assert only(found, "rights").to_do == (
        "as the owner: GRANT INSERT ON analytics.fct_reservation_events TO data_platform"
    )
    assert "none was loaded within a second" in only(found, "lag").found
    sound.execute(only(found, "rights").to_do.removeprefix("as the owner: "))
    assert only(examined(sound), "rights").level == "ok"


def test_wrong_topics_are_errors(platform: Platform, unique_topic: UniqueTopic) -> None:
    wrong = replace(
        platform, topic=unique_topic(2, {"retention.ms": "604800000"}), catalogue_topic="none"
    )
    found = examined(wrong)
    assert only(found, f"topic {wrong.topic}").found == (
        "partitions are 2, wanted 6 or more; retention.ms is 604800000, wanted -1"
    )
    assert only(found, "topic none") == Finding(
        "error", "topic none", "is missing", "outbox-relay topics"
    )
    assert doctor.failed(found)


def test_a_topic_made_anew_and_records_deleted_unloaded_are_errors(sound: Platform) -> None:
    sound.execute(
        "INSERT INTO analytics.load_offsets (topic, kafka_partition, next_offset, topic_id)"  # noqa: S608 - ours
        f" VALUES ('{sound.topic}', 0, 7, 'another')"
    )
    sound.produce_raw([(b"k", b"lost")] * 5, partition=2)
    admin = AdminClient({"bootstrap.servers": sound.bootstrap_servers})
    for future in admin.delete_records([TopicPartition(sound.topic, 2, 3)]).values():
        future.result(10)
    anew, lost = [one for one in named(examined(sound), f"topic {sound.topic}") if one.to_do]
    assert anew.found.startswith("partition 0 can't go on: the topic was made anew")
    assert lost.found.startswith("partition 2 can't go on: records 0 to 2 were deleted")
    assert "`partition_stopped` in operations.md" in lost.to_do


def test_dead_letters_are_errors_with_a_cure_by_reason(
    analytics_database: AnalyticsDatabase,
) -> None:
    execute(
        analytics_database,
        "INSERT INTO analytics.dead_letters (topic, kafka_partition, kafka_offset, reason, error)"
        " SELECT 't', 0, n, CASE WHEN n < 3 THEN 'unknown-type' ELSE 'schema' END, 'e'"
        " FROM generate_series(0, 9) AS n",
    )
    bad, newer = named(of_database(analytics_database), "dead letters")
    assert bad.found.startswith("7 of t: schema")
    assert newer.found.startswith("3 of t: unknown-type")
    assert newer.to_do == (
        "upgrade the workers, then data-platform dead-letters replay --reason unknown-type"
    )


@pytest.mark.parametrize(
    ("statement", "found", "level"),
    [
        (GRANTED.format("SELECT", "dead_letters"), "may read analytics.dead_letters", "error"),
        (GRANTED.format("SELECT (topic)", "load_offsets"), "may read analytics.load_", "error"),
        (GRANTED.format("DELETE", "dim_concerts"), "may write to analytics.dim_con", "error"),
        (GRANTED.format("UPDATE (title)", "dim_concerts"), "may write to analytics.dim", "error"),
        (
            "GRANT INSERT ON analytics.fct_reservations TO PUBLIC",
            "may write to analytics.fct_reservations",
            "error",
        ),
        ("GRANT CREATE ON SCHEMA analytics TO analyst", "may create tables", "error"),
        ("REVOKE USAGE ON SCHEMA analytics FROM analyst", "may not use schema", "error"),
        ("REVOKE SELECT ON analytics.freshness FROM analyst", "may not read analytics", "warning"),
    ],
)
def test_an_analyst_who_may_do_too_much_or_too_little_is_found(
    analytics_database: AnalyticsDatabase, statement: str, found: str, level: str
) -> None:
    execute(analytics_database, statement)
    one = next(one for one in named(of_database(analytics_database), "analyst"))
    assert one.found.startswith(found)
    assert one.level == level
    execute(analytics_database, one.to_do)  # what it says to do
    assert only(of_database(analytics_database), "analyst").level == "ok"


def test_missing_views_tables_and_comments_and_unfinished_indexes_are_found(
    analytics_database: AnalyticsDatabase,
) -> None:
    execute(
        analytics_database,
        "DROP VIEW analytics.booking_funnel",
        "DROP TABLE analytics.fct_reservation_seats CASCADE",
        "CREATE TABLE analytics.mine (a integer)",
        "COMMENT ON COLUMN analytics.dim_concerts.title IS NULL",
        "INSERT INTO analytics.mine VALUES (1), (1)",
    )
    with pytest.raises(psycopg.errors.UniqueViolation):
        execute(analytics_database, "CREATE UNIQUE INDEX CONCURRENTLY mine_a ON analytics.mine (a)")
    found = of_database(analytics_database)
    missing = {one.found for one in found if one.level == "error"}
    assert {
        "analytics.booking_funnel is missing",
        "analytics.fct_reservation_seats is missing",
    } <= missing
    assert {one.found[:26] for one in named(found, "comments")} == {
        "analytics.dim_concerts: no",
        "analytics.mine: no comment",
    }
    assert "analytics.mine_a was not built" in only(found, "indexes").found


def test_a_database_that_is_not_migrated_or_not_there_is_told_in_words(
    make_postgres_server: MakePostgresServer,
) -> None:
    server = make_postgres_server({"fsync": "off", "max_connections": "8"})
    database = create_analytics_database(server)
    found = of_database(database)
    assert only(found, "server").found.startswith("fsync is off")
    assert only(found, "connections").level == "warning"
    execute(database, "UPDATE alembic_version SET version_num = 'analytics_0001'")
    assert only(of_database(database), "migrations").found.startswith(
        "the database is at analytics_0001, this version wants analytics_"
    )
    server.create_database("empty", "analytics_owner")
    empty = replace(database, loader_url=database.loader_url.replace("/analytics", "/empty"))
    found = of_database(empty)
    assert only(found, "migrations").found == "database empty has no alembic_version"
    assert len(named(found, "tables")) == len(doctor.OUR_RIGHTS)

    server.pause()
    try:
        before = time.monotonic()
        (late,) = of_database(database)
        assert time.monotonic() - before < doctor.PART_TIMEOUT_S + 1
    finally:
        server.resume()
    assert late.level == "error"
    server.stop()
    (gone,) = of_database(database)
    assert (gone.name, gone.to_do) == ("postgres", "see ANALYTICS_DATABASE_URL")


def test_a_frozen_loader_is_named_with_its_pid(
    analytics_database: AnalyticsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TRANSACTION_LIMIT_S", 0.0)
    with psycopg.connect(
        analytics_database.loader_url, application_name=APPLICATION_NAME
    ) as frozen:
        frozen.execute("SELECT pg_current_xact_id()")
        one = only(of_database(analytics_database), "frozen loader")
        assert f"pid {frozen.info.backend_pid} from 127.0.0.1" in one.found
        assert "holds locks" in one.found
        assert one.to_do.startswith(f"SELECT pg_terminate_backend({frozen.info.backend_pid})")
    assert only(of_database(analytics_database), "frozen loader").level == "ok"


def test_who_holds_back_vacuum_is_named(
    analytics_database: AnalyticsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "HOLDS_BACK_VACUUM_S", 0.0)
    monkeypatch.setattr(doctor, "HOLDS_BACK_VACUUM_TRANSACTIONS", 1)
    with psycopg.connect(analytics_database.analyst_url, application_name="notebook") as analyst:
        # The age in time of another role's session is hidden from us.
        analyst.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        analyst.execute("SELECT FROM analytics.dim_concerts")
        for _ in range(3):
            execute(analytics_database, "SELECT pg_current_xact_id()")
        one = next(
            one
            for one in named(of_database(analytics_database), "vacuum")
            if "(notebook)" in one.found
        )
        assert one.to_do == f"SELECT pg_terminate_backend({analyst.info.backend_pid})"


# What the superuser does, how it is undone, the finding's name, how it begins, what to do about it.
ON_A_SERVER = [
    (
        ["ALTER ROLE analyst CREATEROLE BYPASSRLS"],
        "ALTER ROLE analyst NOCREATEROLE NOBYPASSRLS",
        ("analyst", "may more than read: createrole, bypassrls"),
        "ALTER ROLE analyst NOCREATEROLE NOBYPASSRLS",
    ),
    (
        ["GRANT data_platform TO analyst"],
        "REVOKE data_platform FROM analyst",
        ("analyst", "has all that the role data_platform has"),
        "REVOKE data_platform FROM analyst",
    ),
    (
        ["ALTER ROLE analyst RENAME TO somebody"],
        "ALTER ROLE somebody RENAME TO analyst",
        ("analyst", "there is no role analyst"),
        "data-platform migrate",
    ),
    (
        ["ALTER ROLE data_platform CONNECTION LIMIT 3"],
        "ALTER ROLE data_platform CONNECTION LIMIT -1",
        ("connections", "the role data_platform has 2 free of 3"),
        "raise the limit or use fewer: a worker and its commands need 5",
    ),
    (
        ["ALTER DATABASE analytics CONNECTION LIMIT 4"],
        "ALTER DATABASE analytics CONNECTION LIMIT -1",
        ("connections", "the database analytics has 3 free of 4"),
        "raise the limit or use fewer: a worker and its commands need 5",
    ),
    (
        ["SELECT pg_create_logical_replication_slot('left', 'pgoutput')"],
        "SELECT pg_drop_replication_slot('left')",
        ("vacuum", "replication slot left keeps dead rows"),
        "SELECT pg_drop_replication_slot('left'), or start its consumer",
    ),
    (
        ["BEGIN", "CREATE TABLE public.t ()", "PREPARE TRANSACTION 'left'"],
        "ROLLBACK PREPARED 'left'",
        ("vacuum", "prepared transaction left of postgres keeps dead rows"),
        "ROLLBACK PREPARED 'left', or COMMIT PREPARED 'left'",
    ),
]


def test_what_is_wrong_with_a_server_and_its_roles_is_found_and_gone_once_it_is_mended(
    make_postgres_server: MakePostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "HOLDS_BACK_VACUUM_S", 0.0)
    server = make_postgres_server(
        {"full_page_writes": "off", "wal_level": "logical", "max_prepared_transactions": "1"}
    )
    database = create_analytics_database(server)
    as_before = {(one.level, one.name) for one in of_database(database)}
    assert only(of_database(database), "server").found.startswith("full_page_writes is off")
    superuser = replace(
        database, owner_url=server.admin_url.removesuffix("postgres") + database.name
    )
    for wrong, undo, (name, begins), to_do in ON_A_SERVER:
        execute(superuser, *wrong)
        found = [one for one in named(of_database(database), name) if one.found.startswith(begins)]
        assert [one.to_do for one in found if one.level != "ok"] == [to_do], wrong
        execute(superuser, undo)
        assert {(one.level, one.name) for one in of_database(database)} == as_before, wrong

    server.stop()
    (server.data_folder / "standby.signal").touch()
    server.start()
    standby = named(of_database(database), "server")[0]
    assert (standby.level, standby.found) == ("error", "a standby, or still recovering")


def test_brokers_that_are_down_and_topics_on_too_few_disks_are_found(
    make_platform: MakePlatform,
    make_kafka_cluster: MakeKafkaCluster,
    analytics_database: AnalyticsDatabase,
) -> None:
    cluster = make_kafka_cluster(3)
    cluster.create_topic("safe", 6, KEPT)
    admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers})
    unsafe = NewTopic(
        "unsafe",
        3,
        replica_assignment=[[3], [1], [2]],
        config={"cleanup.policy": "compact", "min.insync.replicas": "1"}
        | {"unclean.leader.election.enable": "true"},
    )
    admin.create_topics([unsafe], operation_timeout=10)["unsafe"].result(15)
    platform = replace(make_platform(analytics_database, cluster, "safe"), catalogue_topic="unsafe")
    wait_until(
        lambda: len(admin.list_topics("unsafe", 5).topics["unsafe"].partitions) == 3,
        15,
        "every broker to know it",
    )
    found = examined(platform)
    assert (only(found, "kafka").level, only(found, "topic safe").level) == ("ok", "ok")
    assert only(found, "topic unsafe").found == (
        "replication factor is 1, wanted 3; min.insync.replicas is 1, wanted 2; "
        "unclean.leader.election.enable is true, wanted false"
    )
    cluster.brokers[2].kill()
    down = "of 3 brokers these are down: [3]"
    wait_until(
        lambda: down in [one.found for one in named(examined(platform), "kafka")],
        30,
        "the broker to be missed",
    )
    assert "partitions [0] have no leader" in only(examined(platform), "topic unsafe").found


def test_a_lag_that_grows_though_workers_load_is_a_warning(
    sound: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    lags = iter([doctor._Lag(10, 5, []), doctor._Lag(90, 6, [])])
    monkeypatch.setattr(doctor._Lag, "read", lambda *_: next(lags))
    monkeypatch.setattr(doctor, "_workers", lambda *_: 1)
    one = only(examined(sound), "lag")
    assert (one.level, one.found) == ("warning", "90 records wait, 80 more than a second ago")


def test_clocks_that_differ_are_told(
    analytics_database: AnalyticsDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr("data_platform.doctor.time.time", lambda: real() + 5)
    assert "differ by 5.0 s" in only(of_database(analytics_database), "clock").found


def test_a_kafka_that_is_away_is_a_finding(analytics_database: AnalyticsDatabase) -> None:
    given: dict[str, Any] = {
        "analytics_database_url": analytics_database.loader_url,
        "kafka_bootstrap_servers": "127.0.0.1:1",
    }
    before = time.monotonic()
    found = doctor.examine_all(Settings(**given))
    assert time.monotonic() - before < 15
    assert only(found, "kafka").found.startswith("no answer from 127.0.0.1:1")


def test_what_others_named_themselves_cannot_break_a_line() -> None:
    line = doctor.render([Finding("error", "a", "b\n\x1b[2Jc", "d\ne")])
    assert line == "error   a: b ?[2Jc -> d?e"


def test_every_statement_of_the_doctor_is_one_that_postgres_can_plan(
    analytics_database: AnalyticsDatabase,
) -> None:
    given = {
        "names": ["t"], "rights": ["SELECT"], "hidden": ["t"], "application_name": "a",
        "older_than_s": 1.0, "older_than_transactions": 1,
    }  # fmt: skip
    with psycopg.connect(analytics_database.loader_url, autocommit=True) as connection:
        for name, text in vars(sql_doctor).items():
            if name.isupper():
                connection.execute(text, given)
